"""Looks through text for sequences of tokens: long documents, and, should they be too few, packed ones.

    1 units       files in stretches of 1 MiB, in an order drawn by the seed, or the rows of a dataset as they come
    2 documents   tokenised in batches, of a huge one no more than is needed; a separator after each
    3 long        a document of at least `length` tokens gives a row: the separator before it and its start
    4 packed      the first sequences * length tokens of all documents, one after the other, cut into rows

It ends when there are enough long documents (`packed` alone: enough tokens), after `search_bytes` of text, or at the
end. Rows go to the disk at once; in memory are one batch of texts, or one text, and the tokens of a piece of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from torchtitan_deltaproduct.data.order import Permutation
from torchtitan_deltaproduct.data.text_sources import BadRecord, Document, plan_units, read_unit
from torchtitan_deltaproduct.data.tokenizer import Tokenizer

from .row_file import RowWriter

UNIT_BYTES = 1 << 20
BATCH_CHARACTERS, BATCH_DOCUMENTS = 1 << 18, 1024
PIECE_CHARACTERS = 1 << 20
"""Longer texts are tokenised in pieces, cut after a line: the tokens next to a cut may differ from those without it."""


def spread_units(path: str, field: str, seed: int) -> Iterator[Document | BadRecord]:
    """The records of files, some from everywhere long before all of them have been read."""
    units = plan_units([path], field, UNIT_BYTES)
    if not units:
        return
    for index in Permutation(len(units), seed)(np.arange(len(units))).tolist():
        yield from read_unit(units[index])


class LongRows:
    """Step 3: the starts of documents that are at least as long as a row."""

    def __init__(self, writer: RowWriter, eos_id: int):
        self.writer, self.eos_id = writer, eos_id
        self.rows = self.filled = 0

    def add(self, tokens: np.ndarray) -> None:
        """The next tokens of a document, the separator after it included."""
        rows, length = self.writer.shape
        if self.rows < rows and self.filled < length:
            if self.filled == 0:
                self.writer.write(self.rows, 0, [self.eos_id])
                self.filled = 1
            taken = tokens[: length - self.filled]
            self.writer.write(self.rows, self.filled, taken)
            self.filled += len(taken)

    def end(self) -> None:
        """The document is over: unless its row is full, the next one overwrites it."""
        self.rows += self.filled == self.writer.shape[1]
        self.filled = 0


class PackedRows:
    """Step 4: rows of the stream of all documents; the last token of a row is the first of the next (`packing`)."""

    def __init__(self, writer: RowWriter, eos_id: int):
        self.writer, self.filled = writer, 0
        self.add(np.array([eos_id]))

    @property
    def room(self) -> int:
        """Tokens that are still taken."""
        rows, length = self.writer.shape
        return rows * (length - 1) + 1 - self.filled

    @property
    def rows(self) -> int:
        """Rows that are complete."""
        return (self.filled - 1) // (self.writer.shape[1] - 1)

    def add(self, tokens: np.ndarray) -> None:
        """The next tokens of the stream."""
        tokens, (rows, length) = tokens[: self.room], self.writer.shape
        while len(tokens):
            row, column = divmod(self.filled, length - 1)
            taken = min(len(tokens), length - 1 - column)
            if row < rows:
                self.writer.write(row, column, tokens[:taken])
            if column == 0 and row > 0:
                self.writer.write(row - 1, length - 1, tokens[:1])
            self.filled += taken
            tokens = tokens[taken:]


@dataclass
class Search:
    """A pass over documents, into rows of `length + 1` tokens.

    Attributes:
        tokenizer: what makes tokens of text.
        eos_id: the separator.
        long, packed: where rows go; None: none of that kind are wanted.
        search_bytes: of text looked through at most.
        documents: seen so far that are not empty.
        found: of them, as long as a row; counted if `long` is there.
        bytes: of text so far.
        tokens, unknown: of the first pieces of documents, and those of them that the vocabulary cannot write.
        bad: the first records that could not be read; bad_count: all of them.
        complete: there was nothing left to look through.
    """

    tokenizer: Tokenizer
    eos_id: int
    long: LongRows | None
    packed: PackedRows | None
    search_bytes: int
    documents: int = 0
    found: int = 0
    bytes: int = 0
    tokens: int = 0
    unknown: int = 0
    bad: list[BadRecord] = field(default_factory=list)
    bad_count: int = 0
    complete: bool = False

    def run(self, records: Iterator[Document | BadRecord]) -> None:
        """Reads until it has what it wants."""
        for texts in self._batches(records):
            firsts = [text[: _cut(text, 0)] for text in texts]
            for text, ids in zip(texts, self.tokenizer.encode_batch(firsts), strict=True):
                self.tokens += len(ids)
                self.unknown += self.tokenizer.count_unknown(text[: _cut(text, 0)], ids)
                if ids:
                    self._take(text, ids)
            if self._enough() or self.bytes >= self.search_bytes:
                return
        self.complete = True

    def _take(self, text: str, ids: list[int]) -> None:
        """Hands on a document, as much of it as is of use; `ids` are the tokens up to its first cut."""
        stop, size = _cut(text, 0), 0
        while True:
            tokens = np.array(ids if stop < len(text) else [*ids, self.eos_id])
            size += len(tokens)
            if self.packed is not None:
                self.packed.add(tokens)
            if self.long is not None:
                self.long.add(tokens)
            packing = self.packed is not None and self.packed.room > 0
            if stop == len(text) or not (packing or size < self.length):
                break
            start, stop = stop, _cut(text, stop)
            ids = self.tokenizer.encode_batch([text[start:stop]])[0]
        self.documents += 1
        if self.long is not None:
            self.found += size >= self.length
            self.long.end()

    @property
    def length(self) -> int:
        """Tokens of a document that is long."""
        return (self.long or self.packed).writer.shape[1] - 1

    def _enough(self) -> bool:
        if self.long is not None:
            return self.long.rows == self.long.writer.shape[0]
        return not self.packed.room

    def _batches(self, records: Iterator[Document | BadRecord]) -> Iterator[list[str]]:
        batch, characters = [], 0
        for record in records:
            if isinstance(record, BadRecord):
                self.bad_count += 1
                self.bad += [record] * (self.bad_count <= 3)
                continue
            size = len(record.text.encode())
            self.bytes += size
            if self._needs(size):
                batch.append(record.text)
                characters += len(record.text)
            else:
                self.documents += size > 0
            if characters >= BATCH_CHARACTERS or len(batch) >= BATCH_DOCUMENTS or self.bytes >= self.search_bytes:
                yield batch
                batch, characters = [], 0
        yield batch

    def _needs(self, size: int) -> bool:
        """Whether a text of so many bytes must be tokenised: a token is at least one byte, up to a space in front."""
        return (self.packed is not None and self.packed.room > 0) or size + 2 >= self.length


def _cut(text: str, start: int) -> int:
    """Where the piece of a text that begins at `start` ends: after its last line if it is too long."""
    stop = start + PIECE_CHARACTERS
    if stop >= len(text):
        return len(text)
    line = text.rfind("\n", start, stop) + 1
    return line if line > start else stop
