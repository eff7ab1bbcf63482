"""Our kernels on a sequence cut in shards, under Triton's interpreter in float32: run by test_shards.py."""

import pytest
import torch

from tests.unit.ops.test_parity import make
from tests.unit.ops.test_shards import by_shards, random_positions, whole
from torchtitan_deltaproduct.ops import shards, triton_backend
from torchtitan_deltaproduct.ops.normalize import l2norm


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("n", "gated", "every", "cut", "keep_states"), [
    (1, True, None, 1, True), (2, False, None, 2, False), (3, True, 20, 2, True), (4, False, 60, 1, False),
])  # fmt: skip
def test_cuts(monkeypatch, n, gated, every, cut, keep_states):
    """`cut`: segments that a shard is scanned in."""
    monkeypatch.setattr(triton_backend, "segments", lambda *_: cut)
    given = make(192, n, gated=gated, dim=16, dim_v=24, seed=n)
    args = dict(given)
    for name in ("q", "k"):
        args[name] = l2norm(given[name].detach()).requires_grad_()
    do = torch.randn(1, 192, 2, 24, dtype=torch.float64)
    positions = None if every is None else random_positions(1, 192, every, n)
    expected = whole(args, do, n, positions, use_qk_l2norm=False)
    single = {name: None if x is None else x.detach().float() for name, x in args.items()}
    found = by_shards(single, do.float(), n, 2, positions, "triton", keep_states)
    for name, x in expected.items():
        assert (found[name].double() - x).norm() < 1e-5 * x.norm(), name


@pytest.mark.parametrize(("gated", "every", "cut"), [(False, None, 1), (True, 20, 2)])
def test_opcheck(monkeypatch, gated, every, cut):
    monkeypatch.setattr(triton_backend, "segments", lambda *_: cut)
    args = make(96, 2, gated=gated, dim=16, dim_v=24, dtype=torch.float32)
    shard = *(None if args[name] is None else args[name].detach() for name in ("q", "k", "v", "g", "beta")), None
    if every is not None:
        shard = *shard[:5], random_positions(1, 96, every, 0)
    options, do, state = (2, 0.3, False, "triton"), torch.randn(1, 96, 2, 24), torch.randn(1, 2, 16, 24)
    _, *made = shards.MAP(*shard, *options, True)
    _, states = shards.OUTPUT(*shard, state, *made, *options, True)
    _, shares = shards.RESPONSE(do, *shard, *made, *options)
    for op, given in {
        shards.MAP: (*shard, *options, True),
        shards.OUTPUT: (*shard, state, *made, *options, True),
        shards.RESPONSE: (do, *shard, *made, *options),
        shards.BACKWARD: (do, state, *shard, state, *made, states, shares, *options),
    }.items():
        torch.library.opcheck(op, given, test_utils=("test_schema", "test_faketensor"))
