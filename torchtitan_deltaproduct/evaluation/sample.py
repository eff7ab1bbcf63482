"""Raw text for an evaluation: as much of it as is of use, prepared like the text that models are trained on.

    stream, seen = prepare_sample(Wanted("corpus/", length=32_768, sequences=32), tokenizer, eos_id, folder)

Files are looked through in stretches of 1 MiB, in an order drawn by the seed, a dataset as its rows come.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from torchtitan_deltaproduct.data.shards.order import Permutation
from torchtitan_deltaproduct.data.shards.shards import TokenStream
from torchtitan_deltaproduct.data.text.arrow import DatasetRecords, is_saved_dataset
from torchtitan_deltaproduct.data.text.documents import BadRecord, Document
from torchtitan_deltaproduct.data.text.plan import Settings
from torchtitan_deltaproduct.data.text.prepare import prepare
from torchtitan_deltaproduct.data.text.sources import plan_units, read_unit
from torchtitan_deltaproduct.data.text.tokenizer import MOST_UNKNOWN, load_tokenizer
from torchtitan_deltaproduct.errors import DataError

UNIT_BYTES = 1 << 20
"""Of the stretches in which files are looked through."""
TOKEN_BYTES = 8
"""Bytes of text that are sure to have a token: how much text is enough for a number of tokens."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """What to read.

    Attributes:
        data: the dataset; a name of `datasets` may have a configuration, NAME:CONFIGURATION.
        length, sequences: tokens predicted in each sequence, and how many at most.
        documents, seed: `auto`, `long` or `packed`, and which ones.
        split, text_field: of a dataset; the field also of JSON and Parquet files.
        eos: text of the separator; empty: as `find_eos_id`. Prepared folders know theirs.
        search_bytes: of text looked through for long documents at most.
    """

    data: str
    length: int
    sequences: int
    documents: str = "auto"
    seed: int = 0
    split: str = "train"
    text_field: str = "text"
    eos: str = ""
    search_bytes: int = 1 << 30


def is_dataset(data: str) -> bool:
    """Whether `datasets` reads it: what is not there as a path, and folders of its `save_to_disk`."""
    return not Path(data).exists() or is_saved_dataset(data)


@dataclass
class Seen:
    """What a look through text came by: documents that are not empty, and whether these are all."""

    documents: int = 0
    all: bool = True


def prepare_sample(wanted: Wanted, tokenizer: Path, eos_id: int, folder: Path) -> tuple[TokenStream | None, Seen]:
    """Prepares as much of some text as is wanted, with `data.prepare`, in a new `folder`.

    The tokens are those of the tokenizer.json in `tokenizer`, with the separator `eos_id`. Returns their stream (None:
    there is no text at all), and what was seen of the text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sample, seen = folder / "sample.jsonl", Seen()
    with sample.open("w", encoding="utf-8") as file:
        for text in _useful(wanted, seen):
            file.write(json.dumps({"text": text}) + "\n")
    if not sample.stat().st_size:
        return None, seen
    separator = load_tokenizer(tokenizer, eos_id).inner.id_to_token(eos_id) or wanted.eos
    prepare(Settings(str(folder / "tokens"), str(tokenizer), [str(sample)], eos=separator), max_unknown=1.0)
    stream = TokenStream(folder / "tokens")
    unknown, tokens = stream.manifest.unknown_tokens, stream.tokens - stream.manifest.documents
    if unknown > MOST_UNKNOWN * tokens:
        logger.warning("%s: %d of %d tokens are unknown to the tokenizer, which was not made for such text",
                       wanted.data, unknown, tokens)  # fmt: skip
    return stream, seen


def _useful(wanted: Wanted, seen: Seen) -> Iterator[str]:
    """Documents in the order they come by, until there is enough text or `search_bytes` of it have been seen.

    First whatever fills the packed sequences, then what may have the tokens of a long one: a token has a byte at least,
    up to a space in front.
    """
    packed_bytes = 0 if wanted.documents == "long" else TOKEN_BYTES * wanted.length * wanted.sequences
    long_wanted = 0 if wanted.documents == "packed" else wanted.sequences
    total = surely_long = 0
    unreadable: list[BadRecord] = []
    for record in _records(wanted):
        # Looked at before the next record counts as seen: it is only known now that there is one.
        if (total >= packed_bytes and surely_long >= long_wanted) or total >= wanted.search_bytes:
            seen.all = False
            break
        if isinstance(record, BadRecord):
            unreadable.append(record)
            continue
        size = len(record.text.encode())
        seen.documents += size > 0
        surely_long += size >= TOKEN_BYTES * wanted.length
        if size and (total < packed_bytes or (long_wanted and size + 2 >= wanted.length)):
            yield record.text
        total += size
    if unreadable:
        logger.warning("%s: %d records cannot be read and are left out, such as %s",
                       wanted.data, len(unreadable), unreadable[0])  # fmt: skip


def _records(wanted: Wanted) -> Iterator[Document | BadRecord]:
    """The records of files, in an order drawn by the seed that is soon everywhere, or of a dataset as they come."""
    if not is_dataset(wanted.data):
        units = plan_units([wanted.data], wanted.text_field, UNIT_BYTES)
        for index in Permutation(len(units), wanted.seed)(np.arange(len(units))).tolist() if units else ():
            yield from read_unit(units[index])
        return
    name, _, config = wanted.data.partition(":")
    try:
        yield from DatasetRecords(name, config, wanted.split, wanted.text_field)
    except DataError as error:
        if Path(wanted.data).exists():
            raise
        raise DataError(f"There is no file or folder {wanted.data}. As a dataset:\n{error}") from None
