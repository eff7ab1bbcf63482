"""The custom op: opcheck, compile, activation checkpointing, FLOPs, the choice of backend and its errors."""

import logging
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

from tests.unit.ops.test_parity import make
from torchtitan_deltaproduct.errors import ConfigError
from torchtitan_deltaproduct.ops import (
    SAVE_FOR_SELECTIVE_AC,
    fla_backend,
    flops_per_token,
    gated_delta_product,
    interface,
    triton_backend,
)
from torchtitan_deltaproduct.ops.documents import document_positions
from torchtitan_deltaproduct.ops.normalize import normalise

N = 2


def loss(q, k, v, g, beta, cu_seqlens=None):
    o, _ = gated_delta_product(q.cos(), k, v, g, beta, N, cu_seqlens=cu_seqlens, use_qk_l2norm=True)
    return o.sin().sum()


def inputs(length=37, gated=True, **options):
    args = make(length, N, gated=gated, dtype=torch.float32, **options)
    return [args[name] for name in ("q", "k", "v", "g", "beta")]


def grads(function, args, *rest):
    value = function(*args, *rest)
    return [value.detach(), *torch.autograd.grad(value, [x for x in args if x is not None])]


def policy(_ctx, op, *_args, **_kwargs):
    return CheckpointPolicy.MUST_SAVE if op in SAVE_FOR_SELECTIVE_AC else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bounds", [None, [0, 5, 5, 6, 37]])
@pytest.mark.parametrize("states", [False, True])
def test_opcheck(gated, bounds, states):
    args = inputs(gated=gated)
    state = torch.randn(1, 2, 8, 6, requires_grad=True) if states else None
    positions = None if bounds is None else document_positions(torch.tensor(bounds), args[0])
    op = torch.ops.deltaproduct.gated_delta_product.default
    torch.library.opcheck(op, (*args, state, positions, N, 0.3, states, True, "all", "chunk"))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_compile_fullgraph(checkpointed):
    function = loss
    if checkpointed:
        context = partial(create_selective_checkpoint_contexts, policy)
        function = partial(checkpoint, loss, use_reentrant=False, context_fn=context)
    compiled = torch.compile(function, fullgraph=True)
    args = inputs()
    for bounds in (None, [0, 5, 5, 6, 37], [0, 9, 37], [0, 37]):
        cu_seqlens = None if bounds is None else torch.tensor(bounds)
        for a, b in zip(grads(compiled, args, cu_seqlens), grads(loss, args, cu_seqlens), strict=True):
            assert (a - b).abs().max() < 2e-5


def test_selective_checkpointing_runs_the_op_once():
    args, context = inputs(), partial(create_selective_checkpoint_contexts, policy)
    forward = N * 0 + 37 * flops_per_token(N, 2, 8, 6)
    for options, passes in (({}, 4), ({"context_fn": context}, 3)):
        with FlopCounterMode(display=False) as counter:
            checkpoint(loss, *args, use_reentrant=False, **options).backward()
        assert counter.get_total_flops() == passes * forward


def test_flops_on_meta_follow_the_formula():
    assert flops_per_token(2, 4, 64, 64) == 4 * 64 * 64 * 10
    assert flops_per_token(2, 4, 64, 64, backward=True) == 2 * flops_per_token(2, 4, 64, 64)
    args = [x.detach().to("meta").requires_grad_() for x in inputs(length=1000, batch=3)]
    with FlopCounterMode(display=False) as counter:
        o, state = gated_delta_product(*args, N, output_final_state=True)
        assert o.shape == (3, 1000, 2, 6) and state.shape == (3, 2, 8, 6)
        o.sum().backward()
    assert counter.get_total_flops() == 3 * 3 * 1000 * flops_per_token(N, 2, 8, 6)
    assert args[1].grad.shape == args[1].shape


def test_auto_logs_its_reason_once(caplog):
    interface._logged.clear()
    with caplog.at_level(logging.INFO, interface.logger.name):
        for _ in range(3):
            loss(*inputs())
    assert [r.message for r in caplog.records] == ["gated_delta_product runs on backend chunk: device is cpu"]


