"""Our kernels under Triton's interpreter, in float32, against the float64 recurrence: run by test_triton.py."""

import pytest
import torch

from tests.unit.ops.test_parity import make
from torchtitan_deltaproduct.ops import (
    flops_per_token,
    gated_delta_product,
    recurrent_gated_delta_product,
    triton_backend,
)


def positions_of(bounds: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(b - a) for a, b in zip(bounds, bounds[1:], strict=False)]).int().unsqueeze(0)


def errors(
    length, n, *, gated=False, states=True, positions=None, dim=16, dim_v=16, batch=1, heads=1, decay=0.3, **options
):
    """Relative errors of outputs, final state and gradients, by name; fresh memory is NaN."""
    given = make(
        length, n, batch=batch, heads=heads, gated=gated, dim=dim, dim_v=dim_v, states=batch if states else None
    )
    if gated:
        given["g"] = (given["g"].detach() * decay).requires_grad_()
    results = []
    for dtype, backend in ((torch.float64, "recurrent"), (torch.float32, "triton")):
        args = {name: x if x is None else x.detach().to(dtype).requires_grad_() for name, x in given.items()}
        o, state = gated_delta_product(
            **args, num_householder=n, output_final_state=states, positions=positions, use_qk_l2norm=True,
            backend=backend, **options,
        )  # fmt: skip
        torch.manual_seed(5)
        loss = (o * torch.randn(o.shape, dtype=torch.float64)).sum()
        if states:
            loss = loss + (state * torch.randn(state.shape, dtype=torch.float64)).sum()
        leaves = {name: x for name, x in args.items() if x is not None}
        grads = torch.autograd.grad(loss, tuple(leaves.values()))
        named = {"o": o, **({"state": state} if states else {})}
        results.append(named | {f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)})
    exact, got = results
    # Python's `max` may pass over a NaN.
    relative = {name: (got[name].double() - x).norm() / x.norm().clamp(min=1e-6) for name, x in exact.items()}
    return {name: error.nan_to_num(nan=torch.inf).item() for name, error in relative.items()}


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("n", "gated"), [(1, False), (1, True), (2, False), (3, False), (3, True), (4, True), (5, False), (8, True)]
)
def test_householders(n, gated):
    found = errors(70, n, gated=gated)
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33])
def test_lengths(length):
    found = errors(length, 2, gated=True, batch=2, heads=3)
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize(("dim", "dim_v"), [(32, 64), (24, 40), (8, 16), (64, 16)])
def test_head_dims(dim, dim_v):
    found = errors(40, 2, gated=True, dim=dim, dim_v=dim_v)
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize(("bounds", "n", "gated", "states"), [
    ([0, 1, 20, 47, 64, 70], 1, False, True), ([0, 1, 20, 47, 64, 70], 3, True, False),
    (list(range(71)), 1, True, True), (list(range(71)), 3, False, False),
    ([0, 21, 42, 63, 70], 1, True, False), ([0, 21, 42, 63, 70], 3, False, True),
    ([0, 70], 3, True, True),
])  # fmt: skip
def test_documents(bounds, n, gated, states):
    found = errors(70, n, gated=gated, positions=positions_of(bounds), states=states)
    assert max(found.values()) < 1e-5, found


def test_rows_of_documents_that_begin_inside_one():
    positions = torch.stack([torch.arange(7, 77), torch.arange(70) % 9]).int()
    found = errors(70, 2, gated=True, positions=positions, batch=2, heads=2)
    assert max(found.values()) < 1e-5, found


@pytest.mark.parametrize(("gated", "states", "bounds"), [
    (False, True, None), (True, True, [0, 5, 100, 130]),
    (True, False, [0, 5, 100, 130]), (False, False, [0, 5, 100, 130]),
])  # fmt: skip
def test_segments(monkeypatch, gated, states, bounds):
    """Few heads and long sequences: the sequence in three parts, each an affine map of the state."""
    monkeypatch.setattr(triton_backend, "segments", lambda *_: 3)
    positions = None if bounds is None else positions_of(bounds)
    found = errors(130, 2, gated=gated, states=states, positions=positions, dim_v=32, heads=2)
    assert max(found.values()) < 1e-5, found


def test_documents_with_a_state_each():
    args = make(70, 2, gated=True, dim=16, dim_v=16, states=4, dtype=torch.float32)
    cu_seqlens = torch.tensor([0, 20, 20, 21, 70])
    options = {"num_householder": 2, "use_qk_l2norm": True, "cu_seqlens": cu_seqlens}
    o, states = gated_delta_product(**args, **options, output_final_state=True, backend="triton")
    want, want_states = recurrent_gated_delta_product(**args, **options)
    assert (o - want).abs().max() < 1e-5 and (states - want_states).abs().max() < 1e-5
    assert torch.equal(states[1], args["initial_state"][1])


