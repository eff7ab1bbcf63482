"""Restart equals no restart: killed at any point, resharded, with other settings."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.processes import run_distributed
from tests.toy import (
    arguments,
    assert_close,
    assert_same_weights,
    kill,
    launch,
    learned,
    log_of,
    records,
    train,
    wait_for,
    weights,
)
from torchtitan_deltaproduct import status
from torchtitan_deltaproduct.checkpoint import scan
from torchtitan_deltaproduct.checkpoint.safe_dcp import read_index
from torchtitan_deltaproduct.config import Schedule, load_config
from torchtitan_deltaproduct.errors import CheckpointError, ConfigError
from torchtitan_deltaproduct.events import last_stop, read_events
from torchtitan_deltaproduct.history import read_jsonl

FULL = ("--compile.enable", "--activation_checkpoint.mode", "selective", "--activation_checkpoint.selective_ac_option",
        "op", "--checkpoint.async_mode", "async")  # fmt: skip


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_process_alone_saves_and_loads_without_collectives(toy, tmp_path, monkeypatch, mode):
    """gloo's copies would leave OpenMP threads that slow every later step; see `checkpointer.alone`."""
    words = ("--checkpoint.async_mode", mode, "--training.steps")
    for name in ("gather_object", "scatter_object_list"):
        monkeypatch.setattr(f"torch.distributed.{name}", lambda *_, **__: pytest.fail("gathered"))
    train(toy, tmp_path / "run", *words, "4")
    train(toy, tmp_path / "run", *words, "6")
    assert {info.step for info in scan(tmp_path / "run/checkpoint") if info.complete} >= {4, 6}


@pytest.mark.parametrize(
    ("ranks", "options", "moment"),
    [
        (1, (), "step 5/8"),
        (1, ("--checkpoint.async_mode", "async", "--data.num_workers", "1"), "validation at step 4"),
        # Compiled the same training is that of test_equivalence.py; two ranks are stopped in test_signals.py.
        pytest.param(2, FULL, "step 7/8", marks=pytest.mark.slow),
    ],
    ids=["1-sync", "1-async-workers", "2-async-compile-ac"],
)
def test_killed_and_restarted(toy, tmp_path, ranks, options, moment):
    unbroken, killed = tmp_path / "unbroken", tmp_path / "killed"
    if ranks == 1:
        train(toy, unbroken, *options)
    else:
        launch(toy, unbroken, *options, ranks=ranks)
    process = launch(toy, killed, *options, ranks=ranks, wait=False)
    wait_for(killed, moment)
    kill(process)
    assert not (killed / "checkpoint/step-8").exists()
    # An asynchronous save may not have come to its end yet.
    saved = any(info.complete for info in scan(killed / "checkpoint"))
    launch(toy, killed, *options, ranks=ranks)
    assert ("resumed step" in log_of(killed)) == saved and (saved or "async" in options)
    assert learned(killed) == learned(unbroken)
    assert_same_weights(weights(killed, 8), weights(unbroken, 8))


def test_a_run_that_was_cut_short_goes_on_without_a_second_warm_up(toy, tmp_path, capsys):
    """Its warm-up was shortened with it; told once a launch, on two ranks as on one."""
    config = tmp_path / "toy.toml"
    config.write_text(toy.read_text().replace("warmup_steps = 3\ntotal_steps = 8", "warmup_steps = 6"))
    run, lr = tmp_path / "run", 1e-2
    train(config, run, "--training.steps", "4")
    assert capsys.readouterr().out.count("shortened from 6 to 3, as training.steps from 8 to 4") == 1
    launch(config, run, "--training.steps", "7", ranks=2)
    assert log_of(run).count("lr_scheduler.warmup_steps: stays 3, not 6: the warm-up of this run is over") == 1
    train(config, run)
    rates = {r["step"]: r["lr"] for r in records(run) if "loss" in r}
    schedule = Schedule(warmup_steps=3, total_steps=7, decay_steps=4, decay_type="linear", min_lr_factor=0.0)
    assert [rates[step] for step in (1, 2, 3)] == pytest.approx([lr / 3, lr * 2 / 3, lr])
    assert [rates[step] for step in (5, 6, 7)] == pytest.approx([lr * schedule(step) for step in (4, 5, 6)])
    assert rates[8] < lr / 4


