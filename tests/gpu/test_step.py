"""The loss and the step on a CUDA device: python -m pytest -m gpu tests/gpu/test_step.py"""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from tests import toy as toys
from torchtitan_deltaproduct.models import DeltaProductArgs, DeltaProductLM
from torchtitan_deltaproduct.models.embedding import Embedding
from torchtitan_deltaproduct.models.loss import linear_cross_entropy, peak_bytes
from torchtitan_deltaproduct.titan.parallelize import set_up_compiler

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def operands(tokens: int, vocab: int, hidden: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(tokens, hidden, device="cuda", generator=generator).bfloat16().requires_grad_()
    weight = (0.1 * torch.randn(vocab, hidden, device="cuda", generator=generator)).bfloat16().requires_grad_()
    labels = torch.randint(vocab, (tokens,), device="cuda", generator=generator)
    labels[::7] = -100
    return x, weight, labels


@pytest.mark.parametrize("backend", [None, "inductor"])
def test_loss_and_gradients(backend):
    """Three chunks of unequal length against float32 without chunks; the same bits twice."""
    x, weight, labels = operands(9001, 32_000, 256)
    exact_x, exact_weight = (t.detach().float().requires_grad_() for t in (x, weight))
    exact = F.cross_entropy(exact_x @ exact_weight.T, labels, reduction="sum")
    exact.backward()
    results = []
    for _ in range(2):
        x.grad = weight.grad = None
        loss = linear_cross_entropy(x, weight, labels, backend=backend)
        loss.backward()
        results.append((loss.detach(), x.grad, weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert math.isclose(loss.item(), exact.item(), rel_tol=1e-4)
    for found, true in ((x.grad, exact_x.grad), (weight.grad, exact_weight.grad)):
        assert (found.float() - true).norm() / true.norm() < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [6, 60, 1000, 32_000])
def test_the_gradient_of_an_embedding_has_the_same_bits(vocab, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    # As words of a language are: a few of them make most of a text.
    tokens = (vocab * torch.rand(512, 128, device="cuda", generator=generator) ** 4).long()
    x = torch.randn(512, 128, 128, device="cuda", generator=generator, dtype=dtype)
    embedding = Embedding(vocab, 128, device="cuda", dtype=dtype)
    gradients = [torch.autograd.grad(embedding(tokens), embedding.weight, x)[0] for _ in range(20)]
    assert all(torch.equal(gradients[0], gradient) for gradient in gradients)
    exact = torch.zeros(vocab, 128, device="cuda", dtype=torch.float64).index_add_(
        0, tokens.flatten(), x.double().view(-1, 128)
    )
    assert (gradients[0] - exact).norm() / exact.norm() < (1e-5 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("backend", [None, "inductor"])
def test_peak_memory(backend):
    """As counted, and below 1 GB, at 8 x 4,096 tokens, 32,000 words, hidden 1,024."""
    x, weight, labels = operands(8 * 4096, 32_000, 1024)
    linear_cross_entropy(x, weight, labels, backend=backend).backward()  # compiles; cuBLAS takes its work space
    x.grad = weight.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = linear_cross_entropy(x, weight, labels, backend=backend)
    loss.backward()
    added = torch.cuda.max_memory_allocated() - before
    counted = peak_bytes(8 * 4096, 32_000, 1024, 2, compiled=backend is not None)
    assert added < 1e9 and 0.95 * counted < added < 1.05 * counted


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_host_waits_once_a_step(toy, tmp_path, monkeypatch, accumulated):
    """From step 3 on (compiled, Adam's state made) whatever waits for the device raises, but for the wait for one event
    after the update was launched."""
    from torchtitan_deltaproduct.titan.optimizer import GroupedOptimizers
    from torchtitan_deltaproduct.titan.trainer import Trainer

    step, update, synchronize, order = Trainer.train_step, GroupedOptimizers.step, torch.cuda.Event.synchronize, []

    def strict_step(self, feed):
        torch.cuda.set_sync_debug_mode("error" if self.step >= 3 else "default")
        order.append(self.step)
        try:
            return step(self, feed)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def noted_update(self, skip):
        update(self, skip)
        order.append("update")

    def noted_wait(self):
        order.append("wait")
        synchronize(self)

    monkeypatch.setattr(Trainer, "train_step", strict_step)
    monkeypatch.setattr(GroupedOptimizers, "step", noted_update)
    monkeypatch.setattr(torch.cuda.Event, "synchronize", noted_wait)
    model = ("--model.hidden_size", "128", "--model.head_dim", "64", "--compile.enable", "--checkpoint.no-enable")
    toys.train(toy, tmp_path / "run", *model, "--training.local_batch_size", str(4 // accumulated))
    assert order[order.index(3) :] == [what for step in range(3, 9) for what in (step, "update", "wait")]
    losses = [r["loss"] for r in toys.records(tmp_path / "run") if "loss" in r]
    assert losses[-1] < losses[0] - 0.2


def fill_free_memory(device: str, value: float) -> None:
    """Fills what the allocator hands out next: blocks of many sizes, a few of each."""
    blocks = [torch.full((1 << size,), value, device=device) for size in range(6, 23) for _ in range(8)]
    del blocks


def gradients(model: torch.nn.Module, device: str) -> list[torch.Tensor]:
    """Of one batch of packed documents, the loss first."""
    generator = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(320, (2, 2, 192), generator=generator).to(device)
    starts = (torch.rand(2, 192, generator=generator) < 0.03).to(device)
    model.zero_grad()
    loss = model(tokens, document_starts=starts, labels=labels)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_step_has_the_same_bits_whatever_memory_held(n, gated, device="cuda"):
    """Nothing is read that was not written, and nothing depends on who is first."""
    set_up_compiler()
    args = DeltaProductArgs(
        vocab_size=320, hidden_size=256, num_heads=2, head_dim=128, num_hidden_layers=2, num_householder=n,
        allow_neg_eigval=True, use_forget_gate=gated,
    )  # fmt: skip
    model = DeltaProductLM(args)
    model.init_weights()
    model = model.to(device, torch.bfloat16)
    for name, block in model.layers.items():
        model.layers.register_module(name, torch.compile(block, fullgraph=True))
    model.loss_backend = "inductor"
    first = gradients(model, device)
    assert all(gradient.isfinite().all() for gradient in first)
    for value in [float("nan"), 1e30, 0.0, -3.0] * 25:
        fill_free_memory(device, value)
        again = gradients(model, device)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("conv", [False, True])
def test_gradients_of_a_compiled_model_are_those_of_the_definition(conv, gated, dtype):
    """Of every parameter, beside the same model in float64, not compiled, its operator in PyTorch."""
    set_up_compiler()
    args = DeltaProductArgs(
        vocab_size=320, hidden_size=128, num_heads=2, head_dim=64, num_hidden_layers=2, num_householder=2,
        allow_neg_eigval=True, use_forget_gate=gated, use_short_conv=conv,
    )  # fmt: skip
    model = DeltaProductLM(args)
    model.init_weights()
    # What 16 bits hold exactly, so that both have the same weights.
    state = {name: x.bfloat16().double() if x.is_floating_point() else x for name, x in model.state_dict().items()}
    exact = DeltaProductLM(dataclasses.replace(args, op_backend="chunk")).double()
    exact.load_state_dict(state)
    model.load_state_dict(state)
    model, exact = model.to("cuda", dtype), exact.cuda()
    for name, block in model.layers.items():
        model.layers.register_module(name, torch.compile(block, fullgraph=True))
    model.loss_backend = "inductor"
    limit = 1e-4 if dtype == torch.float32 else 1e-1
    names = ["loss", *(name for name, _ in exact.named_parameters())]
    for name, ours, true in zip(names, gradients(model, "cuda"), gradients(exact, "cuda"), strict=True):
        assert (ours - true).norm() < limit * true.norm(), name
