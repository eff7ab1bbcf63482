"""Number formats: contractive under repeated keys, float32 inside whatever is around, deterministic, no stray
memory."""

import pytest
import torch

from tests.unit.ops.test_parity import make, run
from torchtitan_deltaproduct.ops import gated_delta_product
from torchtitan_deltaproduct.ops.normalize import ROUNDING, contractive_beta, l2norm, normalise


def repeated_key_growth(n, *, length=4096, normalise=True, backend="auto", device="cpu", dim=64, seed=0) -> float:
    """|S| after `length` tokens of one bfloat16 key at beta = 2 without writes, over |S| before.

    Each micro-step is a reflection, so the true ratio is 1. The key is the one of many random ones whose
    rounding lengthens it the most. Used by `tests/gpu/test_op.py` for fla as well.
    """
    torch.manual_seed(seed)
    keys = l2norm(torch.randn(4096, dim)).bfloat16()
    key = keys[keys.float().square().sum(-1).argmax()].to(device)
    k = key.expand(1, length * n, 1, dim).contiguous()
    v = torch.zeros_like(k)
    beta = torch.full(k.shape[:3], 2.0, device=device)
    state = torch.randn(1, 1, dim, dim, device=device)
    _, final = gated_delta_product(
        k[:, :length],
        k,
        v,
        None,
        beta,
        n,
        initial_state=state,
        output_final_state=True,
        use_qk_l2norm=normalise,
        backend=backend,
    )
    return (final.norm() / state.norm()).item()


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("backend", ["chunk", "recurrent"])
def test_repeated_keys_do_not_grow_the_state(n, normalise, backend):
    length = 4096 if backend == "chunk" else 512
    growth = repeated_key_growth(n, normalise=normalise, backend=backend, length=length)
    assert 0.95 < growth < 1.05


def test_the_hazard_is_real():
    """Without the cap the same key explodes, so the test above can fail."""
    keys = l2norm(torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))).bfloat16().float()
    longest = keys.square().sum(-1).max().item()
    assert 1.001 < longest < 1 + ROUNDING
    assert (2 * longest - 1) ** 4096 > 1e3


def test_contractive_beta_leaves_other_keys_alone():
    beta = torch.full((1, 3, 1), 2.0)
    k = torch.zeros(1, 3, 1, 4, dtype=torch.bfloat16)
    k[0, :, 0, 0] = torch.tensor([0.5, 1.0, 3.0])
    assert torch.equal(contractive_beta(k, beta), beta)
    assert contractive_beta(k.float(), beta) is beta
    k[0, :, 0, 1] = 0.0625
    assert torch.allclose(contractive_beta(k, beta).flatten(), torch.tensor([2.0, 2 / 1.00390625, 2.0]))


def test_keys_normalised_outside_the_op_are_contractive_too():
    """What the kernels are given: the rounded key times the corrected beta has eigenvalue 1 - 2, not beyond."""
    torch.manual_seed(0)
    k, beta = torch.randn(1, 2048, 1, 64).bfloat16(), torch.full((1, 2048, 1), 2.0)
    q, unit, corrected = normalise(k, k, beta, True)
    square = unit.float().square().sum(-1)
    assert torch.equal(q, unit) and (beta * square).max() > 2.002
    assert (corrected * square - 2).abs().max() < 1e-5


def test_gradient_of_the_normalisation_outside_the_op():
    torch.manual_seed(0)
    k = torch.randn(1, 16, 2, 8, requires_grad=True)
    _, unit, _ = normalise(k, k, torch.ones(1, 16, 2), True)
    weights = torch.randn(unit.shape)
    (ours,) = torch.autograd.grad((unit * weights).sum(), k)
    exact = k.detach().double().requires_grad_()
    (theirs,) = torch.autograd.grad((l2norm(exact) * weights).sum(), exact)
    torch.testing.assert_close(ours.double(), theirs, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_the_normalisation_is_traced(dtype):
    """torch 2.11 drops that of an autograd.Function whose output went through a cast that changes nothing."""
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 16, 2, 8).to(dtype)
    beta, weights = torch.rand(1, 16, 2), torch.randn(2, 1, 16, 2, 8)

    def loss(q, k):
        unit_q, unit_k, scaled = normalise(q, k, beta, True)
        return (unit_q * weights[0]).sum() + (unit_k * weights[1]).sum() + scaled.sum()

    inputs = q.requires_grad_(), k.requires_grad_()
    eager = torch.autograd.grad(loss(*inputs), inputs)
    traced = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(*inputs), inputs)
    assert all(x.abs().sum() > 0 for x in eager)
    torch.testing.assert_close(traced, eager)


