"""`[data] kind = "streaming"`: a Hugging Face dataset, tokenised while training.

    [data]
    kind = "streaming"
    dataset = "HuggingFaceFW/fineweb"      # or a local file or folder
    dataset_config = "sample-10BT"
    shuffle_buffer = 1000                  # documents shuffled among themselves; 0: file order

    1 documents   rows of the dataset      in blocks of `shuffle_buffer`, permuted; unreadable ones counted and left out
    2 chunks      256 documents            tokenised together, a separator after each; resuming begins here
    3 windows     [i*T - 1, (i+1)*T)       sample i, as for prepared data

Cost: where window i begins depends on the length of every document before it, so each rank tokenises the
whole stream and keeps its rows. The global batches are the same for any number of ranks, at a speed that more
ranks do not raise: use it for a look at a dataset or on one node, `prepare` for a real run. Resuming re-reads
at most one block of documents, and what `datasets` itself must skip in the file it was in.
"""

import json
import logging
from collections import deque
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from torchtitan_deltaproduct.errors import ConfigError, DataError

from .. import separator_id
from ..loader import Batch, Geometry, Loader
from ..packing import read_windows
from ..text.arrow import check_no_split, is_saved_dataset
from ..text.documents import BadRecord, Document
from ..text.sources import open_records
from ..text.tokenizer import MOST_UNKNOWN, Tokenizer, load_tokenizer, tokenizer_sha256
from .order import Permutation

logger = logging.getLogger(__name__)

CHUNK = 256
"""Documents tokenised together."""


def build(data, geometry: Geometry, tokenizer_path: str) -> "StreamingLoader":
    """The loader of `[data] kind = "streaming"`."""
    if not data.dataset:
        raise ConfigError('data.dataset is empty: name the dataset that data.kind = "streaming" reads')
    if Path(data.dataset).exists() and not is_saved_dataset(data.dataset):
        check_no_split(data.dataset, data.split, data.dataset_config)
    if data.num_workers > 1:
        raise ConfigError(f"data.num_workers is {data.num_workers}: streaming reads one stream: it takes 0 or 1 worker")
    source = StreamingSource(data, geometry.seq_len, tokenizer_path)
    return StreamingLoader(source, geometry, data.num_workers, data.prefetch_factor)


class Position(NamedTuple):
    """Where a chunk begins: all that is needed to read on from there."""

    tokens: int = 0
    """Of the stream before the chunk."""
    epoch: int = 0
    block: int = 0
    """Index of its block in the epoch."""
    dataset: dict | None = None
    """State of the records at the start of the block; None: at the start."""
    documents: int = 0
    """Records of the block before the chunk."""
    skipped: int = 0
    """Rows so far that could not be read."""
    bad: str = ""
    """The last of them, and why."""


class Chunk(NamedTuple):
    position: Position
    tokens: np.ndarray
    """[n] int64."""
    starts: np.ndarray
    """[d] int64: where documents begin, counted from the chunk's first token."""


class StreamingSource:
    """What the table `data` says to stream, and how. Picklable: it opens nothing until it is read."""

    def __init__(self, data, seq_len: int, tokenizer_path: str):
        self.data, self.seq_len, self.tokenizer_path = data, seq_len, tokenizer_path
        self.eos_id = separator_id(data, tokenizer_path)
        self.vocab_size = load_tokenizer(tokenizer_path).vocab_size
        self.warned_of_unknown = False

    def order(self) -> dict[str, object]:
        """All that decides which tokens sample i has, as far as the name of a dataset decides its rows."""
        names = ("dataset", "dataset_config", "split", "text_field", "shuffle_buffer", "reset_state_at_documents")
        return {name: getattr(self.data, name) for name in names} | {
            "kind": "streaming",
            "seed": self.data.seed if self.data.shuffle_buffer else None,
            "tokenizer": [tokenizer_sha256(self.tokenizer_path)[:16], self.eos_id],
            "seq_len": self.seq_len,
        }

    def describe(self) -> str:
        data = self.data
        shuffled = f"shuffled in blocks of {data.shuffle_buffer:,}" if data.shuffle_buffer else "in file order"
        return f"streaming data: {data.dataset} {data.dataset_config} {data.split}, documents {shuffled}"

    def chunks(self, start: Position) -> Iterator[Chunk]:
        """The stream from `start` on, epoch after epoch."""
        tokenizer = load_tokenizer(self.tokenizer_path, self.eos_id)
        data = self.data
        records = open_records(data.dataset, data.dataset_config, data.split, data.text_field)
        position = start
        while True:
            records.load_state_dict(position.dataset)
            rows, first = iter(records), position
            while block := list(islice(rows, data.shuffle_buffer or CHUNK)):
                after = records.state_dict()
                for chunk in self._chunks_of_block(block, position, tokenizer):
                    yield chunk
                    tokens = chunk.position.tokens + len(chunk.tokens)
                    position = chunk.position._replace(tokens=tokens)
                bad = [record for record in block if isinstance(record, BadRecord)]
                position = position._replace(
                    block=position.block + 1, dataset=after, documents=0, skipped=position.skipped + len(bad),
                    bad=str(bad[-1]) if bad else position.bad,
                )  # fmt: skip
            if position.tokens == first.tokens and first.block == first.documents == 0:
                why = f"; {position.skipped:,} rows cannot be read, such as {position.bad}" if position.bad else "."
                raise DataError(f"The dataset {data.dataset!r}, split {data.split!r}, has no text in it{why}")
            logger.warning("data: epoch %d of %s is over, starting again", position.epoch + 1, data.dataset)
            position = position._replace(epoch=position.epoch + 1, block=0, dataset=None)

    def _chunks_of_block(
        self, block: list[Document | BadRecord], start: Position, tokenizer: Tokenizer
    ) -> Iterator[Chunk]:
        """The chunks from record `start.documents` of the block on."""
        if self.data.shuffle_buffer:
            order = Permutation(len(block), self.data.seed, start.epoch, start.block)(np.arange(len(block)))
            block = [block[i] for i in order.tolist()]
        position = start
        for first in range(start.documents, len(block), CHUNK):
            position = position._replace(documents=first)
            texts = [record.text for record in block[first : first + CHUNK] if isinstance(record, Document)]
            encoded = tokenizer.encode_batch(texts)
            unknown, known = sum(map(tokenizer.count_unknown, texts, encoded)), sum(map(len, encoded))
            if not self.warned_of_unknown and unknown > MOST_UNKNOWN * known:
                self.warned_of_unknown = True
                logger.warning("data: %d of %d tokens of %s are unknown to the tokenizer",
                               unknown, known, self.data.dataset)  # fmt: skip
            documents = [[*ids, self.eos_id] for ids in encoded if ids]
            lengths = [len(document) for document in documents]
            tokens = np.fromiter(chain.from_iterable(documents), np.int64, sum(lengths))
            yield Chunk(position, tokens, np.cumsum([0, *lengths[:-1]]) if lengths else np.empty(0, np.int64))
            position = position._replace(tokens=position.tokens + len(tokens))


