"""A non-finite gradient on one rank: no rank updates, the step is counted, and it ends after N in a row."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from tests.processes import run_distributed
from tests.toy import arguments, learned, records, train, weights
from torchtitan_deltaproduct.checkpoint import scan
from torchtitan_deltaproduct.config import load_config
from torchtitan_deltaproduct.errors import NonFiniteError
from torchtitan_deltaproduct.optimizers import local


def held(trainer) -> dict[str, torch.Tensor]:
    """Copies of this rank's part of the weights, the moments and their step, by name."""
    tensors = dict(trainer.model_parts[0].named_parameters())
    names = {p: name for name, p in tensors.items()}
    for p, state in (item for optimizer in trainer.optimizers for item in optimizer.state.items()):
        tensors |= {f"{names[p]}.{name}": value for name, value in state.items()}
    return {name: local(tensor).detach().clone() for name, tensor in tensors.items()}


def poisoned(rank: int, argv: list[str], poison_rank: int, steps: tuple[int, ...], what: str = "loss") -> None:
    """Trains with a NaN on one rank: its loss and all its gradients, or what it takes for the norm of all ranks."""
    from torchtitan_deltaproduct.titan import trainer
    from torchtitan_deltaproduct.titan.run import run

    class Poisoned(trainer.Trainer):
        def forward_backward_step(self, **given):
            if rank == poison_rank and self.step in steps and what == "loss":
                given["global_valid_tokens"] = given["global_valid_tokens"] * float("nan")
            return super().forward_backward_step(**given)

        def train_step(self, feed):
            before = held(self)
            bad = rank == poison_rank and self.step in steps and what == "norm"
            trainer.clip_gradients = (lambda *given: clip(*given) * float("nan")) if bad else clip
            stop = super().train_step(feed)
            after = held(self)
            same = [torch.equal(after[name], value) for name, value in before.items()]
            assert all(same) if self.step in steps else not any(same)
            assert {int(value) for name, value in after.items() if name.endswith("step")} == {
                sum(step not in steps for step in range(1, self.step + 1))
            }
            return stop

    original, clip, trainer.Trainer = trainer.Trainer, trainer.clip_gradients, Poisoned
    try:
        run(load_config(argv))
    finally:
        trainer.Trainer, trainer.clip_gradients = original, clip


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


def test_a_checkpoint_before_the_first_update_is_gone_on_from(toy, tmp_path, monkeypatch):
    """`foreach` has no state until it has made an update; a checkpoint without it could not be read."""
    from torchtitan_deltaproduct.titan import device

    device.install("cpu")
    from torchtitan_deltaproduct.titan import trainer

    class Poisoned(trainer.Trainer):
        def forward_backward_step(self, **given):
            given["global_valid_tokens"] = given["global_valid_tokens"] * (float("nan") if self.step <= 2 else 1)
            return super().forward_backward_step(**given)

    monkeypatch.setattr(trainer, "Trainer", Poisoned)
    options = ("--optimizer.implementation", "foreach")
    train(toy, tmp_path / "run", *options, "--training.steps", "2")
    train(toy, tmp_path / "run", *options, "--training.steps", "4")
    assert [r["skipped_steps"] for r in records(tmp_path / "run") if "lr" in r] == [1, 2, 2, 2]


def test_one_rank_disagrees_about_the_norm(toy, tmp_path):
    """Under Muon, which looks at the device's answer itself."""
    options = ("--checkpoint.no-enable", "--optimizer.name", "Muon")
    run_distributed(poisoned, 2, (arguments(toy, tmp_path / "run", options), 1, (3,), "norm"))
    assert [r["skipped_steps"] for r in records(tmp_path / "run") if "lr" in r] == [0, 0, 1, 1, 1, 1, 1, 1]


def skipped_and_signalled(rank: int, argv: list[str], folder: str) -> None:
    """Trains with a NaN on rank 3 in step 3 and a signal to rank 2 in step 5; notes what this rank came to."""
    from torchtitan_deltaproduct.titan import trainer
    from torchtitan_deltaproduct.titan.run import run

    seen = {}

    class Troubled(trainer.Trainer):
        def forward_backward_step(self, **given):
            seen.update(trainer=self)
            if (rank, self.step) == (3, 3):
                given["global_valid_tokens"] = given["global_valid_tokens"] * float("nan")
            if (rank, self.step) == (2, 5):
                os.kill(os.getpid(), signal.SIGUSR1)
            return super().forward_backward_step(**given)

    original, trainer.Trainer = trainer.Trainer, Troubled
    try:
        run(load_config(argv))
    finally:
        trainer.Trainer = original
    found = seen["trainer"]
    ranks = found.parallel_dims.get_mesh("loss").size()
    told = {"step": found.step, "skipped": found.skipped_steps, "loss ranks": ranks}
    Path(folder, f"rank-{rank}.json").write_text(json.dumps(told))


