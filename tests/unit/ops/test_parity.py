"""The chunkwise backend against the recurrence: outputs, final state and every gradient."""

import pytest
import torch

from torchtitan_deltaproduct.ops import gated_delta_product, recurrent_gated_delta_product, recurrent_step
from torchtitan_deltaproduct.ops.chunk import chunk_backward, chunk_forward

NAMES = ("q", "k", "v", "g", "beta", "initial_state")


def make(
    length,
    n,
    *,
    batch=1,
    heads=2,
    dim=8,
    dim_v=6,
    gated=True,
    top=2.0,
    states=None,
    dtype=torch.float64,
    seed=0,
):
    """Random arguments by name; `states` documents or sequences get an initial state each."""
    torch.manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    return {
        "q": normal(batch, length, heads, dim),
        "k": normal(batch, length * n, heads, dim),
        "v": normal(batch, length * n, heads, dim_v),
        "g": (-torch.rand(batch, length, heads, dtype=dtype)).requires_grad_() if gated else None,
        "beta": (top * torch.rand(batch, length * n, heads, dtype=dtype)).requires_grad_(),
        "initial_state": normal(states, heads, dim, dim_v) if states else None,
    }


def run(args, n, backend, final=True, **options):
    """[(name, tensor)]: outputs, then gradients of a random projection of them."""
    o, state = gated_delta_product(
        **args, num_householder=n, output_final_state=final, use_qk_l2norm=True, backend=backend, **options
    )
    torch.manual_seed(1)
    loss = (o * torch.randn_like(o)).sum()
    if final:
        loss = loss + (state * torch.randn_like(state)).sum()
    inputs = {name: x for name, x in args.items() if x is not None}
    grads = torch.autograd.grad(loss, tuple(inputs.values()))
    named = [("o", o.detach())] + ([("state", state.detach())] if final else [])
    return named + list(zip((f"d{name}" for name in inputs), grads, strict=True))


