"""The token sequences that an eval reads, chosen once and kept on disk.

    wanted = Wanted("data/code/validation", length=32_768, sequences=32)
    texts = open_texts(wanted, tokenizer=None, folder=Path("eval/texts"))
    texts.read(0, 4, start=0, stop=1025)            # [4, 1025] int64

A dataset is a prepared folder, a file or folder of text (`data.text_sources`), or a name of `datasets`. A sequence has
`length` + 1 tokens, so that `length` of them are predicted:

    long      the start of a document of at least `length` tokens (its separator counted): separator, d1, d2, ...
    packed    a window of documents one after the other, as in training (`data.packing`)

`auto` takes long ones if there are enough, else packed. They are spread over the set: of n equal stretches each gives
one, drawn by the seed. TEXTS/NAME-KEY holds tokens.npy and about.json, written last.
"""

import hashlib
import json
import logging
import re
import shutil
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from torchtitan_deltaproduct.data.manifest import NAME as MANIFEST
from torchtitan_deltaproduct.data.manifest import write_atomically
from torchtitan_deltaproduct.data.prepared import check_tokenizer
from torchtitan_deltaproduct.data.shards import TokenStream, token_dtype
from torchtitan_deltaproduct.data.text_files import list_files
from torchtitan_deltaproduct.data.text_sources import check_no_split, is_saved_dataset
from torchtitan_deltaproduct.data.text_streams import stream_dataset
from torchtitan_deltaproduct.data.tokenizer import MOST_UNKNOWN, find_eos_id, load_tokenizer, tokenizer_sha256
from torchtitan_deltaproduct.data.verified import file_sha256
from torchtitan_deltaproduct.errors import DataError
from torchtitan_deltaproduct.files import read_text

from .row_file import RowFile, RowWriter
from .text_search import LongRows, PackedRows, Search, spread_units

VERSION = 1
PIECE = 1 << 16
"""Tokens copied at a time."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """What to read.

    Attributes:
        data: the dataset; a name of `datasets` may have a configuration, NAME:CONFIGURATION.
        length: tokens predicted in each sequence.
        sequences: how many at most.
        documents: `auto`, `long` or `packed`.
        seed: which ones.
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


@dataclass(frozen=True)
class Texts:
    """Sequences on disk.

    Attributes:
        folder: with tokens.npy.
        about: about.json, see `open_texts`.
    """

    folder: Path
    about: dict

    @property
    def length(self) -> int:
        return self.about["length"]

    @property
    def sequences(self) -> int:
        return self.about["sequences"]

    def read(self, first: int, last: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the sequences first .. last - 1: [last - first, stop - start] int64."""
        file = RowFile(self.folder / "tokens.npy")
        return np.stack([file.read(row, start, stop) for row in range(first, last)]).astype(np.int64)

    def describe(self) -> str:
        """One line: which sequences these are, and why."""
        about = self.about
        asked, found, seen = about["wanted"]["sequences"], about["long_documents"], about["documents"]
        among = f"{'' if about['all_seen'] else 'the first '}{seen:,} document{'s' * (seen != 1)}"
        few = f" (all there are; {asked:,} were asked for)" if self.sequences < asked else ""
        head = f"{self.sequences:,} sequence{'s' * (self.sequences != 1)} of {self.length:,} tokens{few}"
        if about["kind"] == "long":
            return f"{head}: the starts of long documents (long enough: {found:,} of {among})"
        why = "" if found is None else f" (long enough: {found:,} of {among})"
        return f"{head}: packed documents, {about['documents_a_sequence']:,.1f} in each{why}"


def open_texts(wanted: Wanted, tokenizer: Path | None, folder: Path, eos_id: int | None = None) -> Texts:
    """Chooses the sequences and writes them, unless that was done before.

    Args:
        wanted: what to read.
        tokenizer: folder with the tokenizer.json for text; prepared folders have their own.
        folder: where the sequences of all datasets are kept.
        eos_id: the separator between documents of text; None: as `wanted.eos`.

    Returns:
        Sequences whose `about` has: wanted, source (identifies the dataset), `kind` (long or packed), sequences,
        length, documents seen, long_documents (None: not counted), all_seen (or the search ended before),
        documents_a_sequence (mean), largest_id, eos_id, tokenizer_sha256, and sha256 of tokens.npy.

    Raises:
        DataError: there is no such dataset, no tokenizer for it, or not one sequence of that length.
    """
    stream = _prepared(wanted.data)
    if not _is_dataset(wanted.data) and wanted.split != "train":
        # A name may be meant for another dataset of the same command; a slice would be another number of documents.
        if "[" in wanted.split:
            check_no_split(wanted.data, wanted.split)
        logger.warning("%s has no splits: --split %s does not concern it", wanted.data, wanted.split)
    if stream is not None:
        check_tokenizer(stream)
        source = {"prepared": stream.manifest.content_sha256}
        sha, eos_id = stream.manifest.tokenizer_sha256, stream.manifest.eos_id
    else:
        source = _source(wanted)
        if tokenizer is None:
            raise DataError(
                f"{wanted.data} is text, and the model's folder has no tokenizer.json to read it with\n"
                "name the folder of its tokenizer with --tokenizer"
            )
        sha, eos_id = tokenizer_sha256(tokenizer), find_eos_id(tokenizer, wanted.eos) if eos_id is None else eos_id
    asked = asdict(wanted) | {"source": source, "tokenizer_sha256": sha, "eos_id": eos_id, "version": VERSION}
    target = folder / f"{slug(wanted.data)}-{digest(asked)}"
    known = _read(target)
    if known is not None:
        return known
    target.mkdir(parents=True, exist_ok=True)
    choose = _choose_windows if stream is not None else _choose_texts
    facts = choose(wanted, stream or tokenizer, eos_id, target)
    about = {
        "version": VERSION, "wanted": asdict(wanted), "source": source, "eos_id": eos_id, "tokenizer_sha256": sha,
        "length": wanted.length, **facts, **_measure(target / "tokens.npy", eos_id),
    }  # fmt: skip
    write_atomically(target / "about.json", json.dumps(about, indent=1) + "\n")
    return Texts(target, about)


def slug(name: str) -> str:
    """A name for a folder: the last two parts of a path, with nothing but letters, digits, dots and lines."""
    return re.sub(r"[^\w.-]+", "_", "_".join(Path(name).parts[-2:])).strip("._") or "data"


def slugs(names: list[str]) -> list[str]:
    """A `slug` for each of some names, with more of a path, or a number, where the last two parts are not enough."""
    for found in ([slug(name) for name in names], [slug(name.replace("/", "_")) for name in names]):
        if len(set(found)) == len(names):
            return found
    return [f"{name}_{number}" for number, name in enumerate(found, start=1)]


def digest(content: dict) -> str:
    """Eight hexadecimal digits that change with the content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def _read(folder: Path) -> Texts | None:
    """What an earlier run chose; None if it did not finish, or the file was damaged since."""
    try:
        about = json.loads(read_text(folder / "about.json"))
        if RowFile(folder / "tokens.npy").shape == (about["sequences"], about["length"] + 1):
            return Texts(folder, about)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, DataError):
        pass
    return None


