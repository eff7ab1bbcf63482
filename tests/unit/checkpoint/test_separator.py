"""The separator that data were prepared with is that of the run, of its exports and imports, and of every eval."""

import json
import shutil

import pytest
from tokenizers import Tokenizer

from tests import toy as toys
from torchtitan_deltaproduct.checkpoint import from_hf, to_hf
from torchtitan_deltaproduct.checkpoint.load import load_model
from torchtitan_deltaproduct.data import show_batch
from torchtitan_deltaproduct.data.shards.manifest import read_manifest
from torchtitan_deltaproduct.data.shards.shards import TokenStream
from torchtitan_deltaproduct.data.text.prepare import main as prepare
from torchtitan_deltaproduct.data.text.tokenizer import copy_tokenizer, find_eos_id, load_tokenizer
from torchtitan_deltaproduct.errors import CheckpointError
from torchtitan_deltaproduct.evaluation import generate
from torchtitan_deltaproduct.evaluation.generate.vocabulary import open_vocabulary

DOC = "<doc>"


@pytest.fixture(scope="module")
def tokenizer(toy, tmp_path_factory):
    """The toy's, which names <|endoftext|>, with one more token that is not special."""
    folder = tmp_path_factory.mktemp("separator") / "tokenizer"
    copy_tokenizer(toy.parent / "tokenizer", folder)
    inner = Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.add_tokens([DOC])
    inner.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def run(toy, tokenizer):
    """Trained on documents that <doc> separates, one of which spells it; the data are gone afterwards."""
    folder = tokenizer.parent
    text = "".join(json.dumps({"text": f"def f{i}(): return {i} # {DOC} is text\n" * 9}) + "\n" for i in range(30))
    (folder / "a.jsonl").write_text(text)
    options = ["--tokenizer", str(tokenizer), "--eos", DOC, "--workers", "1", "--validation-fraction", "0.3"]
    assert not prepare([str(folder / "data"), "--input", str(folder / "a.jsonl"), *options])
    manifest, stream = read_manifest(folder / "data/train"), TokenStream(folder / "data/train")
    assert (manifest.eos_id, find_eos_id(folder / "data/train/tokenizer")) == (320, 320)
    assert stream.document(3).tolist().count(320) == 1
    assert DOC in load_tokenizer(folder / "data/train/tokenizer").decode(stream.document(3).tolist()[:-1])
    config = toys.write_toml(folder)
    toys.train(config, folder / "run", "--model.vocab_size", "384", "--training.steps", "2")
    shutil.rmtree(folder / "data")
    return folder / "run"


def test_a_run_knows_its_separator(run, tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    loaded = load_model(run)
    assert loaded.eos_id == 320 and json.loads((run / "config.json").read_text())["extra"]["eos_id"] == 320
    vocabulary = open_vocabulary(loaded)
    assert vocabulary.separator == 320 and 320 not in vocabulary.encode(f"x {DOC} y")
    # The original folder names another one; as its tokens are the same, that of training counts.
    assert find_eos_id(tokenizer) == 0 and open_vocabulary(loaded, tokenizer).separator == 320
    assert open_vocabulary(loaded, tokenizer, eos="<|endoftext|>").separator == 0
    assert generate.main([str(run), "--prompt", "def", "--tokens", "3", "--eos", "<|endoftext|>"]) == 0


def test_exports_and_imports_keep_it(run, tmp_path, tokenizer):
    from transformers import AutoTokenizer

    to_hf.export(run, tmp_path / "hf")
    to_hf.export(run, tmp_path / "given", tokenizer=tokenizer)
    from_hf.import_hf(tmp_path / "hf", tmp_path / "imported")
    to_hf.export(tmp_path / "imported", tmp_path / "again")
    for name in ("hf", "given", "again"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["bos_token_id"] == config["eos_token_id"] == 320
        assert AutoTokenizer.from_pretrained(tmp_path / name).eos_token_id == 320
        assert load_model(tmp_path / name).eos_id == 320
    assert load_model(tmp_path / "imported").eos_id == find_eos_id(tmp_path / "imported/tokenizer") == 320
    assert open_vocabulary(load_model(tmp_path / "imported")).separator == 320
    with pytest.raises(CheckpointError, match="holds imported weights: it has no steps of its own to show"):
        show_batch.main([str(tmp_path / "imported"), "--step", "1"])
    # The export of an import tells what the first export told of the training.
    first, again = ((tmp_path / name / "training.json").read_text() for name in ("hf", "again"))
    assert [json.loads(text)[key] for text in (first, again) for key in ("step", "run")] == [2, str(run)] * 2
    card = (tmp_path / "again/README.md").read_text()
    assert "| step | 2 of 2 |" in card and "| tokens | 512 (4 sequences of 64 a step) |" in card
    assert f"| imported from | {tmp_path}/hf |" in card


def test_a_tokenizer_that_names_no_separator(run, tmp_path, toy):
    """Weights of others: the tokenizer names none, so the user does; a run of ours knows it."""
    shutil.copytree(run, tmp_path / "run")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "run/tokenizer" / name).unlink(missing_ok=True)
    to_hf.export(tmp_path / "run", tmp_path / "hf")
    assert eos_of(tmp_path / "hf") == 320
    (tmp_path / "hf/training.json").unlink()
    config = json.loads((tmp_path / "hf/config.json").read_text())
    (tmp_path / "hf/config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    (tmp_path / "hf/tokenizer_config.json").unlink()
    from_hf.import_hf(tmp_path / "hf", tmp_path / "imported", eos=DOC)
    assert load_model(tmp_path / "imported").eos_id == 320
    card = (tmp_path / "hf/README.md").read_text()
    assert "of 2" in card
    to_hf.export(tmp_path / "imported", tmp_path / "again")
    assert "step" not in (tmp_path / "again/README.md").read_text().split("## Use")[0].split("## Training")[1]


def eos_of(folder):
    return json.loads((folder / "config.json").read_text())["eos_token_id"]


@pytest.mark.parametrize(("name", "content", "said"), [
    ("tokenizer_config.json", "[]", "holds a JSON list; expected an object"),
    ("tokenizer_config.json", '{"eos_token": ["a"]}', "an eos_token of type list; expected a token's text"),
    ("tokenizer.json", "{", "cannot be read as a tokenizer"),
])  # fmt: skip
def test_a_damaged_tokenizer_is_one_line(run, tmp_path, name, content, said):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/tokenizer" / name).write_text(content)
    with pytest.raises(CheckpointError, match=said) as caught:
        to_hf.export(tmp_path / "run", tmp_path / "hf")
    assert "\n" not in str(caught.value) and not (tmp_path / "hf").exists()
