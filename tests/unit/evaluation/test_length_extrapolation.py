"""The command: results against independent loops, killed and resumed, on two ranks, in other buckets; and errors."""

import copy
import csv
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from rich.console import Console

from tests import processes
from tests import toy as toys
from tests.unit.models.conftest import small_model
from torchtitan_deltaproduct.checkpoint.hf import write_hf
from torchtitan_deltaproduct.checkpoint.load import load_model
from torchtitan_deltaproduct.data.shards.shards import TokenStream
from torchtitan_deltaproduct.data.text.tokenizer import copy_tokenizer
from torchtitan_deltaproduct.errors import ConfigError, DataError
from torchtitan_deltaproduct.evaluation import length_extrapolation
from torchtitan_deltaproduct.evaluation.files import short_names, short_paths, write_array
from torchtitan_deltaproduct.evaluation.length_extrapolation.loss import POSITION
from torchtitan_deltaproduct.evaluation.length_extrapolation.results import summarise, table
from torchtitan_deltaproduct.evaluation.pieces import Measured, Pieces, Tokens, fingerprint
from torchtitan_deltaproduct.evaluation.sample import Wanted
from torchtitan_deltaproduct.evaluation.texts import open_texts
from torchtitan_deltaproduct.progress import Progress

HERE = "torchtitan_deltaproduct.evaluation"

LENGTH, SEQUENCES = 300, 6
SIZE = ["--length", str(LENGTH), "--sequences", str(SEQUENCES), "--batch", "2", "--segment", "64"]


@pytest.fixture(scope="module")
def run(toy_run):
    return toy_run


@pytest.fixture(scope="module")
def data(toy):
    return toy.parent / "data"


@pytest.fixture(scope="module")
def whole(run, data, tmp_path_factory):
    """The results of an evaluation that nothing disturbed, on packed documents."""
    out = tmp_path_factory.mktemp("whole")
    evaluate(out, run, data / "train", "--documents", "packed")
    return out


def evaluate(out, *arguments):
    """Evaluates in this process; the arguments are models, one dataset, and options."""
    length_extrapolation.main(command(out, *arguments))


def command(out, *arguments):
    given = list(map(str, arguments))
    options = next((i for i, word in enumerate(given) if word.startswith("--")), len(given))
    return [*given[: options - 1], "--data", given[options - 1], "--out", str(out), *SIZE, *given[options:]]


def export(loaded, folder):
    """A Hugging Face folder of a model and its tokenizer."""
    folder.mkdir()
    write_hf(folder, loaded.model.state_dict(), loaded.model.args, training={}, max_position_embeddings=64)
    copy_tokenizer(loaded.tokenizer, folder)


def raw(out):
    """{name of a part: its bytes} of the only evaluation in a folder."""
    (about,) = (out / "length_extrapolation").glob("*/about.json")
    return {path.name: path.read_bytes() for path in sorted(about.parent.glob("*.npy"))}


def entries(out):
    return json.loads((out / "length_extrapolation.json").read_text())["results"]


def test_against_an_independent_loop(run, data, whole):
    """Own windows, one forward pass a sequence, one log_softmax a position, buckets with slices."""
    stream, model = TokenStream(data / "train"), load_model(run).model
    tokens = np.zeros(stream.tokens + 1, np.int64)
    stream.read(-1, tokens)
    (about,) = (whole / "length_extrapolation/texts").glob("*/about.json")
    windows = np.load(about.parent / "tokens.npy").astype(np.int64)
    places = range(0, len(tokens), LENGTH)
    starts = [next(s for s in places if (tokens[s : s + LENGTH + 1] == window).all()) for window in windows]
    assert starts == sorted(starts) and starts[-1] > len(tokens) / 2
    losses, right = np.empty((SEQUENCES, LENGTH)), np.empty((SEQUENCES, LENGTH))
    for row, start in enumerate(starts):
        for t, logits in enumerate(model(torch.from_numpy(tokens[None, start : start + LENGTH]))[0]):
            label = tokens[start + t + 1]
            losses[row, t] = -torch.log_softmax(logits.double(), 0)[label]
            right[row, t] = int(logits.argmax()) == label
    found = np.concatenate([np.load(path) for path in sorted((whole / "length_extrapolation").glob("*/0*.npy"))])
    assert found.dtype == POSITION and np.abs(found["loss"] - losses).max() < 2e-5
    assert np.array_equal(found["correct"], right)
    (entry,) = entries(whole)
    assert [bucket["last"] for bucket in entry["buckets"]] == [32, 48, 64, 96, 128, 192, 256, 300]
    first = 0
    for bucket in entry["buckets"]:
        means, first = losses[:, first : bucket["last"]].mean(1), bucket["last"]
        assert bucket["loss"] == pytest.approx(means.mean(), rel=1e-5)
        assert bucket["loss_se"] == pytest.approx(means.std(ddof=1) / 6**0.5, rel=1e-4)
        assert bucket["loss_high"] - bucket["loss"] == pytest.approx(2.5706 * bucket["loss_se"], rel=1e-4)
    assert entry["buckets"][-1]["running_loss"] == pytest.approx(losses.mean(), rel=1e-5)
    change = losses[:, 150:].mean(1) - losses[:, 32:64].mean(1)
    assert entry["beyond_training"]["difference"] == pytest.approx(change.mean(), rel=1e-3)