def test_a_torn_newest_checkpoint_is_skipped(toy, tmp_path):
    train(toy, tmp_path / "a")
    train(toy, tmp_path / "b", "--training.steps", "6")
    data = next((tmp_path / "b/checkpoint/step-6").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:100])
    train(toy, tmp_path / "b")
    assert [r["step"] for r in records(tmp_path / "b") if "loss" in r] == list(range(1, 9))
    assert learned(tmp_path / "b") == learned(tmp_path / "a")
    assert_same_weights(weights(tmp_path / "a", 8), weights(tmp_path / "b", 8))


def test_retention_counts_only_complete_ones(toy, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoint/step-300-bad").mkdir(parents=True)
    (run / "checkpoint/step-7").mkdir()
    (run / "checkpoint/step-7/notes.txt").write_text("not ours")
    train(toy, run, "--checkpoint.keep_latest_k", "2", "--checkpoint.keep_every", "4", "--checkpoint.interval", "1")
    assert [(i.step, i.complete) for i in scan(run / "checkpoint")] == [(4, True), (7, True), (8, True)]
    assert (run / "checkpoint/step-300-bad").is_dir()
    kept = [path.read_text() for path in (run / "checkpoint").glob("step-7.found-*/notes.txt")]
    assert kept == ["not ours"]


def test_the_best_is_kept(toy, tmp_path, monkeypatch, capsys):
    """By the losses in markers, over three launches; one that a stop broke off is made up for and noted by the next."""
    from torchtitan_deltaproduct.titan.trainer import Trainer

    run = tmp_path / "run"
    best = ("--checkpoint.keep_best", "1", "--checkpoint.keep_latest_k", "2", "--checkpoint.interval", "1",
            "--validation.freq", "1")  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "after_validation_batch", lambda self: "SIGTERM" if self.step == 5 else None)
        train(toy, run, *best)
    before = {info.step: info.marker.validation_loss for info in scan(run / "checkpoint")}
    losses = {r["step"]: r["validation_loss"] for r in records(run) if "validation_loss" in r}
    assert sorted(losses) == [0, 1, 2, 3, 4] and before[5] is None and before[4] == losses[4]
    train(toy, run, *best, "--training.steps", "5")
    assert scan(run / "checkpoint")[-1].marker.validation_loss == records(run)[-1]["validation_loss"]
    # At this rate the loss rises.
    train(toy, run, *best, "--optimizer.lr", "30")
    losses = {r["step"]: r["validation_loss"] for r in records(run) if "validation_loss" in r and r["step"]}
    lowest = min(losses, key=losses.get)
    assert lowest < 7
    kept = {info.step: info.marker.validation_loss for info in scan(run / "checkpoint")}
    assert kept == {step: losses[step] for step in (lowest, 7, 8)}
    assert "resumed step 5 of 8" in capsys.readouterr().out
    status.main([str(run)])
    assert f"step {lowest}, validation loss {losses[lowest]:.4f}" in capsys.readouterr().out


def continue_on(rank: int, commands: list[list[str]]) -> None:
    from torchtitan_deltaproduct.titan.run import run

    for argv in commands:
        run(load_config(argv))


def reload_save_continue(rank: int, argv: list[str], checkpoints: str) -> None:
    """Loads the newest checkpoint of a run and writes it again, as step 5; then continues from the newest, step 4."""
    from torchtitan_deltaproduct.titan import run as module

    config = load_config(argv)
    module.start_logging()
    module.resolve_precision(config, "cpu")
    module.device.install("cpu")
    from torchtitan_deltaproduct.titan.trainer import Trainer

    trainer = Trainer(config)
    trainer.checkpointer.load()
    assert trainer.step == 4
    trainer.checkpointer.save(5, last_step=True)
    trainer.close()
    Path(checkpoints, "step-5").rename(Path(checkpoints, "again")) if rank == 0 else None
    torch.distributed.barrier()
    continue_on(rank, [argv])


