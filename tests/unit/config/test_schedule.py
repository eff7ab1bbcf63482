"""`lr_factor` against the schedule torchtitan builds."""

import itertools

import pytest
import torch
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.config.job_config import LRScheduler

from torchtitan_deltaproduct.config import lr_factor

SETTINGS = itertools.product(
    [0, 1, 7, 40],  # warm-up
    [40, 41],  # total
    [None, 0.0, 0.1, 0.33, 1.0],  # decay ratio
    ["linear", "sqrt", "cosine"],
    [0.0, 0.1],
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("warmup", "total", "ratio", "kind", "least"), list(SETTINGS))
def test_equals_torchtitan(warmup, total, ratio, kind, least):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    config = LRScheduler(
        warmup_steps=warmup, decay_ratio=ratio, decay_type=kind, min_lr_factor=least, total_steps=total
    )
    scheduler = build_lr_schedulers([optimizer], config, 10_000).schedulers[0]
    curve = {
        "warmup_steps": warmup,
        "total_steps": total,
        "decay_ratio": ratio,
        "decay_type": kind,
        "min_lr_factor": least,
    }
    # After the last step of a run the scheduler moves on once more.
    assert lr_factor(0, **curve) == scheduler.get_last_lr()[0]
    for step in range(1, total + 1):
        scheduler.step()
        assert lr_factor(step, **curve) == scheduler.get_last_lr()[0]


def test_numbers():
    curve = {"warmup_steps": 2, "total_steps": 10, "decay_ratio": 0.5, "min_lr_factor": 0.1}
    linear = [round(lr_factor(step, **curve, decay_type="linear"), 3) for step in range(10)]
    assert linear == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.82, 0.64, 0.46, 0.28]
