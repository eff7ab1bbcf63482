"""The token sequences that an evaluation reads, chosen once and kept on disk.

    wanted = Wanted("data/code/validation", length=32_768, sequences=32)
    texts = open_texts(wanted, tokenizer=None, folder=Path("eval/texts"))
    texts.read(0, 4, start=0, stop=1025)            # [4, 1025] int64

Sequences come from a prepared folder. Files, folders of text and names of `datasets` are prepared first, as much of
them as is of use (`sample`). A sequence has `length` + 1 tokens, so that `length` of them are predicted:

    long      the start of a document of at least `length` tokens (its separator counted): separator, d1, d2, ...
    packed    a window of documents one after the other, as in training (`data.packing`)

`auto` takes long ones if there are enough, else packed. From a prepared folder they are spread over the set: of n equal
stretches each gives one, drawn by the seed. TEXTS/NAME-KEY holds tokens.npy and about.json, written last.
"""

import argparse
import contextlib
import json
import logging
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from torchtitan_deltaproduct.checkpoint.load import LoadedModel
from torchtitan_deltaproduct.data.shards.manifest import NAME as MANIFEST
from torchtitan_deltaproduct.data.shards.prepared import check_tokenizer
from torchtitan_deltaproduct.data.shards.shards import TokenStream, token_dtype
from torchtitan_deltaproduct.data.shards.verified import file_sha256
from torchtitan_deltaproduct.data.text.arrow import check_no_split
from torchtitan_deltaproduct.data.text.files import list_files
from torchtitan_deltaproduct.data.text.tokenizer import find_eos_id, tokenizer_sha256
from torchtitan_deltaproduct.errors import DataError
from torchtitan_deltaproduct.files import read_text

from .files import DAMAGE, digest, slug, write_array, write_json
from .sample import Seen, Wanted, is_dataset, prepare_sample

