"""Shows what starts, samples and saves cost as shards, records, checkpoints and ranks grow: little that need not.

    python -m benchmarks.scale                              # 10^3 and 10^4 shards, two minutes; no network
    python -m benchmarks.scale --shards 1000 100000         # some minutes, most of it making the files
    python -m benchmarks.scale --shards                     # the second table alone

For each size a synthetic prepared set of sparse files. Each number is of a fresh process:

    start       seconds from imported modules to a loader, training and validation sets opened, and MB of memory gained
    calls       system calls on files of that process, python's own imports included (by strace, where it is installed)
    sample      microseconds a window, of 2,000 windows drawn from all shards, and such system calls a window
    continue    seconds in which a restarted prepare finds its finished shards, of 64 MB each, still the same

A second table is of a run's own files, in seconds, for a short run and one ten times as long (plans: four times the
ranks):

    start       records brought to the step of the checkpoint, the newest ones and the events read; newest folder found
    status      what the command reads of metrics.jsonl
    compare     of 50 such runs, all of the command: imports, table and picture
    retention   what a save looks at before it deletes, a launch's second time
    plan        what rank 0 does to plan a save of all ranks (432 tensors, a part of each a rank), again and at first

Exit code 1 if a start of the most shards takes more than half a second, or makes 100 system calls more than that of the
fewest, or if anything of a long run takes twice as long as of a short one and 50 ms more, but for the first plan.
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
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.tables import columns

TOKENS, DOCUMENTS, SEQ_LEN, WINDOWS = 1 << 14, 64, 1024, 2000
CALLS = "trace=%file,%desc"
MOST_SECONDS, MOST_CALLS = 0.5, 100


def make_set(folder: Path, shards: int) -> Path:
    """Files of zeros as long as they must be, and the manifest and note of a set that was used before."""
    from benchmarks.synthetic import write_sparse_set

    return write_sparse_set(folder, shards, TOKENS, DOCUMENTS)


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
    from torchtitan_deltaproduct.data.shards.megatron import own_index
    from torchtitan_deltaproduct.data.shards.verified import state
    from torchtitan_deltaproduct.data.text.prepare import WORK, finished_units

    for name in ("shards", WORK):
        (folder / name).mkdir(parents=True)
    for number in range(shards):
        states = []
        for suffix, size in ((".bin", 64 << 20), (".idx", own_index(20).size)):
            path = folder / f"shards/{number:05d}{suffix}"
            with open(path, "wb") as file:
                os.truncate(file.fileno(), size)
            states.append(state(path.stat()))
        shard = {"name": f"shards/{number:05d}", "documents": 20, "bin_sha256": "0" * 64, "idx_sha256": "0" * 64}
        record = {"shards": {"": shard}, "states": {"": states}, "bad": [], "least": 1.0}
        (folder / WORK / f"{number:05d}.json").write_text(json.dumps(record))
    begin = time.perf_counter()
    assert len(finished_units(folder, range(shards), verify=False)) == shards
    return time.perf_counter() - begin


def seconds_of(function: Callable[[], object]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def of_records(run: Path, lines: int, runs: int = 50) -> dict[str, float]:
    """Seconds to bring `lines` records, with a validation each thousandth, ten steps back, and to look at them.

    That also of so many `runs` beside each other.
    """
    from torchtitan_deltaproduct.events import append, read_events
    from torchtitan_deltaproduct.history import ends, overview
    from torchtitan_deltaproduct.titan.records import restore_history

    run.mkdir()
    path = run / "metrics.jsonl"
    rest = '"grad_norm": 0.8123456789, "lr": 0.0003, "tokens": 524288000, "seconds": 0.2771, "memory_gib": 41.5'
    with open(path, "w", encoding="utf-8") as file:
        for step in range(1, lines + 1):
            file.write(f'{{"step": {step}, "loss": {2 + 8 / step:.6f}, {rest}, "time": 1764000000.123}}\n')
            if step % 1000 == 0:
                file.write(f'{{"step": {step}, "validation_loss": {2 + 8 / step:.6f}, "time": 1764000000.123}}\n')
        file.flush()
        # A run's file has been on the disk for long.
        os.fsync(file.fileno())
    append(run, "launch", step=0, ranks=8)

    def start() -> None:
        restore_history(path, lines - 10, 1764000001.0)
        assert ends(path, head=0)[-1]["step"] == lines - 10
        read_events(run)

    return {
        "start, records": seconds_of(start),
        "status": seconds_of(lambda: overview(path, 1000)),
        f"compare, {runs} runs": compare_seconds(run, runs),
    }


def compare_seconds(run: Path, runs: int) -> float:
    """Seconds of `compare`, in a process of its own, over runs of several settings and seeds, the records of one."""
    folders = [run / f"{number}" for number in range(runs)]
    for number, folder in enumerate(folders):
        folder.mkdir()
        for name in ("metrics.jsonl", "events.jsonl"):
            os.link(run / name, folder / name)
        tables = {
            "model": {"num_householder": 1 + number // 5},
            "debug": {"seed": number % 5},
            "validation": {"freq": 1000},
        }
        (folder / "config.json").write_text(json.dumps({"config": tables}))
    command = [sys.executable, "-m", "torchtitan_deltaproduct.compare", *folders, "--out", run / "x.png"]
    return seconds_of(lambda: subprocess.run(command, check=True, capture_output=True))


def of_folders(run: Path, folders: int, files: int = 256) -> dict[str, float]:
    """Seconds to find the newest of `folders` checkpoints, milestones all, and what a later save looks at."""
    from torchtitan_deltaproduct.checkpoint.folders import Retention, newest_first
    from torchtitan_deltaproduct.checkpoint.marker import INDEX, Marker, write_marker

    names = [INDEX, *(f"__{rank}_0.distcp" for rank in range(files - 1))]
    for step in range(100, 100 * (folders + 1), 100):
        folder = run / f"step-{step}"
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).touch()
        write_marker(folder, Marker(step, 0.0, files, "interval", dict.fromkeys(names, (0, "0" * 64))))
    retention = Retention(run, keep_latest_k=2, keep_every=100)
    retention.surplus()
    found = seconds_of(lambda: next(newest_first(run)))
    return {"start, checkpoints": found, "retention": seconds_of(retention.surplus)}


def of_plans(ranks: int, tensors: int = 432) -> dict[str, float]:
    """Seconds in which rank 0 plans a save of tensors that are cut in `ranks` parts each, at first and again."""
    import torch
    from torch.distributed.checkpoint import SavePlan
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

    from torchtitan_deltaproduct.checkpoint.writer import planner_for

    size, properties = torch.Size([ranks, 64]), TensorProperties(torch.float32)

    def part(tensor: int, rank: int) -> WriteItem:
        offsets = torch.Size([rank, 0])
        data = TensorWriteData(ChunkStorageMetadata(offsets, torch.Size([1, 64])), properties, size)
        return WriteItem(MetadataIndex(f"tensor.{tensor}", offsets, rank), WriteItemType.SHARD, tensor_data=data)

    plans = [SavePlan([part(t, rank) for t in range(tensors)], planner_data={}) for rank in range(ranks)]
    first = seconds_of(lambda: planner_for(f"{ranks} ranks").create_global_plan(plans))
    unchanged = [SavePlan([], usable=False)] * ranks
    again = seconds_of(lambda: planner_for(f"{ranks} ranks").create_global_plan(unchanged))
    return {"plan again": again, "plan at first": first}


def of_a_run() -> tuple[Table, bool]:
    """The second table, and whether something grows that must not."""
    title = "what grows with the length of a run and its ranks, s"
    table = Table("", *columns("short", "long"), "of", title=title, title_justify="left")
    grows = False
    measured = ((of_records, 100_000, "steps"), (of_folders, 10, "checkpoints of 256 files"), (of_plans, 64, "ranks"))
    with tempfile.TemporaryDirectory() as root:
        for measure_it, size, what in measured:
            sizes = (size, 4 * size) if measure_it is of_plans else (size, 10 * size)
            paths = [() if measure_it is of_plans else (Path(root, f"{what}-{n}"),) for n in sizes]
            short, long = (measure_it(*path, n) for path, n in zip(paths, sizes, strict=True))
            for name in short:
                grows |= name != "plan at first" and long[name] > 2 * short[name] + 0.05
                table.add_row(name, f"{short[name]:.4f}", f"{long[name]:.4f}", f"{sizes[0]:,} and {sizes[1]:,} {what}")
    return table, grows


def main() -> int:
    parser = argparse.ArgumentParser(prog="scale", description=__doc__.split("\n")[0])
    parser.add_argument("--shards", type=int, nargs="*", default=[1000, 10_000], metavar="N")
    parser.add_argument("--measure", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--windows", type=int, default=WINDOWS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.windows)))
        return 0
    names = ("shards", "start, s", "memory, MB", "calls", "sample, us", "calls a sample", "continue, s")
    table = Table(*columns(*names), title="what grows with shards", title_justify="left")
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
    console = Console(width=110)
    if options.shards:
        console.print(table)
    of_run, grows = of_a_run()
    console.print(of_run)
    more = max(starts) - min(starts) if starts and None not in starts else 0
    return int(seconds > MOST_SECONDS or more > MOST_CALLS or grows)


if __name__ == "__main__":
    sys.exit(main())