def test_auto_choice_by_machine(monkeypatch):
    monkeypatch.setattr(fla_backend, "_missing", lambda: None)
    monkeypatch.setattr(fla_backend, "_broken_gated_backward", lambda: "fla #640")
    low, full = ("bfloat16",) * 3, ("float32",) * 3
    monkeypatch.setattr(triton_backend, "_missing", lambda: None)
    choose = interface.resolve_backend
    assert choose("auto", "cuda", low, False, 128, 128, 2) == "fla", "before Hopper, where ours were never timed"
    assert choose("auto", "cuda", full, False, 128, 64, 8) == "chunk", "in float32"
    assert choose("triton", "cuda", full, False, 128, 64, 8) == "triton"
    monkeypatch.setattr(triton_backend, "measured_here", lambda: True)
    assert choose("auto", "cuda", low, True, 128, 128, 2) == "triton"
    assert choose("auto", "cuda", full, False, 64, 64, 3) == "triton"
    assert choose("auto", "cuda", full, False, 128, 64, 2) == "chunk"
    assert choose("auto", "cuda", full, False, 64, 64, 4) == "chunk"
    assert choose("auto", "cuda", low, False, 256, 256, 2) == "fla"
    assert choose("auto", "cuda", low, False, 128, 128, 9) == "fla"
    assert choose("auto", "cuda", low, False, 128, 128, 9, packed_states=True) == "chunk"
    assert choose("auto", "cuda", low, True, 256, 256, 2) == "chunk"
    assert choose("auto", "cuda", low, False, 512, 512, 2) == "chunk"
    assert choose("auto", "cuda", ("float64",) * 3, False, 128, 128, 2) == "chunk"
    assert choose("auto", "meta", low, False, 128, 128, 2) == "chunk"
    with pytest.raises(ConfigError, match="fla #640"):
        choose("fla", "cuda", low, True, 128, 128, 2)
    with pytest.raises(ConfigError, match="at most 128"):
        choose("triton", "cuda", low, True, 256, 256, 2)


@pytest.mark.parametrize(
    ("backend", "message"),
    [("fla", "need CUDA"), ("triton", "need CUDA"), ("chunky", "choose one of auto")],
)
def test_backend_that_cannot_run(backend, message):
    with pytest.raises(ConfigError, match=message):
        gated_delta_product(*inputs(), N, backend=backend)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("k", (1, 37, 2, 8)),
        ("v", (1, 74, 3, 6)),
        ("g", (1, 74, 2)),
        ("beta", (1, 37, 2)),
        ("initial_state", (1, 2, 6, 8)),
    ],
)
def test_wrong_shapes_are_named(name, shape):
    args = make(37, N, states=1)
    args[name] = torch.zeros(shape)
    with pytest.raises(ValueError, match=f"^{name} is"):
        gated_delta_product(**args, num_householder=N)


def test_no_rows_and_no_boundaries_are_errors():
    with pytest.raises(ValueError, match="no tokens"):
        gated_delta_product(*inputs(batch=0), N)
    with pytest.raises(ValueError, match="cu_seqlens must be"):
        gated_delta_product(*inputs(), N, cu_seqlens=torch.zeros(0, dtype=torch.int32))


def test_states_of_documents_are_float64_if_one_of_q_k_and_v_is():
    q, *others = (x.detach() for x in inputs())
    args = q, *(x.double() for x in others)
    for cu_seqlens in (None, torch.tensor([0, 5, 37])):
        _, state = gated_delta_product(*args, N, cu_seqlens=cu_seqlens, output_final_state=True)
        assert state.dtype == torch.float64


@pytest.mark.parametrize("backend", ["chunk", "recurrent"])
def test_a_second_derivative_is_refused_or_right(backend):
    q, k, v, g, beta = (x.detach().double().requires_grad_() for x in inputs(5))

    def slope(k):
        o, _ = gated_delta_product(q, k, v, g, beta, N, use_qk_l2norm=True, backend=backend)
        return torch.autograd.grad(o.sin().sum(), k, create_graph=True)[0]

    if backend == "recurrent":
        torch.autograd.gradcheck(slope, k)
    else:
        first = slope(k)
        with pytest.raises(RuntimeError, match="no second derivative"):
            first.sum().backward()


@pytest.mark.parametrize("bounds", [[0, 5], [1, 37], [0, 20, 10, 37]])
def test_boundaries_that_do_not_cover_the_tokens(bounds):
    with pytest.raises(ValueError, match="cu_seqlens"):
        gated_delta_product(*inputs(), N, cu_seqlens=torch.tensor(bounds))


def test_fla_normalisation_is_contractive_and_differentiable():
    """What feeds fla: beta' |k rounded|^2 = beta |k exact|^2, and the norm's own gradient."""
    k = torch.randn(1, 50, 2, 64).bfloat16().requires_grad_()
    q, beta = torch.randn(1, 25, 2, 64).bfloat16(), torch.full((1, 50, 2), 2.0, requires_grad=True)
    _, unit, scaled = normalise(q, k, beta, True)
    assert unit.dtype == torch.bfloat16 and scaled.dtype == torch.float32
    assert (scaled * unit.float().square().sum(-1) - 2).abs().max() < 1e-5
    dunit = torch.randn_like(unit)
    (got,) = torch.autograd.grad(unit, k, dunit, retain_graph=True)
    exact = k.detach().double().requires_grad_()
    norm = exact * torch.rsqrt(exact.square().sum(-1, keepdim=True) + 1e-6)
    (want,) = torch.autograd.grad(norm, exact, dunit.double())
    assert (got.double() - want).norm() < 5e-3 * want.norm()
    zero = torch.zeros(1, 50, 2, 64, dtype=torch.bfloat16)
    assert torch.equal(normalise(q, zero, beta, True)[2], beta)
