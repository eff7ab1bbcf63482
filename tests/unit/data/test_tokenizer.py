"""Separator, byte counts and training of tokenizers."""

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as HfTokenizer

from torchtitan_deltaproduct.data.text import tokenizer as tokenizer_module
from torchtitan_deltaproduct.data.text.tokenizer import (
    copy_tokenizer,
    find_eos_id,
    load_tokenizer,
    same_tokenizer,
    token_bytes,
)
from torchtitan_deltaproduct.data.text.train_tokenizer import main as train_main
from torchtitan_deltaproduct.data.text.train_tokenizer import train_tokenizer
from torchtitan_deltaproduct.errors import ConfigError, DataError

from .conftest import make_corpus, make_jsonl, save_sentencepiece

TEXTS = ["", "plain", " two  spaces\n\ttab\r\n", "naïve 日本語 🙂", "\x00\x7f", "<|endoftext|> spelled", "\ufeffx"]


def test_byte_table_is_exact_for_a_byte_level_vocabulary(tokenizer):
    table = token_bytes(tokenizer, 400)
    assert table.dtype == np.int32 and table.shape == (400,) and table[0] == 0 and (table[1:] > 0).all()
    inner = load_tokenizer(tokenizer)
    for text, ids in zip(TEXTS, inner.encode_batch(TEXTS), strict=True):
        assert table[ids].sum() == len(text.encode())
        assert inner.decode(ids) == text
        assert 0 not in ids


