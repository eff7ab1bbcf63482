"""Prepared sets for benchmarks that need data of a given size and vocabulary but not its meaning.

write_random_set(Path("/tmp/random"), tokens=4_000_000, vocab_size=32_000)
write_sparse_set(Path("/tmp/sparse"), shards=100, tokens=2**31, documents=1000)     # 400 GiB, no disk space
"""

import os
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models

from torchtitan_deltaproduct.data.shards.manifest import Manifest, Shard, write_manifest
from torchtitan_deltaproduct.data.shards.megatron import index_bytes
from torchtitan_deltaproduct.data.shards.shards import ShardWriter, token_dtype
from torchtitan_deltaproduct.data.shards.verified import Verified
from torchtitan_deltaproduct.data.text.tokenizer import tokenizer_sha256


def write_random_set(folder: Path, tokens: int, vocab_size: int, document: int = 1000, seed: int = 0) -> Path:
    """Writes documents of `document` tokens, the last of each the separator (id 0), and returns `folder`."""
    writer = ShardWriter(folder, "shards/00000", token_dtype(vocab_size))
    rng = np.random.default_rng(seed)
    for _ in range(tokens // document):
        ids = rng.integers(1, vocab_size, document)
        ids[-1] = 0
        writer.add(ids, document)
    write_tokenizer_and_manifest(folder, vocab_size, [writer.close()])
    return folder


def write_sparse_set(folder: Path, shards: int, tokens: int, documents: int, vocab_size: int = 2) -> Path:
    """Writes `shards` of so many tokens, all of them 0, as holes that take no space, and returns `folder`.

    It is as after a first use: nothing is compared with its checksums.
    """
    (folder / "shards").mkdir(parents=True)
    dtype, table = token_dtype(vocab_size), []
    index = index_bytes(np.arange(1, documents + 1) * tokens // documents, dtype)
    for number in range(shards):
        name = f"shards/{number:05d}"
        with open(folder / f"{name}.bin", "wb") as file:
            os.truncate(file.fileno(), tokens * np.dtype(dtype).itemsize)
        (folder / f"{name}.idx").write_bytes(index)
        table.append(Shard(name, tokens, documents, tokens, "0" * 64, "0" * 64))
    Verified(folder, write_tokenizer_and_manifest(folder, vocab_size, table)).trust()
    return folder


def write_tokenizer_and_manifest(folder: Path, vocab_size: int, shards: list[Shard]) -> Manifest:
    """A tokenizer of words `w1`, `w2` and so on, and the manifest of a set that it made."""
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    vocab = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, vocab_size)}
    Tokenizer(models.WordLevel(vocab, unk_token="<|endoftext|>")).save(str(folder / "tokenizer/tokenizer.json"))
    sha = tokenizer_sha256(folder / "tokenizer")
    counts = (sum(getattr(shard, name) for shard in shards) for name in ("tokens", "documents", "bytes"))
    manifest = Manifest(token_dtype(vocab_size), vocab_size, 0, sha, *counts, 0, 0, {}, shards)
    write_manifest(folder, manifest)
    return manifest
