"""Loss, perplexity and bits per byte of validation by another road: from the text and one forward at a time."""

import json
import math
import unicodedata

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from tests import toy as toys
from torchtitan_deltaproduct.checkpoint.load import load_model
from torchtitan_deltaproduct.data.text.prepare import Settings, prepare
from torchtitan_deltaproduct.errors import DataError

T = 64
# Two spellings of é, of which NFC makes one, and words that no vocabulary below has.
TEXTS = [f"cafe\u0301 caf\u00e9 word{n % 7} stranger{n} 日本 x" for n in range(40)]


def nfc_tokenizer(folder):
    """Whole words after NFC, most of them known; the separator is an ordinary added token."""
    words = ["caf\u00e9", "x", "日本", *(f"word{n}" for n in range(7))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", *words])}, unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normalizers.NFC(), pre_tokenizers.WhitespaceSplit()
    inner.add_tokens(["<end>"])
    folder.mkdir()
    inner.save(str(folder / "tokenizer.json"))
    return inner, folder


def by_hand(run, ids, windows):
    """Nats and labels of some windows of a stream of ids that a separator opens, one forward each, in float64."""
    model, nats, labels = load_model(run, dtype=torch.float64).model, 0.0, []
    for window in windows:
        piece = ids[window * T : (window + 1) * T + 1]
        logits = model(torch.tensor([piece[:-1]]))[0]
        exp = logits.exp()
        nats -= sum(math.log(exp[i, label] / exp[i].sum()) for i, label in enumerate(piece[1:]))
        labels += piece[1:]
    return nats, labels


def validated(run):
    return next(record for record in toys.records(run) if record["step"] == 1 and "validation_loss" in record)


def check(record, nats, tokens, text_bytes):
    assert (record["validation_tokens"], record["validation_bytes"]) == (tokens, pytest.approx(text_bytes, rel=1e-9))
    assert record["validation_loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert record["validation_perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert record["validation_bits_per_byte"] == pytest.approx(nats / math.log(2) / text_bytes, rel=1e-5)


def test_text_that_the_tokenizer_changes(toy, tmp_path):
    """NFC shortens it, unknown tokens hide it: the bytes are those of the text; the separator has none."""
    inner, folder = nfc_tokenizer(tmp_path / "tokenizer")
    end = inner.token_to_id("<end>")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    settings = Settings(str(tmp_path / "data"), str(folder), [str(tmp_path / "a.jsonl")], eos="<end>",
                        validation_input=[str(tmp_path / "b.jsonl")])  # fmt: skip
    held_out = [f"stranger{n} cafe\u0301 word{n % 5}" for n in range(50)]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in held_out))
    prepare(settings, workers=1, max_unknown=0.5)
    config = toys.write_toml(tmp_path)
    toys.train(config, tmp_path / "run", "--training.steps", "1", "--validation.steps", "-1")
    ids = [end] + [i for text in held_out for i in [*inner.encode(text).ids, end]]
    nats, labels = by_hand(tmp_path / "run", ids, range(-(-(len(ids) - 1) // T)))
    assert labels.count(0) == labels.count(end) == 50 and len(labels) == 200
    text_bytes = sum(len(text.encode()) for text in held_out)
    assert text_bytes != sum(len(unicodedata.normalize("NFC", text).encode()) for text in held_out)
    check(validated(tmp_path / "run"), nats, len(labels), text_bytes)


def test_some_windows_of_a_byte_level_set(toy, tmp_path):
    """Six windows, evenly spaced: their bytes are those of their own text."""
    toys.train(toy, tmp_path / "run", "--training.steps", "1", "--validation.steps", "3")
    inner = Tokenizer.from_file(str(toy.parent / "tokenizer/tokenizer.json"))
    from torchtitan_deltaproduct.data.shards.shards import TokenStream

    stream = TokenStream(toy.parent / "data/validation")
    ids = torch.empty(stream.tokens + 1, dtype=torch.int64).numpy()
    stream.read(-1, ids)
    count = -(-stream.tokens // T)
    nats, labels = by_hand(tmp_path / "run", ids.tolist(), [i * count // 6 for i in range(6)])
    text_bytes = sum(len(piece) for i in labels if i for piece in [inner.id_to_token(i)])
    check(validated(tmp_path / "run"), nats, len(labels), text_bytes)


def test_a_validation_set_of_another_separator(toy, tmp_path):
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    prepare(Settings(str(tmp_path / "other"), str(toy.parent / "tokenizer"), [str(source)], eos="!"), workers=1)
    with pytest.raises(DataError, match="different tokenizers or separators"):
        toys.train(toy, tmp_path / "run", "--validation.paths", str(tmp_path / "other"))