def assert_same(left, right, tolerance):
    for (name, a), (_, b) in zip(left, right, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        error = (a - b).abs().max().item() / max(1.0, b.abs().max().item())
        assert error <= tolerance, f"{name}: {error:.2e}"


@pytest.mark.parametrize("top", [1.0, 2.0])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("length", [1, 2, 37, 64])
def test_float64_with_states(length, n, gated, top):
    args = make(length, n, batch=2, gated=gated, top=top, states=2)
    assert_same(run(args, n, "chunk"), run(args, n, "recurrent"), 1e-12)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("bounds", [[0, 71], [0, 0, 5, 5, 6, 38, 39, 71, 71], list(range(72)), [0, 16, 32, 48, 71]])
@pytest.mark.parametrize("final", [False, True])
def test_float64_documents(bounds, n, gated, final):
    args = make(71, n, gated=gated, states=len(bounds) - 1 if final else None)
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    fast = run(args, n, "chunk", final, cu_seqlens=cu_seqlens)
    assert_same(fast, run(args, n, "recurrent", final, cu_seqlens=cu_seqlens), 1e-12)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("states", [False, True])
def test_float64_rows_of_documents(gated, states):
    """Positions: each row has its own documents; the first takes the initial state, the last leaves the final one."""
    args = make(71, 2, batch=3, gated=gated, states=3 if states else None)
    starts = torch.rand(3, 71) < torch.tensor([[0.0], [0.1], [0.6]])
    starts[1, 70] = True
    index = torch.arange(71)
    positions = (index - torch.where(starts, index, 0).cummax(1).values).int()
    # A row may begin inside a document: nothing is reset there.
    positions[0] += 5
    options = {"final": states, "positions": positions}
    slow = run(args, 2, "recurrent", **options)
    assert_same(run(args, 2, "chunk", **options), slow, 1e-12)
    bounds = [0, *starts[2].nonzero().squeeze(1).tolist(), 71] if not starts[2, 0] else None
    if bounds and not states:
        row = {name: x if x is None else x[2:] for name, x in args.items()}
        o, _ = gated_delta_product(
            **row, num_householder=2, use_qk_l2norm=True, backend="recurrent", cu_seqlens=torch.tensor(bounds)
        )
        assert_same([("o", o.detach())], [("o", slow[0][1][2:])], 1e-12)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_float32(n):
    args = make(133, n, dim=16, dim_v=24, dtype=torch.float32)
    assert_same(run(args, n, "chunk"), run(args, n, "recurrent"), 2e-5)


@pytest.mark.parametrize("chunk_rows", [2, 16, 48, 128])
@pytest.mark.parametrize("segment_rows", [1, 64, 10**6])
def test_any_chunk_and_segment_size(chunk_rows, segment_rows):
    args = make(50, 2, states=1)
    options = {"scale": 0.3, "use_qk_l2norm": True}
    o, state = recurrent_gated_delta_product(**args, num_householder=2, **options)
    do, dstate = torch.randn_like(o), torch.randn_like(state)
    grads = torch.autograd.grad((o * do).sum() + (state * dstate).sum(), tuple(args.values()))
    sizes = {"chunk_rows": chunk_rows, "segment_rows": segment_rows}
    with torch.no_grad():
        fast_o, fast_state, *saved = chunk_forward(*args.values(), None, **options, **sizes)
        fast = chunk_backward(do, dstate, *list(args.values())[:5], None, *saved, **options, **sizes)
    for name, a, b in zip(("o", "state", *NAMES), (fast_o, fast_state, *fast), (o, state, *grads), strict=True):
        assert (a - b).abs().max() < 1e-12, name


def test_gradient_through_the_state_alone():
    args = make(21, 2, states=1)
    grads = []
    for backend in ("chunk", "recurrent"):
        _, state = gated_delta_product(**args, num_householder=2, output_final_state=True, backend=backend)
        grads.append(torch.autograd.grad(state.square().sum(), tuple(args.values()), allow_unused=True)[1:])
    for a, b in zip(*grads, strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()


@pytest.mark.parametrize("lowest", [-1e4, -1e30, float("-inf")])
def test_hard_reset_by_the_gate(lowest):
    """A token that forgets everything must not disturb the decays of its neighbours."""
    args = make(40, 2, dtype=torch.float32)
    with torch.no_grad():
        args["g"][:, [3, 17, 18]] = lowest
    slow, fast = run(args, 2, "recurrent"), run(args, 2, "chunk")
    assert_same(fast, slow, 1e-3 if lowest == -1e4 else 1e-3)
    assert all(x.isfinite().all() for _, x in fast)


def test_recurrent_against_the_transition_matrices():
    """The oracle's own check: S_t as an explicit product of matrices, one head."""
    args = make(5, 3, heads=1, dim=4, dim_v=3)
    o, state = recurrent_gated_delta_product(**args, num_householder=3, scale=0.5)
    expected = torch.zeros(4, 3, dtype=torch.float64)
    for t in range(5):
        expected = args["g"][0, t, 0].exp() * expected
        for row in range(3 * t, 3 * t + 3):
            key, value, beta = args["k"][0, row, 0], args["v"][0, row, 0], args["beta"][0, row, 0]
            expected = (torch.eye(4) - beta * key.outer(key)) @ expected + beta * key.outer(value)
        assert torch.allclose(o[0, t, 0], 0.5 * expected.T @ args["q"][0, t, 0], atol=1e-12)
    assert torch.allclose(state[0, 0], expected, atol=1e-12)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_decode_step(n, gated):
    args = make(19, n, batch=2, gated=gated)
    q, k, v, g, beta, _ = (None if x is None else x.detach() for x in args.values())
    o, final = gated_delta_product(q, k, v, g, beta, n, output_final_state=True, use_qk_l2norm=True)
    _, state = gated_delta_product(
        q[:, :7],
        k[:, : 7 * n],
        v[:, : 7 * n],
        None if g is None else g[:, :7],
        beta[:, : 7 * n],
        n,
        output_final_state=True,
        use_qk_l2norm=True,
    )
    for t in range(7, 19):
        rows = slice(t * n, t * n + n)
        gate = None if g is None else g[:, t]
        step, same = recurrent_step(q[:, t], k[:, rows], v[:, rows], gate, beta[:, rows], state, use_qk_l2norm=True)
        assert same is state
        assert (step - o[:, t]).abs().max() < 1e-12
    assert (state - final).abs().max() < 1e-12
