"""Accuracy on words: against an independent loop, in any segments, with planted answers; the table and the files."""

import csv
import json
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from rich.console import Console

from tests import toy
from tests.unit.evaluation.words_toy import PARITY, fake, flat, write_toml
from torchtitan_deltaproduct.checkpoint.load import load_model
from torchtitan_deltaproduct.config.job import JobConfig
from torchtitan_deltaproduct.config.schema import schema
from torchtitan_deltaproduct.data.generated.group_words import GroupWordSource
from torchtitan_deltaproduct.data.generated.languages import FormalSource
from torchtitan_deltaproduct.errors import CheckpointError, ConfigError
from torchtitan_deltaproduct.evaluation import generate, state_tracking
from torchtitan_deltaproduct.evaluation.state_tracking import results
from torchtitan_deltaproduct.evaluation.state_tracking.problems import Counts, Problem, model_reader, problem_of
from torchtitan_deltaproduct.evaluation.state_tracking.results import Criterion, RunResult, Share, by_setting
from torchtitan_deltaproduct.intervals import wilson
from torchtitan_deltaproduct.models import DeltaProductLM
from torchtitan_deltaproduct.models.args import DeltaProductArgs


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("s3")
    toy.train(write_toml(folder / "s3.toml"), folder / "run")
    return folder / "run"


def small_model(vocab=6, **fields):
    torch.manual_seed(0)
    model = DeltaProductLM(DeltaProductArgs(vocab_size=vocab, hidden_size=16, num_hidden_layers=2, num_heads=2,
                                            head_dim=8, intermediate_size=32, **fields))  # fmt: skip
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20)
    return model.double()


def count(read, source, words, *options, **more):
    """Right answers in the words of one source."""
    return Problem("", False, 8, source.seq_len, 0.1, (source,), 0).count(read, words, *options, **more)


def perfect(source, wrong_at=()):
    """A reader that knows the group and says something else at the positions given (from 0)."""
    problem = source.problem

    def read(tokens, cache):
        state, position = cache or (np.zeros(len(tokens), dtype=np.int64), 0)
        logits = torch.zeros(*tokens.shape, problem.vocab_size)
        for t in range(tokens.shape[1]):
            state = problem.group.table[state, tokens[:, t].numpy()].astype(np.int64)
            said = (state + (position + t in wrong_at)) % problem.classes
            logits[torch.arange(len(tokens)), t, torch.from_numpy(said)] = 1.0
        return logits, (state, position + tokens.shape[1])

    return read


def test_accuracy_by_hand(run):
    """Own products of permutations, one forward pass a word, one comparison at a time."""
    loaded = load_model(run, dtype=torch.float64)
    problem = problem_of(loaded.config, 20, seed=9)
    counts = problem.count(model_reader(loaded.model), 30, rows=7, segment=6)
    perms = list(permutations(range(3)))
    words = GroupWordSource("S3", 20, 9, "test").batch(np.arange(30))[0]["input"].tolist()
    correct, prefix = [0] * 20, [0] * 20
    for word in words:
        answers = loaded.model(torch.tensor([word]))[0].argmax(-1).tolist()
        state, intact = (0, 1, 2), True
        for t, (element, answer) in enumerate(zip(word, answers, strict=True)):
            state = tuple(state[perms[element][i]] for i in range(3))
            right = perms[answer] == state
            intact = intact and right
            correct[t] += right
            prefix[t] += intact
    assert counts.correct.tolist() == correct and counts.prefix.tolist() == prefix
    assert counts.scored.tolist() == [30] * 20 and 0 < sum(correct) < 600
    result = RunResult.of(loaded, problem, counts)
    assert result.at_length.value == pytest.approx(sum(correct) / 600)
    assert result.at_training.value == pytest.approx(sum(correct[:8]) / 240)
    assert result.prefix(2).value == prefix[1] / 30
    assert problem_of(loaded.config).length == 32 and problem_of(loaded.config).seed == 5


@pytest.mark.parametrize("fields", [{}, {"use_forget_gate": True, "use_output_gate": True}, {"use_short_conv": False}])
def test_segments_change_nothing(fields):
    model = small_model(**fields)
    source = GroupWordSource("S3", 50, split="test")
    inputs, labels = source.batch(np.arange(12))
    right = model(inputs["input"]).argmax(-1) == labels
    for rows, segment in [(12, 50), (5, 1), (3, 7), (100, 1000)]:
        counts = count(model_reader(model), source, 12, rows, segment)
        assert counts.correct.tolist() == right.sum(0).tolist()
        assert counts.prefix.tolist() == right.cumprod(1).sum(0).tolist()