class StreamWindow:
    """The part of the token stream in memory, a `packing.Stream`; asked for later tokens, it reads on."""

    tokens = 1 << 62

    def __init__(self, source: StreamingSource, start: Position):
        # The separator before the first document is a chunk of its own, at position -1.
        self.held = deque([Chunk(start, np.array([source.eos_id]), np.empty(0, np.int64))])
        self.first = start.tokens - 1
        self.end = start.tokens
        self.chunks = source.chunks(start)

    def read(self, start: int, out: np.ndarray) -> int:
        self._reach(start + len(out))
        base = self.first
        for chunk in self.held:
            a, b = max(start, base), min(start + len(out), base + len(chunk.tokens))
            if a < b:
                out[a - start : b - start] = chunk.tokens[a - base : b - base]
            base += len(chunk.tokens)
        return len(out)

    def document_starts(self, start: int, stop: int) -> np.ndarray:
        self._reach(stop)
        starts = np.concatenate([chunk.starts + chunk.position.tokens for chunk in self.held])
        return starts[(starts >= start) & (starts < stop)]

    def forget(self, before: int) -> Position:
        """Drops the chunks that end at or before token `before`; returns where to resume to read it."""
        self._reach(before + 1)
        while self.first + len(self.held[0].tokens) <= before:
            self.first += len(self.held.popleft().tokens)
        return self.held[0].position

    def _reach(self, stop: int) -> None:
        while self.end < stop:
            chunk = next(self.chunks)
            self.held.append(chunk)
            self.end += len(chunk.tokens)


class _Stream(torch.utils.data.IterableDataset):
    """Micro-batches of this rank with the position after each."""

    def __init__(self, source: StreamingSource, geometry: Geometry, sample: int, position: Position):
        self.source, self.geometry, self.sample, self.position = source, geometry, sample, position

    def __iter__(self) -> Iterator[tuple[Batch, Position]]:
        seq_len, sample = self.source.seq_len, self.sample
        window = StreamWindow(self.source, self.position)
        while True:
            rows = self.geometry.rows(sample).tolist()
            batch = read_windows([window] * len(rows), rows, seq_len, self.source.data.reset_state_at_documents)
            sample += self.geometry.micro_batch
            yield batch, window.forget(sample * seq_len - 1)


class StreamingLoader(Loader):
    """A `Loader` whose position, beside the sample index, says where in the dataset to read on."""

    def __init__(self, source: StreamingSource, geometry: Geometry, num_workers: int, prefetch_factor: int):
        super().__init__(source, geometry, num_workers, prefetch_factor)
        self.position = Position()

    def __iter__(self) -> Iterator[Batch]:
        stream = _Stream(self.source, self.geometry, self.sample, self.position)
        for batch, position in self._wrap(stream):
            self.sample += self.geometry.micro_batch
            if position.skipped > self.position.skipped:
                logger.warning("data: %d rows of %s cannot be read and are left out, such as %s",
                               position.skipped, self.source.data.dataset, position.bad)  # fmt: skip
            self.position = position
            yield batch

    def describe(self) -> str:
        return f"{self.source.describe()}; a step is {self._step()}"

    def epochs(self) -> dict[str, float]:
        """Complete passes; how far the current one is cannot be known."""
        return {self.source.data.dataset: float(self.position.epoch)}

    def state_dict(self) -> dict[str, int | str]:
        return {**super().state_dict(), "stream": json.dumps(self.position._asdict())}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        super().load_state_dict(state)
        self.position = Position(**json.loads(str(state["stream"])))