VERSION = 1
PIECE = 1 << 16
"""Tokens copied at a time."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Texts:
    """Sequences on disk: the `folder` with tokens.npy, and about.json, see `open_texts`."""

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
        return np.load(self.folder / "tokens.npy", mmap_mode="r")[first:last, start:stop].astype(np.int64)

    def describe(self) -> str:
        """One line: which sequences these are, and why."""
        about = self.about
        asked, long, seen = about["wanted"]["sequences"], about["long_documents"], about["documents"]
        among = f"{'' if about['all_seen'] else 'the first '}{seen:,} document{'s' * (seen != 1)}"
        why = "" if long is None else f" (long enough: {long:,} of {among})"
        few = f" (all there are; {asked:,} were asked for)" if self.sequences < asked else ""
        head = f"{self.sequences:,} sequence{'s' * (self.sequences != 1)} of {self.length:,} tokens{few}"
        packed = f"packed documents, {about['documents_a_sequence']:,.1f} in each"
        return f"{head}: {'the starts of long documents' if about['kind'] == 'long' else packed}{why}"


def open_texts(wanted: Wanted, tokenizer: Path | None, folder: Path, eos_id: int | None = None) -> Texts:
    """Chooses the sequences and writes them below `folder`, unless that was done before.

    Text needs the folder of a tokenizer.json, and has the separator `eos_id` (None: as `wanted.eos`) between documents;
    prepared folders have their own.

    Returns:
        Sequences whose `about` has: wanted, source (identifies the dataset), `kind` (long or packed), sequences,
        length, documents seen, long_documents (None: not counted), all_seen (or the search ended before),
        documents_a_sequence (mean), largest_id, eos_id, tokenizer_sha256, and sha256 of tokens.npy.

    Raises:
        DataError: there is no such dataset, no tokenizer for it, or not one sequence of that length.
    """
    path = Path(wanted.data)
    prepared = path.is_dir() and any((path / part / MANIFEST).exists() for part in ("", "train", "validation"))
    stream = TokenStream(path) if prepared else None
    if not is_dataset(wanted.data) and wanted.split != "train":
        # A name may be meant for another dataset of the same command; a slice would be another number of documents.
        if "[" in wanted.split:
            check_no_split(wanted.data, wanted.split)
        logger.warning("%s has no splits: --split %s does not concern it", wanted.data, wanted.split)
    if prepared:
        check_tokenizer(stream)
        source = {"prepared": stream.manifest.content_sha256}
        tokenizer_id, eos_id = stream.manifest.tokenizer_sha256, stream.manifest.eos_id
    else:
        source = _source(wanted, folder)
        if tokenizer is None:
            raise DataError(
                f"{wanted.data} is text, and the model's folder has no tokenizer.json to read it with\n"
                "name the folder of its tokenizer with --tokenizer"
            )
        tokenizer_id = tokenizer_sha256(tokenizer)
        eos_id = find_eos_id(tokenizer, wanted.eos) if eos_id is None else eos_id
    origin = {"source": source, "tokenizer_sha256": tokenizer_id, "eos_id": eos_id, "version": VERSION}
    target = folder / f"{slug(wanted.data)}-{digest(asdict(wanted) | origin)}"
    # What an earlier run chose, if it finished and no file was damaged since.
    with contextlib.suppress(*DAMAGE):
        about = json.loads(read_text(target / "about.json"))
        shape = np.load(target / "tokens.npy", mmap_mode="r").shape
        if shape == (about["sequences"], about["length"] + 1):
            return Texts(target, about)
    target.mkdir(parents=True, exist_ok=True)
    seen = None
    try:
        if not prepared:
            stream, seen = prepare_sample(wanted, tokenizer, eos_id, target / "prepared")
        chosen = _choose(wanted, stream, target / "tokens.npy", seen)
    finally:
        shutil.rmtree(target / "prepared", ignore_errors=True)
    about = {
        "version": VERSION, "wanted": asdict(wanted), "source": source, "eos_id": eos_id,
        "tokenizer_sha256": tokenizer_id, "length": wanted.length, **chosen,
        "sha256": file_sha256(target / "tokens.npy"),
    }  # fmt: skip
    write_json(target / "about.json", about)
    return Texts(target, about)


def _source(wanted: Wanted, folder: Path) -> dict:
    """What identifies text: files by name, size and time; a dataset by its name."""
    data, source = wanted.data, {"split": wanted.split, "field": wanted.text_field}
    if not Path(data).exists():
        if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?(:[\w.-]+)?", data) or Path(data).suffix in (".txt", ".jsonl"):
            raise DataError(
                f"There is no file or folder {data}.\n"
                "Expected a prepared folder, files of text (.txt, .jsonl, .parquet), or a dataset NAME[:CONFIGURATION]."
            )
        return source | {"dataset": data}
    files = [(str(path), path.stat()) for path in list_files([data], [str(folder)])] if not is_dataset(data) else []
    return source | {"files": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in files], "path": data}


def spread(count: int, wanted: int, seed: int) -> np.ndarray:
    """`wanted` of `count` places in rising order, all if they are fewer: one from each of as many equal stretches."""
    wanted = min(count, wanted)
    edges = np.arange(wanted + 1) * count // max(1, wanted)
    return np.random.default_rng(seed).integers(edges[:-1], edges[1:])


def _choose(wanted: Wanted, stream: TokenStream | None, target: Path, seen: Seen | None) -> dict:
    """Writes tokens.npy and says what was chosen: from a prepared folder places that are spread, else the first."""
    length, asked, kind = wanted.length, wanted.sequences, wanted.documents
    shards = range(len(stream.manifest.shards)) if stream else ()
    long = np.concatenate([np.empty(0, np.int64), *(_long_starts(stream, shard, length) for shard in shards)])
    if kind == "auto":
        kind = "long" if len(long) >= asked else "packed"
    total = stream.tokens if stream else 0
    there = len(long) if kind == "long" else total // length
    if not there:
        raise _too_short(wanted, kind, total, seen is None or seen.all)
    picks = np.arange(min(there, asked)) if seen else spread(there, asked, wanted.seed)
    firsts = long[picks] if kind == "long" else picks * length
    tokens = np.empty((len(firsts), length + 1), token_dtype(stream.manifest.vocab_size))
    for row, first in zip(tokens, firsts.tolist(), strict=True):
        for start in range(0, length + 1, PIECE):
            piece = np.empty(min(PIECE, length + 1 - start), dtype=np.int64)
            stream.read(first - 1 + start, piece)
            row[start : start + PIECE] = piece
            stream.close()
    write_array(target, tokens)
    # A document is entered by reading a separator; a window may begin inside of one. The last token is not read.
    eos_id = stream.manifest.eos_id
    entered = int((tokens[:, :-1] == eos_id).sum() + (tokens[:, 0] != eos_id).sum())
    return {
        "kind": kind, "sequences": len(tokens), "documents": seen.documents if seen else stream.manifest.documents,
        "long_documents": None if seen and wanted.documents == "packed" else len(long),
        "all_seen": seen is None or seen.all, "largest_id": int(tokens.max()),
        "documents_a_sequence": entered / len(tokens),
    }  # fmt: skip


def _long_starts(stream: TokenStream, shard: int, length: int) -> np.ndarray:
    """Stream positions of the documents of a shard that have at least `length` tokens, the separator included."""
    base, end = stream.bounds[shard], stream.bounds[shard + 1]
    starts = stream.document_starts(base, end)
    stream.close()
    return starts[np.diff(starts, append=end) >= length]


def _too_short(wanted: Wanted, kind: str, tokens: int, all_seen: bool) -> DataError:
    """What to say of a dataset without one sequence."""
    where = wanted.data if all_seen else f"the first {wanted.search_bytes / 2**20:,.0f} MiB of {wanted.data}"
    if kind == "long":
        lack, remedy = f"no document has {wanted.length:,} tokens or more", "--documents packed, or a smaller --length"
    else:
        lack = f"{tokens:,} tokens, less than one sequence of {wanted.length:,}"
        remedy = "a smaller --length, or a larger dataset"
    return DataError(f"{where}: {lack}\nuse {remedy}")


def texts_of(data: str, loaded: LoadedModel, options: argparse.Namespace, folder: Path) -> Texts:
    """The sequences of a dataset for a model, kept in `folder`/texts; DataError if it does not know their tokens."""
    tokenizer = tokenizer_of(loaded, options)
    wanted = Wanted(
        data, options.length, options.sequences, options.documents, options.seed or 0, options.split,
        options.text_field, options.eos, options.search_mb << 20,
    )  # fmt: skip
    eos_id = None if tokenizer is None else loaded.separator(tokenizer, options.eos)
    texts = open_texts(wanted, tokenizer, folder / "texts", eos_id)
    check_fit(loaded, tokenizer, texts)
    return texts


def tokenizer_of(loaded: LoadedModel, options: argparse.Namespace) -> Path | None:
    """The folder of --tokenizer, or the model's own."""
    return Path(options.tokenizer) if options.tokenizer else loaded.tokenizer


def check_fit(loaded: LoadedModel, tokenizer: Path | None, texts: Texts) -> None:
    """Raises DataError if the tokens are not those that the model knows."""
    data, eos_id, most = texts.about["wanted"]["data"], texts.about["eos_id"], loaded.model.args.vocab_size
    if tokenizer is not None and tokenizer_sha256(tokenizer) != texts.about["tokenizer_sha256"]:
        raise DataError(
            f"{data} was prepared with another tokenizer than {loaded.label} was trained with\n"
            f"expected the tokenizer.json of {tokenizer}: prepare the text again with --tokenizer {tokenizer}"
        )
    if loaded.eos_id not in (None, eos_id) and not texts.about["wanted"]["eos"]:
        raise DataError(
            f"{data} has the separator {eos_id}, and {loaded.label} was trained with {loaded.eos_id}\n"
            "prepare the text again with its separator (--eos)"
        )
    if (largest := texts.about["largest_id"]) >= most:
        raise DataError(
            f"{data} has a token {largest:,}; {loaded.label} knows those below {most:,}\n"
            "prepare the text with the model's tokenizer"
        )