def _prepared(data: str) -> TokenStream | None:
    """The stream of a prepared folder; DataError if it is one, or should be, and cannot be read."""
    path = Path(data)
    if path.is_dir() and any((path / part / MANIFEST).exists() for part in ("", "train", "validation")):
        return TokenStream(path)
    return None


def _is_dataset(data: str) -> bool:
    """Whether `datasets` reads it: what is not there as a path, and folders of its `save_to_disk`."""
    return not Path(data).exists() or is_saved_dataset(data)


def _source(wanted: Wanted) -> dict:
    """What identifies text: files by name, size and time; a dataset by its name."""
    data, source = wanted.data, {"split": wanted.split, "field": wanted.text_field}
    if not Path(data).exists():
        if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?", data) or Path(data).suffix in (".txt", ".jsonl"):
            raise DataError(
                f"There is no file or folder {data}.\n"
                "Expected a prepared folder, files of text (.txt, .jsonl, .parquet), or a dataset NAME[:CONFIGURATION]."
            )
        return source | {"dataset": data}
    files = [(str(path), path.stat()) for path in list_files([data])] if not _is_dataset(data) else []
    return source | {"files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in files], "path": data}


def spread(count: int, wanted: int, seed: int) -> np.ndarray:
    """`wanted` of `count` places in rising order, all if they are fewer: one from each of as many equal stretches."""
    wanted = min(count, wanted)
    edges = np.arange(wanted + 1) * count // max(1, wanted)
    return np.random.default_rng(seed).integers(edges[:-1], edges[1:])


def _choose_windows(wanted: Wanted, stream: TokenStream, eos_id: int, target: Path) -> dict:
    """Writes tokens.npy from a prepared folder, and says what was chosen."""
    length, asked = wanted.length, wanted.sequences
    found = [len(_long_starts(stream, shard, length)) for shard in range(len(stream.manifest.shards))]
    kind = wanted.documents
    if kind == "auto":
        kind = "long" if sum(found) >= asked else "packed"
    if kind == "long":
        picks = spread(sum(found), asked, wanted.seed)
        bounds = np.cumsum([0, *found])
        firsts = []
        for shard in np.unique(np.searchsorted(bounds, picks, side="right") - 1).tolist():
            inside = picks[(picks >= bounds[shard]) & (picks < bounds[shard + 1])] - bounds[shard]
            firsts += _long_starts(stream, shard, length)[inside].tolist()
    else:
        firsts = (spread(stream.tokens // length, asked, wanted.seed) * length).tolist()
    if not firsts:
        raise too_short(wanted, kind, stream.tokens)
    with RowWriter(target / "tokens.npy", token_dtype(stream.manifest.vocab_size), len(firsts), length + 1) as out:
        for row, first in enumerate(firsts):
            for start in range(0, length + 1, PIECE):
                piece = np.empty(min(PIECE, length + 1 - start), dtype=np.int64)
                stream.read(first - 1 + start, piece)
                out.write(row, start, piece)
                stream.close()
    documents = stream.manifest.documents
    return {"kind": kind, "sequences": len(firsts), "documents": documents, "long_documents": sum(found),
            "all_seen": True}  # fmt: skip


def _long_starts(stream: TokenStream, shard: int, length: int) -> np.ndarray:
    """Stream positions of the documents of a shard that have at least `length` tokens, the separator included."""
    base, end = stream.bounds[shard], stream.bounds[shard + 1]
    starts = stream.document_starts(base, end)
    stream.close()
    return starts[np.diff(starts, append=end) >= length]


def _choose_texts(wanted: Wanted, tokenizer_folder: Path, eos_id: int, target: Path) -> dict:
    """Writes tokens.npy from text, and says what was chosen."""
    tokenizer = load_tokenizer(tokenizer_folder, eos_id)
    dtype, shape = token_dtype(max(tokenizer.vocab_size, eos_id + 1)), (wanted.sequences, wanted.length + 1)
    if _is_dataset(wanted.data):
        name, _, config = wanted.data.partition(":")
        records = stream_dataset(name, config, wanted.split, wanted.text_field)
    else:
        records = spread_units(wanted.data, wanted.text_field, wanted.seed)
    kind, sinks = wanted.documents, {"long": LongRows, "packed": PackedRows}
    if kind != "auto":
        sinks = {kind: sinks[kind]}
    with ExitStack() as stack:
        made = {
            name: sink(stack.enter_context(RowWriter(target / f"{name}.npy", dtype, *shape)), eos_id)
            for name, sink in sinks.items()
        }
        search = Search(tokenizer, eos_id, made.get("long"), made.get("packed"), wanted.search_bytes)
        try:
            search.run(records)
        except DataError as error:
            if Path(wanted.data).exists():
                raise
            raise DataError(f"There is no file or folder {wanted.data}. As a dataset:\n{error}") from None
        if kind == "auto":
            kind = "long" if made["long"].rows == wanted.sequences else "packed"
        if search.bad_count:
            logger.warning("%s: %d records cannot be read and are left out, such as %s",
                           wanted.data, search.bad_count, search.bad[0])  # fmt: skip
        if search.unknown > MOST_UNKNOWN * search.tokens:
            logger.warning("%s: %d of %d tokens are unknown to the tokenizer, which was not made for such text",
                           wanted.data, search.unknown, search.tokens)  # fmt: skip
        if not made[kind].rows:
            raise too_short(wanted, kind, search.packed.filled - 1 if search.packed else None, search.complete)
        for sink in made.values():
            sink.writer.cut(sink.rows)
    shutil.move(target / f"{kind}.npy", target / "tokens.npy")
    for name in sinks:
        (target / f"{name}.npy").unlink(missing_ok=True)
    return {"kind": kind, "sequences": made[kind].rows, "documents": search.documents,
            "long_documents": search.found if "long" in made else None, "all_seen": search.complete}  # fmt: skip


def too_short(wanted: Wanted, kind: str, tokens: int | None, all_seen: bool = True) -> DataError:
    """What to say of a dataset without one sequence."""
    where = wanted.data if all_seen else f"the first {wanted.search_bytes / 2**20:,.0f} MiB of {wanted.data}"
    if kind == "long":
        return DataError(
            f"{where}: no document has {wanted.length:,} tokens or more\nuse --documents packed, or a smaller --length"
        )
    return DataError(
        f"{where}: {tokens:,} tokens, less than one sequence of {wanted.length:,}\n"
        "use a smaller --length, or a larger dataset"
    )


def _measure(path: Path, eos_id: int) -> dict:
    """Facts about the written tokens."""
    file, largest, documents = RowFile(path), 0, 0
    rows, width = file.shape
    for row in range(rows):
        for start in range(0, width, PIECE):
            piece = file.read(row, start, min(start + PIECE, width))
            largest = max(largest, int(piece.max()))
            # A document is entered by reading a separator; a window may begin inside of one. The last is not read.
            documents += int(np.count_nonzero(piece[: width - 1 - start] == eos_id))
            documents += int(start == 0 and piece[0] != eos_id)
    return {"largest_id": largest, "documents_a_sequence": documents / rows, "sha256": file_sha256(path)}
