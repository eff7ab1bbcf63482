"""Shows what a prepared folder holds.

python -m torchtitan_deltaproduct.data.show data/code/train
python -m torchtitan_deltaproduct.data.show data/code/train --document 17     # one document, decoded
python -m torchtitan_deltaproduct.data.show data/code/train --verify          # checksums of every file
"""

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from torchtitan_deltaproduct.arguments import Parser, path
from torchtitan_deltaproduct.errors import ConfigError, exit_on_user_error

from .shards.manifest import read_manifest
from .shards.shards import TokenStream
from .shards.verified import SUFFIXES, compare, file_states
from .text.tokenizer import load_tokenizer

SHOWN_TOKENS = 200


def verify(folder: str | Path) -> int:
    """Compares every shard file with its checksum; returns the number of files.

    Raises:
        DataError: names the files that are missing, have another size, or differ.
    """
    manifest = read_manifest(folder)
    file_states(Path(folder), manifest)
    files = [(shard, suffix) for shard in range(len(manifest.shards)) for suffix in SUFFIXES]
    compare(Path(folder), manifest, files)
    return len(files)


def document(stream: TokenStream, number: int) -> np.ndarray:
    """Tokens of a document, counted from 0 over all shards, its separator included: [n] int64."""
    if not 0 <= number < stream.manifest.documents:
        raise ConfigError(f"--document is {number}: {stream.folder} has documents 0 to {stream.manifest.documents - 1}")
    before = 0
    for base, shard in zip(stream.bounds, stream.manifest.shards, strict=False):
        if number < before + shard.documents:
            starts = stream.document_starts(base, base + shard.tokens)
            ends = np.append(starts[1:], base + shard.tokens)
            tokens = np.empty(ends[number - before] - starts[number - before], dtype=np.int64)
            stream.read(int(starts[number - before]), tokens)
            return tokens
        before += shard.documents
    raise AssertionError("the shards of a manifest hold as many documents as it says")


def table(stream: TokenStream) -> Table:
    """Counts, format and origin."""
    manifest = stream.manifest
    rows = {
        "tokens": f"{manifest.tokens:,} ({manifest.dtype}, vocabulary {manifest.vocab_size:,})",
        "documents": f"{manifest.documents:,}, {manifest.tokens / manifest.documents:,.0f} tokens on average",
        "text": f"{manifest.bytes:,} bytes, "
        f"{manifest.bytes / max(1, manifest.tokens - manifest.documents):.2f} a token",
        "left out": f"{manifest.empty_documents} empty documents, {manifest.bad_records} unreadable records",
        "unknown": f"{manifest.unknown_tokens:,} tokens, in all parts",
        "shards": f"{len(manifest.shards)}",
        "separator": f"id {manifest.eos_id}",
        "tokenizer": manifest.tokenizer_sha256[:16],
        "content": manifest.content_sha256[:16],
    }
    origin = {key: value for key, value in manifest.source.items() if key not in ("plan", "tokenizer_sha256")}
    rows |= {f"made with {key}": str(value) for key, value in origin.items() if value not in ("", [], None)}
    grid = Table(title=str(stream.folder), show_header=False, title_justify="left")
    for key, value in rows.items():
        grid.add_row(key, Text(value))
    return grid


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("torchtitan_deltaproduct.data.show", __doc__)
    parser.add_argument("folder", type=path, help="prepared folder, the one with manifest.json")
    parser.add_argument("--document", type=int, default=0, metavar="N", help="document to show (default: 0)")
    parser.add_argument("--verify", action="store_true", help="check every file against its checksum")
    options = parser.parse_args(arguments)
    console = Console()
    stream = TokenStream(options.folder)
    console.print(table(stream))
    tokens = document(stream, options.document)
    tokenizer = load_tokenizer(stream.folder / "tokenizer", stream.manifest.eos_id)
    shown = tokens[:SHOWN_TOKENS].tolist()
    pieces = Text()
    for index, token in enumerate(shown):
        pieces.append(tokenizer.decode([token]), style="on grey23" if index % 2 else "")
    console.print(f"\ndocument {options.document}, {len(tokens):,} tokens, the first {len(shown)}:")
    console.print(pieces)
    console.print(f"{shown[:16]} ...", highlight=False)
    if options.verify:
        console.print(f"\nall {verify(options.folder)} files have the right checksums")


if __name__ == "__main__":
    exit_on_user_error(main)
