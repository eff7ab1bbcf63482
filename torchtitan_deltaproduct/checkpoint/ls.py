"""Lists the checkpoints of a run: size, validation loss, complete or why not, and why each is kept.

    python -m torchtitan_deltaproduct.checkpoint.ls outputs/run

Looks at names, sizes and markers; `checkpoint.verify` reads everything back.
"""

import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ..arguments import Parser, path
from ..errors import CheckpointError, exit_on_user_error
from .folders import (
    CheckpointInfo,
    best_steps,
    checkpoint_folder,
    deletable,
    is_hf_folder,
    retention,
    scan,
    was_complete,
)

KEEP = {"latest_k": 3, "every": 0, "best": 0}
"""What retention goes by, with the defaults of `[checkpoint]`."""


def open_run(run: Path) -> tuple[Path, dict]:
    """The folder of a run's checkpoints and its `[checkpoint]` settings; CheckpointError if there is no such run."""
    if not run.is_dir():
        raise CheckpointError(f"{run} {'is not a folder' if run.exists() else 'does not exist'}; expected a run folder")
    if is_hf_folder(run):
        raise CheckpointError(
            f"{run} is a model in the Hugging Face layout, which has no steps and no checksums; expected a run folder\n"
            "loading it, as every evaluation does, says whether its files are whole"
        )
    folder, settings = checkpoint_folder(run)
    return (folder if folder.is_dir() else run), settings


def listing(checkpoints: list[CheckpointInfo], settings: dict) -> Table:
    """One line a `step-N` folder, oldest first."""
    keep, every, of_best = (settings.get(f"keep_{n}", default) for n, default in KEEP.items())
    kept = retention((i.step for i in checkpoints if i.complete), keep, every, best_steps(checkpoints, of_best))
    going = {info.step for info in deletable(checkpoints, keep, every, of_best)}
    table = Table()
    for name in ("step", "size", "saved", "ranks", "validation"):
        table.add_column(name, justify="right")
    for name in ("by", "state", "kept because"):
        table.add_column(name)
    for info in checkpoints:
        marker = info.marker
        saved = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(marker.time)) if marker else ""
        reason = info.reason.removeprefix(f"{info.path} ").removeprefix(f"{info.path}/")
        state = "[green]complete[/]" if info.complete else f"[red]not usable[/]: {reason}"
        why = kept.get(info.step, "") if info.complete else "not by retention"
        why = "nothing: goes with the next save" if info.step in going else why
        ranks, by = (str(marker.ranks), marker.reason) if marker else ("", "")
        loss = f"{marker.validation_loss:.4f}" if marker and marker.validation_loss is not None else ""
        table.add_row(f"{info.step:,}", f"{info.size / 1e6:,.1f} MB", saved, ranks, loss, by, state, why)
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("torchtitan_deltaproduct.checkpoint.ls", __doc__)
    parser.add_argument("run", metavar="RUN", type=path, help="run folder")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    folder, settings = open_run(Path(options.run))
    checkpoints = scan(folder)
    if not checkpoints:
        raise CheckpointError(f"{folder} holds no step-N; a run saves there every checkpoint.interval steps")
    console.print(listing(checkpoints, settings))
    complete = [info.step for info in checkpoints if info.complete]
    over = "refuses to start over" if any(was_complete(info.path) for info in checkpoints) else "starts over"
    newest = f"a restart goes on from step {complete[-1]:,}" if complete else f"none is usable: a restart {over}"
    size = sum(info.size for info in checkpoints) / 1e6
    console.print(f"{len(complete)} of {len(checkpoints)} complete, {size:,.1f} MB; {newest}")


if __name__ == "__main__":
    exit_on_user_error(main)
