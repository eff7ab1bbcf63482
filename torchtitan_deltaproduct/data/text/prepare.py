"""Turns text into token shards that training reads.

    alias prepare="python -m torchtitan_deltaproduct.data.prepare"
    prepare data/code --tokenizer data/tokenizer --input corpus/ --validation-fraction 0.02 --workers 8
    prepare data/web --tokenizer data/tokenizer --input part-*.jsonl.gz --text-field content
    prepare data/fineweb --tokenizer data/mistral --dataset HuggingFaceFW/fineweb:sample-10BT
    prepare data/web ... --part 3/16         # one of 16 machines on one file system; then, once, without --part

The input is cut into units (sources.py); each becomes one shard. A run that was killed continues: shards that are
finished and untouched since are kept (--verify: those with the right checksums). The result depends neither on the
number of workers nor on interruptions, and manifest.json is written last. Records that cannot be read are left out,
counted, and named in OUT/bad_records.jsonl.
"""

import argparse
import fcntl
import json
import os
import shlex
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from torchtitan_deltaproduct.arguments import Parser, path, text
from torchtitan_deltaproduct.devices import cores
from torchtitan_deltaproduct.errors import ConfigError, DataError
from torchtitan_deltaproduct.files import read_object, read_text, write_atomically

from ..shards.manifest import NAME, TABLE, WORK, Manifest, Shard, read_manifest, write_manifest
from ..shards.megatron import own_index
from ..shards.verified import SUFFIXES, THREADS, Verified, file_sha256, file_states, state
from .documents import BadRecord
from .files import result_folder
from .plan import Plan, Settings, log, make_plan
from .tokenizer import MOST_UNKNOWN, copy_tokenizer
from .units import Preparation, tokenize_units

BAD_RECORDS = "bad_records.jsonl"


def prepare(
    settings: Settings, workers: int = 0, max_bad_records: int = 100, overwrite: bool = False,
    max_unknown: float = MOST_UNKNOWN, verify: bool = False, part: tuple[int, int] | None = None,
) -> bool:  # fmt: skip
    """Makes the prepared folder, or folders `train` and `validation` inside it.

    Args:
        settings: what to make.
        workers: processes; 0 takes one for each CPU core.
        max_bad_records, max_unknown: more bad records, or a larger share of unknown tokens, are an error; finished
            shards are kept.
        overwrite: removes another prepared dataset that is in the way.
        verify: compares the shards of an interrupted run with their checksums, even if size, time and inode are right.
        part: (i, n), the i-th of n shares of the shards, from 1, which is all that is made then: other processes,
            on other machines too, make the others at the same time, and a last call without `part` the rest.

    Returns:
        False if the result was there already.

    Raises:
        DataError: the input, the tokenizer or the target cannot be used; ConfigError: the settings cannot.
    """
    if workers < 0 or max_bad_records < 0:
        raise ConfigError("--workers and --max-bad-records must not be negative")
    if not 0 <= max_unknown <= 1:
        raise ConfigError(f"--max-unknown is {max_unknown}: expected a share of the tokens, 0 <= F <= 1")
    if part and (overwrite or not 1 <= part[0] <= part[1]):
        raise ConfigError(f"--part {part[0]}/{part[1]}: expected I/N with 1 <= I <= N, and without --overwrite")
    plan, out = make_plan(settings), Path(settings.out)
    workers = workers or cores()
    with locked(out, fcntl.LOCK_SH if part else fcntl.LOCK_EX):
        if not overwrite and finished(plan):
            shutil.rmtree(out / WORK, ignore_errors=True)
            return False
        make_room(out, plan, overwrite, keep=settings.tokenizer, alone=not part)
        if part:
            numbers = range(part[0] - 1, len(plan.units), part[1])
            with locked(out / WORK / f"part-{part[0]}-of-{part[1]}"):
                done = finished_units(out, numbers, verify)
                tokenize_units(plan.job, plan.units, done, workers, max_bad_records, numbers)
            log(
                f"part {part[0]}/{part[1]} of {out} is done: {len(numbers)} of {len(plan.units)} shards\n"
                "when all parts are, the same command without --part finishes the folder"
            )
            return True
        done = finished_units(out, range(len(plan.units)), verify)
        if done:
            log(f"continuing: {len(done)} of {len(plan.units)} shards are there already")
        records = tokenize_units(plan.job, plan.units, done, workers, max_bad_records)
        records = hold_out_one(plan, records, workers, max_bad_records)
        check_unknown(records, max_unknown)
        write_result(out, plan, records, settings.tokenizer)
    return True


