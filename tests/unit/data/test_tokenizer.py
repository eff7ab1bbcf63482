"""Separator, byte counts and training of tokenizers."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

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

from .conftest import make_corpus, make_jsonl

TEXTS = [
    "",
    "plain",
    " two  spaces\n\ttab\r\n",
    "naïve 日本語 🙂",
    "\x00\x7f",
    "<|endoftext|> spelled",
    "\ufeffx",
]


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
    inner = HfTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    special = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, show_progress=False)
    inner.train_from_iterator(["alpha beta gamma naïve alpha beta"] * 3, trainer)
    description = json.loads(inner.to_str())
    description["added_tokens"] = description["added_tokens"][:2]
    (tmp_path / "tokenizer.json").write_text(json.dumps(description))
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
    assert train_main([corpus, "--vocab-size", "50000", "--out", str(tmp_path / "big")]) == 0
    assert "the text supports no more than" in capsys.readouterr().out
