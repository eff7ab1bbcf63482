"""Reads checkpoints back and compares every file with the checksum it was saved with.

    python -m torchtitan_deltaproduct.checkpoint.verify outputs/run             all complete steps
    python -m torchtitan_deltaproduct.checkpoint.verify outputs/run --step 500
    python -m torchtitan_deltaproduct.checkpoint.verify outputs/run/checkpoint/step-500

Exit code 0: all that was read is as it was written; 1: something is not, or nothing is complete.
"""

import threading
import time
from pathlib import Path

from ..arguments import Parser, path
from ..errors import CheckpointError, exit_on_user_error
from ..progress import Progress
from .folders import CheckpointInfo, inspect, scan
from .ls import open_run
from .marker import MARKER, wrong_checksums


def chosen(run: Path, step: int | None) -> list[CheckpointInfo]:
    """The folders to read, newest first; CheckpointError if there are none, or not the step asked for."""
    if (run / MARKER).exists():
        info = inspect(run)
        if step not in (None, info.step):
            raise CheckpointError(f"{run} is step {info.step}, and step {step} was asked for: give its run folder")
        return [info]
    folder, _ = open_run(run)
    checkpoints = scan(folder)
    asked = [info for info in checkpoints if step in (None, info.step)]
    if not asked:
        have = ", ".join(str(info.step) for info in checkpoints) or "none"
        what = "no step-N" if step is None else f"no step-{step}"
        raise CheckpointError(f"{folder} has {what}; steps there: {have}")
    return asked[::-1]


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("torchtitan_deltaproduct.checkpoint.verify", __doc__)
    parser.add_argument("run", metavar="RUN", type=path, help="run folder, or one checkpoint/step-N")
    parser.add_argument("--step", type=int, help="only this step (default: all)")
    options = parser.parse_args(arguments)
    good = bad = done = 0
    lock = threading.Lock()
    infos = chosen(Path(options.run), options.step)
    total = sum(size for info in infos if info.complete for size, _ in info.marker.files.values())

    def tell(size: int) -> None:
        nonlocal done
        with lock:
            done += size
            progress.update(done)

    for info in infos:
        start = time.monotonic()
        with Progress("verify", total, done=done) as progress:
            problems = wrong_checksums(info.path, info.marker, tell=tell) if info.complete else [info.reason]
        seconds = max(time.monotonic() - start, 1e-9)
        good, bad = good + (not problems), bad + bool(problems)
        if problems:
            print(f"step {info.step}: NOT USABLE: {'; '.join(problems)}")
        else:
            size = sum(size for size, _ in info.marker.files.values())
            print(f"step {info.step}: {len(info.marker.files)} files as they were written, "
                  f"{size / 1e6:,.1f} MB at {size / seconds / 1e6:,.0f} MB/s")  # fmt: skip
    return 1 if bad or not good else 0


if __name__ == "__main__":
    exit_on_user_error(main)
