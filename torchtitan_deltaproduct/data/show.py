"""Shows what a prepared folder holds, or a corpus of others.

python -m torchtitan_deltaproduct.data.show data/code/train
python -m torchtitan_deltaproduct.data.show data/code/train --document 17     # one document, decoded
python -m torchtitan_deltaproduct.data.show data/code/train --verify          # checksums of every file
python -m torchtitan_deltaproduct.data.show corpus/web_text_document --tokenizer data/gpt2 --verify     # every id
"""

import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from torchtitan_deltaproduct.arguments import Parser, path
from torchtitan_deltaproduct.errors import ConfigError, exit_on_user_error
from torchtitan_deltaproduct.progress import Progress

from .shards.corpora import BLOCK, BLOCKS, NO_TOKENIZER, CorpusStream, find_files, open_stream
from .shards.manifest import read_manifest
from .shards.shards import TokenStream
from .shards.verified import SUFFIXES, compare, file_states
from .text.tokenizer import load_tokenizer

SHOWN_TOKENS = 200
PIECE = 1 << 20
"""Tokens read at a time."""
OURS = "all tokens, in their order"
OTHERS = f"the size and {BLOCKS} blocks of {BLOCK >> 10} KiB of each file: a change elsewhere is not noticed"
"""What a checkpoint's data position, and the refusal of another one, is drawn from."""


def verify(folder: str | Path) -> int:
    """Compares every shard file with its checksum, DataError names those that differ; returns the number of files."""
    manifest = read_manifest(folder)
    file_states(Path(folder), manifest)
    files = [(shard, suffix) for shard in range(len(manifest.shards)) for suffix in SUFFIXES]
    compare(Path(folder), manifest, files)
    return len(files)


def read_all(stream: TokenStream) -> None:
    """Reads every token; DataError names file and place of an id that is not in the vocabulary."""
    piece = np.empty(PIECE, dtype=np.int64)
    with Progress("verify", stream.tokens, "tokens") as progress:
        for start in range(0, stream.tokens, PIECE):
            progress.advance(stream.read(start, piece))


def table(stream: TokenStream) -> Table:
    """Counts, format and origin, as far as they are known: files of others do not say what text they were made of."""
    manifest = stream.manifest
    rows = {"tokens": f"{manifest.tokens:,} ({manifest.dtype}, vocabulary {manifest.vocab_size:,})"}
    if manifest.documents:
        mean = manifest.tokens / manifest.documents
        rows["documents"] = f"{manifest.documents:,}, {mean:,.0f} tokens on average"
    ours = not isinstance(stream, CorpusStream)
    if ours:
        rows |= {
            "text": f"{manifest.bytes:,} bytes, {manifest.bytes_a_token:.2f} a token",
            "left out": f"{manifest.empty_documents} empty documents, {manifest.bad_records} unreadable records",
            "unknown": f"{manifest.unknown_tokens:,} tokens, in all parts",
        }
    rows |= {
        "shards": f"{len(manifest.shards)}",
        "separator": f"id {manifest.eos_id}",
        "tokenizer": f"tokenizer.json of sha256 {manifest.tokenizer_sha256[:16]}...",
        "known to runs by": f"{manifest.content_sha256[:16]}, a checksum of {OURS if ours else OTHERS}",
    }
    origin = {key: value for key, value in manifest.source.items() if key not in ("plan", "tokenizer_sha256")}
    made = "made with " * ours
    rows |= {f"{made}{key}": str(value) for key, value in origin.items() if value not in ("", [], None)}
    grid = Table(title=str(stream.folder), show_header=False, title_justify="left")
    for key, value in rows.items():
        grid.add_row(key, Text(value))
    return grid


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("torchtitan_deltaproduct.data.show", __doc__)
    parser.add_argument("folder", type=path, help="prepared folder, the one with manifest.json, or files of others")
    parser.add_argument("--tokenizer", default="", type=path, metavar="FOLDER", help="that made the files of others")
    parser.add_argument("--document", type=int, default=0, metavar="N", help="document to show (default: 0)")
    parser.add_argument("--verify", action="store_true", help="compare files with their checksums, of others all ids")
    options = parser.parse_args(arguments)
    if find_files(options.folder) and not options.tokenizer:
        raise ConfigError(NO_TOKENIZER.format(options.folder, "--tokenizer"))
    console = Console(width=None if sys.stdout.isatty() else 120)
    stream = open_stream(options.folder, options.tokenizer)
    console.print(table(stream))
    if stream.manifest.documents:
        tokens = stream.document(options.document)
        title = f"document {options.document}, {len(tokens):,} tokens, the first {min(SHOWN_TOKENS, len(tokens))}:"
    elif options.document:
        raise ConfigError(f"--document is {options.document}: {options.folder} has no index of its documents")
    else:
        title = f"the first {min(SHOWN_TOKENS, stream.tokens)} of {stream.tokens:,} tokens:"
        tokens = np.empty(min(SHOWN_TOKENS, stream.tokens), dtype=np.int64)
        stream.read(0, tokens)
    tokenizer = load_tokenizer(stream.tokenizer_path, stream.manifest.eos_id)
    shown = tokens[:SHOWN_TOKENS].tolist()
    pieces = Text()
    for index, token in enumerate(shown):
        pieces.append(tokenizer.decode([token]), style="on grey23" if index % 2 else "")
    console.print(f"\n{title}")
    console.print(pieces)
    console.print(f"{shown[:16]} ...", highlight=False)
    if options.verify and isinstance(stream, CorpusStream):
        read_all(stream)
        console.print(f"\nall {stream.tokens:,} tokens are in the vocabulary")
    elif options.verify:
        console.print(f"\nall {verify(options.folder)} files have the right checksums")


if __name__ == "__main__":
    exit_on_user_error(main)
