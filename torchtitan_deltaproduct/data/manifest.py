"""manifest.json: what a prepared folder holds, written last, so that a folder without it is not a dataset.

    data/code/train/manifest.json      counts, checksums, separator id, dtype, where the text came from
                    tokenizer/         the tokenizer's files, so that the folder is complete in itself
                    shards/00000.bin   token ids, little endian
                    shards/00000.idx   int64: for each document the position after its separator

    manifest = read_manifest("data/code/train"); manifest.tokens
The file carries a checksum of itself. `python -m torchtitan_deltaproduct.data.show FOLDER` prints it.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torchtitan_deltaproduct.errors import DataError
from torchtitan_deltaproduct.files import read_text

NAME = "manifest.json"
FORMAT = "torchtitan-deltaproduct tokens"
VERSION = 1


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
    """Documents without text; left out."""
    bad_records: int
    """Records that could not be read; left out."""
    source: dict
    """How the folder was made: inputs, options, and `plan`, their checksum."""
    shards: list[Shard] = field(default_factory=list)
    unknown_tokens: int = 0
    """Tokens that stand for text which the vocabulary cannot write."""

    @property
    def content_sha256(self) -> str:
        """Identifies tokens, their order and meaning, wherever the folder lies and however it was made."""
        parts = [self.dtype, self.eos_id, self.tokenizer_sha256]
        parts += [(s.tokens, s.bin_sha256, s.idx_sha256) for s in self.shards]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def write_manifest(folder: str | Path, manifest: Manifest) -> None:
    """Writes manifest.json atomically."""
    body = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
    write_atomically(
        Path(folder, NAME), json.dumps({**body, "manifest_sha256": _checksum(body)}, indent=1) + "\n"
    )


def read_manifest(folder: str | Path) -> Manifest:
    """Reads and checks manifest.json.

    Raises:
        DataError: it is missing, damaged, of another version, or the shard files are not as long as it says.
    """
    folder = Path(folder)
    try:
        body = json.loads(read_text(folder / NAME))
        if not isinstance(body, dict):
            raise ValueError("it is not a JSON object")
    except FileNotFoundError:
        raise DataError(_missing(folder)) from None
    except OSError as error:
        raise DataError(f"{folder} cannot be read as a folder of tokens: {error.strerror}.") from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{folder / NAME} is damaged ({error}).\nRestore it from a copy or prepare again."
        ) from None
    if body.get("format") != FORMAT:
        raise DataError(f"{folder / NAME} is not a manifest of prepared tokens (no format = {FORMAT!r}).")
    if body.get("version") != VERSION:
        raise DataError(
            f"{folder / NAME} has version {body.get('version')}; this program reads version {VERSION}.\n"
            "Prepare the data again, or use the release that wrote it."
        )
    if body.pop("manifest_sha256", None) != _checksum(body):
        raise DataError(
            f"{folder / NAME} was changed after it was written: its checksum does not match.\n"
            "Restore it from a copy or prepare again."
        )
    del body["format"], body["version"]
    manifest = Manifest(**{**body, "shards": [Shard(**s) for s in body["shards"]]})
    check_sizes(folder, manifest)
    return manifest


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Raises DataError unless every shard file has the length that the manifest implies."""
    token_size = int(manifest.dtype.removeprefix("uint")) // 8
    for shard in manifest.shards:
        for suffix, expected in ((".bin", shard.tokens * token_size), (".idx", shard.documents * 8)):
            path = folder / (shard.name + suffix)
            found = path.stat().st_size if path.is_file() else None
            if found != expected:
                state = "is missing" if found is None else f"has {found:,} bytes"
                raise DataError(
                    f"{path} {state}; the manifest says {expected:,} bytes.\n"
                    "Copy the folder again, or make it again with prepare --overwrite."
                )


def make_folder(folder: Path) -> None:
    """Makes a folder unless it is there; DataError if there cannot be one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = "a file is in the way" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        raise DataError(f"{folder} cannot be made: {why}; choose another folder") from None


def write_atomically(path: Path, text: str) -> None:
    """Writes through a temporary file, so that `path` is old, new or absent, never half."""
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _checksum(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _missing(folder: Path) -> str:
    if not folder.exists():
        return (
            f"There is no folder {folder}.\n"
            f"Make it: python -m torchtitan_deltaproduct.data.prepare {folder} --input ... --tokenizer ..."
        )
    inner = [name for name in ("train", "validation") if (folder / name / NAME).is_file()]
    if inner:
        return f"{folder} has no {NAME}, but these have: {', '.join(str(folder / name) for name in inner)}"
    work = (folder / ".prepare").exists() or (folder.parent / ".prepare").exists()
    if work:
        return (
            f"{folder} has no {NAME}: its preparation did not finish.\n"
            "Run the same prepare command again; it continues."
        )
    return f"{folder} has no {NAME}: it is not a folder made by torchtitan_deltaproduct.data.prepare."
