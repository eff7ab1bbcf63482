"""`[data] kind = "prepared"`: windows of memory-mapped token shards, one set or a weighted mixture.

    [data]
    paths = ["data/web/train", "data/code/train"]
    weights = [0.7, 0.3]

Without `weights` all windows of all sets are one pool: each is visited once an epoch. With them, each set
has its share of every global batch and its own epochs.
"""

import numpy as np
import torch

from torchtitan_deltaproduct.errors import ConfigError, DataError

from ..loader import Batch, Geometry, Loader
from ..packing import full_windows, read_window
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
    if tokenizer_path and tokenizer_sha256(tokenizer_path) != source.streams[0].manifest.tokenizer_sha256:
        raise DataError(
            f"The tokenizer in {tokenizer_path} is not the one {data.paths[0]} was prepared with.\n"
            f"Leave model.hf_assets_path empty, or set it to {source.tokenizer_path}"
        )
    return Loader(source, geometry, data.num_workers, data.prefetch_factor)


def open_streams(paths: list[str], field: str, tokenizer_path: str = "", eos: str = "") -> list[TokenStream]:
    """Opens prepared folders, or token files of others, and checks that one tokenizer made them all.

    Args:
        paths: the folders and files.
        field: name of the setting they come from, for messages.
        tokenizer_path, eos: see `open_stream`.
    """
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
    folder = stream.tokenizer_path
    if tokenizer_sha256(folder) != stream.manifest.tokenizer_sha256:
        raise DataError(
            f"{folder}/tokenizer.json is not the tokenizer that {stream.folder} was prepared with.\n"
            "Copy the folder again, or put the original tokenizer.json back."
        )


def read_windows(
    streams: list[TokenStream], bounds: np.ndarray, windows: np.ndarray, seq_len: int, reset: bool
) -> Batch:
    """Windows of several streams, counted through.

    Args:
        streams: the streams.
        bounds: [len(streams) + 1] int64: windows bounds[k] .. bounds[k + 1] - 1 are those of stream k.
        windows: [n] int64.
        seq_len: T, tokens of a window.
        reset: whether to add `document_starts`.

    Returns:
        ({"input": [n, T] int64, "document_starts": [n, T] bool}, labels [n, T] int64).
    """
    inputs, labels = (np.empty((len(windows), seq_len), dtype=np.int64) for _ in range(2))
    starts = np.empty(inputs.shape, dtype=bool) if reset else [None] * len(windows)
    sets = np.searchsorted(bounds, windows, side="right") - 1
    for row, (k, window) in enumerate(zip(sets.tolist(), (windows - bounds[sets]).tolist(), strict=True)):
        read_window(streams[k], window, inputs[row], labels[row], starts[row])
    batch = {"input": torch.from_numpy(inputs)}
    if reset:
        batch["document_starts"] = torch.from_numpy(starts)
    return batch, torch.from_numpy(labels)


class PreparedSource:
    """Samples out of prepared folders.

    Args:
        streams: of prepared folders or token files of others.
        weights: share of samples of each; empty makes them one pool of windows.
        seq_len: window length in tokens.
        seed: of the shuffle.
        shuffle: False keeps file order.
        reset: adds `document_starts` to the batch.
    """

    def __init__(
        self, streams: list[TokenStream], weights: list[float], seq_len: int, seed: int, shuffle: bool, reset: bool
    ):
        self.streams, self.tokenizer_path = streams, streams[0].tokenizer_path
        self.vocab_size = streams[0].manifest.vocab_size
        self.paths, self.weights = [str(stream.folder) for stream in streams], list(weights)
        self.seq_len, self.reset = seq_len, reset
        sizes = [full_windows(stream.tokens, seq_len) for stream in self.streams]
        # Window w of the pool is window w - bounds[k] of set k.
        self.bounds = np.cumsum([0] + sizes)
        self._check(sizes)
        if weights:
            self.sequence = Order(tuple(sizes), tuple(weights), seed, shuffle)
            self.bases = self.bounds[:-1]
        else:
            self.sequence = Order((sum(sizes),), (1.0,), seed, shuffle)
            self.bases = np.zeros(1, dtype=np.int64)

    def _check(self, sizes: list[int]) -> None:
        if self.weights and len(self.weights) != len(self.paths):
            raise ConfigError(
                f"data.weights has {len(self.weights)} entries and data.paths {len(self.paths)}: "
                "give one weight for each path"
            )
        too_small = [k for k, size in enumerate(sizes) if size == 0]
        if too_small and (self.weights or len(too_small) == len(sizes)):
            stream = self.streams[too_small[0]]
            raise DataError(
                f"{stream.folder} has {stream.tokens:,} tokens, less than one window of "
                f"seq_len = {self.seq_len:,}.\nPrepare more text or lower training.seq_len."
            )

    def batch(self, samples: np.ndarray) -> Batch:
        """samples: [n] int64 -> ({"input": [n, T] int64, "document_starts": [n, T] bool}, labels [n, T])."""
        source, window = self.sequence(samples)
        return read_windows(self.streams, self.bounds, self.bases[source] + window, self.seq_len, self.reset)

    def order(self) -> dict[str, object]:
        """Data by content, so that a folder may move; the period of the mixture is its quotas."""
        return {
            "kind": "prepared",
            "data": [stream.manifest.content_sha256[:16] for stream in self.streams],
            "weights": self.sequence.quotas.tolist() if self.weights else [],
            "seed": self.sequence.seed,
            "shuffle": self.sequence.shuffle,
            "seq_len": self.seq_len,
            "reset_state_at_documents": self.reset,
        }

    def epochs(self, sample: int) -> dict[str, float]:
        names = self.paths if self.weights else [" + ".join(self.paths)]
        return dict(zip(names, self.sequence.epochs(sample), strict=True))

    def describe(self) -> str:
        shares = self.sequence.quotas / self.sequence.quotas.sum() if self.weights else np.diff(self.bounds)
        shares = shares / shares.sum()
        sets = ", ".join(
            f"{path} ({stream.manifest.counts()}, {share:.1%} of samples)"
            for path, stream, share in zip(self.paths, self.streams, shares, strict=True)
        )
        return f"prepared data: {sets}; {int(self.bounds[-1]):,} windows of {self.seq_len:,} tokens"
