"""The command: ranks against an independent loop; words; what is written; errors."""

import csv
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

from tests import toy as toys
from tests.unit.evaluation.words_toy import PARITY
from tests.unit.evaluation.words_toy import write_toml as write_words
from torchtitan_deltaproduct.checkpoint.hf import write_hf
from torchtitan_deltaproduct.checkpoint.load import load_model
from torchtitan_deltaproduct.data.text.tokenizer import copy_tokenizer, find_eos_id
from torchtitan_deltaproduct.errors import ConfigError, DataError
from torchtitan_deltaproduct.evaluation import effective_rank
from torchtitan_deltaproduct.evaluation.effective_rank.results import WINDOW_BINS, Change
from torchtitan_deltaproduct.evaluation.files import slugs
from torchtitan_deltaproduct.models.decode import init_cache, step

HERE = "torchtitan_deltaproduct.evaluation"

LENGTH, SEQUENCES, EVERY = 203, 3, 4
SIZE = ["--length", str(LENGTH), "--sequences", str(SEQUENCES), "--every", str(EVERY)]
SIZE += ["--batch", "2", "--segment", "64"]


@pytest.fixture(scope="module")
def run(toy_run):
    return toy_run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Short documents: the paragraphs of this package's own sources."""
    path = tmp_path_factory.mktemp("data") / "short.jsonl"
    sources = sorted((toys.REPO / "torchtitan_deltaproduct/config").glob("*.py"))
    texts = [text for source in sources for text in source.read_text().split("\n\n") if len(text) > 100]
    path.write_text("".join(json.dumps({"text": text[:150]}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def whole(run, data, tmp_path_factory):
    """The results of an evaluation that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole")
    evaluate(out, run, data)
    return out


def evaluate(out, *arguments):
    """Evaluates in this process; the arguments are models, one dataset, and options."""
    effective_rank.main(command(out, *arguments))


def command(out, *arguments):
    given = list(map(str, arguments))
    options = next((i for i, word in enumerate(given) if word.startswith("--")), len(given))
    return [*given[: options - 1], "--data", given[options - 1], "--out", str(out), *SIZE, *given[options:]]


def numbers(out, name="effective_rank.npz"):
    with np.load(out / name) as file:
        return dict(file)


def entries(out):
    return json.loads((out / "effective_rank.json").read_text())["results"]


def tokens_of(out):
    (about,) = (out / "effective_rank/texts").glob("*/about.json")
    return np.load(about.parent / "tokens.npy").astype(np.int64)


def svd_rank(state):
    values = np.linalg.svd(state.astype(np.float64), compute_uv=False)
    shares = values[values > 0] / values.sum()
    return np.exp(-(shares * np.log(shares)).sum())


def by_decoding(run, tokens, starts=()):
    """[L, H, N, P] with one token and one SVD at a time; empty states at `starts` (sequence, position)."""
    model = load_model(run).model
    found = np.empty((2, 2, len(tokens), LENGTH // EVERY))
    for row, sequence in enumerate(tokens):
        cache = init_cache(model, 1)
        for t in range(LENGTH):
            if (row, t) in starts:
                cache = init_cache(model, 1)
            _, cache = step(model, torch.from_numpy(sequence[t : t + 1]), cache)
            if (t + 1) % EVERY == 0:
                for layer, entry in enumerate(cache):
                    for head, state in enumerate(entry.state[0].numpy()):
                        found[layer, head, row, t // EVERY] = svd_rank(state)
    return found


def document_starts(run, tokens):
    eos = find_eos_id(run / "tokenizer")
    return [(row, t) for row, sequence in enumerate(tokens) for t in range(1, LENGTH) if sequence[t] == eos]


def test_ranks_against_an_independent_loop(run, whole):
    found, tokens = numbers(whole), tokens_of(whole)
    assert found["positions"].tolist() == list(range(EVERY, LENGTH + 1, EVERY))
    exact = by_decoding(run, tokens)
    assert found["rank"].shape == exact.shape and np.abs(found["rank"] / exact - 1).max() < 1e-4
    assert found["rank"][..., 0].max() <= 2 * EVERY + 1e-3
    starts = document_starts(run, tokens)
    assert len(starts) > 3 and found["document_starts"].tolist() == [list(start) for start in starts]
    assert found["mean"] == pytest.approx(exact.mean(2), rel=1e-4)
    assert found["std"] == pytest.approx(exact.std(2, ddof=1), rel=1e-2, abs=1e-4)
    # 3 sequences of 203 tokens, of 50 chosen ones 2 eigenvalues each.
    assert (found["beta"].sum(-1) == 609).all() and (found["plane"].sum((2, 3)) == 300).all()
    assert found["beta"].shape == (2, 2, 2, 40)
    mean = (found["beta"] * (found["beta_edges"][:-1] + found["beta_edges"][1:]) / 2).sum(-1) / 609
    assert mean == pytest.approx(found["beta_sum"] / 609, abs=0.03)


def test_summary(run, whole):
    (entry,), found = entries(whole), numbers(whole)
    assert entry["model"]["name"] == "run step 8" and entry["model"]["train_length"] == 64
    assert entry["positions"] == {"end": 200, "training_length": 64} and entry["npz"] == "effective_rank.npz"
    assert entry["data"]["name"].endswith("/short.jsonl") and entry["settings"]["every"] == EVERY
    layers = found["rank"].mean(1, dtype=np.float64)
    for index, layer in enumerate(entry["layers"]):
        trained, end = layers[index, :, 15], layers[index, :, -1]
        assert layer["at_training_length"]["mean"] == pytest.approx(trained.mean(), rel=1e-6)
        assert layer["at_end"]["std"] == pytest.approx(end.std(ddof=1), rel=1e-6)
        assert layer["growth"] == pytest.approx(end.mean() / trained.mean() - 1, rel=1e-6)
        for h, head in enumerate(layer["heads"]):
            values = found["rank"][index, h, :, -1].astype(np.float64)
            assert head["at_end"]["std"] == pytest.approx(values.std(ddof=1), rel=1e-6)
            assert head["beta_mean"] == pytest.approx((found["beta_sum"][index, h] / 609).tolist())
            assert 0 <= head["eigenvalues_complex"] <= 1 and 0 < head["eigenvalue_modulus_mean"] <= 1
            assert head["eigenvalues_negative"] == pytest.approx(found["negative"][index, h] / 300)
    for name in ("", "_sequence", "_beta", "_spectrum"):
        assert (whole / f"effective_rank{name}.png").read_bytes().startswith(b"\x89PNG"), name


def test_between_householders(run, data, whole, tmp_path, no_pictures):
    evaluate(tmp_path, run, data, "--between-householders", "--batch", "3", "--segment", "50")
    found, plain = numbers(tmp_path), numbers(whole)
    between = found["rank_between"]
    assert between.shape == (*plain["rank"].shape, 2) and np.array_equal(between[..., 1], found["rank"])
    assert np.abs(found["rank"] / plain["rank"] - 1).max() < 1e-4
    # One micro-step is a rank-one change.
    assert np.abs(between[..., 0] - between[..., 1]).max() > 1e-3
    assert "rank_between" not in plain
    head = entries(tmp_path)[0]["layers"][1]["heads"][0]
    assert head["mean_after_each_householder"] == pytest.approx(between[1, 0].mean((0, 1)).tolist(), rel=1e-5)


def test_states_emptied_at_documents(run, data, whole, tmp_path, capsys, no_pictures):
    evaluate(tmp_path, run, data, "--reset")
    assert "at document starts the states are emptied" in capsys.readouterr().out
    tokens = tokens_of(tmp_path)
    exact = by_decoding(run, tokens, document_starts(run, tokens))
    found = numbers(tmp_path)
    assert np.abs(found["rank"] / exact - 1).max() < 1e-4
    assert np.abs(found["rank"] - numbers(whole)["rank"]).max() > 0.5
    assert found["document_starts"].tolist() == numbers(whole)["document_starts"].tolist()


def test_states_are_emptied_as_in_training(run, data):
    loaded = load_model(run)
    trained_so = dataclasses.replace(loaded, config={"data": {"reset_state_at_documents": True}})
    for model, option, expected in [
        (loaded, [], False), (trained_so, [], True), (trained_so, ["--no-reset"], False), (loaded, ["--reset"], True),
    ]:  # fmt: skip
        options = effective_rank.parse([str(run), "--data", str(data), *option])
        assert effective_rank.evaluation.reading(model, options)["reset"] is expected
    # 16,384 tokens on a CPU: four sequences a part.
    assert effective_rank.evaluation.reading(loaded, options)["batch"] == 4


def test_several_models_and_datasets(run, toy, data, tmp_path, capsys, no_pictures):
    prepared = toy.parent / "data/train"
    models = [run, run / "checkpoint/step-4", run / "checkpoint/step-8"]
    effective_rank.main([*map(str, models), "--data", str(data), str(prepared), "--out", str(tmp_path / "out"), *SIZE])
    said = capsys.readouterr().out
    assert said.count("Effective rank on") == 2 and said.count("packed documents") == 2
    found = {(entry["model"]["step"], entry["data"]["name"]): entry for entry in entries(tmp_path / "out")}
    assert {key[0] for key in found} == {4, 8} and {key[1].split("/")[-1] for key in found} == {"short.jsonl", "train"}
    ranks = [numbers(tmp_path / "out", entry["npz"])["rank"] for entry in found.values()]
    assert len(found) == 4 and len({rank.tobytes() for rank in ranks}) == 4
    pictures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert "effective_rank_data_train.png" in pictures
    assert sum(name.endswith("_spectrum.png") for name in pictures) == 4
    for entry in found.values():
        assert (tmp_path / "out" / entry["npz"].replace(".npz", "_beta.png")).exists()


def test_numbers_for_tables_over_models(whole):
    (entry,) = entries(whole)
    heads = [head for layer in entry["layers"] for head in layer["heads"]]
    for change, head in enumerate(heads):
        head["change_after_document_start"] = change or None  # too few documents for the first one
    found = effective_rank.evaluation.metrics(entry)
    assert found["change at document starts"] == len(heads) / 2
    assert found["growth"] == pytest.approx(np.mean([layer["growth"] for layer in entry["layers"]]))
    for layer in entry["layers"]:
        layer["growth"] = None
    assert effective_rank.evaluation.metrics(entry)["growth"] is None


def test_csv(whole):
    """Means and deviations of each layer at each position, over heads and sequences."""
    with (whole / "effective_rank.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    rank = numbers(whole)["rank"].astype(np.float64).mean(1)
    layers, sequences, positions = rank.shape
    assert len(rows) == layers * positions and [int(row["position"]) for row in rows[:2]] == [EVERY, 2 * EVERY]
    assert [float(row["rank"]) for row in rows] == pytest.approx(rank.mean(1).ravel(), abs=1e-5)
    assert [float(row["rank_std"]) for row in rows] == pytest.approx(rank.std(1, ddof=1).ravel(), abs=1e-5)


def test_files_of_models_and_datasets_whose_paths_end_alike(run, data, tmp_path, no_pictures):
    models, sets = [tmp_path / name / "seed/1" for name in "ab"], [tmp_path / name / "x/short.jsonl" for name in "cd"]
    for number, folder in zip((4, 8), models, strict=True):
        loaded = load_model(run, number)
        folder.mkdir(parents=True)
        write_hf(folder, loaded.model.state_dict(), loaded.model.args, training={}, max_position_embeddings=64)
        copy_tokenizer(loaded.tokenizer, folder)
    for count, path in zip((60, 120), sets, strict=True):
        path.parent.mkdir(parents=True)
        path.write_text("".join(data.read_text().splitlines(keepends=True)[:count][::-1]))
    effective_rank.main([*map(str, models), "--data", *map(str, sets), "--out", str(tmp_path / "out"), *SIZE])
    found = entries(tmp_path / "out")
    assert len({entry["npz"] for entry in found}) == 4
    for entry in found:
        own = numbers(tmp_path / "out", entry["npz"])["rank"]
        layer = entry["layers"][0]["at_end"]["mean"]
        assert own[0, :, :, -1].mean(dtype=np.float64) == pytest.approx(layer, abs=1e-6)
    long = [f"runs/{'é' * 120}/{end}" for end in "ab"]
    assert len(set(slugs(long))) == 2 and all(80 < len(name.encode()) <= 90 for name in slugs(long))
    assert slugs(["a/b/c", "a_b/c", "x"]) == ["b_c", "a_b_c", "x"] and slugs(["a b", "a_b"]) == ["a_b_1", "a_b_2"]


def content(out):
    """Everything measured, to the bit."""
    parts = {path.name: path.read_bytes() for path in sorted((out / "effective_rank").glob("*/0*.npz"))}
    return parts, (out / "effective_rank.npz").read_bytes(), entries(out)


def test_finished_parts_are_not_measured_again(run, data, whole, tmp_path, capsys, monkeypatch, no_pictures):
    shutil.copytree(whole, tmp_path / "copy")

    def never(*arguments):
        raise AssertionError("measured again")

    monkeypatch.setattr(effective_rank.EffectiveRank, "measure", never)
    evaluate(tmp_path / "copy", run, data)
    assert "609 tokens were read before" in capsys.readouterr().out
    assert content(tmp_path / "copy") == content(whole)
    # Other settings are other measurements.
    for option in (["--every", "8"], ["--segment", "32"], ["--reset"], ["--between-householders"], ["--step", "4"]):
        with pytest.raises(AssertionError, match="again"):
            evaluate(tmp_path / "copy", run, data, *option)


def test_what_is_damaged_is_not_used(run, data, whole, tmp_path, no_pictures):
    shutil.copytree(whole, tmp_path / "cut")
    part = next((tmp_path / "cut/effective_rank").glob("*/00000-00001.npz"))
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(DataError, match="00000-00001.npz is damaged.*\n.*measures it again"):
        evaluate(tmp_path / "cut", run, data)
    part.unlink()
    evaluate(tmp_path / "cut", run, data)
    assert content(tmp_path / "cut") == content(whole)


def test_words(tmp_path, capsys):
    """Runs on generated words read words of their own problem."""
    toys.train(write_words(tmp_path / "s3.toml", n=2), tmp_path / "s3")
    toys.train(write_words(tmp_path / "parity.toml", PARITY, vocab=3), tmp_path / "parity")
    size = ["--length", "40", "--every", "2", "--sequences", "3"]
    effective_rank.main([str(tmp_path / "s3"), str(tmp_path / "parity"), *size])
    assert "3 generated words of 40 tokens" in capsys.readouterr().out
    found = {entry["data"]["name"]: entry for entry in entries(tmp_path / "eval")}
    assert set(found) == {"S3", "parity"}
    for entry in found.values():
        rank = numbers(tmp_path / "eval", entry["npz"])["rank"]
        assert rank.shape == (1, 2, 3, 20) and np.isfinite(rank).all() and rank.min() >= 1 and rank.max() <= 8
    model = load_model(tmp_path / "s3")
    words = effective_rank.Words(model, effective_rank.parse([str(tmp_path), *size]))
    assert words.read(1, 3, 5, 9).shape == (2, 4)
    assert np.array_equal(words.read(1, 3, 0, 40), words.source.batch(np.arange(1, 3))[0]["input"].numpy())
    # Without --seed the run's own; 0 is a seed like any other.
    model.config["data"]["seed"] = 5
    seeds = [
        effective_rank.Words(model, effective_rank.parse([str(tmp_path), *size, *seed])).about["source"]["seed"]
        for seed in ([], ["--seed", "0"], ["--seed", "3"])
    ]
    assert seeds == [5, 0, 3]


def test_change_at_document_starts():
    """A state that loses half of its rank with every document, and one that does not care."""
    positions = np.arange(4, 2001, 4)
    starts = np.array([[0, 100], [0, 700], [0, 1502], [1, 900]])
    rank = np.full((1, 2, 2, 500), 20.0)
    for sequence, start in starts:
        rank[0, 0, sequence, (positions > start) & (positions <= start + 40)] = 10
    change = Change(rank, positions, starts)
    # The first start is too near to the start of its sequence.
    assert len(change.of_each) == 3 and change.edges[WINDOW_BINS] == 0 and len(change.states) == 2 * WINDOW_BINS
    assert change.mean[0, 0, WINDOW_BINS : WINDOW_BINS + 2].tolist() == [-10, -10]
    assert (change.mean[0, 0, WINDOW_BINS + 3 :] == 0).all() and (change.mean[0, 1] == 0).all()
    assert (change.mean[0, 0, :WINDOW_BINS] == 0).all() and change.states[:WINDOW_BINS].sum() == 3 * 128
    assert change.after(32)[0].tolist() == [-10, 0]
    rank[0, :, 1] *= np.where(positions > 900, 2, 1)
    assert Change(rank, positions, starts).of_each[:, 0, WINDOW_BINS].tolist() == [-5, -5, 10]
    assert np.isnan(Change(rank, positions, starts[:0]).after(128)).all()


def test_errors(run, data, tmp_path):
    out = ["--out", str(tmp_path)]
    with pytest.raises(ConfigError, match="--every 32: must be at most --length, 16"):
        effective_rank.main([str(run), "--data", str(data), "--length", "16", "--every", "32", *out])
    with pytest.raises(ConfigError, match="--every 0: must be at least 1"):
        effective_rank.main([str(run), "--data", str(data), "--every", "0", *out])
    with pytest.raises(ConfigError, match="name what it shall read with --data"):
        effective_rank.main([str(run), *out])