def test_perfect_answers():
    source = GroupWordSource("S5", 40, split="test")
    counts = count(perfect(source), source, 50, rows=16, segment=9)
    assert (counts.correct == 50).all() and (counts.prefix == 50).all() and (counts.accuracy() == 1).all()
    low, high = wilson(counts.correct, counts.scored)
    assert low == pytest.approx(np.full(40, 50 / (50 + 1.959964**2)), abs=1e-6) and (high == 1).all()


def test_one_mistake_ends_the_prefix():
    source = GroupWordSource("S3", 30, split="test")
    counts = count(perfect(source, wrong_at={17}), source, 10, segment=8)
    assert counts.correct.tolist() == [10] * 17 + [0] + [10] * 12
    assert counts.prefix.tolist() == [10] * 17 + [0] * 13
    assert counts.between(17, 19) == (20, 30)


def test_positions_without_a_label_do_not_count():
    source = GroupWordSource("S3_3_tokens_last", 12, split="test")

    def silent(tokens, cache):
        return torch.zeros(*tokens.shape, 6), None

    counts = count(silent, source, 20, segment=5)
    labelled = [0, 0, 20] * 4
    assert counts.scored.tolist() == labelled
    assert np.isnan(counts.accuracy()[[0, 1, 3, 4]]).all() and counts.prefix[:2].tolist() == [20, 20]


def test_parity_by_length():
    """A reader that is right on rows of at most 20 tokens; answers come at the last bit."""

    def read(tokens, cache):
        total, position = cache or (torch.zeros(len(tokens), dtype=torch.long), 0)
        ones = total[:, None] + (tokens == 1).cumsum(1)
        past = torch.arange(position, position + tokens.shape[1]) >= 20
        said = (ones + past) % 2
        return torch.nn.functional.one_hot(said, 3).float(), (ones[:, -1], position + tokens.shape[1])

    config = {"data": {"kind": "formal_language", "language": "parity", "min_length": 3, "max_length": 10, "seed": 1},
              "training": {"seq_len": 16}}  # fmt: skip
    problem = problem_of(config, 40)
    counts = problem.count(read, 500, rows=64, segment=7)
    assert counts.scored.sum() == 1000 and counts.scored[:2].sum() == 0 and counts.scored[:10].sum() == 500
    assert (counts.accuracy()[2:20] == 1).all() and (counts.accuracy()[20:] == 0).all()
    result = fake(problem, counts)
    assert [b["value"] for b in result.buckets()] == [1, 1, 0, 0]
    assert [b["scaled"] for b in result.buckets()] == [1, 1, -1, -1]
    assert result.at_training.value == 1 and result.at_length.value == counts.correct[10:].sum() / 500
    # Where no longer rows were asked for, "at the tested length" are those that were.
    same = problem_of(config, 10)
    assert fake(same, same.count(read, 50)).at_length.value == 1 and fake(same, same.count(read, 50)).solved(
        Criterion()
    )
    assert problem_of(config).length == 256
    own = FormalSource("parity", 40, 11, 40, 1, "test").batch(np.arange(500))[1]
    assert counts.scored[10:].tolist() == (own[:, 10:] >= 0).sum(0).tolist()


def test_lengths_of_which_there_is_no_row_are_left_out(tmp_path, capsys):
    config = {"data": {"kind": "formal_language", "language": "parity", "min_length": 3, "max_length": 10, "seed": 1},
              "training": {"seq_len": 16}}  # fmt: skip
    problem = problem_of(config, 40)
    counts = problem.count(lambda tokens, cache: (torch.zeros(*tokens.shape, 3), cache), 1)
    assert any(np.isnan(bucket["value"]) for bucket in fake(problem, counts).buckets())
    state_tracking.report(by_setting([fake(problem, counts)]), Criterion(), tmp_path / "few", Console())
    printed = capsys.readouterr().out
    assert "accuracy (scaled) by length\n  1-10: " in printed and "nan" not in printed


