"""A sequence cut in shards on a CUDA device, against the float64 recurrence: python -m pytest -m gpu tests/gpu."""

import pytest
import torch
import torch.nn.functional as F

from tests.unit.ops.test_shards import by_shards, random_positions, whole
from torchtitan_deltaproduct.ops import triton_backend

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("cut", [1, 3])
@pytest.mark.parametrize("every", [None, 90])
@pytest.mark.parametrize(("n", "gated"), [(1, True), (2, False), (2, True), (3, False), (4, True)])
def test_our_kernels(monkeypatch, n, gated, every, cut):
    """`cut`: segments that a shard is scanned in."""
    monkeypatch.setattr(triton_backend, "segments", lambda *_: cut)
    torch.manual_seed(n)
    shape = 2, 512 * n, 2, 128
    q, k, v = (torch.randn(2, rows, *shape[2:], device="cuda") for rows in (512, *[shape[1]] * 2))
    low = {"q": F.normalize(q, dim=-1).bfloat16(), "k": F.normalize(k, dim=-1).bfloat16(), "v": v.bfloat16()}
    low["g"] = -0.2 * torch.rand(2, 512, 2, device="cuda") if gated else None
    low["beta"] = 2 * torch.rand(*shape[:3], device="cuda") / low["k"].float().square().sum(-1).clamp(min=1)
    exact = {name: None if x is None else x.cpu().double().requires_grad_() for name, x in low.items()}
    do = torch.randn(2, 512, 2, 128)
    positions = None if every is None else random_positions(2, 512, every, n)
    expected = whole({**exact, "initial_state": None}, do.double(), n, positions, use_qk_l2norm=False)
    there = None if positions is None else positions.cuda()
    found = by_shards(low, do.cuda().bfloat16(), n, 4, there, "triton")
    for name, x in expected.items():
        assert (found[name].cpu().double() - x).norm() < 2e-2 * x.norm(), name