@pytest.mark.parametrize("lowest", [-30.0, float("-inf")])
def test_hard_reset_by_the_gate(lowest):
    """Tokens that forget everything leave their neighbours' decays, and every gradient, as they are."""
    args = make(70, 2, dim=16, dim_v=16, dtype=torch.float64)
    with torch.no_grad():
        args["g"][:, [3, 17, 18, 40]] = lowest
    low = {name: x if x is None else x.detach().float().requires_grad_() for name, x in args.items()}
    want, _ = gated_delta_product(**args, num_householder=2, use_qk_l2norm=True, backend="recurrent")
    got, _ = gated_delta_product(**low, num_householder=2, use_qk_l2norm=True, backend="triton")
    names = ("q", "k", "v", "g", "beta")
    wants = torch.autograd.grad(want.sin().sum(), [args[name] for name in names])
    gots = torch.autograd.grad(got.sin().sum(), [low[name] for name in names])
    for name, a, b in zip(("o", *names), (got, *gots), (want, *wants), strict=True):
        assert (a.double() - b).norm() < 1e-4 * b.norm(), name


def test_strong_decay_leaves_no_noise_in_the_gate_gradient():
    """Near pairs cancel exactly: dg keeps its relative precision although it is far smaller than what it sums."""
    found = errors(70, 2, gated=True, decay=12.0, states=False)
    assert found["dg"] < 1e-4, found


@pytest.mark.parametrize(("length", "n"), [(16, 2), (40, 2), (42, 3)])
def test_a_chunk_that_lacks_tokens_may_decay_beyond_float32(length, n):
    """Its decay from end to start would be infinite; at n = 3 every chunk lacks some of its tile's tokens."""
    found = errors(length, n, gated=True, decay=40.0)
    assert max(found.values()) < 1e-4, found


def test_repeated_keys_at_two():
    """(I + A)^-1 is solved, not summed: a Neumann series has errors of 1e20 here."""
    torch.manual_seed(0)
    k = torch.nn.functional.normalize(torch.randn(1, 1, 2, 16), dim=-1).expand(1, 128, 2, 16).contiguous()
    q, v, beta = torch.randn(1, 64, 2, 16), torch.randn(1, 128, 2, 16), torch.full((1, 128, 2), 2.0)
    got, state = gated_delta_product(q, k, v, None, beta, 2, output_final_state=True, backend="triton")
    want, want_state = recurrent_gated_delta_product(q.double(), k.double(), v.double(), None, beta.double(), 2)
    assert (got - want).norm() < 1e-3 * want.norm() and (state - want_state).norm() < 1e-3 * want_state.norm()


def test_zero_beta_has_a_zero_gradient_and_changes_nothing_else():
    args = make(40, 2, gated=False, dim=16, dim_v=16, dtype=torch.float32)
    with torch.no_grad():
        args["beta"][:, 5] = 0.0
    o, _ = gated_delta_product(**args, num_householder=2, use_qk_l2norm=True, backend="triton")
    want, _ = gated_delta_product(**args, num_householder=2, use_qk_l2norm=True, backend="recurrent")
    assert (o - want).abs().max() < 1e-5
    dbeta, dv = torch.autograd.grad(o.sum(), [args["beta"], args["v"]])
    want_dbeta, want_dv = torch.autograd.grad(want.sum(), [args["beta"], args["v"]])
    assert (dbeta[:, 5] == 0).all() and (dv - want_dv).abs().max() < 1e-4
    others = torch.arange(80) != 5
    assert (dbeta - want_dbeta)[:, others].abs().max() < 1e-4


def test_bitwise_repeatable_and_nothing_kept_without_gradients():
    args = make(70, 2, dim=16, dim_v=16, dtype=torch.float32)
    results = []
    for _ in range(2):
        o, _ = gated_delta_product(**args, num_householder=2, use_qk_l2norm=True, backend="triton")
        results.append([o, *torch.autograd.grad(o.sum(), [x for x in args.values() if x is not None])])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    op = torch.ops.deltaproduct.gated_delta_product
    plain = [x if x is None else x.detach() for x in args.values()]
    assert len(op(*plain, None, 2, 0.25, False, False, "nothing", "triton")) == 2


@pytest.mark.parametrize(("gated", "cut"), [(False, 1), (True, 3)])
def test_states_that_are_not_kept_are_made_again(monkeypatch, gated, cut):
    """The same bits as if they were kept, and as many numbers less as they have."""
    monkeypatch.setattr(triton_backend, "segments", lambda *_: cut)
    args = make(130, 2, gated=gated, dim=16, dim_v=32, states=1, dtype=torch.float32)
    leaves, results, numbers = [x for x in args.values() if x is not None], [], []
    for keep_states in (True, False):
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x) or x, lambda x: x):
            o, state = gated_delta_product(
                **args, num_householder=2, output_final_state=True, keep_states=keep_states, use_qk_l2norm=True,
                backend="triton",
            )  # fmt: skip
        results.append([o, state, *torch.autograd.grad(o.sin().sum() + state.sum(), leaves)])
        numbers.append(sum(x.numel() for x in saved))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    chunks, heads = 5, args["q"].shape[2]
    assert numbers[0] - numbers[1] == heads * chunks * 32 * (64 + 16) - args["v"].numel()