def test_files(run, data, whole):
    (entry,) = entries(whole)
    assert entry["model"] | {"weights": ""} == {
        "name": "run step 8", "label": f"{run} step 8", "path": str(run), "step": 8, "train_length": 64,
        "num_householder": 2, "head_dim": 16, "head_v_dim": 16, "allow_neg_eigval": True, "parameters": 36_544,
        "weights": "",
    }  # fmt: skip
    assert entry["data"]["name"] == "data/train" and entry["data"]["kind"] == "packed"
    assert entry["data"]["long_documents"] > SEQUENCES and f"of {LENGTH} tokens: packed" in entry["data"]["said"]
    rows = list(csv.DictReader((whole / "length_extrapolation.csv").open()))
    assert len(rows) == len(entry["buckets"])
    for row, bucket in zip(rows, entry["buckets"], strict=True):
        assert (row["model"], row["data"], row["documents"], row["train_length"]) == (
            f"{run} step 8", "data/train", "packed", "64",
        )  # fmt: skip
        for name, value in bucket.items():
            assert row[name] == "" if value is None else float(row[name]) == pytest.approx(value, abs=1e-6)
    assert (whole / "length_extrapolation.png").read_bytes().startswith(b"\x89PNG")
    assert len(raw(whole)) == 3 and not list(whole.rglob("*.tmp*"))


def test_several_models_and_datasets(run, data, tmp_path, capsys, no_pictures):
    """A Hugging Face folder of a step has its losses; one checkpoint under two names is one model."""
    export(load_model(run, 4), tmp_path / "exported")
    book = tmp_path / "book.txt"
    book.write_text("def f(x):\n    return x\n" * 200)
    models = [run, run / "checkpoint/step-8", run / "checkpoint/step-4", tmp_path / "exported"]
    options = ["--length", "200", "--sequences", "3", "--out", tmp_path / "out"]
    length_extrapolation.main(list(map(str, [*models, "--data", data / "train", data / "validation", book, *options])))
    said = capsys.readouterr().out
    found = entries(tmp_path / "out")
    assert len(found) == 9 and len({entry["model"]["name"] for entry in found}) == 3
    kinds = {"data/train": "long", "data/validation": "long", f"{tmp_path.name}/book.txt": "packed"}
    for data_name, kind in kinds.items():
        best, early, exported = (entry for entry in found if entry["data"]["name"] == data_name)
        assert best["data"]["kind"] == kind and best["buckets"] != early["buckets"]
        assert early["buckets"] == exported["buckets"]
        assert early["model"]["weights"] == exported["model"]["weights"] != best["model"]["weights"]
        assert best["data"]["said"] in said
    assert "3 sequences of 200 tokens: the starts of long documents (long enough: " in said
    table = [line for line in said.splitlines() if "193 - 200" in line]
    assert len(table) == 3 and all(line.count("±") == 5 for line in table)
    assert [bucket["minus_first"] for bucket in best["buckets"]] == [None] * len(best["buckets"])
    for one, other in zip(best["buckets"], early["buckets"], strict=True):
        assert other["minus_first"] == pytest.approx(other["loss"] - one["loss"])
        assert other["minus_first_low"] < other["minus_first"] < other["minus_first_high"]


class Stop(Exception):
    pass


