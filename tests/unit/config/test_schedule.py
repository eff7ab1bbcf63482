"""`Schedule` against the schedule torchtitan builds."""

import itertools

import pytest
import torch
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.config.job_config import LRScheduler

from torchtitan_deltaproduct.config import Schedule

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
    schedule = Schedule.of(config, 10_000)
    # After the last step of a run the scheduler moves on once more.
    assert schedule(0) == scheduler.get_last_lr()[0]
    for step in range(1, total + 1):
        scheduler.step()
        assert schedule(step) == scheduler.get_last_lr()[0]


def test_numbers():
    schedule = Schedule(warmup_steps=2, total_steps=10, decay_ratio=0.5, decay_type="linear", min_lr_factor=0.1)
    assert [round(schedule(step), 3) for step in range(10)] == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.82, 0.64, 0.46, 0.28]
