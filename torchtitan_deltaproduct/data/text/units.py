"""The workers of `prepare`: units of text in, token shards out, in several processes.

    records = tokenize_units(job, units, done={}, workers=8, max_bad_records=100)

A unit is finished when its record `<work>/<number>.json` exists, which is written after the shard files. What
a unit becomes depends on the unit and the job alone.
"""

import errno
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path

from torchtitan_deltaproduct.errors import DataError
from torchtitan_deltaproduct.files import write_atomically
from torchtitan_deltaproduct.progress import Progress

from ..shards.manifest import Shard
from ..shards.shards import ShardWriter
from ..shards.verified import SUFFIXES, state
from .documents import BadRecord, Document, Unit
from .sources import read_unit
from .tokenizer import load_tokenizer

# One call of the tokenizer, and one report of progress.
BATCH_BYTES, BATCH_DOCUMENTS = 1 << 18, 1024
QUEUED = 4
"""Units that wait for each worker at most."""


@dataclass(frozen=True)
class Preparation:
    """What is the same for all units; as in `Settings`, and:"""

    out: str
    work: str
    """Folder of the records of finished units."""
    tokenizer: str
    eos_id: int
    dtype: str
    """Of the shards."""
    validation_fraction: float
    split_by: str
    validation_from: int | None = None
    """Number of the first unit of `--validation-input`; None: there is none."""
    surely: float = -1.0
    """The largest draw that is held out in any case (`prepare.hold_out_one`)."""

    @property
    def parts(self) -> tuple[str, ...]:
        splits = self.validation_fraction or self.validation_from is not None
        return ("train", "validation") if splits else ("",)

    def draw(self, document: Document) -> float:
        """In [0, 1), by a hash: of the text, so that copies of a document are on one side, or of the file name."""
        basis = os.fsencode(document.origin) if self.split_by == "file" else document.text.encode()
        return int.from_bytes(blake2b(basis, digest_size=8).digest(), "little") / 2**64

    def pieces(self, document: Document, unit: int) -> list[tuple[str, str]]:
        """The part that a document goes to and its text, or two parts and the two texts that it is cut into."""
        if self.validation_from is not None:
            return [("train" if unit < self.validation_from else "validation", document.text)]
        if not self.validation_fraction:
            return [("", document.text)]
        if self.split_by == "token":
            cut = tail_start(document.text, self.validation_fraction)
            return [("train", document.text[:cut]), ("validation", document.text[cut:])]
        draw = self.draw(document)
        held_out = draw < self.validation_fraction or draw <= self.surely
        return [("validation" if held_out else "train", document.text)]


def tail_start(text: str, fraction: float) -> int:
    """Where the last `fraction` of a text begins: with a line, unless the nearest one would double the tail."""
    cut = round(len(text) * (1 - fraction))
    line = text.rfind("\n", 0, cut) + 1
    return line if len(text) - line <= 2 * (len(text) - cut) else cut


class Stopped(Exception):
    """Another unit failed, or the user pressed Ctrl-C."""


def tokenize_units(
    job: Preparation, units: list[Unit], done: dict[int, dict], workers: int, max_bad_records: int,
    numbers: range | None = None,
) -> list[dict]:  # fmt: skip
    """Tokenises the units that are not in `done`; returns the records of all, in order; of all in `numbers` if given.

    DataError: more than `max_bad_records` records are unreadable, the disk is full, or a worker died.
    """
    numbers = range(len(units)) if numbers is None else numbers
    todo = [number for number in numbers if number not in done]
    records, tokens = dict(done), 0
    # Bytes read of each unit.
    read = {number: units[number].size for number in done}
    context = multiprocessing.get_context("spawn")
    messages, stop = context.SimpleQueue(), context.Event()
    check_bad(records, max_bad_records)
    size = sum(units[number].size for number in numbers)
    with (
        Progress("tokenize", size, done=sum(read.values()), lines=True) as progress,
        ProcessPoolExecutor(
            min(workers, max(1, len(todo))), context, _start_worker, (job, max_bad_records, messages, stop)
        ) as pool,
    ):
        # Not all at once: what is waited for is gone through at every turn.
        waiting, pending = iter(todo), {}
        try:
            while True:
                for number in islice(waiting, QUEUED * workers - len(pending)):
                    pending[pool.submit(_run_unit, number, units[number])] = number
                if not pending:
                    break
                finished, _ = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                while not messages.empty():
                    number, read[number], more = messages.get()
                    tokens += more
                records |= {pending.pop(future): future.result() for future in finished}
                if any(future.result()["bad"] for future in finished):
                    check_bad(records, max_bad_records)
                progress.update(sum(read.values()), f"{tokens / 1e6:.1f} M tokens")
        except BrokenProcessPool:
            raise DataError(
                "A worker process died, most likely for lack of memory; finished shards are kept.\n"
                "Run the same command with fewer --workers."
            ) from None
        finally:
            stop.set()
            # With a wait: a worker that is still starting would find its queue gone, and say so at length.
            pool.shutdown(wait=True, cancel_futures=True)
    return [records[number] for number in numbers]