@pytest.mark.parametrize(("before", "after", "optimizer"), [
    (2, 1, "AdamW"), pytest.param(1, 4, "AdamW", marks=pytest.mark.slow), (1, 2, "Muon"),
])  # fmt: skip
def test_another_number_of_ranks(toy, tmp_path, before, after, optimizer):
    run, one = tmp_path / "run", ("--training.local_batch_size", "1", "--optimizer.name", optimizer)
    train(toy, tmp_path / "unbroken", *one)
    first = arguments(toy, run, (*one, "--training.steps", "4"))
    run_distributed(continue_on, before, ([first],))
    run_distributed(reload_save_continue, after, (arguments(toy, run, one), str(run / "checkpoint")))
    assert_same_weights(weights(run, 4), weights(run, "again"))
    assert_close(run, tmp_path / "unbroken")


def test_muon_goes_on_bit_for_bit(toy, tmp_path):
    muon, run = ("--optimizer.name", "Muon"), tmp_path / "run"
    train(toy, tmp_path / "unbroken", *muon)
    train(toy, run, *muon, "--training.steps", "4", "--checkpoint.async_mode", "async")
    with pytest.raises(ConfigError, match='optimizer.name was "Muon", is "AdamW".*another optimizer state'):
        train(toy, run)
    train(toy, run, *muon)
    assert learned(run) == learned(tmp_path / "unbroken")
    assert_same_weights(weights(run, 8), weights(tmp_path / "unbroken", 8))
    names = [name for name in weights(run, 8) if name.endswith("momentum_buffer")]
    assert len(names) == 2 * 7 and not any("b_proj" in name or "embeddings" in name for name in names)


def test_a_stable_phase_is_branched(toy, tmp_path, capsys):
    """Cut short in its folder and in another one, and extended again: each is bitwise the run planned like that."""
    wsd = ("--lr_scheduler.schedule", "wsd", "--lr_scheduler.decay_steps", "3", "--lr_scheduler.total_steps", "none",
           "--lr_scheduler.warmup_steps", "2", "--checkpoint.keep_latest_k", "0")  # fmt: skip
    short, long, run, branch = (tmp_path / name for name in ("short", "long", "run", "branch"))
    train(toy, short, *wsd, "--training.steps", "6")
    train(toy, long, *wsd)
    rates = {step: value for (step, name), value in learned(long).items() if name == "lr"}
    assert [round(100 * rates[step], 9) for step in range(1, 9)] == [0.5, *[1.0] * 5, 0.666666667, 0.333333333]
    train(toy, run, *wsd)
    start = tmp_path / "start"
    shutil.copytree(run / "checkpoint/step-4", start / "step-4")
    back = ("--checkpoint.load_step", "4")
    train(toy, run, *wsd, *back, "--training.steps", "6")
    other = ("--checkpoint.initial_load_path", str(start / "step-4"), "--checkpoint.initial_load_model_only", "false")
    train(toy, branch, *wsd, *other, "--training.steps", "6")
    for name in (run, branch):
        found = learned(name)
        assert found == {key: value for key, value in learned(short).items() if key in found} and (6, "loss") in found
        assert_same_weights(weights(name, 6), weights(short, 6))
    assert "goes on at" not in capsys.readouterr().out
    with pytest.raises(CheckpointError):
        train(toy, run, *wsd, *("--checkpoint.load_step", "5"))
    train(toy, run, *wsd, *back)
    assert learned(run) == learned(long)
    assert_same_weights(weights(run, 8), weights(long, 8))
    train(toy, short, *wsd)
    assert "step 6 was saved in its decay, at 33% of the peak rate, and goes on at 67%" in capsys.readouterr().out


