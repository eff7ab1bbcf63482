"""A corpus that any machine has: the Python sources and documentation of its installed packages, as token shards.

    python -m launch.python_corpus data/python                        collects, trains a tokenizer, prepares
    python -m launch.python_corpus data/python --vocab-size 8192

It makes text/train/PACKAGE.jsonl and text/validation/PACKAGE.jsonl, a document a file, then tokenizer/, train/ and
validation/ by the documented commands, which it prints. A package is trained on or held out as a whole, so that no file
is met in both; which ones, a hash of their names decides. text/corpus.json says what was taken: packages, files, bytes,
and the checksum of all paths and contents, which tells two machines' corpora apart. Licences and other files that are
the same to the byte count once. The same command again goes on where it was.
"""

import hashlib
import json
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from torchtitan_deltaproduct.arguments import Parser
from torchtitan_deltaproduct.arguments import path as path_of
from torchtitan_deltaproduct.data.text.files import result_folder
from torchtitan_deltaproduct.errors import ConfigError, DataError, exit_on_user_error
from torchtitan_deltaproduct.files import write_atomically

from .quickstart import LEFT_OUT, call

KINDS = (".py", ".pyi", ".md", ".rst")
LARGEST = 1 << 20
"""Bytes of a file: larger ones are tables that a program wrote."""
HELD_OUT = 0.03
"""Share of the bytes, at least, and the most that a package that is held out has of them."""


@dataclass
class Package:
    """What was taken of one package: how many files and bytes, and whether it is held out."""

    name: str
    files: int = 0
    bytes: int = 0
    held_out: bool = False


def sources() -> Iterator[tuple[str, Path, Path]]:
    """Package, file, and the file's path in its folder, of all that is installed, in the order of names."""
    library = Path(sysconfig.get_paths()["stdlib"])
    places = {Path(place).resolve() for place in sys.path if place.rstrip("/").endswith(("-packages", "site"))}
    found = [("python", library, file) for file in library.rglob("*") if not LEFT_OUT & set(file.parts)]
    for place in places:
        for file in place.rglob("*"):
            name = file.relative_to(place).parts[0]
            if not name.endswith((".dist-info", ".egg-info")) and "__pycache__" not in file.parts:
                found.append((name.partition(".")[0], place, file))
    for package, place, file in sorted(found, key=lambda entry: (entry[0], str(entry[2].relative_to(entry[1])))):
        if file.suffix in KINDS and file.is_file():
            yield package, file, file.relative_to(place)


def held_out(packages: list[Package]) -> set[str]:
    """Names of packages that together have `HELD_OUT` of all bytes, of those that alone have less, by a hash.

    Raises:
        DataError: there are too few packages for that.
    """
    limit = HELD_OUT * sum(package.bytes for package in packages)
    small = [package for package in packages if package.bytes < limit]
    chosen: set[str] = set()
    for package in sorted(small, key=lambda package: hashlib.sha256(package.name.encode()).digest()):
        chosen.add(package.name)
        limit -= package.bytes
        if limit <= 0:
            return chosen
    raise DataError(f"{len(packages)} packages are installed here, too few to hold some out; install more of them")


def collect(text: Path) -> dict:
    """Writes `text`/{train,validation}/PACKAGE.jsonl and corpus.json, unless that was done; returns the record.

    Raises:
        DataError: there are too few packages.
    """
    record = text / "corpus.json"
    if record.is_file():
        return json.loads(record.read_text(encoding="utf-8"))
    partial = text.with_name(f"{text.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    packages: dict[str, Package] = {}
    seen, everything = set(), hashlib.sha256()
    for place in ("all", "train", "validation"):
        (partial / place).mkdir(parents=True)
    for name, file, path in sources():
        content = file.read_bytes()
        digest = hashlib.sha256(content).digest()
        if not content.strip() or len(content) > LARGEST or digest in seen:
            continue
        try:
            document = json.dumps({"text": content.decode(), "path": str(path)})
        except UnicodeDecodeError:
            continue
        seen.add(digest)
        everything.update(str(path).encode() + b"\0" + digest)
        package = packages.setdefault(name, Package(name))
        package.files += 1
        package.bytes += len(content)
        with (partial / "all" / f"{name}.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(document + "\n")
    chosen = held_out([*packages.values()])
    for package in packages.values():
        package.held_out = package.name in chosen
        name = f"{package.name}.jsonl"
        (partial / "all" / name).rename(partial / ("validation" if package.held_out else "train") / name)
    (partial / "all").rmdir()
    content = {"sha256": everything.hexdigest(), "packages": [asdict(package) for package in packages.values()]}
    write_atomically(partial / "corpus.json", json.dumps(content, indent=1) + "\n")
    partial.rename(text)
    return content


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("launch.python_corpus", __doc__)
    parser.add_argument("out", type=path_of, metavar="FOLDER", help="folder to make")
    parser.add_argument("--vocab-size", type=int, default=16_384, metavar="N", help="entries of the vocabulary")
    options = parser.parse_args(arguments)
    if options.vocab_size < 257:
        raise ConfigError(f"--vocab-size is {options.vocab_size}: expected at least 257 (256 bytes and the separator)")
    # Absolute: the tokenizer and the shards remember what they were made of by its path.
    out = Path(os.path.abspath(options.out))
    if out.is_dir() and any(out.iterdir()) and not any((out / name).is_dir() for name in ("text", "text.partial")):
        raise DataError(f"{out} was not made by this command, and is not empty; choose another folder")
    with result_folder(out):
        record = collect(out / "text")
    for out_of_it, use in ((False, "to train on"), (True, "held out")):
        chosen = [package for package in record["packages"] if package["held_out"] is out_of_it]
        size, files = (sum(package[key] for package in chosen) for key in ("bytes", "files"))
        print(f"{use}: {len(chosen):,} packages, {files:,} files, {size / 1e6:,.1f} MB")
    train, validation, tokenizer = (str(out / name) for name in ("text/train", "text/validation", "tokenizer"))
    package = "torchtitan_deltaproduct.data"
    call(sys.executable, "-m", f"{package}.train_tokenizer", train, "--out", tokenizer, "--vocab-size",
         str(options.vocab_size))  # fmt: skip
    call(sys.executable, "-m", f"{package}.prepare", str(out), "--input", train, "--validation-input", validation,
         "--tokenizer", tokenizer)  # fmt: skip
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