def check_bad(records: dict[int, dict], limit: int) -> None:
    """Raises DataError if the units finished so far have more than `limit` bad records."""
    bad = [entry for number in sorted(records) for entry in records[number]["bad"]]
    if len(bad) > limit:
        shown = "\n  ".join(str(BadRecord(*entry)) for entry in bad[:3])
        raise DataError(
            f"More than {limit} records cannot be read:\n  {shown}\n"
            "Correct the input, or allow more with --max-bad-records; finished shards are kept."
        )


_worker: dict = {}


def _start_worker(job: Preparation, max_bad_records: int, messages, stop) -> None:
    # Ctrl-C reaches every process of the terminal; the parent decides, through `stop`.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The processes are the parallelism; threads inside them would only compete.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _worker.update(job=job, limit=max_bad_records, messages=messages, stop=stop)
    _worker["tokenizer"] = load_tokenizer(job.tokenizer, job.eos_id)


def _die_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _run_unit(number: int, unit: Unit) -> dict:
    job = _worker["job"]

    def report(read_bytes: int, tokens: int) -> None:
        _worker["messages"].put((number, min(read_bytes, unit.size), tokens))
        if _worker["stop"].is_set():
            raise Stopped

    try:
        return tokenize_unit(job, number, unit, _worker["tokenizer"], _worker["limit"], report)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(f"{error.filename or job.out}: {error.strerror}; finished shards are kept.") from None
        raise DataError(
            f"The disk of {job.out} is full; finished shards are kept.\nFree space and run the same command again."
        ) from None


def tokenize_unit(
    job: Preparation, number: int, unit: Unit, tokenizer, max_bad_records: int, report: Callable[[int, int], None]
) -> dict:
    """Tokenises one unit into a shard for each part, and writes its record.

    `report` is told of the bytes of text read so far and of the tokens since the last call.

    Returns:
        `{"shards": {part: shard or None}, "states": {part: states_of}, "empty": count, "unknown": tokens,
        "bad": [[file, position, reason], ...], "separators": documents with the separator in their text,
        "least": smallest draw of a document}`.
    """
    writers = {part: ShardWriter(Path(job.out, part), f"shards/{number:05d}", job.dtype) for part in job.parts}
    record: dict = {"bad": [], "empty": 0, "unknown": 0, "separators": 0, "least": 1.0}
    read_bytes = 0
    try:
        for documents in _batches(read_unit(unit), record["bad"]):
            check_bad({number: record}, max_bad_records)
            pieces = [piece for document in documents for piece in job.pieces(document, number)]
            tokens = 0
            for (part, text), ids in zip(pieces, tokenizer.encode_documents([text for _, text in pieces]), strict=True):
                size = len(text.encode())
                read_bytes += size
                tokens += len(ids)
                record["unknown"] += tokenizer.count_unknown(text, ids)
                record["separators"] += job.eos_id in ids
                if ids:
                    ids.append(job.eos_id)
                    writers[part].add(ids, size)
                else:
                    # A short document may have no tail.
                    record["empty"] += job.split_by != "token" or part == "train"
            if job.validation_fraction and job.split_by != "token":
                draws = [job.draw(document) for document in documents if document.text]
                record["least"] = min([record["least"], *draws])
            report(read_bytes, tokens)
        shards = {part: writer.close() for part, writer in writers.items()}
    except BaseException:
        for writer in writers.values():
            writer.abandon()
        raise
    record["shards"] = {part: asdict(shard) if shard else None for part, shard in shards.items()}
    record["states"] = {part: states_of(Path(job.out, part), shard) for part, shard in shards.items() if shard}
    write_atomically(Path(job.work, f"{number:05d}.json"), json.dumps(record))
    report(unit.size, 0)
    return record


def states_of(folder: Path, shard: Shard) -> list[list[int]]:
    """By which a later run knows the files of a shard."""
    return [state(os.stat(folder / (shard.name + suffix))) for suffix in SUFFIXES]


def _batches(records: Iterator[Document | BadRecord], bad: list[BadRecord]) -> Iterator[list[Document]]:
    """Documents in batches for the tokenizer; bad records go to `bad`. The last batch may be empty."""
    batch, size, bad_before = [], 0, 0
    for record in records:
        if isinstance(record, BadRecord):
            bad.append(record)
        else:
            batch.append(record)
            size += len(record.text)
        if size >= BATCH_BYTES or len(batch) + len(bad) - bad_before >= BATCH_DOCUMENTS:
            yield batch
            batch, size, bad_before = [], 0, len(bad)
    yield batch