def test_interrupted_and_resumed(run, data, whole, tmp_path, monkeypatch, capsys, no_pictures):
    """Raised out of the middle of a part: the same bits, and only what is missing is read again."""
    evaluation, seen = length_extrapolation.LengthExtrapolation, []
    measure = evaluation.measure

    def until(count):
        def stop_in_the_middle(self, model, tokens, reading, progress):
            seen.append((tokens.first, tokens.last))
            segments = iter(range(count))

            def tell(tokens):
                progress(tokens)
                if next(segments, None) is None:
                    raise Stop

            return measure(self, model, tokens, reading, tell)

        return stop_in_the_middle

    monkeypatch.setattr(evaluation, "measure", until(3))
    with pytest.raises(Stop):
        evaluate(tmp_path, run, data / "train", "--documents", "packed")
    assert seen == [(0, 2)] and raw(tmp_path) == {}
    assert not (tmp_path / "length_extrapolation.json").exists()
    monkeypatch.setattr(evaluation, "measure", measure)
    compute_only(run, data, tmp_path, (2, 4))
    capsys.readouterr()
    evaluate(tmp_path, run, data / "train", "--documents", "packed")
    assert "continuing: 600 of 1,800 tokens were read before" in capsys.readouterr().out
    assert raw(tmp_path) == raw(whole) and entries(tmp_path) == entries(whole)
    monkeypatch.setattr(evaluation, "measure", until(0))
    evaluate(tmp_path, run, data / "train", "--documents", "packed")
    assert "all 1,800 tokens were read before" in capsys.readouterr().out and entries(tmp_path) == entries(whole)


def wanted(data):
    return Wanted(str(data / "train"), LENGTH, SEQUENCES, "packed")


def compute_only(run, data, out, piece):
    """One of the pieces that the command would make."""
    folder, loaded = out / "length_extrapolation", load_model(run)
    texts, reading = open_texts(wanted(data), None, folder / "texts"), {"batch": 2, "segment": 64}
    pieces = Pieces.open(folder, loaded, fingerprint(loaded.model), texts, reading, ".npy", 1)
    tokens = Tokens(texts, *piece)
    array = length_extrapolation.evaluation.measure(loaded.model, tokens, pieces.about, lambda tokens: None)
    write_array(pieces.path(piece), array)


def start(out, *arguments):
    """On two ranks in a session of their own, the output in OUT.log."""
    return processes.start(["-m", "eval.length_extrapolation", *command(out, *arguments)], f"{out}.log", ranks=2)


def test_two_ranks_killed_then_two(run, data, tmp_path, no_pictures):
    """SIGKILL to two ranks in the middle of their pieces, then two go on: the same bits as of one never killed."""
    options = ("--documents", "packed", "--segment", "1", "--length", "100", "--batch", "1")
    evaluate(tmp_path / "one", run, data / "train", *options)
    process = start(tmp_path / "two", run, data / "train", *options)
    end = time.monotonic() + 200
    while not list((tmp_path / "two").glob("length_extrapolation/*/0*.npy")):
        assert time.monotonic() < end and process.poll() is None, toys.log_of(tmp_path / "two")
        time.sleep(0.01)
    toys.kill(process)
    done = list((tmp_path / "two").glob("length_extrapolation/*/0*.npy"))
    assert 0 < len(done) < 6 and not (tmp_path / "two/length_extrapolation.json").exists()
    # What is killed while it writes leaves this.
    done[0].with_name("00005-00005.npy.tmp1").write_bytes(b"half")
    process = start(tmp_path / "two", run, data / "train", *options)
    assert process.wait(timeout=300) == 0, toys.log_of(tmp_path / "two")
    assert raw(tmp_path / "two") == raw(tmp_path / "one") and entries(tmp_path / "two") == entries(tmp_path / "one")
    assert not list((tmp_path / "two").rglob("*.tmp*"))
    said = toys.log_of(tmp_path / "two")
    assert said.count("written:") == 1 and "tokens/s on each of 2 ranks" in said


def test_an_error_on_two_ranks_is_said_once(run, tmp_path):
    process = start(tmp_path / "out", run, tmp_path / "nothing.txt")
    assert process.wait(timeout=200) != 0
    said = toys.log_of(tmp_path / "out")
    assert said.count("error: There is no file or folder") == 1 and 'File "' not in said.split("error: There")[0]


