"""A non-finite gradient on one rank: no rank updates, the step is counted, and it ends after N in a row."""

import pytest
import torch

from tests.dist.helper import run_distributed
from tests.toy import arguments, learned, records, train, weights
from torchtitan_deltaproduct.checkpoint import scan
from torchtitan_deltaproduct.config import load_config
from torchtitan_deltaproduct.errors import NonFiniteError


def poisoned(rank: int, argv: list[str], poison_rank: int, steps: tuple[int, ...]) -> None:
    from torchtitan_deltaproduct.titan import trainer
    from torchtitan_deltaproduct.titan.run import run

    class Poisoned(trainer.Trainer):
        def forward_backward_step(self, **given):
            if rank == poison_rank and self.step in steps:
                given["global_valid_tokens"] = given["global_valid_tokens"] * float("nan")
            return super().forward_backward_step(**given)

    original, trainer.Trainer = trainer.Trainer, Poisoned
    try:
        run(load_config(argv))
    finally:
        trainer.Trainer = original


def test_one_bad_rank_skips_the_step_everywhere(toy, tmp_path):
    run_distributed(poisoned, 2, (arguments(toy, tmp_path / "run", ()), 1, (3,)))
    steps = [r for r in records(tmp_path / "run") if "lr" in r]
    assert [r["step"] for r in steps] == list(range(1, 9))
    assert steps[2]["loss"] is None and [r["skipped_steps"] for r in steps] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert all(torch.isfinite(v).all() for v in weights(tmp_path / "run", 8).values() if isinstance(v, torch.Tensor))
    train(toy, tmp_path / "clean")
    clean = learned(tmp_path / "clean")
    # Losses agree until the skipped update, and the schedule goes on as if nothing had happened.
    assert all(learned(tmp_path / "run")[(s, "lr")] == clean[(s, "lr")] for s in range(1, 9))
    assert steps[3]["loss"] != clean[(4, "loss")]


def test_too_many_in_a_row(toy, tmp_path):
    argv = arguments(toy, tmp_path / "run", ("--training.max_skipped_steps", "2"))
    with pytest.raises(NonFiniteError, match="2 steps in a row had a non-finite loss .* the last good step is 4"):
        poisoned(0, [*argv, "--training.local_batch_size", "4"], 0, (5, 6, 7, 8))
    assert [i.step for i in scan(tmp_path / "run/checkpoint")][-1] == 4


def test_non_finite_weights_are_not_saved(toy, tmp_path, monkeypatch):
    from torchtitan_deltaproduct.titan.optimizer import TwoGroupOptimizers

    original = TwoGroupOptimizers.step
    count = []

    def step(self):
        original(self)
        count.append(1)
        if len(count) == 4:
            next(self.model_parts[0].parameters()).data[0, 0] = float("inf")

    monkeypatch.setattr(TwoGroupOptimizers, "step", step)
    with pytest.raises(NonFiniteError, match="weights at step 4 are not finite and were not saved"):
        train(toy, tmp_path / "run", "--validation.no-enable")
    assert [i.step for i in scan(tmp_path / "run/checkpoint")] == [2]
