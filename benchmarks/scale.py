"""Shows what a start and a sample cost as the number of shards grows: nothing should grow that need not.

    python -m benchmarks.scale                              # 10^3 and 10^4 shards, a minute; no network
    python -m benchmarks.scale --shards 1000 100000         # some minutes, most of it making the files

For each size a synthetic prepared set of sparse files. Each number is of a fresh process:

    start       seconds from imported modules to a loader, training and validation sets opened, and MB of memory gained
    calls       system calls on files of that process, python's own imports included (by strace, where it is installed)
    sample      microseconds a window, of 2,000 windows drawn from all shards, and such system calls a window
    continue    seconds in which a restarted prepare finds its finished shards, of 64 MB each, still the same

Exit code 1 if a start of the most shards takes more than half a second, or makes 100 system calls more than that of the
fewest.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models

TOKENS, DOCUMENTS, SEQ_LEN, WINDOWS = 1 << 14, 64, 1024, 2000
CALLS = "trace=%file,%desc"
MOST_SECONDS, MOST_CALLS = 0.5, 100


def make_set(folder: Path, shards: int) -> Path:
    """Files of zeros as long as they must be, and the manifest and note of a set that was used before."""
    from torchtitan_deltaproduct.data.shards.manifest import Manifest, Shard, write_manifest
    from torchtitan_deltaproduct.data.shards.verified import Verified
    from torchtitan_deltaproduct.data.text.tokenizer import tokenizer_sha256

    (folder / "tokenizer").mkdir(parents=True)
    (folder / "shards").mkdir()
    words = models.WordLevel({"<|endoftext|>": 0, "x": 1}, unk_token="x")
    Tokenizer(words).save(str(folder / "tokenizer/tokenizer.json"))
    ends = (np.arange(1, DOCUMENTS + 1) * (TOKENS // DOCUMENTS)).astype("<i8").tobytes()
    table = []
    for number in range(shards):
        name = f"shards/{number:05d}"
        with open(folder / f"{name}.bin", "wb") as file:
            os.truncate(file.fileno(), TOKENS * 2)
        (folder / f"{name}.idx").write_bytes(ends)
        table.append(Shard(name, TOKENS, DOCUMENTS, TOKENS, "0" * 64, "0" * 64))
    counts = (shards * TOKENS, shards * DOCUMENTS, shards * TOKENS)
    sha = tokenizer_sha256(folder / "tokenizer")
    manifest = Manifest("uint16", 2, 0, sha, *counts, 0, 0, {}, table)
    write_manifest(folder, manifest)
    Verified(folder, manifest).trust()
    return folder


def measure(folder: Path, windows: int) -> dict[str, float]:
    """Seconds and bytes of a start, then seconds a window; in this process."""
    from torchtitan_deltaproduct.config.job import Data
    from torchtitan_deltaproduct.data import build_loader
    from torchtitan_deltaproduct.data.held_out import held_out_text
    from torchtitan_deltaproduct.data.shards.prepared import open_streams

    sizes = {"seq_len": SEQ_LEN, "local_batch_size": 1}
    data = Data(paths=[str(folder)], reset_state_at_documents=True)
    memory, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    # As a run does: once to check, once to train, once to validate.
    open_streams([str(folder)], "data.paths")
    loader = build_loader(data, global_batch_size=1, **sizes)
    held_out_text([str(folder)], **sizes)
    loader.state_dict()
    start = time.perf_counter() - begin
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    begin = time.perf_counter()
    for sample in range(windows):
        loader.source.batch(np.array([sample]))
    return {"start": start, "memory": memory * 1024, "window": (time.perf_counter() - begin) / max(windows, 1)}


def system_calls(folder: Path, windows: int) -> int | None:
    """Calls that name a file or use a descriptor, of `measure` in a process of its own; None without strace."""
    if shutil.which("strace") is None:
        return None
    with tempfile.NamedTemporaryFile() as log:
        command = ["strace", "-f", "-c", "-e", CALLS, "-o", log.name, *own_command(folder, windows)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = Path(log.name).read_text(encoding="utf-8").splitlines()
    # `% time     seconds  usecs/call     calls    errors syscall`
    return next(int(line.split()[3]) for line in lines if line.endswith(" total"))


def own_command(folder: Path, windows: int) -> list[str]:
    return [sys.executable, "-m", "benchmarks.scale", "--measure", str(folder), "--windows", str(windows)]


def continue_seconds(folder: Path, shards: int) -> float:
    """Seconds in which prepare finds `shards` finished shards of 64 MB unchanged: sparse files, and their records."""
    from torchtitan_deltaproduct.data.shards.verified import state
    from torchtitan_deltaproduct.data.text.prepare import WORK, finished_units

    for name in ("shards", WORK):
        (folder / name).mkdir(parents=True)
    for number in range(shards):
        states = []
        for suffix, size in ((".bin", 64 << 20), (".idx", 512)):
            path = folder / f"shards/{number:05d}{suffix}"
            with open(path, "wb") as file:
                os.truncate(file.fileno(), size)
            states.append(state(path.stat()))
        shard = {"name": f"shards/{number:05d}", "bin_sha256": "0" * 64, "idx_sha256": "0" * 64}
        record = {"shards": {"": shard}, "states": {"": states}, "bad": []}
        (folder / WORK / f"{number:05d}.json").write_text(json.dumps(record))
    begin = time.perf_counter()
    assert len(finished_units(folder, range(shards), verify=False)) == shards
    return time.perf_counter() - begin


def main() -> int:
    parser = argparse.ArgumentParser(prog="scale", description=__doc__.split("\n")[0])
    parser.add_argument("--shards", type=int, nargs="+", default=[1000, 10_000], metavar="N")
    parser.add_argument("--measure", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--windows", type=int, default=WINDOWS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.windows)))
        return 0
    table = Table(title="what grows with shards", title_justify="left")
    for name in ("shards", "start, s", "memory, MB", "calls", "sample, us", "calls a sample", "continue, s"):
        table.add_column(name, justify="right")
    starts, seconds = [], 0.0
    for shards in options.shards:
        with tempfile.TemporaryDirectory() as root:
            folder = make_set(Path(root, "set"), shards)
            output = subprocess.run(own_command(folder, WINDOWS), check=True, capture_output=True, text=True).stdout
            numbers, few, many = json.loads(output), system_calls(folder, 0), system_calls(folder, WINDOWS)
            again = continue_seconds(Path(root, "again"), shards)
        starts.append(few)
        seconds = numbers["start"]
        table.add_row(
            f"{shards:,}", f"{seconds:.3f}", f"{numbers['memory'] / 1e6:.1f}", "-" if few is None else f"{few:,}",
            f"{1e6 * numbers['window']:.0f}", "-" if few is None else f"{(many - few) / WINDOWS:.1f}", f"{again:.2f}",
        )  # fmt: skip
    Console(width=110).print(table)
    more = max(starts) - min(starts) if None not in starts else 0
    return int(seconds > MOST_SECONDS or more > MOST_CALLS)


if __name__ == "__main__":
    sys.exit(main())