def test_a_step_to_load_is_loaded_once_a_launch(toy, tmp_path, monkeypatch, capsys):
    """A requeued job goes on from what it saved; the same command in a job of its own begins at the step again."""
    run, keep = tmp_path / "run", ("--checkpoint.keep_latest_k", "0")
    train(toy, run, *keep)
    for job, restart, first in (("7", "0", 2), ("7", "1", 8), ("8", "0", 2)):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
        train(toy, run, "--checkpoint.load_step", "2", *keep)
        assert [event["step"] for event in read_events(run) if event["event"] == "launch"][-1] == first
        assert ("load_step = 2 was obeyed before this restart" in capsys.readouterr().out) is (restart == "1")


def test_changed_settings(toy, tmp_path, caplog):
    run = tmp_path / "run"
    train(toy, run, "--training.steps", "4")
    with pytest.raises(ConfigError, match=r"(?s)belongs to another run.*model.num_householder was 2, is 3"):
        train(toy, run, "--model.num_householder", "3")
    with pytest.raises(ConfigError, match="global_batch_size was 4, is 8"):
        train(toy, run, "--training.global_batch_size", "8")
    # What is harmless or notable is taken over, not silently replaced by what the checkpoint holds.
    train(toy, run, "--optimizer.lr", "0.001", "--optimizer.weight_decay", "0.5", "--metrics.log_freq", "2")
    rates = [r["lr"] for r in records(run) if "lr" in r]
    assert rates[3] > 0.005 and rates[4] < 0.001
    # Nor are settings saved with each parameter: moments, and the step they are of.
    names = {name.rpartition(".")[2] for name in weights(run, 8) if name.startswith("optimizer.")}
    assert names == {"exp_avg", "exp_avg_sq", "step"}
    assert json.loads((run / "checkpoint/step-8/config.json").read_text())["config"]["optimizer"]["lr"] == 0.001


def test_initial_weights(toy, tmp_path):
    train(toy, tmp_path / "a", "--training.steps", "4")
    start = tmp_path / "a/checkpoint/step-4"
    (tmp_path / "b/checkpoint").mkdir(parents=True)  # an empty folder must not hide initial_load_path
    train(toy, tmp_path / "b", "--checkpoint.initial_load_path", str(start), "--training.steps", "1")
    first = records(tmp_path / "b")[0]
    after = [r for r in records(tmp_path / "a") if "validation_loss" in r][-1]
    assert first["validation_loss"] == after["validation_loss"]
    assert [r["step"] for r in records(tmp_path / "b") if "loss" in r] == [1]
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        train(toy, tmp_path / "c", "--checkpoint.initial_load_path", str(tmp_path))


def another_view(rank: int, argv: list[str]) -> None:
    """Rank 1 does not see the newest step yet, as on a network file system."""
    from torchtitan_deltaproduct.checkpoint import load
    from torchtitan_deltaproduct.titan.run import run

    original = load.find_checkpoint
    load.find_checkpoint = lambda path: original(path, 2 if rank else None)
    run(load_config(argv))


def test_initial_weights_are_the_same_on_all_ranks(toy, tmp_path):
    train(toy, tmp_path / "a", "--training.steps", "4")
    options = ("--checkpoint.initial_load_path", str(tmp_path / "a"), "--training.steps", "1")
    run_distributed(another_view, 2, (arguments(toy, tmp_path / "b", options),))
    after = [r for r in records(tmp_path / "a") if "validation_loss" in r][-1]
    assert records(tmp_path / "b")[0]["validation_loss"] == pytest.approx(after["validation_loss"], rel=1e-5)