def test_other_buckets(whole, tmp_path, capsys, monkeypatch, no_pictures):
    """From the raw losses, which must be there; the model is not."""
    copy = shutil.copytree(whole, tmp_path / "copy")
    monkeypatch.setattr(f"{HERE}.long.load_models", None)
    length_extrapolation.main(["--from", str(copy), "--buckets", "3"])
    found = entries(copy)[0]["buckets"]
    assert [(b["first"], b["last"]) for b in found] == [(1, 100), (101, 200), (201, 300)]
    files = sorted((copy / "length_extrapolation").glob("*/0*.npy"))
    losses = np.concatenate([np.load(path)["loss"] for path in files])
    assert found[1]["loss"] == pytest.approx(losses[:, 100:200].mean(dtype=np.float64))
    assert "101 - 200" in capsys.readouterr().out
    length_extrapolation.main(["--from", str(copy), "--out", str(tmp_path / "new")])
    assert entries(tmp_path / "new")[0]["buckets"] == entries(whole)[0]["buckets"]
    assert entries(copy)[0]["buckets"] == found
    length_extrapolation.main(["--from", str(tmp_path / "new"), "--buckets", "7,250"])
    assert [b["last"] for b in entries(tmp_path / "new")[0]["buckets"]] == [7, 250, 300]
    next((copy / "length_extrapolation").glob("*/00002*.npy")).unlink()
    for arguments, error, said in (
        (["--from", str(copy)], DataError, "00002-00003.npy is damaged"),
        (["--from", str(copy), "--buckets", "400"], ConfigError, "up to 300"),
        (["--from", str(tmp_path)], DataError, "left its results"),
    ):
        with pytest.raises(error, match=said):
            length_extrapolation.main(arguments)


def test_side_by_side(run, data, tmp_path, no_pictures):
    """Two models evaluated apart are as they are evaluated together, differences included."""
    words = (data / "train", "--documents", "packed", "--sequences", "3")
    for step in ("4", "8"):
        evaluate(tmp_path / step, run, *words, "--step", step)
    both = ["--from", str(tmp_path / "8"), str(tmp_path / "4"), "--out", str(tmp_path / "both")]
    length_extrapolation.main(both)
    evaluate(tmp_path / "together", run / "checkpoint/step-8", run / "checkpoint/step-4", *words)
    found, expected = entries(tmp_path / "both"), entries(tmp_path / "together")
    assert [entry["buckets"] for entry in found] == [entry["buckets"] for entry in expected]
    assert found[1]["buckets"][0]["minus_first"] is not None
    assert [entry["model"]["name"] for entry in found] == ["run step 8", "run step 4"]
    with pytest.raises(ConfigError, match="need --out"):
        length_extrapolation.main(both[:3])
    # The same model in another type: its lines in table and picture are two.
    evaluate(tmp_path / "wide", run, *words, "--step", "8", "--dtype", "float64")
    here = [str(tmp_path / name) for name in ("8", "wide", "8")]
    length_extrapolation.main(["--from", *here, "--out", str(tmp_path / "types")])
    found = [entry["model"]["name"] for entry in entries(tmp_path / "types")]
    assert found == [f"run step 8 in {tmp_path.name}/{name}" for name in ("8", "wide")]
    length_extrapolation.main(["--from", str(tmp_path / "types")])
    assert [entry["model"]["name"] for entry in entries(tmp_path / "types")] == found
    # Of another dataset that had the same short name when it was alone.
    file = tmp_path / "4/length_extrapolation.json"
    content = json.loads(file.read_text())
    content["results"][0]["data"]["wanted"]["data"] = f"/other/{data.name}/train"
    file.write_text(json.dumps(content))
    length_extrapolation.main(both)
    names = [entry["data"]["name"] for entry in entries(tmp_path / "both")]
    assert len(set(names)) == 2 and names[1] == f"other/{data.name}/train"
    evaluate(tmp_path / "short", run, *words, "--length", "100")
    with pytest.raises(DataError, match="different lengths: 300 in .*, 100 in"):
        length_extrapolation.main(["--from", str(tmp_path / "8"), str(tmp_path / "short"), "--out", str(tmp_path)])