@contextmanager
def locked(out: Path, how: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Keeps a second prepare out of a folder, which is made if need be; the lock ends with the process.

    LOCK_EX keeps all others out, LOCK_SH those that come with LOCK_EX.
    """
    with result_folder(out):
        handle = os.open(out, os.O_RDONLY)
        try:
            fcntl.flock(handle, how | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"Another prepare is writing to {out}.\nWait for it, or choose another folder.") from None
        except OSError as error:
            log(f"warning: {out} cannot be locked ({error.strerror}); let no other prepare write to it")
        try:
            yield
        finally:
            os.close(handle)


def finished(plan: Plan) -> bool:
    """Whether the complete result of this plan is there; DataError if a shard of it is gone or cut short."""
    if not all((folder / NAME).is_file() for folder in plan.folders.values()):
        return False
    manifests = {folder: read_manifest(folder) for folder in plan.folders.values()}
    if any(manifest.source.get("plan") != plan.source["plan"] for manifest in manifests.values()):
        return False
    for folder, manifest in manifests.items():
        file_states(folder, manifest)
    return True


def make_room(out: Path, plan: Plan, overwrite: bool, keep: str, alone: bool) -> None:
    """Makes `out` ready for this plan: empty, or begun by the same plan; unless `alone`, others are writing to it."""
    begun = out / WORK / "plan.json"
    sources = [read_object(begun)] if begun.is_file() else []
    # To be overwritten, a dataset need not be readable.
    made = [folder for folder in (out, out / "train", out / "validation") if (folder / NAME).is_file()]
    sources += [{} if overwrite else read_manifest(folder).source for folder in made]
    other = [source for source in sources if source.get("plan") != plan.source["plan"]]
    if other and not overwrite:
        raise DataError(
            f"{out} holds a dataset made otherwise ({differences(other[0], plan.source)}).\n"
            "Choose another folder, or replace it with --overwrite."
        )
    shards = [folder / "shards" for folder in plan.folders.values()]
    strange = [folder for folder in shards if folder.exists() and not sources]
    if strange:
        raise DataError(f"{strange[0]} was not made by prepare.\nChoose another folder for the result.")
    if other:
        clear(out, keep)
    begun.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(begun, json.dumps(plan.source))
    for folder in {out, out / WORK, *shards, *plan.folders.values()} if alone else ():
        for leftover in folder.glob("*.tmp*"):
            leftover.unlink()


def differences(other: dict, ours: dict) -> str:
    """The settings in which two sources differ, in words."""
    names = (other.keys() | ours.keys()) - {"plan", "part"}
    keys = sorted(key for key in names if other.get(key) != ours.get(key))
    changes = [f"{key}: {other.get(key)} there, {ours.get(key)} here" for key in keys]
    return "; ".join(changes) or "an input file has changed since"


def clear(out: Path, keep: str) -> None:
    """Removes what prepare wrote, manifests first, but the tokenizer `keep`."""
    folders = out, out / "train", out / "validation"
    for folder in folders:
        for file in (folder / NAME, folder / TABLE, *folder.glob(".verified*")):
            file.unlink(missing_ok=True)
    for folder in folders:
        shutil.rmtree(folder / "shards", ignore_errors=True)
        if os.path.realpath(folder / "tokenizer") != os.path.realpath(keep):
            shutil.rmtree(folder / "tokenizer", ignore_errors=True)
    shutil.rmtree(out / WORK, ignore_errors=True)
    (out / BAD_RECORDS).unlink(missing_ok=True)
    for folder in folders[1:]:
        # It refuses a folder that holds something.
        with suppress(OSError):
            folder.rmdir()


def finished_units(out: Path, numbers: range, verify: bool) -> dict[int, dict]:
    """Records of those of some units that an earlier run finished and whose files are still what they were."""
    paths = {number: out / WORK / f"{number:05d}.json" for number in numbers}
    records = {number: read_object(path) for number, path in paths.items() if path.is_file()}
    with ThreadPoolExecutor(THREADS) as pool:
        kept = list(pool.map(lambda record: intact(out, record, verify), records.values()))
    for number, keep in zip(list(records), kept, strict=True):
        if not keep:
            log(f"warning: a shard of unit {number} is damaged and is made again")
            del records[number]
    return records


def intact(out: Path, record: dict, verify: bool) -> bool:
    """Whether the shards of a unit are those of its record: untouched since, or with the right checksums."""
    if "least" not in record:
        # Of an earlier version.
        return False
    for part, shard in record["shards"].items():
        for place, suffix in enumerate(SUFFIXES if shard else ()):
            path = out / part / (shard["name"] + suffix)
            try:
                now = state(os.stat(path))
            except OSError:
                return False
            # An earlier version had another index.
            if suffix == ".idx" and now[0] != own_index(shard["documents"]).size:
                return False
            if (verify or record["states"][part][place] != now) and file_sha256(path) != shard[f"{suffix[1:]}_sha256"]:
                return False
    return True


def hold_out_one(plan: Plan, records: list[dict], workers: int, max_bad_records: int) -> list[dict]:
    """The records, at least one document among them held out: of those to train on, the one with the smallest draw."""
    job = plan.job
    missing = job.validation_fraction and not any(record["shards"]["validation"] for record in records)
    least = min((record["least"] for record in records), default=1.0)
    if not missing or least == 1.0:
        return records
    log(f"no {job.split_by} was drawn at --validation-fraction {job.validation_fraction}: the nearest one is held out")
    done = {number: record for number, record in enumerate(records) if record["least"] != least}
    for number in set(range(len(records))) - done.keys():
        for folder in (Path(job.work), Path(job.out, "train/shards")):
            for file in folder.glob(f"{number:05d}.*"):
                file.unlink()
    return tokenize_units(replace(job, surely=least), plan.units, done, workers, max_bad_records)


def check_unknown(records: list[dict], limit: float) -> None:
    unknown = sum(record["unknown"] for record in records)
    tokens = sum(shard.tokens - shard.documents for shard in shards_of(records))
    if unknown > limit * tokens:
        raise DataError(
            f"{unknown:,} of {tokens:,} tokens ({unknown / tokens:.1%}) are unknown: the tokenizer cannot write them.\n"
            f"Use one that can, or allow more with --max-unknown (now {limit:g}); finished shards are kept."
        )


def shards_of(records: list[dict], part: str | None = None) -> list[Shard]:
    shards = [shard for record in records for name, shard in record["shards"].items() if part in (None, name)]
    return [Shard(**shard) for shard in shards if shard]


def write_result(out: Path, plan: Plan, records: list[dict], tokenizer: str) -> None:
    """Tokenizer copies, the list of bad records and, last, the manifests; then the working folder goes."""
    bad = [BadRecord(*entry) for record in records for entry in record["bad"]]
    empty, unknown, spelled = (sum(record[key] for record in records) for key in ("empty", "unknown", "separators"))
    if spelled:
        log(f"warning: {spelled} documents hold the separator inside, as it is an ordinary token of this tokenizer")
    manifests = {}
    if not any(shards_of(records, part) for part in plan.folders):
        # There is nothing to go on from, and other input may come here.
        clear(out, tokenizer)
    for part, folder in plan.folders.items():
        shards = shards_of(records, part)
        if not shards:
            raise DataError(
                f"The {f'{part} set' if part else 'dataset'} has no documents: {empty} were empty and {len(bad)} "
                f"records unreadable.\n{no_documents(part, plan.job, bad)}"
            )
        if os.path.realpath(tokenizer) != os.path.realpath(folder / "tokenizer"):
            copy_tokenizer(tokenizer, folder / "tokenizer", plan.job.eos_id)
        totals = {name: sum(getattr(shard, name) for shard in shards) for name in ("tokens", "documents", "bytes")}
        manifests[folder] = Manifest(
            dtype=plan.job.dtype, vocab_size=plan.vocab_size, eos_id=plan.job.eos_id, **totals, shards=shards,
            tokenizer_sha256=plan.tokenizer_sha256, empty_documents=empty, bad_records=len(bad), unknown_tokens=unknown,
            source={**plan.source, "part": part},
        )  # fmt: skip
    if bad:
        lines = [json.dumps({"file": file, "position": place, "reason": reason}) for file, place, reason in bad]
        write_atomically(out / BAD_RECORDS, "\n".join(lines) + "\n")
    for folder, manifest in manifests.items():
        write_manifest(folder, manifest)
        Verified(folder, manifest).trust()
    shutil.rmtree(out / WORK)


def no_documents(part: str, job: Preparation, bad: list[BadRecord]) -> str:
    """What to do about a part without documents, or why there is none."""
    if bad:
        return "\n".join(map(str, bad[:3]))
    if not part:
        return "Give more input."
    if job.validation_from is not None:
        return f"Name other files with {'--validation-input' if part == 'validation' else '--input'}."
    if job.split_by == "token":
        return "No document is long enough to be cut: give more input, or another --validation-fraction."
    apart = "--split-by token holds out the end of each, --validation-input PATH other files."
    return f"One document cannot be on both sides: {apart}"


def summary(out: Path, parts: tuple[str, ...]) -> str:
    lines = []
    for part in parts:
        manifest = read_manifest(out / part)
        shards = f"{len(manifest.shards)} shard{'s' * (len(manifest.shards) != 1)}"
        lines.append(
            f"  {out / part}: {manifest.counts()}, {manifest.bytes_a_token:.2f} bytes a token, "
            f"{manifest.tokens * manifest.token_bytes / 1e6:.1f} MB in {shards}"
        )
    empty, bad = manifest.empty_documents, manifest.bad_records
    if empty or bad:
        named = f" (named in {out / BAD_RECORDS}), such as" if bad else ""
        lines.append(f"  left out: {empty} empty documents, {bad} unreadable records{named}")
        lines += [f"    {record}" for record in first_bad(out)]
    if manifest.unknown_tokens:
        share = manifest.unknown_tokens / max(1, sum(read_manifest(out / part).tokens for part in parts))
        lines.append(f"  unknown: {manifest.unknown_tokens:,} tokens ({share:.1%}) that the vocabulary cannot write")
    held_out = ["--validation.paths", str(out / parts[1])] if len(parts) > 1 else ["--validation.no-enable"]
    words = ["bash", "launch/local.sh", "train_configs/own_text.toml", "--job.dump_folder", f"outputs/{out.name}"]
    words += ["--data.paths", str(out / parts[0]), *held_out]
    # A vocabulary that is a multiple of 64 is fastest.
    words += ["--model.vocab_size", str(-(-manifest.vocab_size // 64) * 64)]
    words += ["--model.hf_assets_path", str(out / parts[0] / "tokenizer")]
    return "\n".join([*lines, "  to train on it, with this or another TOML:", f"    {shlex.join(words)}"])


def first_bad(out: Path) -> list[BadRecord]:
    """The first three records that could not be read."""
    with suppress(OSError, ValueError, TypeError, AttributeError, RecursionError):
        return [BadRecord(*json.loads(line).values()) for line in read_text(out / BAD_RECORDS).splitlines()[:3]]
    return []


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("torchtitan_deltaproduct.data.prepare", __doc__)
    add, paths = parser.add_argument, {"nargs": "+", "default": [], "type": path, "metavar": "PATH"}
    add("out", type=path, help="folder to make")
    add("--input", **paths, help="text, JSON, CSV (also packed) or Parquet files, or folders")
    add("--dataset", default="", type=path, metavar="NAME[:CONFIG]",
        help="instead of --input: a dataset of the hub or disk")  # fmt: skip
    add("--split", default="train", type=text, help="split of --dataset")
    add("--tokenizer", required=True, type=path, metavar="FOLDER", help="folder with tokenizer.json")
    add("--text-field", default="text", type=text, metavar="NAME", help="JSON field or column that holds the text")
    add("--eos", default="", type=text, metavar="TOKEN",
        help="separator token; default: the tokenizer's end-of-text token")  # fmt: skip
    add("--validation-fraction", type=float, default=0.0, metavar="F", help="share held out, one document at least")
    add("--split-by", choices=("document", "file", "token"), default="document",
        help="what is held out as a whole; token: of each document the end")  # fmt: skip
    add("--validation-input", **paths, help="files or folders to hold out, instead of a share")
    add("--workers", type=int, default=0, help="processes; 0: one for each CPU core")
    add("--max-bad-records", type=int, default=100, metavar="N", help="unreadable records to skip before stopping")
    add("--max-unknown", type=float, default=MOST_UNKNOWN, metavar="F",
        help="share of unknown tokens above which to stop (default: %(default)s)")  # fmt: skip
    add("--shard-mb", type=int, default=0, metavar="MB", help="input for one shard; 0: 1 to 256, by input size")
    add("--part", type=part_of, metavar="I/N", help="make this share of the shards only; then once without --part")
    add("--verify", action="store_true", help="continuing: compare finished shards with checksums, not times alone")
    add("--overwrite", action="store_true", help="replace another prepared dataset in OUT")
    return parser.parse_args(arguments)


def part_of(word: str) -> tuple[int, int]:
    number, _, parts = word.partition("/")
    if not (number.isdecimal() and parts.isdecimal()):
        raise argparse.ArgumentTypeError(f"{word}: expected I/N, such as 3/16")
    return int(number), int(parts)


def main(arguments: list[str] | None = None) -> int:
    options = vars(parse(arguments))
    names = ("workers", "max_bad_records", "overwrite", "max_unknown", "verify", "part")
    how = {name: options.pop(name) for name in names}
    settings = Settings(**options)
    try:
        made = prepare(settings, **how)
    except KeyboardInterrupt:
        log("\ninterrupted; the same command continues from the finished shards")
        return 130
    if not (made and how["part"]):
        print(f"{'prepared' if made else 'already prepared:'} {settings.out}")
        print(summary(Path(settings.out), settings.parts))
    return 0
