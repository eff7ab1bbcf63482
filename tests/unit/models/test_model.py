"""The model against the slow reference, documents against running each alone, gradients, dtypes, compile."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from torchtitan_deltaproduct.models import Block
from torchtitan_deltaproduct.models.embedding import Embedding
from torchtitan_deltaproduct.models.hf_names import to_hf
from torchtitan_deltaproduct.models.model import document_positions

from . import reference
from .conftest import small_model


def test_logits_equal_the_reference(variant):
    model = small_model(**variant)
    tokens = torch.randint(0, 50, (2, 19))
    weights = to_hf(model.state_dict(), model.args)
    expected = torch.stack([reference.logits(row, weights, model.args) for row in tokens])
    torch.testing.assert_close(model(tokens), expected, atol=1e-10, rtol=1e-10)


def test_packed_documents_equal_documents_alone(variant):
    model = small_model(**variant)
    tokens = torch.randint(0, 50, (2, 23))
    starts = torch.zeros(2, 23, dtype=torch.bool)
    # One-token documents, one shorter than the convolution, and a row that does not mark its own start.
    starts[0, [0, 1, 2, 9]] = True
    starts[1, [6, 8, 22]] = True
    packed = model(tokens, starts)
    for row, bounds in ((0, [0, 1, 2, 9, 23]), (1, [0, 6, 8, 22, 23])):
        for first, last in zip(bounds[:-1], bounds[1:], strict=True):
            alone = model(tokens[row : row + 1, first:last])[0]
            torch.testing.assert_close(packed[row, first:last], alone, atol=1e-10, rtol=1e-10)


def test_gradients_reach_every_parameter_with_and_without_documents(variant):
    starts = torch.rand(2, 17, generator=torch.Generator().manual_seed(1)) < 0.2
    for documents in (None, starts):
        model = small_model(**variant)
        model(torch.randint(0, 50, (2, 17)), documents).square().mean().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_document_positions():
    starts = torch.tensor([[0, 0, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
    positions = document_positions(starts)
    assert positions.tolist() == [[0, 1, 0, 1], [0, 0, 1, 2]] and positions.dtype == torch.int32
    assert not starts[0, 0], "the caller's mask is left alone"


def test_causal():
    model = small_model(num_householder=2, use_forget_gate=True)
    tokens = torch.randint(0, 50, (1, 20))
    changed = tokens.clone()
    changed[0, 12] = (changed[0, 12] + 1) % 50
    difference = (model(tokens) - model(changed)).abs().amax(-1)[0]
    assert difference[:12].max() == 0 and difference[12:].min() > 0


def test_decay_parameters_stay_float32_in_a_bfloat16_model():
    model = small_model(torch.float32, use_forget_gate=True)
    before = model.layers["0"].mixer.decay.A_log.clone()
    model.to(torch.bfloat16)
    narrow = {name for name, p in model.named_parameters() if p.dtype == torch.bfloat16}
    wide = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert wide == {f"layers.{i}.mixer.decay.{leaf}" for i in "01" for leaf in ("A_log", "dt_bias")}
    assert narrow | wide == {name for name, _ in model.named_parameters()}
    assert torch.equal(model.layers["0"].mixer.decay.A_log, before)
    tokens = torch.randint(0, 50, (2, 16))
    logits = model(tokens)
    assert logits.dtype == torch.bfloat16
    exact = small_model(torch.float32, use_forget_gate=True)(tokens)
    assert (logits.float() - exact).norm() / exact.norm() < 0.05


def test_a_fractional_value_width_is_refused():
    with pytest.raises(ValueError, match="not a whole number"):
        small_model(head_dim=8, expand_v=1.3)
    assert small_model(head_dim=100, expand_v=1.1).args.head_v_dim == 110, "100 * 1.1 is 110.00000000000001"


def test_a_tied_head_is_one_parameter():
    model = small_model(tie_word_embeddings=True)
    assert model.output is None and "output.weight" not in model.state_dict()
    with torch.no_grad():
        model.tok_embeddings.weight.zero_()
    assert model(torch.zeros(1, 3, dtype=torch.int64)).abs().max() == 0


@pytest.mark.parametrize("documents", [False, True])
def test_block_compiles_whole_and_once(documents):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = small_model(use_forget_gate=True, use_output_gate=True, num_householder=2)
    block: Block = model.layers["0"]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True)
    generator = torch.Generator().manual_seed(0)
    for share in (0.0, 0.05, 0.1, 0.3, 0.6, 0.9):
        x = torch.randn(2, 32, model.args.hidden_size, generator=generator, dtype=torch.float64)
        positions = None
        if documents:
            positions = document_positions(torch.rand(2, 32, generator=generator) < share)
        results = []
        for run in (block, compiled):
            block.zero_grad()
            y = run(x, block.mixer.decay(), positions)
            y.square().sum().backward()
            results.append((y, [p.grad.clone() for p in block.parameters()]))
        torch.testing.assert_close(results[0], results[1], atol=1e-9, rtol=1e-9)
    assert counter.frame_count <= 2


def test_ten_layers_share_one_compilation():
    """Blocks are compiled one by one, as the trainer does; dynamo gives up at 8 versions of a function."""
    torch._dynamo.reset()
    model = small_model(torch.float32, num_hidden_layers=10, use_forget_gate=True)
    counter = CompileCounterWithBackend("aot_eager")
    for key, block in list(model.layers.items()):
        model.layers.register_module(key, torch.compile(block, backend=counter, fullgraph=True))
    tokens = torch.randint(0, 50, (2, 16))
    for starts in (None, torch.rand(2, 16) < 0.1, torch.rand(2, 16) < 0.5):
        model(tokens, starts).sum().backward()
    assert counter.frame_count == 2, "one graph without documents and one with"


class Calls(TorchDispatchMode):
    """Whether torch was asked for deterministic kernels in each call of an operator."""

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        flags = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
        self.seen[function.overloadpacket.__name__] = flags
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("before", [False, True])
def test_the_gradient_of_the_embedding_is_a_deterministic_kernel_s(before):
    """A CPU's always is; on a GPU tests/gpu/test_step.py compares bits."""
    torch.manual_seed(0)
    ours, tokens = Embedding(7, 4), torch.randint(7, (3, 50))
    theirs = nn.Embedding.from_pretrained(ours.weight.detach(), freeze=False)
    x = torch.randn(3, 50, 4)
    torch.use_deterministic_algorithms(before)
    try:
        with Calls() as calls:
            (ours(tokens) * x).sum().backward()
        assert calls.seen["embedding_dense_backward"] == (True, False)
        assert calls.seen["mul"] == (before, True)
        assert torch.are_deterministic_algorithms_enabled() is before
    finally:
        torch.use_deterministic_algorithms(False)
    (theirs(tokens) * x).sum().backward()
    assert torch.equal(ours.weight.grad, theirs.weight.grad)
