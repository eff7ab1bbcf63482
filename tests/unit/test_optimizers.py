"""Muon's step against one written out by hand, and the arithmetic of dividing its work."""

import math

import pytest
import torch

from torchtitan_deltaproduct.optimizers import Muon, dealt_out, orthogonalization_flops, rows_of

LR, DECAY, MOMENTUM = 0.02, 0.5, 0.9


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """Five steps of x <- a x + (b A + c A^2) x, A = x x^T, from x of norm 1 and no taller than wide."""
    x = matrix.double()
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    x = x / x.square().sum().sqrt()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.T if tall else x


@pytest.mark.parametrize("shape", [(6, 6), (12, 5), (4, 9)])
@pytest.mark.parametrize("stacked", [1, 2])
def test_three_steps_by_hand(shape, stacked):
    """Float64 by hand, bfloat16 inside of torch's: updates agree to 4 % of their norm."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(shape))
    optimizer = Muon([{"params": [weight], "stacked": stacked}], lr=LR, weight_decay=DECAY, momentum=MOMENTUM,
                     adjust_lr_fn="match_rms_adamw")  # fmt: skip
    expected, momentum = weight.detach().double(), torch.zeros(shape, dtype=torch.float64)
    for _ in range(3):
        weight.grad = torch.randn(shape)
        optimizer.step()
        gradient = weight.grad.double()
        momentum = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
        nesterov = MOMENTUM * momentum + (1 - MOMENTUM) * gradient
        update = torch.cat([newton_schulz(part) for part in nesterov.chunk(stacked)])
        scale = 0.2 * math.sqrt(max(shape[0] // stacked, shape[1]))
        expected = expected * (1 - LR * DECAY) - LR * scale * update
        torch.testing.assert_close(optimizer.state[weight]["momentum_buffer"].double(), momentum, rtol=1e-5, atol=1e-6)
        assert (weight - expected).norm() < 0.04 * LR * scale * update.norm()
        # So does AdamW step, whose updates have a root mean square of 0.2 to 0.4 of the rate.
        assert 0.1 < (LR * scale * update).square().mean().sqrt() / LR < 0.3
        expected = weight.detach().double()


def test_the_same_as_torch_where_one_rank_has_all():
    """Bit for bit."""
    results = []
    for cls in (Muon, torch.optim.Muon):
        torch.manual_seed(1)
        weights = [torch.nn.Parameter(torch.randn(shape)) for shape in [(8, 8), (3, 7), (9, 2)]]
        optimizer = cls(weights, lr=LR, weight_decay=DECAY, momentum=MOMENTUM, adjust_lr_fn="match_rms_adamw")
        for _ in range(3):
            for weight in weights:
                weight.grad = torch.randn_like(weight)
            optimizer.step()
        results.append([t for w in weights for t in (w, optimizer.state[w]["momentum_buffer"])])
    assert all(map(torch.equal, *results))


def test_rows_are_those_of_chunk():
    for rows in range(1, 12):
        for ranks in range(1, 9):
            chunks = torch.arange(rows).chunk(ranks)
            sizes = [len(chunk) for chunk in chunks] + [0] * (ranks - len(chunks))
            assert [rows_of(rank, rows, ranks) for rank in range(ranks)] == sizes


def test_work_is_dealt_out_evenly():
    assert dealt_out([5, 9, 4], 2) == [[1], [0, 2]]
    assert dealt_out([1], 3) == [[0], [], []]
    costs = [orthogonalization_flops(1024, columns) for columns in (1024, 2048, 2048, 1024, 2816, 2816, 2816)] * 24
    owned = dealt_out(costs, 8)
    assert sorted(task for own in owned for task in own) == list(range(len(costs)))
    loads = [sum(costs[task] for task in own) for own in owned]
    assert max(loads) < 1.05 * min(loads)


def test_flops_are_those_of_torch():
    from torch.utils.flop_counter import FlopCounterMode

    weight = torch.nn.Parameter(torch.randn(24, 16))
    weight.grad = torch.randn(24, 16)
    with FlopCounterMode(display=False) as counter:
        Muon([weight]).step()
    assert counter.get_total_flops() == orthogonalization_flops(24, 16) == orthogonalization_flops(16, 24)