def test_a_step_by_name(toy, tmp_path):
    train(toy, tmp_path / "a")
    train(toy, tmp_path / "b", "--training.steps", "6", "--checkpoint.keep_latest_k", "0")
    with pytest.raises(CheckpointError, match=r"(?s)no complete step 3.*2, 4, 6"):
        train(toy, tmp_path / "b", "--checkpoint.load_step", "3")
    train(toy, tmp_path / "b", "--checkpoint.load_step", "2", "--checkpoint.keep_latest_k", "0")
    assert learned(tmp_path / "b") == learned(tmp_path / "a")
    assert_same_weights(weights(tmp_path / "a", 8), weights(tmp_path / "b", 8))
    # The later steps of the past that was given up are kept, under names that no restart takes for checkpoints.
    names = {path.name.partition(".")[0] for path in (tmp_path / "b/checkpoint").glob("step-*.rewound-*")}
    assert names == {"step-4", "step-6"}


def test_seed_checkpoint(toy, tmp_path):
    train(toy, tmp_path / "a", "--checkpoint.create_seed_checkpoint")
    assert weights(tmp_path / "a", 0)["norm.weight"].eq(1).all()
    train(toy, tmp_path / "a")
    train(toy, tmp_path / "b")
    assert torch.equal(weights(tmp_path / "a", 8)["norm.weight"], weights(tmp_path / "b", 8)["norm.weight"])


def test_a_seed_checkpoint_serves_any_number_of_ranks(toy, tmp_path):
    """Without a global batch size the batch grows with the ranks, and no sample was trained on yet."""
    run, batch = tmp_path / "run", ("--training.global_batch_size", "-1")
    train(toy, run, *batch, "--checkpoint.create_seed_checkpoint")
    launch(toy, run, *batch, "--training.steps", "1", ranks=2)
    assert "resumed" not in log_of(run) and [r["tokens"] for r in records(run) if "loss" in r] == [2 * 2 * 64]


def test_a_seed_checkpoint_is_the_first_of_a_run(toy, tmp_path):
    run, seed = tmp_path / "run", "--checkpoint.create_seed_checkpoint"
    for _ in range(2):
        train(toy, run, seed)
        assert not [name for name in read_index(run / "checkpoint/step-0").state_dict_metadata if "exp_avg" in name]
        assert last_stop(read_events(run)) | {"time": 0, "rank": 0} == {
            "event": "stop", "time": 0, "rank": 0, "step": 0, "reason": "finished", "detail": "seed checkpoint saved",
            "saved": True,
        }  # fmt: skip
    train(toy, run, "--training.steps", "4")
    with pytest.raises(ConfigError, match="(?s)holds the checkpoints of a run, up to step 4.*a new folder"):
        train(toy, run, seed)


def test_a_step_that_is_not_there_changes_nothing(toy, tmp_path):
    run = tmp_path / "run"
    train(toy, run, "--training.steps", "4")
    before = (run / "config.json").read_bytes()
    with pytest.raises(CheckpointError, match=r"(?s)no complete step 3\n.*there: 2, 4; name"):
        train(toy, run, "--checkpoint.load_step", "3", "--optimizer.lr", "0.5")
    assert (run / "config.json").read_bytes() == before


def test_what_a_branch_begins_anew_it_does_not_begin_again(toy, tmp_path):
    """Without the step or the place in the data a new run takes both, and the schedule, from the start; it keeps what
    it has learned, and all of its own checkpoints when it is started again."""
    run, branch = tmp_path / "run", tmp_path / "branch"
    train(toy, run, "--training.steps", "4")
    whole = ("--checkpoint.initial_load_path", str(run), "--checkpoint.initial_load_model_only", "false")
    anew = (*whole, "--checkpoint.exclude_from_loading", "dataloader", "--training.global_batch_size", "8")
    with pytest.raises(ConfigError, match="(?s)another run:.*global_batch_size was 4, is 8.*optimizer, train"):
        train(toy, branch, *whole, "--training.global_batch_size", "8")
    assert not (branch / "config.json").exists()
    train(toy, branch, *anew, "--training.steps", "4")
    train(toy, branch, *anew)
    train(toy, tmp_path / "unbroken", *anew)
    assert learned(branch) == learned(tmp_path / "unbroken")
    first = [r for r in records(branch) if "loss" in r]
    assert [r["step"] for r in first] == [*range(1, 9)] and [r["tokens"] for r in first] == [
        8 * 64 * n for n in range(1, 9)
    ]
    scratch = tmp_path / "scratch"
    train(toy, scratch, "--training.global_batch_size", "8")
    assert [r["lr"] for r in first] == [r["lr"] for r in records(scratch) if "lr" in r]
    assert first[0]["loss"] < [r["loss"] for r in records(scratch) if "loss" in r][0]
    other = ("--checkpoint.exclude_from_loading", "optimizer", "--optimizer.name", "Muon", "--training.steps", "5")
    train(toy, tmp_path / "other", *whole, *other)
    with pytest.raises(ConfigError, match="exclude_from_loading.*: a run's own checkpoints are always loaded whole"):
        train(toy, run, "--checkpoint.exclude_from_loading", "optimizer")
    with pytest.raises(ConfigError, match="initial_load_model_only.*: the whole state of what"):
        train(toy, run, "--checkpoint.initial_load_model_only", "false")