def test_settings_and_seeds():
    runs = [flat(0.2, n=1), flat(1.0, seed=1), flat(0.5, seed=2), flat(0.3, negative=False),
            flat(0.99, seed=1, **{"optimizer.lr": 1})]  # fmt: skip
    runs[1:3] = [flat(1.0, seed=1, **{"optimizer.lr": 2}), flat(0.5, seed=2, **{"optimizer.lr": 2})]
    settings = by_setting(runs)
    assert [(s.label, len(s.runs)) for s in settings] == [
        ("n_h = 1, [-1, 1]", 1), ("n_h = 2, [-1, 1], lr 2", 2), ("n_h = 2, [-1, 1], lr 1", 1), ("n_h = 2, [0, 1]", 1),
    ]  # fmt: skip
    share = Share.of(settings[1].solved(Criterion()), 2)
    assert share.value == 0.5 and 0.09 < share.low < 0.1 and 0.9 < share.high < 0.91
    assert settings[1].spread("at_length")["mean"] == 0.75
    assert [r.solved(Criterion()) for r in runs] == [False, True, False, False, True]
    assert not flat(0.98).solved(Criterion())
    assert flat(0.98).solved(Criterion(at_training=0.98))


def test_every_option_that_is_learned_from_tells_settings_apart():
    """By the records of the config's schema: a new option is not forgotten; folders, speed and seeds are left out."""
    config = JobConfig().to_dict()
    known = results.trained_settings(config)
    assert {"optimizer.eps", "lr_scheduler.schedule", "training.mixed_precision_param", "data.group"} < known.keys()
    assert {"model.intermediate_size", "model.init_scheme", "checkpoint.initial_load_path"} < known.keys()
    assert not known.keys() & {"data.seed", "debug.seed", "training.gc_freq", "model.op_backend", "data.num_workers"}
    assert not any(schema()[key].record.refused for key in known) and "model.hf_assets_path" not in known
    # The same samples a step, in other pieces.
    config["training"] |= {"global_batch_size": 64, "local_batch_size": 8}
    assert results.trained_settings(config)["training.global_batch_size"] == 64
    assert "training.local_batch_size" not in results.trained_settings(config)


def test_what_only_one_of_two_runs_knows_does_not_set_them_apart():
    """Recorded results have fewer keys than runs of today; those stay one setting, and two of today's two."""
    small, large = ({"training.global_batch_size": size} for size in (64, 128))
    (setting,) = by_setting([flat(1.0, seed=1), flat(0.5, seed=2, **small)])
    assert setting.differs == "" and setting.to_dict(Criterion())["settings"]["training.global_batch_size"] == 64
    settings = by_setting([flat(1.0, **small), flat(0.5, **large)])
    assert [setting.differs for setting in settings] == ["global_batch_size 64", "global_batch_size 128"]


def test_a_copy_of_a_run_is_no_other_seed(tmp_path, capsys):
    run = flat(1.0, seed=1)
    (setting,) = settings = by_setting([run, replace(run, label="copy"), flat(0.5, seed=1), flat(1.0, seed=2)])
    record = setting.to_dict(Criterion())
    assert (record["seeds"], record["share_solved"]["value"], record["copies"]) == (3, 2 / 3, ["copy"])
    state_tracking.report(settings, Criterion(), tmp_path / "copies", Console(width=140))
    assert "not counted: copy, a copy of another run (same seeds, same answers)" in capsys.readouterr().out


def test_results_are_read_back(tmp_path):
    """By a sweep or a grid, which compare runs from their files alone."""
    (setting,) = by_setting([flat(1.0, seed=1), flat(0.5, seed=2)])
    state_tracking.write_json(tmp_path / "state_tracking.json", [setting], Criterion(), {})
    (again,) = state_tracking.read_settings([tmp_path / "state_tracking.json"])
    assert again.to_dict(Criterion()) == setting.to_dict(Criterion()) and again.label == setting.label


