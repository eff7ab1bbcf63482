"""From text to the batches of a training step.

    1 text           text, JSON, CSV, Parquet, a dataset of `datasets`                         text/sources.py
         | prepare   "def f():\\n" -> 283 71 9 14, then 0, the separator       text/tokenizer.py, text/prepare.py
    2 token shards   shards/00003.bin  ... 283 71 9 14 0 283 88 ...  (uint16)      shards/shards.py, shards/corpora.py
         | order     global sample 4711 -> epoch 2, window 913 of data/code                     shards/order.py
    3 window         tokens [913*T - 1, 914*T) of the set, one read                                  packing.py
         | loader    rank r takes samples first + r*LB + [0, LB)                  loader.py, shards/prepared.py
    4 batch          {"input": [LB, T], "document_starts": [LB, T]}, labels [LB, T]

`kind = "streaming"` reaches 4 from 1 without shards (shards/streaming.py); `group_word` and `formal_language` reach it
from a seed alone (generated/). `held_out.py` reads any of them for validation, each sample once. Stages 2 to 4 are a
pure function of (manifest, seed, global sample index): any step can be read directly, by any number of ranks. Every
document ends with the separator, which also opens the next one: its first token is predicted from the separator.

    loader = build_loader(config.data, seq_len=2048, local_batch_size=8, global_batch_size=64)
    inputs, labels = next(iter(loader))

A further kind of data is one module with `build(data, geometry, tokenizer_path)`, one line in `KINDS`, and its options,
each a field with its record in `config/job.py`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from torchtitan_deltaproduct.errors import ConfigError

if TYPE_CHECKING:
    from .loader import Loader

# Modules are imported when they are needed: `prepare` starts without torch, training without `datasets`.
KINDS = {
    "prepared": ".shards.prepared", "streaming": ".shards.streaming", "group_word": ".generated.group_words",
    "formal_language": ".generated.languages",
}  # fmt: skip
GENERATED = ("group_word", "formal_language")
"""Kinds made from a seed: they read no files, have no tokenizer, and are validated on generated samples."""


def build_loader(
    data, *, seq_len: int, local_batch_size: int, global_batch_size: int, dp_rank: int = 0, dp_world_size: int = 1,
    tokenizer_path: str = "",
) -> "Loader":  # fmt: skip
    """The training loader that a `[data]` table asks for: iterating yields micro-batches forever, from its state on.

    Args:
        data: the table (`config.job.Data`).
        seq_len: window length in tokens.
        local_batch_size, global_batch_size: samples of one micro-batch on a rank, of an optimizer step on all ranks.
        dp_rank: index of this data-parallel rank, of `dp_world_size`.
        tokenizer_path: folder with tokenizer.json. Streaming and the tokens of other programs need it; a prepared
            folder has its own, and this one, if given, must be the same.

    Raises:
        ConfigError: the settings cannot be run. DataError: the data is missing, damaged or does not fit.
    """
    from .loader import Geometry

    if data.kind not in KINDS:
        raise ConfigError(f"data.kind is {data.kind!r}; known kinds: {', '.join(KINDS)}")
    geometry = Geometry(seq_len, local_batch_size, global_batch_size, dp_rank, dp_world_size)
    return import_module(KINDS[data.kind], __name__).build(data, geometry, tokenizer_path)


def separator_id(data, tokenizer_path: str = "") -> int | None:
    """Id of the token that stands between documents of a `[data]` table; None for generated data, which has none.

    Raises:
        ConfigError: streaming without a tokenizer. DataError: the data or the tokenizer is missing or damaged, or no
            separator is named.
    """
    # Tables that an earlier version wrote have no `eos`.
    eos = getattr(data, "eos", "")
    if data.kind == "prepared":
        from .shards.corpora import open_manifest

        return open_manifest(data.paths[0], tokenizer_path, eos).eos_id
    if data.kind == "streaming":
        from .text.tokenizer import find_eos_id

        if not tokenizer_path:
            raise ConfigError("model.hf_assets_path is empty: streaming needs a folder with tokenizer.json")
        return find_eos_id(tokenizer_path, eos, option="data.eos")
    return None