@pytest.mark.parametrize("keep_states", [True, False])
def test_flops_are_counted_whether_the_backward_reads_values_or_not(keep_states):
    from torch.utils.flop_counter import FlopCounterMode

    args = make(9, 2, dim=16, dim_v=32, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        o, _ = gated_delta_product(**args, num_householder=2, keep_states=keep_states, backend="triton")
        o.sum().backward()
    assert counter.get_total_flops() == 3 * 9 * flops_per_token(2, 2, 16, 32)


@pytest.mark.parametrize(("states", "packed"), [(False, True), (True, False)])
def test_opcheck(states, packed):
    args = make(40, 2, dim=16, dim_v=16, states=1 if states else None, dtype=torch.float32)
    positions = positions_of([0, 7, 40]) if packed else None
    op = torch.ops.deltaproduct.gated_delta_product.default
    torch.library.opcheck(op, (*args.values(), positions, 2, 0.3, states, False, "all", "triton"))


@pytest.mark.parametrize(("gated", "packed"), [(False, False), (True, True)])
def test_the_mixer_over_our_kernels_is_the_mixer(monkeypatch, gated, packed):
    """Fused convolutions, unit keys and our operator, against PyTorch's convolutions and the chunk backend."""
    from torchtitan_deltaproduct.models import DeltaProductArgs, DeltaProductLM
    from torchtitan_deltaproduct.ops import short_conv
    from torchtitan_deltaproduct.ops.triton import short_conv as conv_kernels

    for shapes in (conv_kernels.FORWARD, conv_kernels.BACKWARD):
        monkeypatch.setitem(shapes, "STEPS", 8)
    args = {"hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2, "head_dim": 16, "vocab_size": 40}
    tokens, starts = torch.randint(40, (2, 50)), torch.rand(2, 50) < 0.1 if packed else None
    results = []
    for backend in ("triton", "chunk"):
        model = DeltaProductLM(DeltaProductArgs(**args, num_householder=2, use_forget_gate=gated, op_backend=backend))
        model.init_weights()
        if backend == "chunk":
            monkeypatch.setattr(short_conv, "obstacle", lambda *_: "not in this test")
        logits = model(tokens, starts)
        results.append([logits, *torch.autograd.grad(logits.sin().sum(), list(model.parameters()))])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() < 1e-4 * b.norm().clamp(min=1e-3)


@pytest.mark.parametrize("products", [False, True])
def test_what_a_compiled_block_keeps_is_what_the_plan_counts(monkeypatch, products):
    """Numbers a token, counted where autograd keeps them; "products" computes the rest again, to the same gradients."""
    from torch import nn
    from torchtitan.config import ActivationCheckpoint

    from torchtitan_deltaproduct import memory
    from torchtitan_deltaproduct.config import load_config
    from torchtitan_deltaproduct.models import DeltaProductArgs
    from torchtitan_deltaproduct.models.block import Block
    from torchtitan_deltaproduct.ops.triton import short_conv as conv_kernels
    from torchtitan_deltaproduct.titan.parallelize import keep_products

    for shapes in (conv_kernels.FORWARD, conv_kernels.BACKWARD):
        monkeypatch.setitem(shapes, "STEPS", 8)
    options = ["--compile.enable", "--training.mixed_precision_param=bfloat16", "--activation_checkpoint.mode=none"]
    config = load_config(["--job.config_file", "train_configs/fineweb/deltaproduct_392M_n1_4k.toml", *options])
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_heads": 2, "head_dim": 16, "vocab_size": 40}
    config.model = DeltaProductArgs(**sizes, num_householder=2, op_backend="triton")
    block, length = Block(config.model), 32
    for p in block.parameters():
        nn.init.normal_(p, std=0.1)
    model = nn.Module()
    model.layers = nn.ModuleDict({"0": block})
    if products:
        block.mixer.keep_states = False
        keep_products(model, ActivationCheckpoint())
    x, kept = torch.randn(2, length, 64, requires_grad=True), {}
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}

    def note(t):
        if t.untyped_storage().data_ptr() not in weights:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() / 4
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        # What is kept is decided before any code is made.
        y = torch.compile(model.layers["0"], backend="aot_eager_decomp_partition", fullgraph=True)(x)
    counted = memory._kept_products(config) if products else memory._kernel_elements(config)
    assert sum(kept.values()) / (2 * length) == pytest.approx(counted, rel=0.05)
    leaves = [x, *block.parameters()]
    found, expected = torch.autograd.grad(y.sin().sum(), leaves), torch.autograd.grad(block(x).sin().sum(), leaves)
    assert all((a - b).norm() < 1e-4 * b.norm().clamp(min=1e-3) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("backend", "kept"), [("triton", False), ("chunk", True)])
def test_values_are_not_kept_for_the_backward(backend, kept):
    """Our backward does not read v: it must not hold its memory from the forward pass on."""
    given = {name: x.float().detach().requires_grad_() for name, x in make(40, 2, states=None).items() if x is not None}
    v, saved = given["v"], set()

    def note(x):
        saved.add(x.untyped_storage().data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        gated_delta_product(**given, num_householder=2, use_qk_l2norm=True, backend=backend)
    assert (v.untyped_storage().data_ptr() in saved) == kept