def test_a_run_that_ended_with_weights_alone(toy, tmp_path, capsys):
    run, only = tmp_path / "run", ("--checkpoint.last_save_model_only", "--checkpoint.keep_latest_k", "0")
    train(toy, run, *only, "--training.steps", "6")
    before = (run / "metrics.jsonl").read_bytes()
    # As it is where a signal breaks off the last validation.
    marker = run / "checkpoint/step-6/complete.json"
    marker.write_text(marker.read_text().replace('"last step"', '"SIGTERM"'))
    train(toy, run, *only, "--training.steps", "6")
    assert "finished already: step 6 of 6" in capsys.readouterr().out and (run / "metrics.jsonl").read_bytes() == before
    assert last_stop(read_events(run))["reason"] == "finished"
    train(toy, run, *only, "--checkpoint.load_only", "--checkpoint.load_step", "4", "--training.steps", "6")
    assert (run / "metrics.jsonl").read_bytes() != before
    train(toy, run, *only, "--training.steps", "6")
    assert (run / "metrics.jsonl").read_bytes() == before
    with pytest.raises(CheckpointError, match=r"(?s)step 6 .* holds weights only .*--checkpoint.load_step 4 goes on"):
        train(toy, run)
    train(toy, run, "--checkpoint.load_step", "4", "--checkpoint.keep_latest_k", "0")
    train(toy, tmp_path / "unbroken")
    assert learned(run) == learned(tmp_path / "unbroken")


def test_a_try_out_in_the_folder_of_a_run(toy, tmp_path, capsys):
    """Its records do not replace the run's, nor mix with them when the run goes on."""
    run = tmp_path / "run"
    train(toy, run, "--training.steps", "4")
    before = (run / "metrics.jsonl").read_bytes()
    train(toy, run, "--checkpoint.enable", "false", "--training.steps", "6", "--model.num_householder", "1")
    (aside,) = run.glob("metrics.until-*.jsonl")
    assert aside.read_bytes() == before and f"is kept as {aside}" in capsys.readouterr().out
    train(toy, run)
    assert (run / "metrics.jsonl").read_bytes().startswith(before)
    before = (run / "metrics.jsonl").read_bytes()
    train(toy, run, "--checkpoint.load_only", "--checkpoint.load_step", "4", "--optimizer.lr", "0.1")
    train(toy, run)
    assert (run / "metrics.jsonl").read_bytes().startswith(before)
    # One that ended before its first record.
    (run / "metrics.jsonl").rename(run / "metrics.until-0.jsonl")
    (run / "metrics.jsonl").touch()
    train(toy, run)
    train(toy, tmp_path / "unbroken")
    assert learned(run) == learned(tmp_path / "unbroken")
    asides = [[r["step"] for r in read_jsonl(aside) if "loss" in r] for aside in run.glob("metrics.until-*.jsonl")]
    assert sorted(asides) == [[1, 2, 3, 4, 5, 6], [5, 6, 7, 8]]