def test_command(run, tmp_path, capsys):
    parity = write_toml(tmp_path / "parity.toml", PARITY, vocab=3)
    toy.train(parity, tmp_path / "parity")
    toy.train(write_toml(tmp_path / "s3.toml"), tmp_path / "other", "--data.seed", "6", "--checkpoint.interval", "1")
    words = ["--words", "40", "--length", "24", "--segment", "5", "--seed", "3"]
    runs = [
        run,
        run / "checkpoint/step-2",
        tmp_path / "other",
        tmp_path / "other/checkpoint/step-1",
        tmp_path / "parity",
    ]
    state_tracking.main([*map(str, runs), *words, "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    for text in ("n_h = 2, [-1, 1]", "mean of 2", "@ 24", "scaled", "17-24", "40 or 80 test words"):
        assert text in said, said
    content = json.loads((tmp_path / "out/state_tracking.json").read_text())
    assert [s["differs"] for s in content["settings"]] == ["step 2", "step 1", ""]
    s3 = content["settings"][0]
    assert (s3["problem"], s3["seeds"], s3["runs"][0]["test_seed"]) == ("S3", 2, 3)
    rows = list(csv.DictReader((tmp_path / "out/state_tracking.csv").open()))
    first = [r for r in rows if r["problem"] == "S3"][:24]
    assert [int(r["correct"]) for r in first] == s3["runs"][0]["correct"]
    assert float(first[3]["accuracy"]) == pytest.approx(s3["runs"][0]["correct"][3] / 40, abs=1e-6)
    assert (tmp_path / "out/state_tracking.png").read_bytes().startswith(b"\x89PNG")


def test_results_go_to_the_run_by_default(run):
    state_tracking.main([str(run / "checkpoint/step-2"), "--words", "4", "--length", "8"])
    assert (run / "eval/state_tracking.json").exists()


def test_torchrun_is_refused(run, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    for main in (state_tracking.main, generate.main):
        with pytest.raises(
            ConfigError, match=r"works in one process, found 4 \(WORLD_SIZE\): start it without torchrun"
        ):
            main([str(run)])


def test_errors(run, toy_lm_config, tmp_path):
    language = {"kind": "formal_language", "language": "parity", "min_length": 3, "max_length": 8, "seed": 0}
    with pytest.raises(ConfigError, match="^--length 7: the run was trained on up to 8 tokens; give at least as many"):
        problem_of(toy_lm_config | {"data": language}, length=7)
    with pytest.raises(ConfigError, match="at least 1"):
        state_tracking.main([str(run), "--words", "0"])
    with pytest.raises(ConfigError, match="numbered"):
        state_tracking.main([str(run), "--length", str(2**24), "--out", str(tmp_path)])
    with pytest.raises(CheckpointError, match="does not exist"):
        state_tracking.main([str(tmp_path / "none")])
    with pytest.raises(CheckpointError, match="group_word or formal_language"):
        problem_of(toy_lm_config)


@pytest.fixture
def toy_lm_config():
    return {"data": {"kind": "prepared", "seed": 0}, "training": {"seq_len": 8}}


def test_labels_tell_settings_apart_in_few_words():
    """The table says all that differs, a picture the least of it; a step that is the last of a run goes without."""

    def run(steps, name, ratio, step=None):
        settings = {"model.num_householder": 2, "model.allow_neg_eigval": True, "training.steps": steps}
        settings |= {"optimizer.name": name, "lr_scheduler.decay_ratio": ratio, "checkpoint.step": step or steps}
        problem = Problem("A5", False, 8, 16, 1 / 60, (), 0)
        return RunResult("r", problem, Counts(1, *[np.ones(16)] * 3), settings, (1, 1), step or steps, steps)

    runs = [run(4900, "AdamW", 0.5), run(4900, "Muon", 0.5), run(7840, "Muon", 0.3)]
    found = [(setting.differs, setting.short) for setting in by_setting(runs)]
    assert found == [
        ("4,900 steps, AdamW, decay_ratio 0.5", "4,900 steps, AdamW"),
        ("4,900 steps, Muon, decay_ratio 0.5", "4,900 steps, Muon"),
        ("7,840 steps, Muon, decay_ratio 0.3", "7,840 steps, Muon"),
    ]
    designs = [run(4900, "Muon", 0.5), run(4900, "AdamW", 0.5), run(4900, "Muon", 0.0), run(7840, "Muon", 0.5)]
    assert [setting.short for setting in by_setting(designs)] == ["", "AdamW", "decay_ratio 0.0", "7,840 steps"]
    (one, _) = by_setting([run(4900, "Muon", 0.5), run(4900, "Muon", 0.5, step=490)])
    assert (one.differs, one.short) == ("step 4900", "step 4900") and one.label == "n_h = 2, [-1, 1], step 4900"
    (one,) = by_setting([run(4900, "Muon", 0.5)])
    assert (one.differs, one.label) == ("", "n_h = 2, [-1, 1]")


def test_values_that_need_no_name():
    settings = {"data.curriculum_start": 0, "training.steps": 7840, "optimizer.lr": 0.1}
    assert results._told(settings, list(settings)) == ["whole words", "7,840 steps", "lr 0.1"]
    assert results._told(settings | {"data.curriculum_start": 4}, ["data.curriculum_start"]) == ["words from 4 tokens"]
