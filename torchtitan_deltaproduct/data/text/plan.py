"""What `prepare` is asked for, and its plan: units of input, and the checksum that tells results apart.

plan = make_plan(Settings("data/code", "data/tokenizer", ["corpus/"], validation_fraction=0.02))
plan.units, plan.job, plan.source["plan"]
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torchtitan_deltaproduct.errors import ConfigError, DataError

from ..shards.manifest import WORK
from ..shards.shards import token_dtype
from .arrow import check_no_split, plan_dataset_units
from .documents import Unit
from .files import folders_above, list_files, refuse_inside
from .sources import plan_units
from .tokenizer import find_eos_id, load_tokenizer, tokenizer_sha256
from .units import Preparation

# Without --shard-mb: 64 units, so that a few dozen workers share the work, within these sizes of input text.
UNITS, LEAST_UNIT_BYTES, MOST_UNIT_BYTES = 64, 1 << 20, 256 << 20


@dataclass
class Settings:
    """All that decides the result; one field for each option of the command line."""

    out: str
    tokenizer: str
    input: list[str]
    dataset: str = ""
    """`NAME` or `NAME:CONFIGURATION`."""
    split: str = "train"
    text_field: str = "text"
    eos: str = ""
    validation_fraction: float = 0.0
    split_by: str = "document"
    shard_mb: int = 0
    validation_input: list[str] = field(default_factory=list)
    """Files and folders that are held out, instead of a share of the input."""

    @property
    def parts(self) -> tuple[str, ...]:
        return ("train", "validation") if self.validation_fraction or self.validation_input else ("",)

    @property
    def written(self) -> list[str]:
        """Folders that the result comes into."""
        return [os.path.join(self.out, part) for part in self.parts]

    def __post_init__(self):
        if self.input and self.split != "train":
            check_no_split(self.input[0], self.split)
        if self.validation_input and self.validation_fraction:
            raise ConfigError("Give either --validation-input PATH... or --validation-fraction F, not both.")
        if bool(self.input) == bool(self.dataset):
            raise ConfigError("Give either --input PATH... or --dataset NAME, not both and not neither.")
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(f"--validation-fraction is {self.validation_fraction}: expected 0 <= F < 1")
        if self.split_by != "document" and not self.validation_fraction:
            raise ConfigError(f"--split-by {self.split_by} says how to hold out --validation-fraction, which is 0")
        if self.shard_mb < 0:
            raise ConfigError(f"--shard-mb is {self.shard_mb}: expected 0 (automatic) or more")


@dataclass
class Plan:
    """What to do, and `source`, the part of it that identifies the result and goes into the manifest."""

    units: list[Unit]
    job: Preparation
    source: dict
    vocab_size: int
    tokenizer_sha256: str

    @property
    def folders(self) -> dict[str, Path]:
        return {part: Path(self.job.out, part) for part in self.job.parts}


def make_plan(settings: Settings) -> Plan:
    """Cuts the input into units and computes the checksum that identifies the result."""
    vocab_size = load_tokenizer(settings.tokenizer).vocab_size
    name, _, config = settings.dataset.partition(":")
    if name:
        if os.path.isdir(name):
            refuse_inside(name, folders_above(settings.written))
        units = plan_dataset_units(name, config, settings.split, settings.text_field)
    else:
        units = units_of(settings, settings.input)
    validation_from = len(units) if settings.validation_input else None
    if settings.validation_input:
        trained = {os.path.realpath(file) for file in list_files(settings.input)}
        for file in list_files(settings.validation_input):
            if os.path.realpath(file) in trained:
                raise DataError(f"{file} is in --input and in --validation-input: it would be trained on and held out")
        units += units_of(settings, settings.validation_input)
    eos_id, digest = find_eos_id(settings.tokenizer, settings.eos), tokenizer_sha256(settings.tokenizer)
    unread = {"out", "tokenizer", "eos"} | (set() if settings.dataset else {"dataset", "split"})
    unread |= set() if settings.validation_input else {"validation_input"}
    source = {key: value for key, value in asdict(settings).items() if key not in unread}
    source |= {"tokenizer_sha256": digest, "eos_id": eos_id}
    names = {name for unit in units if unit.kind != "dataset" for name in unit.paths}
    if name:
        # Of a dataset on disk; what a hub has under a name is taken to stay.
        names |= {str(file) for file in (Path(name), *Path(name).rglob("*")) if file.is_file()}
    source["plan"] = identity(units, names, source)
    job = Preparation(
        settings.out, str(Path(settings.out, WORK)), settings.tokenizer, eos_id, token_dtype(vocab_size),
        settings.validation_fraction, how_to_split(settings, units), validation_from,
    )  # fmt: skip
    return Plan(units, job, source, vocab_size, digest)


def identity(units: list[Unit], names: Iterable[str], *more: object) -> str:
    """Checksum of units, of the names, sizes and times of files, and of whatever else."""
    stats = [(name, os.stat(name).st_size, os.stat(name).st_mtime_ns) for name in sorted(names)]
    parts = [*more, [asdict(unit) for unit in units], stats]
    return hashlib.sha256(json.dumps(parts, sort_keys=bool(more)).encode()).hexdigest()


def how_to_split(settings: Settings, units: list[Unit]) -> str:
    """What was asked for; of a single text file, which is one document, the end is held out."""
    single = len(units) == 1 and units[0].kind == "text" and len(units[0].paths) == 1
    if single and settings.validation_fraction and settings.split_by != "token":
        log(f"{units[0].paths[0]} is a single document: its end is held out, as --split-by token does")
        return "token"
    return settings.split_by


def units_of(settings: Settings, inputs: list[str]) -> list[Unit]:
    """The units of some files, as large as was asked for, or as their size suggests."""
    total = sum(unit.size for unit in plan_units(inputs, settings.text_field, 1 << 62, settings.written))
    unit_bytes = (settings.shard_mb << 20) or min(max(total // UNITS, LEAST_UNIT_BYTES), MOST_UNIT_BYTES)
    return plan_units(inputs, settings.text_field, unit_bytes)


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