def test_damaged_and_foreign_parts(run, data, whole, tmp_path, no_pictures):
    copy = shutil.copytree(whole, tmp_path / "copy")
    part = next((copy / "length_extrapolation").glob("*/00002*.npy"))
    good = part.read_bytes()
    other = next((copy / "length_extrapolation").glob("texts/*/tokens.npy")).read_bytes()
    for content, said in (
        (good[:-5], "Failed to read|reshape"),
        (b"", "No data left"),
        (other, r"it holds uint16 \[6, 301\]"),
    ):
        part.write_bytes(content)
        with pytest.raises(DataError, match=f"00002-00003.npy is damaged (?s:.*)(?:{said})(?s:.*)delete it"):
            evaluate(copy, run, data / "train", "--documents", "packed")
    part.unlink()
    evaluate(copy, run, data / "train", "--documents", "packed")
    assert part.read_bytes() == good
    (part.parent / "about.json").write_text("{}")
    with pytest.raises(DataError, match="does not hold measurements"):
        evaluate(copy, run, data / "train", "--documents", "packed")


def test_every_setting_has_its_own_parts(run, data, tmp_path, monkeypatch):
    """Nothing is taken from an evaluation that differs in anything."""
    monkeypatch.setattr(length_extrapolation.LengthExtrapolation, "report", lambda *arguments: None)
    for options in ([], ["--segment", "32"], ["--batch", "3"], ["--step", "4"], ["--seed", "1"], ["--dtype", "float64"],
                    ["--length", "200"]):  # fmt: skip
        evaluate(tmp_path, run, data / "train", "--sequences", "3", *options)
    assert len(list((tmp_path / "length_extrapolation").glob("*/about.json"))) == 7


def test_wrong_tokenizer(run, data, tmp_path, capsys, no_pictures):
    copy = shutil.copytree(run, tmp_path / "run")
    file = copy / "tokenizer/tokenizer.json"
    file.write_text(file.read_text() + " ")
    with pytest.raises(DataError, match="prepared with another tokenizer than .*run step 8"):
        evaluate(tmp_path / "out", copy, data / "train")
    evaluate(tmp_path / "out", copy, data / "train", "--tokenizer", data / "train/tokenizer")
    export(load_model(run), tmp_path / "bare")
    (tmp_path / "bare/tokenizer.json").unlink()
    capsys.readouterr()
    evaluate(tmp_path / "out", tmp_path / "bare", data / "train")
    assert "bare has no tokenizer.json: that it fits the data cannot be checked" in capsys.readouterr().out
    (tmp_path / "book.txt").write_text("word " * 4000)
    with pytest.raises(DataError, match="has no tokenizer.json to read it with"):
        evaluate(tmp_path / "out", tmp_path / "bare", tmp_path / "book.txt")


def test_tokens_that_the_model_does_not_know(run, data, tmp_path):
    model = small_model(torch.float32)
    (tmp_path / "hf").mkdir()
    write_hf(tmp_path / "hf", model.state_dict(), model.args, training={})
    with pytest.raises(DataError, match="has a token 3.*knows those below 50"):
        evaluate(tmp_path / "out", tmp_path / "hf", data / "train")


