"""`Schedule` against the schedule torchtitan builds."""

import itertools

import pytest
import torch
from torchtitan.components.lr_scheduler import build_lr_schedulers

from torchtitan_deltaproduct.config import Schedule
from torchtitan_deltaproduct.config.job import LRScheduler

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
    schedule = Schedule(warmup_steps=2, total_steps=10, decay_steps=5, decay_type="linear", min_lr_factor=0.1)
    assert [round(schedule(step), 3) for step in range(10)] == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.82, 0.64, 0.46, 0.28]
    assert schedule.phases() == {"warm-up": (1, 2), "stable": (3, 6), "decay": (7, 10)} and schedule.last_at_peak == 6


@pytest.mark.parametrize(
    ("options", "phases"),
    [
        ({}, {"warm-up": (1, 20), "stable": (21, 181), "decay": (182, 200)}),
        ({"decay_steps": 50}, {"warm-up": (1, 20), "stable": (21, 151), "decay": (152, 200)}),
        ({"decay_ratio": 0.5}, {"warm-up": (1, 20), "stable": (21, 101), "decay": (102, 200)}),
        ({"decay_steps": 180}, {"warm-up": (1, 20), "decay": (21, 200)}),
        ({"total_steps": 1000}, {"warm-up": (1, 20), "stable": (21, 901), "decay": (902, 1000)}),
        ({"schedule": "decay"}, {"warm-up": (1, 20), "decay": (21, 200)}),
        ({"schedule": "decay", "warmup_steps": 0, "decay_ratio": 0.0}, {"stable": (1, 200)}),
    ],
)
def test_phases_of_wsd(options, phases):
    """Phases are where the factor rises, is 1 and falls; a decay of N steps begins one step late, as torchtitan's."""
    schedule = Schedule.of(LRScheduler(**{"schedule": "wsd", "warmup_steps": 20} | options), 200)
    assert schedule.phases() == phases
    for name, (first, last) in phases.items():
        factors = [schedule(step - 1) for step in range(first, last + 1)]
        assert (set(factors) == {1.0}) == (name == "stable")
        assert factors == sorted(factors, reverse=name == "decay")
    assert [step for _, ends in phases.items() for step in ends][:: 2 * len(phases) - 1] == [1, schedule.total_steps]


def test_a_longer_run_has_the_same_stable_phase():
    """The rate of a step before the decay does not depend on where the run ends: branches share their beginning."""
    table = LRScheduler(schedule="wsd", warmup_steps=5, decay_steps=30)
    short, long = Schedule.of(table, 100), Schedule.of(table, 400)
    assert [short(step) for step in range(short.last_at_peak)] == [long(step) for step in range(short.last_at_peak)]
    assert [short(100 - back) for back in range(1, 30)] == [long(400 - back) for back in range(1, 30)]
