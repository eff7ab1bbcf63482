"""manifest.json: what a prepared folder holds, written last, so that a folder without it is not a dataset.

    data/code/train/manifest.json      counts, separator id, dtype, where the text came from, checksums
                    shards.npy         a row for each shard: its name, counts and checksums
                    tokenizer/         the tokenizer's files, so that the folder is complete in itself
                    shards/00000.bin   token ids, little endian
                    shards/00000.idx   where documents begin, as in a Megatron corpus (megatron.py)

`python -m torchtitan_deltaproduct.data.show FOLDER` prints what it says.
"""

import hashlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, fields
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

from torchtitan_deltaproduct.errors import DataError
from torchtitan_deltaproduct.files import read_text, write_atomically, write_json

NAME, TABLE, WORK = "manifest.json", "shards.npy", ".prepare"
"""Files of a prepared folder, and the folder of what an unfinished one needs to go on."""
FORMAT = "torchtitan-deltaproduct tokens"
RESTORE = "Restore it from a copy or prepare again."
UNREADABLE = "{} cannot be read as a folder of tokens: {}."
CHANGED = f"{{}} was changed after it was written: its checksum does not match.\n{RESTORE}"
VERSION = 3
"""Of what is written; older ones are read as well. Up to version 2 an .idx was int64, for each document the position
after its separator; version 1 held the shards as a list in manifest.json."""


@dataclass
class Shard:
    """One pair of files, `<name>.bin` and `<name>.idx`; a document never spans two shards."""

    name: str
    tokens: int
    documents: int
    bytes: int
    """UTF-8 bytes of the text in it."""
    bin_sha256: str
    idx_sha256: str


class ShardTable(Sequence):
    """The shards of a folder, maybe many, as one array: names as bytes, counts int64, checksums of 32 bytes."""

    def __init__(self, rows: np.ndarray):
        self.rows = rows

    @classmethod
    def of(cls, shards: Sequence[Shard]) -> "ShardTable":
        width = max((len(shard.name.encode()) for shard in shards), default=1)
        types = [("name", f"S{width}"), *((name, "<i8") for name in ("tokens", "documents", "bytes"))]
        types += [(name, "V32") for name in ("bin_sha256", "idx_sha256")]
        rows = np.empty(len(shards), dtype=types)
        for number, shard in enumerate(shards):
            name, *counts, bin_sha256, idx_sha256 = astuple(shard)
            rows[number] = (name.encode(), *counts, bytes.fromhex(bin_sha256), bytes.fromhex(idx_sha256))
        return cls(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Shard:
        name, tokens, documents, text_bytes, bin_sha256, idx_sha256 = self.rows[index].item()
        return Shard(name.decode(), tokens, documents, text_bytes, bin_sha256.hex(), idx_sha256.hex())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShardTable) and self.rows.tobytes() == other.rows.tobytes()

    @cached_property
    def folders(self) -> list[str]:
        """The folders that shards lie in, relative to the prepared folder, in sorted order."""
        return sorted({os.path.dirname(name.decode()) for name in self.rows["name"].tolist()})


