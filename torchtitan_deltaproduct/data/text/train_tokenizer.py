"""Trains a byte-level BPE tokenizer: any text can be encoded, and bits per byte are exact.

    python -m torchtitan_deltaproduct.data.train_tokenizer corpus/ --vocab-size 4096 --out data/tokenizer

The pre-tokenizer is GPT-2's; the only special token is `<|endoftext|>`, id 0, which separates documents. The
same input gives the same tokenizer. A folder that holds the result already is left as it is.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from torchtitan_deltaproduct.arguments import Parser, path, text
from torchtitan_deltaproduct.errors import ConfigError, DataError
from torchtitan_deltaproduct.files import read_object, write_atomically, write_json
from torchtitan_deltaproduct.progress import Progress

from .documents import BadRecord, Unit
from .files import result_folder
from .plan import identity
from .sources import plan_units, read_unit
from .tokenizer import load_tokenizer

EOS = "<|endoftext|>"
RECORD = "training.json"


def train_tokenizer(
    inputs: list[str], vocab_size: int, out: str, text_field: str = "text", overwrite: bool = False
) -> bool:
    """Trains a tokenizer of `vocab_size` entries on files and folders as `prepare` takes them, and writes its folder.

    Returns False if the folder held this result already; `overwrite` replaces another one.
    """
    if vocab_size < 257:
        raise ConfigError(f"--vocab-size is {vocab_size}: expected at least 257 (256 bytes and the separator)")
    with result_folder(Path(out)):
        return _train(inputs, vocab_size, Path(out), text_field, overwrite)


def _train(inputs: list[str], vocab_size: int, folder: Path, text_field: str, overwrite: bool) -> bool:
    units = plan_units(inputs, text_field, unit_bytes=1 << 24, written=[str(folder)])
    content = identity(units, {name for unit in units for name in unit.paths})
    record = {"inputs": inputs, "vocab_size": vocab_size, "text_field": text_field, "content": content}
    if (folder / "tokenizer.json").exists() and not overwrite:
        if read_object(folder / RECORD) != record:
            raise DataError(
                f"{folder} holds a tokenizer made from other input or settings.\n"
                "Choose another folder, or replace it with --overwrite."
            )
        return False
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # Sorted: the library's list of the 256 characters has another order in each process.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = {"special_tokens": [EOS], "initial_alphabet": alphabet}
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, **special)
    with Progress("read text", sum(unit.size for unit in units), lines=True) as progress:
        tokenizer.train_from_iterator(texts(units, progress), trainer)
    save(tokenizer, folder, record)
    return True


def texts(units: list[Unit], progress: Progress) -> Iterator[str]:
    """The text of all documents; unreadable records are left out and counted on stderr; DataError if there is none."""
    done = bad = size = 0
    for unit in units:
        for record in read_unit(unit):
            if isinstance(record, BadRecord):
                bad += 1
                if bad <= 3:
                    print(f"warning: left out {record}", file=sys.stderr)
            else:
                size += len(record.text)
                yield record.text
        done += unit.size
        progress.update(done)
    if bad > 3:
        print(f"warning: left out {bad} unreadable records in all", file=sys.stderr)
    if not size:
        names = sorted({name for unit in units for name in unit.paths})
        more = f" and {len(names) - 1} other files" * (len(names) > 1)
        raise DataError(
            f"{names[0]}{more}: there is no text to train a tokenizer on\n"
            "check the path, that text is UTF-8 and, of JSON and tables, --text-field"
        )


def save(tokenizer: Tokenizer, folder: Path, record: dict) -> None:
    """Writes the folder in the form that Hugging Face loads; tokenizer.json comes last."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": EOS, "eos_token": EOS}
    config["clean_up_tokenization_spaces"] = False
    (folder / "tokenizer.json").unlink(missing_ok=True)
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / RECORD, record)
    write_atomically(folder / "tokenizer.json", tokenizer.to_str(pretty=True))


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("torchtitan_deltaproduct.data.train_tokenizer", __doc__)
    add = parser.add_argument
    add("input", nargs="+", type=path, help="text, JSON, CSV (also packed) or Parquet files, or folders")
    add("--out", required=True, type=path, metavar="FOLDER", help="folder to write")
    add("--vocab-size", type=int, default=32_000, metavar="N", help="entries of the vocabulary")
    add("--text-field", default="text", type=text, metavar="NAME", help="JSON field or column that holds the text")
    add("--overwrite", action="store_true", help="replace another tokenizer in the folder")
    options = parser.parse_args(arguments)
    made = train_tokenizer(options.input, options.vocab_size, options.out, options.text_field, options.overwrite)
    size = load_tokenizer(options.out).vocab_size
    print(f"{'trained' if made else 'already trained:'} {options.out}, {size:,} tokens")
    if size < options.vocab_size:
        print(f"note: the text supports no more than {size:,} of {options.vocab_size:,} tokens")
    return 0