@pytest.mark.parametrize("backend", ["chunk", "recurrent"])
def test_autocast_lowers_nothing(backend):
    args = make(40, 2, dtype=torch.float32)
    plain = run(args, 2, backend)
    with torch.autocast("cpu", torch.bfloat16):
        lowered = run(args, 2, backend)
    # A backward inside autocast is the custom op's to protect; the oracle is plain autograd.
    count = len(plain) if backend == "chunk" else 2
    for (name, a), (_, b) in list(zip(lowered, plain, strict=True))[:count]:
        assert torch.equal(a, b), name


def test_bfloat16_inputs_are_computed_in_float32():
    args = make(64, 2, dtype=torch.float32, dim=16, dim_v=16)
    low = {name: None if x is None else x.detach().bfloat16().requires_grad_() for name, x in args.items()}
    high = {name: None if x is None else x.detach().float().requires_grad_() for name, x in low.items()}
    for (name, a), (_, b) in zip(run(low, 2, "chunk", False), run(high, 2, "chunk", False), strict=True):
        assert a.dtype == torch.bfloat16, name
        if name == "o":
            assert torch.equal(a, b.bfloat16())
    _, state = gated_delta_product(**low, num_householder=2, output_final_state=True)
    assert state.dtype == torch.float32


def test_two_runs_are_bitwise_equal():
    args = make(77, 3, dtype=torch.float32, states=1)
    for (name, a), (_, b) in zip(run(args, 3, "chunk"), run(args, 3, "chunk"), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("bounds", [None, [0, 5, 5, 6, 41]])
def test_uninitialised_memory_is_not_read(bounds):
    """Fresh memory is filled with NaN: a buffer read before it is written would show."""
    cu_seqlens = None if bounds is None else torch.tensor(bounds)
    args = make(41, 2, dtype=torch.float32)
    expected = run(args, 2, "chunk", cu_seqlens=cu_seqlens) + run(args, 2, "chunk", False, cu_seqlens=cu_seqlens)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        poisoned = run(args, 2, "chunk", cu_seqlens=cu_seqlens) + run(args, 2, "chunk", False, cu_seqlens=cu_seqlens)
    finally:
        torch.use_deterministic_algorithms(False)
    for (name, a), (_, b) in zip(poisoned, expected, strict=True):
        assert torch.equal(a, b), name


def test_documents_do_not_see_each_other():
    """A document a million times louder changes no bit of its neighbours, gradients included."""
    args = make(60, 2, dtype=torch.float32)
    plain = make(60, 2, dtype=torch.float32)
    with torch.no_grad():
        args["v"][:, 40:80] *= 1e6
    cu_seqlens = torch.tensor([0, 20, 40, 60])
    loud = run(args, 2, "chunk", False, cu_seqlens=cu_seqlens)
    quiet = run(plain, 2, "chunk", False, cu_seqlens=cu_seqlens)
    for (name, a), (_, b) in zip(loud, quiet, strict=True):
        size = a.shape[1] // 3
        for part in (slice(0, size), slice(2 * size, None)):
            assert torch.equal(a[:, part], b[:, part]), name


def test_zero_keys_and_zero_beta_are_exact():
    args = make(33, 2, dtype=torch.float32)
    with torch.no_grad():
        args["k"][:, ::2] = 0
        args["beta"][:, 1::4] = 0
    for (name, a), (_, b) in zip(run(args, 2, "chunk"), run(args, 2, "recurrent"), strict=True):
        assert a.isfinite().all(), name
        if name != "dk":  # the norm's gradient at zero is 1e3 times the incoming one
            assert torch.allclose(a, b, atol=2e-5, rtol=1e-4), name


def test_a_strong_decay_leaves_no_noise_in_the_gate_gradient():
    """Near pairs have no part in dg; taken in and out again their rounding would be all that is left of it."""
    args = make(96, 2, dim=16, dim_v=16, dtype=torch.float64)
    args["g"] = (args["g"].detach() * 12).requires_grad_()
    low = {name: x if x is None else x.detach().float().requires_grad_() for name, x in args.items()}
    found = []
    for tensors, backend in ((args, "recurrent"), (low, "chunk")):
        o, _ = gated_delta_product(**tensors, num_householder=2, use_qk_l2norm=True, backend=backend)
        torch.manual_seed(0)
        (dg,) = torch.autograd.grad((o * torch.randn(o.shape, dtype=torch.float64)).sum(), tensors["g"])
        found.append(dg.double())
    assert (found[1] - found[0]).norm() < 1e-6 * found[0].norm()
