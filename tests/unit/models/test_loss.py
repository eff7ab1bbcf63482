"""The loss by chunks against the plain one, its memory, and what is compiled of it."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan_deltaproduct.models import loss as module
from torchtitan_deltaproduct.models.loss import chunk_rows, linear_cross_entropy, peak_bytes

from .conftest import small_model


def operands(tokens: int, dtype=torch.float64, hidden: int = 12, vocab: int = 37, ignored: float = 0.2):
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, hidden, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < ignored] = -100
    return x, weight, labels


def both(x, weight, labels, backend=None):
    """(loss, dx, dweight) by chunks and plain, of a third of the loss: the factor is not 1."""
    results = []
    for loss_of in (linear_cross_entropy, plain):
        x.grad = weight.grad = None
        loss = loss_of(x, weight, labels, **({"backend": backend} if loss_of is linear_cross_entropy else {}))
        (loss / 3).backward()
        results.append((loss.detach(), x.grad, weight.grad))
    return results


def plain(x, weight, labels):
    return F.cross_entropy(F.linear(x, weight).flatten(0, -2), labels.flatten(), reduction="sum")


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of at most 5 tokens."""
    monkeypatch.setattr(module, "CHUNK_TOKENS", 5)


@pytest.mark.parametrize("tokens", [1, 4, 5, 6, 13, 20])
@pytest.mark.parametrize("ignored", [0.0, 0.3])
def test_many_chunks_equal_the_plain_loss(small_chunks, tokens, ignored):
    ours, theirs = both(*operands(tokens, ignored=ignored))
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def test_one_chunk_equals_the_plain_loss():
    x, weight, labels = operands(24)
    ours, theirs = both(x, weight, labels)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)
    batch = linear_cross_entropy(x.view(2, 3, 4, 12), weight, labels.view(2, 3, 4))
    assert torch.equal(batch, ours[0]) and ours[0].dtype == torch.float64 and ours[0].shape == ()


@pytest.mark.parametrize("tokens", [0, 7])
def test_no_label_at_all_is_a_loss_of_zero_with_zero_gradients(small_chunks, tokens):
    x, weight, labels = operands(tokens)
    loss = linear_cross_entropy(x, weight, labels.fill_(-100))
    loss.backward()
    assert loss.item() == 0 and not x.grad.any() and not weight.grad.any()
    assert x.grad.shape == x.shape and weight.grad.shape == weight.shape


def test_large_logits_and_confident_predictions_keep_their_gradient(small_chunks):
    """exp would overflow, and a softmax of 0.999 rounded to bfloat16 is 1: its gradient is not."""
    x, weight, labels = operands(6, torch.float64, ignored=0)
    ours, theirs = both((1e3 * x.detach()).requires_grad_(), weight, labels)
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-12)
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.bfloat16, requires_grad=True)
    x = torch.tensor([[7.0]], dtype=torch.bfloat16, requires_grad=True)
    (_, dx, _), _ = both(x, weight, torch.tensor([0]))
    assert dx.item() == pytest.approx((torch.sigmoid(torch.tensor(7.0)).item() - 1) / 3, rel=0.01)


def test_bfloat16_products_with_float32_sums(small_chunks):
    """Errors against float64 at most those of the plain loss in the same dtype; a loss in float32."""
    exact = both(*operands(640))[1]
    ours, theirs = both(*operands(640, torch.bfloat16))
    assert ours[0].dtype == torch.float32 and ours[1].dtype == ours[2].dtype == torch.bfloat16
    for mine, its, true in zip(ours, theirs, exact, strict=True):
        error, its_error = ((value.double() - true).norm() / true.norm() for value in (mine, its))
        assert error < 0.02 and error <= 1.1 * its_error


def test_an_impossible_label_is_an_error():
    x, weight, labels = operands(3)
    for wrong in (37, -1):
        labels[1] = wrong
        with pytest.raises(RuntimeError, match="index"):
            linear_cross_entropy(x, weight, labels)


