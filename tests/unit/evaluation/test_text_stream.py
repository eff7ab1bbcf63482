"""Streamed text equals the decoder's for byte-level and SentencePiece vocabularies; stop strings across tokens."""

import random

import pytest

from tests.unit.data.conftest import save_sentencepiece
from torchtitan_deltaproduct.data.text.tokenizer import load_tokenizer
from torchtitan_deltaproduct.evaluation.generate.vocabulary import MOST_PENDING, StopStrings, TextStream

TEXTS = [
    "plain text",
    "naïve 日本語 🙂 def f():\n\treturn '语'",
    "👨‍👩‍👧 e\u0301 \ufeff",
    "ends in half \ufffd",
    "\ufffd\ufffd x",
    "  two  ",
]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    save_sentencepiece(folder, ["plain", "text", "two", "naïve", "return", "ends", "in", "half", "x"] * 3)
    return load_tokenizer(folder)


@pytest.fixture(params=["bytes", "pieces"])
def tokenizer(request, vocabulary):
    return vocabulary.tokenizer if request.param == "bytes" else request.getfixturevalue("pieces")


def stream(tokenizer, ids, prompt=(), stops=()):
    text = TextStream(tokenizer, list(prompt), stops)
    shown = []
    for token in ids:
        shown.append(text.push(token))
        if text.stopped:
            break
    return [*shown, text.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_whole_characters_as_they_come(tokenizer, text):
    ids = tokenizer.encode_batch([text])[0]
    shown = stream(tokenizer, ids)
    assert "".join(shown) == tokenizer.decode(ids) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in shown)
        assert shown[-1] == ""


@pytest.mark.parametrize("text", ["two words", "x日本", " in"])
@pytest.mark.parametrize("prompt", ["plain text", "half 日本", "x" * 40])
def test_after_a_prompt(tokenizer, prompt, text):
    before = tokenizer.encode_batch([prompt])[0]
    ids = tokenizer.encode_batch([prompt + text])[0]
    assert ids[: len(before)] == before, "the example must split between tokens"
    assert "".join(stream(tokenizer, ids[len(before) :], before)) == text


def test_bytes_that_are_no_text(vocabulary):
    """Random tokens: as the decoder shows the whole, and never held back for long."""
    random.seed(0)
    for _ in range(200):
        ids = [random.randrange(1, 320) for _ in range(60)]
        assert "".join(stream(vocabulary.tokenizer, ids)) == vocabulary.tokenizer.decode(ids)
    (half,) = vocabulary.tokenizer.encode_batch(["語"])
    shown = stream(vocabulary.tokenizer, half[:1] * 50)
    assert "".join(shown) == "\ufffd" * 50
    silent = [len(run) for run in "".join("." if piece else "_" for piece in shown).split(".")]
    assert max(silent) < MOST_PENDING


def test_broken_bytes_of_a_sentencepiece_vocabulary(pieces):
    """The decoder shows a byte another way once a broken one follows; what was shown stays."""
    broken = [pieces.inner.token_to_id(name) for name in ("<0x41>", "<0xE2>", "<0x82>")]
    after = pieces.encode_batch(["text"])[0]
    shown = stream(pieces, [*broken, *after])
    assert shown[0] == "A" and "".join(shown).endswith("text") and "\ufffd" in "".join(shown)


def feed(stops, *pieces):
    filtered = StopStrings(stops)
    shown = [filtered.push(piece) for piece in pieces]
    return shown + ([] if filtered.complete else [filtered.finish()]), filtered.complete


@pytest.mark.parametrize(("stops", "parts", "shown", "found"), [
    (["END"], ["a E", "N", "D b", "c"], ["a ", "", "", ""], True),
    (["END"], ["a E", "N", "x"], ["a ", "", "ENx", ""], False),
    (["END"], ["a EN"], ["a ", "EN"], False),
    (["aab"], ["a", "a", "a", "b!"], ["", "", "a", ""], True),
    (["\n\n", ")"], ["f(x", ")\n", "\n"], ["f(x", "", ""], True),
    (["later", "at"], ["l", "ate"], ["", "l"], True),
    ([], ["x", "y"], ["x", "y", ""], False),
    ([""], ["x"], ["x", ""], False),
])  # fmt: skip
def test_stop_strings(stops, parts, shown, found):
    assert feed(stops, *parts) == (shown, found)


def test_a_stop_string_across_tokens(vocabulary):
    tokenizer = vocabulary.tokenizer
    (ids,) = tokenizer.encode_batch(["one 日本語 two"])
    for stop in ("本語", "e 日", " two", "o"):
        assert "".join(stream(tokenizer, ids, stops=[stop])) == "one 日本語 two".split(stop)[0]
    assert "".join(stream(tokenizer, ids, stops=["three"])) == "one 日本語 two"
