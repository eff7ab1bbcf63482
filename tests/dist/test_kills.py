"""Hundreds of SIGKILLs at random moments: startup, a step, a save, validation. Nothing that is learned changes.

bash launch/test.sh -m slow tests/dist/test_kills.py            200 kills, about 25 minutes on two idle cores
KILLS=20 bash launch/test.sh -m slow tests/dist/test_kills.py

KILLS_SEED=2 picks other moments: on a machine of many cores several such commands share the work.
"""

import os
import random
import time

import pytest

from tests.dist.test_resume import FULL
from tests.toy import assert_same_weights, kill, launch, learned, log_of, weights
from torchtitan_deltaproduct.events import read_events

KILLS = int(os.environ.get("KILLS", "200"))
CASES = {"1-sync": (1, ()), "1-async": (1, ("--checkpoint.async_mode", "async")), "2-sync": (2, ()),
         "2-async-compile-ac": (2, FULL)}  # fmt: skip
# A step of the toy takes milliseconds: more of them, so that kills fall into the training as well.
LONG = ("--training.steps", "400", "--lr_scheduler.total_steps", "400", "--checkpoint.interval", "7",
        "--validation.freq", "50")  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", CASES)
def test_random_kills(toy, tmp_path, case):
    ranks, options = CASES[case]
    options = (*options, *LONG)
    unbroken, generator = tmp_path / "unbroken", random.Random(case + os.environ.get("KILLS_SEED", ""))
    kills, runs = 0, 0
    begin = time.monotonic()
    launch(toy, unbroken, *options, ranks=ranks)
    duration = time.monotonic() - begin
    while kills < KILLS / len(CASES):
        run = tmp_path / f"killed-{runs}"
        runs += 1
        while not (run / "checkpoint/step-400/complete.json").exists():
            process = launch(toy, run, *options, ranks=ranks, wait=False)
            time.sleep(pause := generator.uniform(0.2, 0.9) * duration)
            if process.poll() is None:
                kills += 1
            else:
                # Sooner done than the first, which had a server to start.
                duration = pause
            kill(process)
        launch(toy, run, *options, ranks=ranks)
        assert learned(run) == learned(unbroken)
        assert_same_weights(weights(run, 400), weights(unbroken, 400))
        assert_no_work_lost(run)
        print(f"{case}: {kills} kills in {runs} runs", flush=True)


def assert_no_work_lost(run) -> None:
    """Every launch begins at the newest save before it, or at a newer one whose event the kill cut off."""
    saved = 0
    for event in read_events(run):
        if event["event"] == "save":
            saved = max(saved, event["step"])
        elif event["event"] == "launch":
            assert event["step"] >= saved, (event, saved, log_of(run)[-2000:])
