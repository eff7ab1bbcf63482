"""A prepared set of random tokens, for benchmarks that need data of a given size and vocabulary but not its meaning.

write_random_set(Path("/tmp/random"), tokens=4_000_000, vocab_size=32_000)
"""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models

from torchtitan_deltaproduct.data.shards.manifest import Manifest, write_manifest
from torchtitan_deltaproduct.data.shards.shards import ShardWriter, token_dtype
from torchtitan_deltaproduct.data.text.tokenizer import tokenizer_sha256


def write_random_set(folder: Path, tokens: int, vocab_size: int, document: int = 1000, seed: int = 0) -> Path:
    """Writes documents of `document` tokens, the last of each the separator (id 0), and returns `folder`."""
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    vocab = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, vocab_size)}
    Tokenizer(models.WordLevel(vocab, unk_token="<|endoftext|>")).save(str(folder / "tokenizer/tokenizer.json"))
    writer = ShardWriter(folder, "shards/00000", token_dtype(vocab_size))
    rng = np.random.default_rng(seed)
    for _ in range(tokens // document):
        ids = rng.integers(1, vocab_size, document)
        ids[-1] = 0
        writer.add(ids, document)
    shard = writer.close()
    sha = tokenizer_sha256(folder / "tokenizer")
    counts = (shard.tokens, shard.documents, shard.bytes)
    write_manifest(folder, Manifest(token_dtype(vocab_size), vocab_size, 0, sha, *counts, 0, 0, {}, [shard]))
    return folder
