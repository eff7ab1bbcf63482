"""`[data] kind = "prepared"`: windows of memory-mapped token shards, one set or a weighted mixture.

    [data]
    paths = ["data/web/train", "data/code/train"]
    weights = [0.7, 0.3]

Without `weights` all windows of all sets are one pool: each is visited once an epoch. With them, each set
has its share of every global batch and its own epochs.
"""

import numpy as np

from torchtitan_deltaproduct.errors import ConfigError, DataError

from ..loader import Batch, Geometry, Loader
from ..packing import read_windows
from ..text.tokenizer import find_eos_id, tokenizer_sha256
from .corpora import open_stream
from .order import Order
from .shards import TokenStream


def build(data, geometry: Geometry, tokenizer_path: str) -> Loader:
    """The loader of `[data] kind = "prepared"`."""
    # Tables that an earlier version wrote have no `eos`.
    streams = open_streams(data.paths, "data.paths", tokenizer_path, getattr(data, "eos", ""))
    source = PreparedSource(
        streams, data.weights, geometry.seq_len, data.seed, data.shuffle, data.reset_state_at_documents
    )
    if tokenizer_path and tokenizer_sha256(tokenizer_path) != streams[0].manifest.tokenizer_sha256:
        raise DataError(
            f"The tokenizer in {tokenizer_path} is not the one {data.paths[0]} was prepared with.\n"
            f"Leave model.hf_assets_path empty, or set it to {source.tokenizer_path}"
        )
    return Loader(source, geometry, data.num_workers, data.prefetch_factor)


def open_streams(paths: list[str], field: str, tokenizer_path: str = "", eos: str = "") -> list[TokenStream]:
    """Opens what a setting `field` names, see `open_stream`, and checks that one tokenizer made it all."""
    if not paths:
        raise ConfigError(
            f"{field} is empty: name at least one folder made by `python -m torchtitan_deltaproduct.data.prepare`"
        )
    streams = [open_stream(path, tokenizer_path, eos) for path in paths]
    first = streams[0]
    for stream in streams:
        theirs, ours = stream.manifest, first.manifest
        if (theirs.tokenizer_sha256, theirs.eos_id) != (ours.tokenizer_sha256, ours.eos_id):
            raise DataError(
                f"{stream.folder} and {first.folder} were prepared with different tokenizers or separators.\n"
                "Prepare one of them again with the other's tokenizer folder."
            )
        check_tokenizer(stream)
        if eos and find_eos_id(stream.tokenizer_path, eos, "data.eos") != theirs.eos_id:
            raise DataError(
                f"{stream.folder} was prepared with token {theirs.eos_id} as its separator, not data.eos = {eos!r}"
            )
    return streams


def check_tokenizer(stream: TokenStream) -> None:
    """Raises DataError unless the tokenizer in the prepared folder is the one its tokens were made with."""
    if tokenizer_sha256(stream.tokenizer_path) != stream.manifest.tokenizer_sha256:
        raise DataError(
            f"{stream.tokenizer_path}/tokenizer.json is not the tokenizer that {stream.folder} was prepared with.\n"
            "Copy the folder again, or put the original tokenizer.json back."
        )


class Windows:
    """Windows of `seq_len` tokens of several streams, counted through; `sizes` are those of each stream.

    `reset` adds `document_starts` to the batches.
    """

    def __init__(self, streams: list[TokenStream], sizes: list[int], seq_len: int, reset: bool):
        self.streams, self.seq_len, self.reset = streams, seq_len, reset
        self.tokenizer_path, self.vocab_size = streams[0].tokenizer_path, streams[0].manifest.vocab_size
        # Window w is window w - bounds[k] of stream k.
        self.bounds = np.cumsum([0, *sizes])

    def read(self, windows: np.ndarray) -> Batch:
        """windows: [n] int64 -> ({"input": [n, T] int64, "document_starts": [n, T] bool}, labels [n, T] int64)."""
        sets = np.searchsorted(self.bounds, windows, side="right") - 1
        inside = (windows - self.bounds[sets]).tolist()
        return read_windows([self.streams[k] for k in sets.tolist()], inside, self.seq_len, self.reset)


class PreparedSource(Windows):
    """Samples out of prepared folders. `weights`: share of samples of each; empty makes them one pool of windows."""

    def __init__(
        self, streams: list[TokenStream], weights: list[float], seq_len: int, seed: int, shuffle: bool, reset: bool
    ):
        # Without the rest of each stream that is shorter than a window.
        sizes = [stream.tokens // seq_len for stream in streams]
        super().__init__(streams, sizes, seq_len, reset)
        self.paths, self.weights = [str(stream.folder) for stream in streams], list(weights)
        if weights and len(weights) != len(streams):
            raise ConfigError(
                f"data.weights has {len(weights)} entries and data.paths {len(streams)}: give one weight for each path"
            )
        too_small = [stream for stream, size in zip(streams, sizes, strict=True) if size == 0]
        if too_small and (weights or len(too_small) == len(sizes)):
            raise DataError(
                f"{too_small[0].folder} has {too_small[0].tokens:,} tokens, less than one window of "
                f"seq_len = {seq_len:,}.\nPrepare more text or lower training.seq_len."
            )
        pools = (tuple(sizes), tuple(weights)) if weights else ((sum(sizes),), (1.0,))
        self.sequence = Order(*pools, seed, shuffle)

    def batch(self, samples: np.ndarray) -> Batch:
        """samples: [n] int64 -> ({"input": [n, T] int64, "document_starts": [n, T] bool}, labels [n, T])."""
        source, window = self.sequence(samples)
        return self.read(self.bounds[source] + window)

    def order(self) -> dict[str, object]:
        """Data by content, so that a folder may move; the period of the mixture is its quotas."""
        contents = [stream.manifest.content_sha256[:16] for stream in self.streams]
        weights = self.sequence.quotas.tolist() if self.weights else []
        return {
            "kind": "prepared", "data": contents, "weights": weights, "seed": self.sequence.seed,
            "shuffle": self.sequence.shuffle, "seq_len": self.seq_len, "reset_state_at_documents": self.reset,
        }  # fmt: skip

    def epochs(self, sample: int) -> dict[str, float]:
        names = self.paths if self.weights else [" + ".join(self.paths)]
        return dict(zip(names, self.sequence.epochs(sample), strict=True))

    def describe(self) -> str:
        shares = self.sequence.quotas if self.weights else np.diff(self.bounds)
        sets = ", ".join(
            f"{path} ({stream.manifest.counts()}, {share:.1%} of samples)"
            for path, stream, share in zip(self.paths, self.streams, shares / shares.sum(), strict=True)
        )
        return f"prepared data: {sets}; {int(self.bounds[-1]):,} windows of {self.seq_len:,} tokens"
