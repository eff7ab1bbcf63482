"""Small data for the tests of `data/`: text files, a tokenizer trained on some, synthetic prepared sets."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import decoders, models, normalizers, trainers

from torchtitan_deltaproduct.data.shards.manifest import Manifest, write_manifest
from torchtitan_deltaproduct.data.shards.shards import ShardWriter
from torchtitan_deltaproduct.data.text.tokenizer import copy_tokenizer, tokenizer_sha256
from torchtitan_deltaproduct.data.text.train_tokenizer import train_tokenizer


def make_corpus(folder: Path, files: int, seed: int = 0) -> Path:
    """Text files of words, with multi-byte characters, DOS line ends and a spelled-out special token."""
    rng = random.Random(seed)
    words = ["def", "return", "naïve", "日本語", "x = 1\r\n", "    ", "<|endoftext|>", "\t", "🙂", "lambda", "0123"]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        words.append(f"{rng.getrandbits(40):x}")
        text = " ".join(rng.choices(words, k=rng.randint(1, 400)))
        (folder / f"{number:04d}.py").write_bytes(text.encode())
    return folder


def make_jsonl(path: Path, records: int, seed: int = 0) -> Path:
    rng = random.Random(seed)
    words = ["alpha", "beta", "größer", "delta", "\n", "  "]
    lines = [
        json.dumps({"text": f"{number} " + " ".join(rng.choices(words, k=rng.randint(1, 80)))})
        for number in range(records)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> str:
    root = tmp_path_factory.mktemp("tokenizer")
    corpus = make_corpus(root / "corpus", files=20)
    train_tokenizer([str(corpus)], vocab_size=400, out=str(root / "tok"))
    return str(root / "tok")


def save_sentencepiece(folder: Path, texts: list[str]) -> None:
    """A vocabulary like Mistral's: spaces as ▁, one put before the text, bytes for unknown characters."""
    inner = HfTokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    special = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, show_progress=False)
    inner.train_from_iterator(texts, trainer)
    description = json.loads(inner.to_str())
    description["added_tokens"] = description["added_tokens"][:2]
    (folder / "tokenizer.json").write_text(json.dumps(description))


def make_set(folder: Path, tokenizer: str, shards: list[list[int]], seed: int = 0) -> list[list[int]]:
    """A prepared folder of random documents; `shards` gives their lengths, separators included.

    Returns:
        The documents.
    """
    rng, documents, written = np.random.default_rng(seed), [], []
    for number, lengths in enumerate(shards):
        writer = ShardWriter(folder, f"shards/{number:05d}", "uint16")
        for length in lengths:
            documents.append([*rng.integers(1, 400, length - 1).tolist(), 0])
            writer.add(documents[-1], length)
        written.append(writer.close())
    copy_tokenizer(tokenizer, folder / "tokenizer")
    manifest = Manifest(
        dtype="uint16",
        vocab_size=400,
        eos_id=0,
        tokenizer_sha256=tokenizer_sha256(tokenizer),
        tokens=sum(shard.tokens for shard in written),
        documents=len(documents),
        bytes=1,
        empty_documents=0,
        bad_records=0,
        source={},
        shards=written,
    )
    write_manifest(folder, manifest)
    return documents


@pytest.fixture(scope="session")
def sets(tmp_path_factory, tokenizer) -> dict[str, str]:
    """Two prepared sets: `a` with 3 shards, documents of 1 to 60 tokens, and `b`, smaller."""
    root, rng = tmp_path_factory.mktemp("sets"), np.random.default_rng(1)
    make_set(root / "a", tokenizer, [rng.integers(1, 60, n).tolist() for n in (40, 1, 55)])
    make_set(root / "b", tokenizer, [rng.integers(1, 60, 20).tolist()], seed=2)
    return {"a": str(root / "a"), "b": str(root / "b")}
