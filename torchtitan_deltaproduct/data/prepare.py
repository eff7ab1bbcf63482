"""Turns text into token shards that training reads.

    alias prepare="python -m torchtitan_deltaproduct.data.prepare"
    prepare data/code --tokenizer data/tokenizer --input corpus/ --validation-fraction 0.02 --workers 8
    prepare data/web --tokenizer data/tokenizer --input part-*.jsonl.gz --text-field content
    prepare data/fineweb --tokenizer data/mistral --dataset HuggingFaceFW/fineweb:sample-10BT

The input is cut into units (text_sources.py); each becomes one shard. A run that was killed continues: shards
that are finished are checked and kept. The result depends neither on the number of workers nor on
interruptions, and manifest.json is written last. Records that cannot be read are left out, counted, and named
in OUT/bad_records.jsonl.
"""

import argparse
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from torchtitan_deltaproduct.errors import ConfigError, DataError, exit_on_user_error

from .manifest import NAME, Manifest, Shard, read_manifest, write_atomically, write_manifest
from .shards import file_sha256, token_dtype
from .text_sources import Unit, plan_dataset_units, plan_units
from .tokenize_units import Job, tokenize_units
from .tokenizer import copy_tokenizer, find_eos_id, load_tokenizer, tokenizer_sha256

WORK = ".prepare"
BAD_RECORDS = "bad_records.jsonl"
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

    def __post_init__(self):
        if bool(self.input) == bool(self.dataset):
            raise ConfigError("Give either --input PATH... or --dataset NAME, not both and not neither.")
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(f"--validation-fraction is {self.validation_fraction}: expected 0 <= F < 1")
        if self.shard_mb < 0:
            raise ConfigError(f"--shard-mb is {self.shard_mb}: expected 0 (automatic) or more")


@dataclass
class Plan:
    """What to do, and `source`, the part of it that identifies the result and goes into the manifest."""

    units: list[Unit]
    job: Job
    source: dict
    vocab_size: int
    tokenizer_sha256: str


def prepare(
    settings: Settings, workers: int = 0, max_bad_records: int = 100, overwrite: bool = False
) -> bool:
    """Makes the prepared folder, or folders `train` and `validation` inside it.

    Args:
        settings: what to make.
        workers: processes; 0 takes one for each CPU core.
        max_bad_records: more than these stop the run with an error; finished shards are kept.
        overwrite: removes another prepared dataset that is in the way.

    Returns:
        False if the result was there already.

    Raises:
        DataError: the input, the tokenizer or the target cannot be used; ConfigError: the settings cannot.
    """
    if workers < 0 or max_bad_records < 0:
        raise ConfigError("--workers and --max-bad-records must not be negative")
    plan, out = make_plan(settings), Path(settings.out)
    with locked(out):
        if not overwrite and finished(out, plan):
            shutil.rmtree(out / WORK, ignore_errors=True)
            return False
        make_room(out, plan, overwrite, keep=settings.tokenizer)
        done = finished_units(out, plan)
        if done:
            log(f"continuing: {len(done)} of {len(plan.units)} shards are there already")
        workers = workers or len(os.sched_getaffinity(0))
        records = tokenize_units(plan.job, plan.units, done, workers, max_bad_records)
        write_result(out, plan, records, settings.tokenizer)
    return True