@dataclass
class Manifest:
    dtype: str
    """`uint16` or `uint32`: the smallest that holds every token id."""
    vocab_size: int
    """One more than the largest token id of the tokenizer."""
    eos_id: int
    """The separator after every document."""
    tokenizer_sha256: str
    """Of tokenizer/tokenizer.json."""
    tokens: int
    """Separators included."""
    documents: int
    bytes: int
    """UTF-8 bytes of the text."""
    empty_documents: int
    bad_records: int
    """Those that could not be read; left out, as are documents without text."""
    source: dict
    """How the folder was made: inputs, options, and `plan`, their checksum."""
    shards: ShardTable | Sequence[Shard] = field(default_factory=list)
    """A sequence becomes a table."""
    unknown_tokens: int = 0
    """Tokens that stand for text which the vocabulary cannot write."""
    version: int = VERSION

    def __post_init__(self):
        if not isinstance(self.shards, ShardTable):
            self.shards = ShardTable.of(self.shards)

    @property
    def token_bytes(self) -> int:
        return np.dtype(self.dtype).itemsize

    @property
    def bytes_a_token(self) -> float:
        """UTF-8 bytes of text behind a token, separators left out."""
        return self.bytes / max(1, self.tokens - self.documents)

    def counts(self) -> str:
        """Tokens and documents; of files without an index the latter are not known."""
        plural = "s" * (self.documents != 1)
        return f"{self.tokens:,} tokens" + (f" in {self.documents:,} document{plural}" if self.documents else "")

    @cached_property
    def content_sha256(self) -> str:
        """Identifies tokens, their order and meaning, wherever the folder lies and however it was made."""
        parts = [self.dtype, self.eos_id, self.tokenizer_sha256]
        parts += [(s.tokens, s.bin_sha256, s.idx_sha256) for s in self.shards]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def write_manifest(folder: str | Path, manifest: Manifest) -> None:
    """Writes shards.npy and, last, manifest.json, each atomically."""
    table = io.BytesIO()
    np.save(table, manifest.shards.rows)
    body = {"format": FORMAT}
    body |= {field.name: getattr(manifest, field.name) for field in fields(manifest) if field.name != "shards"}
    body |= {"content_sha256": manifest.content_sha256, "shards": len(manifest.shards)}
    body["shards_sha256"] = hashlib.sha256(table.getvalue()).hexdigest()
    write_atomically(Path(folder, TABLE), table.getvalue())
    write_json(Path(folder, NAME), {**body, "manifest_sha256": _checksum(body)})


def read_manifest(folder: str | Path) -> Manifest:
    """Reads and checks manifest.json and the table of shards, once in a process unless the file changes.

    The shard files are not looked at: `verified` does that. DataError: it is missing, damaged, or of another version.
    """
    folder = Path(folder)
    try:
        status = os.stat(folder / NAME)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(_missing(folder)) from None
    except OSError as error:
        raise DataError(UNREADABLE.format(folder, error.strerror)) from None
    return _read(folder, status.st_size, status.st_mtime_ns, status.st_ino)


@lru_cache(maxsize=64)
def _read(folder: Path, *_state: int) -> Manifest:
    path = folder / NAME
    try:
        body = json.loads(read_text(path))
        if not isinstance(body, dict):
            raise ValueError("it is not a JSON object")
    except OSError as error:
        raise DataError(UNREADABLE.format(folder, error.strerror)) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged ({error}).\n{RESTORE}") from None
    if body.get("format") != FORMAT:
        raise DataError(f"{path} is not a manifest of prepared tokens (no format = {FORMAT!r}).")
    version = body.get("version")
    if version not in range(1, VERSION + 1):
        raise DataError(
            f"{path} has version {version}; this program reads versions 1 to {VERSION}.\n"
            "Prepare the data again, or use the release that wrote it."
        )
    if body.pop("manifest_sha256", None) != _checksum(body):
        raise DataError(CHANGED.format(path))
    del body["format"]
    if version == 1:
        return Manifest(**{**body, "shards": [Shard(**shard) for shard in body["shards"]]})
    content, digest = body.pop("content_sha256"), body.pop("shards_sha256")
    manifest = Manifest(**{**body, "shards": _read_table(folder / TABLE, digest)})
    manifest.content_sha256 = content
    return manifest


def _read_table(path: Path, digest: str) -> ShardTable:
    try:
        table = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}).\n{RESTORE}") from None
    if hashlib.sha256(table).hexdigest() != digest:
        raise DataError(CHANGED.format(path))
    # Mapped, so that the processes of a machine share it.
    return ShardTable(np.load(path, mmap_mode="r").view(np.ndarray))


def _checksum(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _missing(folder: Path) -> str:
    if not folder.exists():
        make = f"python -m torchtitan_deltaproduct.data.prepare {folder} --input ... --tokenizer ..."
        return f"There is no folder {folder}.\nMake it: {make}"
    inner = [name for name in ("train", "validation") if (folder / name / NAME).is_file()]
    if inner:
        return f"{folder} has no {NAME}, but these have: {', '.join(str(folder / name) for name in inner)}"
    if (folder / WORK).exists() or (folder.parent / WORK).exists():
        unfinished = "its preparation did not finish.\nRun the same prepare command again; it continues."
        return f"{folder} has no {NAME}: {unfinished}"
    return (
        f"{folder} has no {NAME}: it is not a folder made by torchtitan_deltaproduct.data.prepare, nor are there "
        "Megatron (.bin and .idx) or .npy files of tokens."
    )
