"""Many SIGKILLs at random moments of one run: startup, a step, a save, validation. Nothing that is learned changes.

    bash launch/test.sh -m slow tests/dist/test_kills.py       about 10 minutes
"""

import random
import time

import pytest

from tests.dist.test_resume import FULL
from tests.toy import assert_same_weights, kill, launch, learned, log_of, weights


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("ranks", "options"),
    [(1, ()), (1, ("--checkpoint.async_mode", "async")), (2, ()), (2, FULL)],
    ids=["1-sync", "1-async", "2-sync", "2-async-compile-ac"],
)
def test_random_kills(toy, tmp_path, ranks, options):
    # A step of the toy takes milliseconds: more of them, so that kills fall into the training as well.
    options = (*options, "--training.steps", "400", "--lr_scheduler.total_steps", "400", "--checkpoint.interval", "7",
               "--validation.freq", "50")  # fmt: skip
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    begin = time.monotonic()
    launch(toy, unbroken, *options, ranks=ranks)
    duration = time.monotonic() - begin
    generator, kills = random.Random(ranks), 0
    while not (killed / "checkpoint/step-400/complete.json").exists() and kills < 8:
        process = launch(toy, killed, *options, ranks=ranks, wait=False)
        time.sleep(generator.uniform(0.15, 0.6) * duration)
        kills += process.poll() is None
        kill(process)
    launch(toy, killed, *options, ranks=ranks)
    print(f"{kills} kills, resumed {log_of(killed).count('resumed step')} times")
    assert kills >= 2
    assert learned(killed) == learned(unbroken)
    assert_same_weights(weights(killed, 400), weights(unbroken, 400))