def test_a_second_backward_is_an_error_and_a_frozen_weight_gets_no_gradient(small_chunks):
    x, weight, labels = operands(7)
    loss = linear_cross_entropy(x, weight, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        loss.backward()
    expected, x.grad, weight.grad = x.grad, None, None
    linear_cross_entropy(x, weight.requires_grad_(False), labels).backward()
    assert weight.grad is None and torch.equal(x.grad, expected)


class LiveBytes(TorchDispatchMode):
    """The largest sum of storages that were alive at once, of those made while it is entered."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves((args, kwargs, out)):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor.untyped_storage(), new=any(tensor is o for o in torch.utils._pytree.tree_leaves(out)))
        return out

    def note(self, storage, new: bool):
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        size = storage.nbytes() if new else 0
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.forget, key, size)

    def forget(self, key, size):
        self.known.discard(key)
        self.now -= size


def peak_of(tokens: int, vocab: int, hidden: int, gradient: bool = True) -> int:
    x = torch.empty(tokens, hidden, dtype=torch.bfloat16, device="meta", requires_grad=gradient)
    weight = torch.empty(vocab, hidden, dtype=torch.bfloat16, device="meta", requires_grad=gradient)
    labels = torch.empty(tokens, dtype=torch.int64, device="meta")
    with LiveBytes() as live:
        loss = linear_cross_entropy(x, weight, labels)
        if gradient:
            loss.backward()
    return live.peak


def test_peak_of_the_usual_batch_is_below_one_gigabyte():
    """Counted on the meta device, eager mode, which takes the road of a GPU; compiled, the float32 copy is gone."""
    counted, predicted = peak_of(8 * 4096, 32_000, 1024), peak_bytes(8 * 4096, 32_000, 1024, 2)
    assert predicted == 2 * 32_768 * 1024 + 4 * 32_000 * 1024 + 6 * 4096 * 32_000 == 984_612_864
    assert predicted < counted < 1e9 and counted < 1.01 * predicted
    assert peak_bytes(8 * 4096, 32_000, 1024, 2, compiled=True) == predicted - 2 * 4096 * 32_000


def test_a_vocabulary_of_128k_trains():
    """Whole logits and what torch makes of them would be 42 GB."""
    assert peak_of(8 * 4096, 128_256, 1024) < 2.3e9
    assert chunk_rows(128_256, 2, "cuda") == 2092 and chunk_rows(32_000, 2, "cuda") == 4096
    assert chunk_rows(10**9, 2, "cpu") == 1


def test_without_gradients_only_logits_exist():
    assert peak_of(8 * 4096, 32_000, 1024, gradient=False) < 6.1 * 4096 * 32_000


def test_a_size_of_chunks_has_a_graph_of_its_own(small_chunks):
    """Whatever was compiled before it, as in training: chunks of one length have at most two sizes."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        for tokens, graphs in ((13, 2), (5, 2), (22, 2), (9, 2)):
            ours, theirs = both(*operands(tokens, torch.float32), backend=counter)
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
            assert counter.frame_count == graphs
        with torch.no_grad():
            x, weight, labels = operands(11, torch.float32)
            loss = linear_cross_entropy(x, weight, labels, backend=counter)
        torch.testing.assert_close(loss, plain(x, weight, labels))
    assert counter.frame_count == 4, "two graphs more for evaluations"
    shapes = {node.meta["example_value"].shape for graph in counter.graphs for node in graph.graph.nodes
              if node.op == "placeholder"}  # fmt: skip
    assert all(isinstance(size, int) for shape in shapes for size in shape)


@pytest.mark.parametrize("tied", [True, False])
def test_autocast_lowers_the_products_and_nothing_else(tied):
    model = small_model(torch.float32, tie_word_embeddings=tied)
    tokens = torch.randint(0, 50, (2, 9))
    with torch.autocast("cpu", torch.bfloat16):
        loss, logits = model(tokens, labels=tokens), model(tokens)
    assert loss.dtype == torch.float32 and logits.dtype == torch.bfloat16
    torch.testing.assert_close(loss, F.cross_entropy(logits.float().mT, tokens, reduction="sum"), atol=1e-3, rtol=1e-5)
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_the_model_gives_the_loss_of_its_logits(small_chunks, tied):
    model = small_model(tie_word_embeddings=tied)
    tokens, labels = torch.randint(0, 50, (2, 9)), torch.randint(0, 50, (2, 9))
    labels[0, 3:5] = -100
    gradients = []
    for loss in (model(tokens, labels=labels), F.cross_entropy(model(tokens).mT, labels, reduction="sum")):
        model.zero_grad()
        loss.backward()
        gradients.append([loss.detach(), *(p.grad for p in model.parameters())])
    torch.testing.assert_close(*gradients, atol=1e-11, rtol=1e-11)