def test_a_separator_that_is_an_ordinary_token_has_no_bytes(tokenizer, tmp_path):
    copy_tokenizer(tokenizer, tmp_path)
    inner = HfTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    inner.add_tokens(["<doc>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    assert token_bytes(tmp_path, 401)[400] == 5 and token_bytes(tmp_path, 401, eos_id=400)[400] == 0
    assert (token_bytes(tmp_path, 401)[:400] == token_bytes(tmp_path, 401, eos_id=400)[:400]).all()


def test_bytes_that_a_vocabulary_lacks(tmp_path):
    """Byte-level BPE over the bytes of some text alone: others leave no token, and are counted one by one."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters = sorted({letter for piece, _ in byte_level.pre_tokenize_str("a b é") for letter in piece})
    inner = HfTokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = byte_level
    inner.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    texts = ["é b a", "é c a", "日"]
    ids = loaded.encode_batch(texts)
    assert [len(found) for found in ids] == [6, 5, 0]
    assert [loaded.count_unknown(*pair) for pair in zip(texts, ids, strict=True)] == [0, 1, 3]


def test_a_copy_names_the_separator(tokenizer, tmp_path):
    """In every file that names one; a folder that names none gets the file."""
    bang = load_tokenizer(tokenizer).inner.token_to_id("!")
    copy_tokenizer(tokenizer, tmp_path / "one", bang)
    assert find_eos_id(tmp_path / "one") == bang and find_eos_id(tokenizer) == 0
    assert same_tokenizer(tokenizer, tmp_path / "one", bang) and not same_tokenizer(tokenizer, tmp_path / "one", 0)
    (tmp_path / "one/special_tokens_map.json").write_text('{"eos_token": "?", "pad_token": "#"}')
    copy_tokenizer(tmp_path / "one", tmp_path / "two", 0)
    names = json.loads((tmp_path / "two/special_tokens_map.json").read_text())
    assert names == {"eos_token": "<|endoftext|>", "pad_token": "#"} and find_eos_id(tmp_path / "two") == 0
    with pytest.raises(DataError, match="has no token 4000, the separator"):
        copy_tokenizer(tokenizer, tmp_path / "three", 4000)


def test_byte_table_of_a_sentencepiece_vocabulary(tmp_path):
    save_sentencepiece(tmp_path, ["alpha beta gamma naïve alpha beta"] * 3)
    loaded = load_tokenizer(tmp_path)
    table = token_bytes(tmp_path, loaded.vocab_size)
    for text in ["alpha", "alpha  beta", "日本 naïve"]:
        (ids,) = loaded.encode_batch([text])
        # One space is put before the document.
        assert table[ids].sum() == len(text.encode()) + 1
    assert find_eos_id(tmp_path) == 1


def test_eos_is_found_or_asked_for(tokenizer, tmp_path):
    assert find_eos_id(tokenizer) == 0
    assert find_eos_id(tokenizer, eos="!") == load_tokenizer(tokenizer).inner.token_to_id("!")
    with pytest.raises(DataError, match=r"has no token '<end>'; its special tokens: <\|endoftext\|>"):
        find_eos_id(tokenizer, eos="<end>")
    shutil.copy(Path(tokenizer, "tokenizer.json"), tmp_path)
    assert find_eos_id(tmp_path) == 0
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "!"}}')
    assert find_eos_id(tmp_path) == find_eos_id(tokenizer, eos="!")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        find_eos_id(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read as a tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="There is no tokenizer.json in"):
        load_tokenizer(tmp_path / "nowhere")
    fetch = 'hf download mistralai/Mistral-7B-v0.1 --include "*token*" --local-dir data/Mistral-7B-v0.1'
    with pytest.raises(DataError, match=rf"fetch it and name data/Mistral-7B-v0.1:\n{re.escape(fetch)}$"):
        load_tokenizer("mistralai/Mistral-7B-v0.1")


def test_training_is_deterministic_across_processes(tmp_path):
    make_corpus(tmp_path / "corpus", 60)
    make_jsonl(tmp_path / "corpus" / "x.jsonl", 100)
    made = []
    for name in ("one", "two"):
        command = [sys.executable, "-m", "torchtitan_deltaproduct.data.train_tokenizer", "corpus"]
        command += ["--vocab-size", "600", "--out", name]
        assert "trained one, 600 tokens" in subprocess.run(
            command, cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.replace("two", "one")
        made.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert made[0] == made[1] and "tokenizer.json" in made[0]


def test_training_reuses_and_refuses(tmp_path, capsys):
    corpus, out = str(make_corpus(tmp_path / "corpus", 5)), str(tmp_path / "tok")
    assert train_tokenizer([corpus], 300, out) and not train_tokenizer([corpus], 300, out)
    with pytest.raises(DataError, match="other input or settings"):
        train_tokenizer([corpus], 301, out)
    assert train_tokenizer([corpus], 301, out, overwrite=True)
    with pytest.raises(ConfigError, match="at least 257"):
        train_tokenizer([corpus], 256, str(tmp_path / "small"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/a.txt").touch(), (tmp_path / "empty/b.txt").touch()
    with pytest.raises(DataError, match="empty/a.txt and 1 other files: there is no text to train a tokenizer on"):
        train_tokenizer([str(tmp_path / "empty")], 300, str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    assert train_main([corpus, "--vocab-size", "50000", "--out", str(tmp_path / "big")]) == 0
    assert "the text supports no more than" in capsys.readouterr().out


def fast_tokenizer(pre_tokenizer, normalizer=None, model=None) -> HfTokenizer:
    """A BPE over bytes with merges that cross letters, spaces and line breaks wherever the pre-tokenizer lets them."""
    inner = HfTokenizer(model or models.BPE())
    inner.pre_tokenizer, inner.normalizer = pre_tokenizer, normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet,
                                  show_progress=False)  # fmt: skip
    inner.train_from_iterator([long_text(0, 3000), long_text(1, 3000)], trainer)
    return inner


def long_text(seed: int, size: int) -> str:
    """Words, numbers, signs, combining marks and every kind of space, in runs."""
    rng, parts = random.Random(seed), []
    words = [
        "word",
        "naïve",
        "cafe\u0301",
        "日本語",
        "it's",
        "a_b",
        "x1",
        "1234567",
        "\u0301",
        "🙂",
        "...",
        "<doc>",
        "(",
        "Σας",
    ]
    spaces = [" ", " ", " ", "\n", "\n", "  ", "\n\n", " \n", "\n ", "\t", "\r\n", "\u00a0", "\u2028", "\x1c", ""]
    while sum(map(len, parts)) < size:
        parts += [rng.choice(words), rng.choice(spaces)]
    return "".join(parts)


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


@pytest.mark.parametrize(
    "pre_tokenizer, normalizer, is_cut",
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), None, True),
        (pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.NFC(), True),
        (pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA_3), "isolated"), BYTES]), None, True),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]), None, True),
        (pre_tokenizers.WhitespaceSplit(), None, True),
        # A space before the text, unless it has one: it is cut before spaces alone.
        (pre_tokenizers.ByteLevel(add_prefix_space=True), None, True),
        (pre_tokenizers.Metaspace(), None, True),
        (pre_tokenizers.Metaspace(split=False), None, False),
        (pre_tokenizers.Split(Regex(r"(?m).+"), "isolated"), None, False),
        (pre_tokenizers.ByteLevel(add_prefix_space=False), normalizers.Prepend("x"), False),
        (None, None, False),
    ],
)
def test_a_long_text_in_pieces_has_the_tokens_of_the_whole(tmp_path, monkeypatch, pre_tokenizer, normalizer, is_cut):
    fast_tokenizer(pre_tokenizer, normalizer).save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    for size in (1, 40, 300):
        monkeypatch.setattr(tokenizer_module, "PIECE", size)
        for seed in range(4):
            text = long_text(10 + seed, 2000)
            pieces = list(loaded.pieces(text))
            assert "".join(pieces) == text and (len(pieces) > 5 if is_cut and size < 300 else True)
            assert is_cut or len(pieces) == 1
            whole = loaded.inner.encode(text, add_special_tokens=False).ids
            assert loaded.encode_batch([text, "short"]) == [whole, loaded.inner.encode("short").ids]


def test_an_added_token_that_reaches_over_a_space_forbids_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "PIECE", 40)
    for number, token in enumerate((AddedToken("a\nb"), AddedToken("<doc>", rstrip=True), AddedToken("<doc>"))):
        inner = fast_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=False))
        inner.add_tokens([token])
        (tmp_path / str(number)).mkdir()
        inner.save(str(tmp_path / f"{number}/tokenizer.json"))
        loaded, text = load_tokenizer(tmp_path / str(number)), "x a\nb y <doc> z\n" * 200
        assert (len(list(loaded.pieces(text))) > 1) == (number == 2)
        assert loaded.encode_batch([text])[0] == loaded.inner.encode(text, add_special_tokens=False).ids