def test_wrong_arguments(run, data, tmp_path):
    for arguments, said in (
        ([run], "expected MODEL"), ([run, "--data", data / "train", "--from", "x"], "expected MODEL"),
        (["--data", data / "train"], "expected MODEL"), ([run, "--data", "x", "--length", "0"], "--length 0"),
        ([run, "--data", "x", "--batch", "-1"], "--batch -1"), ([run, "--data", "x", "--segment", "0"], "--segment 0"),
        ([run, "--data", "x", "--buckets", "9,8"], "--buckets 9,8"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=said):
            length_extrapolation.main(list(map(str, arguments)))
    with pytest.raises(ConfigError, match="--data '': expected a prepared folder"):
        length_extrapolation.main([str(run), "--data", "", "--out", str(tmp_path)])
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(ConfigError, match=f"no folder for results can be made at {out}: a file is in the way\n"):
            length_extrapolation.main([str(run), "--data", str(data / "train"), "--out", str(out)])
    long = ["--data", str(data / "validation"), "--length", "1000000", "--out", str(tmp_path)]
    with pytest.raises(DataError, match=r"tokens, less than one sequence of 1,000,000"):
        length_extrapolation.main([str(run), *long])


def test_what_is_said_meanwhile(run, data, tmp_path, monkeypatch, capsys, no_pictures):
    shown = []

    class Shown(Progress):
        def update(self, done, note=""):
            super().update(done, note)
            shown.append((self.title, done, self.total, self.unit))

    monkeypatch.setattr(f"{HERE}.long.Progress", Shown)
    evaluate(tmp_path, run, data / "train", "--sequences", "1", "--batch", "1", "--documents", "packed")
    said, errors = capsys.readouterr()
    assert shown == [("run step 8, data/train", tokens, 300, "tokens") for tokens in (64, 128, 192, 256, 300)]
    assert re.search(r"^300 tokens in 0:00:\d\d, [\d,]+ tokens/s$", said, re.MULTILINE) and " left" not in said + errors
    assert "1 sequence of 300 tokens" in said and "one sequence: there are no standard errors" in said
    assert re.search(r"1 - 32 │ +\d\.\d{3}  +\d+\.\d\d", said) and "nan" not in said
    texts, loaded = open_texts(Wanted(str(data / "train"), 300, 4, "packed"), None, tmp_path / "texts"), load_model(run)
    reset = dataclasses.replace(loaded, config={"data": {"reset_state_at_documents": True}})
    options = length_extrapolation.parse([str(run), "--data", "x"])

    def notes(model):
        case = Measured({"name": "m"}, {"said": "", **texts.about}, None, model)
        return length_extrapolation.evaluation.notes([case], options)[1:]

    assert notes(loaded) == []
    assert notes(reset) == ["m was trained with its state reset at documents; here it is carried across them"]


def test_results_on_other_data_are_not_overwritten(run, data, tmp_path, no_pictures):
    """Neither by the default folder nor by --out; all data together may replace one of them."""
    (tmp_path / "book.txt").write_text("def f(x):\n    return x\n" * 200)
    sets, size = [str(data / "validation"), str(tmp_path / "book.txt")], ["--length", "64", "--sequences", "2"]
    out = ["--out", str(tmp_path / "out"), "--documents", "packed"]
    length_extrapolation.main([str(run), "--data", sets[0], *size, *out])
    before = entries(tmp_path / "out")
    with pytest.raises(ConfigError, match="book.txt would overwrite\nname another folder with --out"):
        length_extrapolation.main([str(run), "--data", sets[1], *size, *out])
    assert entries(tmp_path / "out") == before
    length_extrapolation.main([str(run), "--data", *sets, *size, *out])
    assert [entry["data"]["wanted"]["data"] for entry in entries(tmp_path / "out")] == sets


@pytest.mark.slow
def test_names_in_a_locale_that_cannot_write_them(run, tmp_path):
    """In a process of its own, for Python takes its locale when it starts."""
    (tmp_path / "日本").mkdir()
    (tmp_path / "日本/文.txt").write_text("def f(x):\n    return x\n" * 200, encoding="utf-8")
    command = [sys.executable, "-X", "utf8=0", "-m", "eval.length_extrapolation", str(run), "--length", "64"]
    command += ["--sequences", "2", "--documents", "packed", "--data", str(tmp_path / "日本")]
    command += ["--out", str(tmp_path / "出")]
    environment = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run(command, cwd=toys.REPO, env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert entries(tmp_path / "出")[0]["data"]["name"].endswith("/日本")
    assert "/日本,packed" in (tmp_path / "出/length_extrapolation.csv").read_text(encoding="utf-8")


def test_names(run):
    assert short_paths(["a/b/c"]) == ["b/c"] and short_paths(["x.txt"]) == ["x.txt"]
    assert short_paths(["p/a/v", "q/a/v"]) == ["p/a/v", "q/a/v"] and short_paths(["a", "b/c"]) == ["a", "b/c"]
    assert short_paths(["r/p/a/v", "r/q/a/v"]) == ["p/a/v", "q/a/v"]
    assert short_names([(run, 8), (run, None)]) == ["run step 8", "run"]
    assert short_names([(run, 8), (run.parent / "b/run", 4)]) == ["run step 8", "b/run step 4"]


def test_long_names(whole):
    file, names = whole / "length_extrapolation.json", ["a/very/long/path/to/run-1"]
    (result,) = summarise(length_extrapolation.evaluation.read([file], names), "2")
    other = copy.copy(result)
    other.case = dataclasses.replace(result.case, model=result.case.model | {"name": "a/very/long/path/to/run-2"})
    console = Console(width=60)
    with console.capture() as said:
        console.print(table([result, other]))
    header = said.get().partition("┡")[0]
    assert "un-1" in header and "un-2" in header and "…" not in header