def test_replicas_of_shards_agree(toy, tmp_path):
    """HSDP, 2 x 2: what one rank of one replica meets, all ranks of all replicas answer, after the same step."""
    options = ("--parallelism.data_parallel_replicate_degree", "2", "--parallelism.data_parallel_shard_degree", "2",
               "--training.local_batch_size", "1", "--validation.no-enable")  # fmt: skip
    run_distributed(skipped_and_signalled, 4, (arguments(toy, tmp_path / "run", options), str(tmp_path)))
    told = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(4)]
    assert told[0] == {"step": told[0]["step"], "skipped": 1, "loss ranks": 4} and told == told[:1] * 4
    assert told[0]["step"] in (5, 6) and scan(tmp_path / "run/checkpoint")[-1].step == told[0]["step"]
    steps = [r for r in records(tmp_path / "run") if "lr" in r]
    assert [r["step"] for r in steps if r["loss"] is None] == [3] and steps[-1]["step"] == told[0]["step"]


def test_the_first_step_is_bad(toy, tmp_path):
    """Adam's state begins with a step that was skipped: the first update is its first all the same, and it is saved."""
    argv = arguments(toy, tmp_path / "run", ("--checkpoint.interval", "1", "--checkpoint.keep_latest_k", "0"))
    poisoned(0, argv, 0, (1,))
    steps = {step: value for step in (1, 2, 8) for name, value in weights(tmp_path / "run", step).items()
             if name.endswith("tok_embeddings.weight.step")}  # fmt: skip
    assert steps == {1: 0, 2: 1, 8: 7}


def test_the_bad_gradient_is_named(toy, tmp_path, monkeypatch, capsys):
    """One NaN makes the norm NaN: the other gradients stay finite, and are not named."""
    from torchtitan_deltaproduct.titan.trainer import Trainer

    original = Trainer.forward_backward_step

    def spoiled(self, **given):
        loss = original(self, **given)
        if self.step == 2:
            self.model_parts[0].get_parameter("layers.1.mlp.up_proj.weight").grad[3, 4] = float("nan")
        return loss

    monkeypatch.setattr(Trainer, "forward_backward_step", spoiled)
    train(toy, tmp_path / "run", "--validation.no-enable", "--checkpoint.no-enable")
    steps = [r for r in records(tmp_path / "run") if "lr" in r]
    assert [r["skipped_steps"] for r in steps] == [0, 1, 1, 1, 1, 1, 1, 1]
    assert steps[1]["loss"] is not None and steps[1]["grad_norm"] is None
    assert "first non-finite gradient on rank 0: layers.1.mlp.up_proj.weight\n" in capsys.readouterr().out


def test_too_many_in_a_row(toy, tmp_path):
    argv = arguments(toy, tmp_path / "run", ("--training.max_skipped_steps", "2"))
    with pytest.raises(NonFiniteError, match="2 steps in a row had a non-finite loss .* the last good step is 4"):
        poisoned(0, [*argv, "--training.local_batch_size", "4"], 0, (5, 6, 7, 8))
    assert [i.step for i in scan(tmp_path / "run/checkpoint")][-1] == 4


def test_non_finite_weights_are_not_saved(toy, tmp_path, monkeypatch):
    from torchtitan_deltaproduct.titan.optimizer import GroupedOptimizers

    original = GroupedOptimizers.step
    count = []

    def step(self, skip):
        original(self, skip)
        count.append(1)
        if len(count) == 4:
            next(self.model_parts[0].parameters()).data[0, 0] = float("inf")

    monkeypatch.setattr(GroupedOptimizers, "step", step)
    with pytest.raises(NonFiniteError, match="weights at step 4 are not finite and were not saved"):
        train(toy, tmp_path / "run", "--validation.no-enable")
    assert [i.step for i in scan(tmp_path / "run/checkpoint")] == [2]