def make_plan(settings: Settings) -> Plan:
    """Cuts the input into units and computes the checksum that identifies the result."""
    inside = [
        path for path in settings.input if Path(path).resolve() in Path(settings.out, "x").resolve().parents
    ]
    if inside:
        raise DataError(f"{settings.out} lies in its own input {inside[0]}.\nChoose a folder outside of it.")
    tokenizer = load_tokenizer(settings.tokenizer)
    if settings.dataset:
        name, _, config = settings.dataset.partition(":")
        units = plan_dataset_units(name, config, settings.split, settings.text_field)
    else:
        total = sum(unit.size for unit in plan_units(settings.input, settings.text_field, 1 << 62))
        automatic = min(max(total // UNITS, LEAST_UNIT_BYTES), MOST_UNIT_BYTES)
        units = plan_units(settings.input, settings.text_field, (settings.shard_mb << 20) or automatic)
    eos_id, digest = find_eos_id(settings.tokenizer, settings.eos), tokenizer_sha256(settings.tokenizer)
    source = {key: value for key, value in asdict(settings).items() if key not in ("out", "tokenizer", "eos")}
    if not settings.dataset:
        del source["dataset"], source["split"]
    source |= {"tokenizer_sha256": digest, "eos_id": eos_id}
    names = {name for unit in units if unit.kind != "dataset" for name in unit.paths}
    stats = [(name, os.stat(name).st_size, os.stat(name).st_mtime_ns) for name in sorted(names)]
    identity = json.dumps([source, [asdict(unit) for unit in units], stats], sort_keys=True)
    source["plan"] = hashlib.sha256(identity.encode()).hexdigest()
    job = Job(
        out=settings.out,
        work=str(Path(settings.out, WORK)),
        tokenizer=settings.tokenizer,
        eos_id=eos_id,
        dtype=token_dtype(tokenizer.vocab_size),
        validation_fraction=settings.validation_fraction,
        split_by=settings.split_by,
    )
    return Plan(units, job, source, tokenizer.vocab_size, digest)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keeps a second prepare out of the folder; the lock ends with the process, however it ends."""
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(
            f"Another prepare is writing to {out}.\nWait for it, or choose another folder."
        ) from None
    except OSError as error:
        log(f"warning: {out} cannot be locked ({error.strerror}); let no other prepare write to it")
    try:
        yield
    finally:
        os.close(handle)


def folders(out: Path, plan: Plan) -> dict[str, Path]:
    return {part: out / part for part in plan.job.parts}


def finished(out: Path, plan: Plan) -> bool:
    """Whether `out` holds the complete result of this plan."""
    targets = folders(out, plan).values()
    if not all((folder / NAME).is_file() for folder in targets):
        return False
    return all(read_manifest(folder).source.get("plan") == plan.source["plan"] for folder in targets)


def make_room(out: Path, plan: Plan, overwrite: bool, keep: str) -> None:
    """Makes `out` ready for this plan: empty, or begun by the same plan."""
    manifests = [folder for folder in (out, out / "train", out / "validation") if (folder / NAME).is_file()]
    begun = out / WORK / "plan.json"
    sources = [json.loads(begun.read_text())] if begun.is_file() else []
    # To be overwritten, a dataset need not be readable.
    sources += [{} if overwrite else read_manifest(folder).source for folder in manifests]
    other = [source for source in sources if source.get("plan") != plan.source["plan"]]
    if other and not overwrite:
        raise DataError(
            f"{out} holds a dataset made otherwise ({differences(other[0], plan.source)}).\n"
            "Choose another folder, or replace it with --overwrite."
        )
    shards = [folder / "shards" for folder in folders(out, plan).values()]
    strange = [folder for folder in shards if folder.exists() and not sources]
    if strange:
        raise DataError(f"{strange[0]} was not made by prepare.\nChoose another folder for the result.")
    if other:
        clear(out, keep)
    begun.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(begun, json.dumps(plan.source))
    for folder in {out, out / WORK, *shards, *folders(out, plan).values()}:
        for leftover in folder.glob("*.tmp*"):
            leftover.unlink()


def differences(other: dict, ours: dict) -> str:
    """The settings in which two sources differ, in words."""
    names = (other.keys() | ours.keys()) - {"plan", "part"}
    keys = sorted(key for key in names if other.get(key) != ours.get(key))
    found = [f"{key}: {other.get(key)} there, {ours.get(key)} here" for key in keys]
    return "; ".join(found) or "an input file has changed since"


def clear(out: Path, keep: str) -> None:
    """Removes what prepare wrote, manifests first."""
    targets = [out, out / "train", out / "validation"]
    for folder in targets:
        (folder / NAME).unlink(missing_ok=True)
    for folder in targets:
        shutil.rmtree(folder / "shards", ignore_errors=True)
        if (folder / "tokenizer").resolve() != Path(keep).resolve():
            shutil.rmtree(folder / "tokenizer", ignore_errors=True)
    shutil.rmtree(out / WORK, ignore_errors=True)
    (out / BAD_RECORDS).unlink(missing_ok=True)


def finished_units(out: Path, plan: Plan) -> dict[int, dict]:
    """Records of the units that an earlier run finished and whose files are still what they were."""
    done = {}
    for number in range(len(plan.units)):
        path = out / WORK / f"{number:05d}.json"
        if path.is_file():
            record = json.loads(path.read_text())
            if all(intact(out / part, shard) for part, shard in record["shards"].items() if shard):
                done[number] = record
            else:
                log(f"warning: a shard of unit {number} is damaged and is made again")
    return done


def intact(folder: Path, shard: dict) -> bool:
    """Whether the files of a shard have the recorded checksums."""
    base = folder / shard["name"]
    files = ((Path(f"{base}.bin"), shard["bin_sha256"]), (Path(f"{base}.idx"), shard["idx_sha256"]))
    return all(path.is_file() and file_sha256(path) == digest for path, digest in files)


def write_result(out: Path, plan: Plan, records: list[dict], tokenizer: str) -> None:
    """Tokenizer copies, the list of bad records and, last, the manifests; then the working folder goes."""
    bad = [entry for record in records for entry in record["bad"]]
    empty = sum(record["empty"] for record in records)
    manifests = {}
    for part, folder in folders(out, plan).items():
        shards = [Shard(**record["shards"][part]) for record in records if record["shards"][part]]
        if not shards:
            which = f"The {part} set" if part else "The dataset"
            raise DataError(
                f"{which} has no documents: {empty} were empty and {len(bad)} records unreadable.\n"
                "Give more input, or another --validation-fraction."
            )
        if Path(tokenizer).resolve() != (folder / "tokenizer").resolve():
            copy_tokenizer(tokenizer, folder / "tokenizer", plan.job.eos_id)
        manifests[folder] = Manifest(
            dtype=plan.job.dtype,
            vocab_size=plan.vocab_size,
            eos_id=plan.job.eos_id,
            tokenizer_sha256=plan.tokenizer_sha256,
            tokens=sum(shard.tokens for shard in shards),
            documents=sum(shard.documents for shard in shards),
            bytes=sum(shard.bytes for shard in shards),
            empty_documents=empty,
            bad_records=len(bad),
            source={**plan.source, "part": part},
            shards=shards,
        )
    lines = [json.dumps(dict(zip(("file", "position", "reason"), entry, strict=True))) for entry in bad]
    if bad:
        write_atomically(out / BAD_RECORDS, "\n".join(lines) + "\n")
    for folder, manifest in manifests.items():
        write_manifest(folder, manifest)
    shutil.rmtree(out / WORK)


def summary(out: Path, plan_parts: tuple[str, ...]) -> str:
    """What the folder holds and how to train on it."""
    lines = []
    for part in plan_parts:
        manifest = read_manifest(out / part)
        size = manifest.tokens * int(manifest.dtype.removeprefix("uint")) // 8
        lines.append(
            f"  {out / part}: {manifest.tokens:,} tokens in {manifest.documents:,} documents, "
            f"{manifest.bytes / max(1, manifest.tokens - manifest.documents):.2f} bytes a token, "
            f"{size / 1e6:.1f} MB in {len(manifest.shards)} shards"
        )
    if manifest.empty_documents or manifest.bad_records:
        named = f" (named in {out / BAD_RECORDS})" if manifest.bad_records else ""
        lines.append(
            f"  left out: {manifest.empty_documents} empty documents, "
            f"{manifest.bad_records} unreadable records{named}"
        )
    lines.append(f'  to train on it: [data] paths = ["{out / plan_parts[0]}"]')
    return "\n".join(lines)


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="prepare", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("out", help="folder to make")
    add(
        "--input",
        nargs="+",
        default=[],
        metavar="PATH",
        help="text, .jsonl(.gz) or .parquet files, or folders",
    )
    add(
        "--dataset",
        default="",
        metavar="NAME[:CONFIG]",
        help="instead of --input: a dataset of the hub or disk",
    )
    add("--split", default="train", help="split of --dataset")
    add("--tokenizer", required=True, metavar="FOLDER", help="folder with tokenizer.json")
    add("--text-field", default="text", metavar="NAME", help="JSON field or column that holds the text")
    add(
        "--eos",
        default="",
        metavar="TOKEN",
        help="separator token; default: the tokenizer's end-of-text token",
    )
    add("--validation-fraction", type=float, default=0.0, metavar="F", help="share of documents held out")
    add("--split-by", choices=("document", "file"), default="document", help="what is held out as a whole")
    add("--workers", type=int, default=0, help="processes; 0: one for each CPU core")
    add(
        "--max-bad-records",
        type=int,
        default=100,
        metavar="N",
        help="unreadable records to skip before stopping",
    )
    add(
        "--shard-mb",
        type=int,
        default=0,
        metavar="MB",
        help="input for one shard; 0: 1 to 256, by input size",
    )
    add("--overwrite", action="store_true", help="replace another prepared dataset in OUT")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = vars(parse(arguments))
    workers, max_bad, overwrite = (options.pop(k) for k in ("workers", "max_bad_records", "overwrite"))
    settings = Settings(**options)
    try:
        made = prepare(settings, workers, max_bad, overwrite)
    except KeyboardInterrupt:
        log("\ninterrupted; the same command continues from the finished shards")
        return 130
    parts = ("train", "validation") if settings.validation_fraction else ("",)
    print(f"{'prepared' if made else 'already prepared:'} {settings.out}")
    print(summary(Path(settings.out), parts))
    return 0


if __name__ == "__main__":
    exit_on_user_error(main)
