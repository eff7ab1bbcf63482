"""Compares runs: one table and one picture, from the files in their folders.

    python -m torchtitan_deltaproduct.compare outputs/*/run
    python -m torchtitan_deltaproduct.compare outputs/n1 outputs/n2 --out n1-n2.png
    python -m torchtitan_deltaproduct.compare outputs/*/run --json

Runs whose settings differ in seeds alone are one group: mean, and 95 % interval from three seeds on (Student's t).
Seconds are those of running, without the time between launches. Reads no checkpoint and needs no torch.
"""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .. import arguments
from ..errors import ConfigError, UserError
from ..formats import amount, count, duration
from ..history import VALIDATIONS
from ..runs import Run, read_run, short_names, shown
from .groups import Group, differences, grouped, rank, setting_words

LIMIT = 1 << 18
"""Bytes of a metrics.jsonl that are read, and a little for each validation."""


def main(words: list[str] | None = None) -> None:
    parser = arguments.Parser("torchtitan_deltaproduct.compare", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", type=arguments.path, help="run folders")
    parser.add_argument("--out", metavar="FILE", type=arguments.path,
                        help="picture, .png, .pdf or .svg (default: compare.png)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON; a picture only if --out names one")
    options = parser.parse_args(words)
    picture = options.out or ("" if options.json else "compare.png")
    if picture:
        check_picture(Path(picture))
    runs, refused = read_runs(options.runs)
    names = short_names([run.path for run in runs])
    changed = differences(runs)
    groups = sorted(grouped(runs, names, changed), key=Group.rank)
    if options.json:
        content = {
            "runs": [summary(run, name, changed) for run, name in zip(runs, names, strict=True)],
            "groups": [{"name": group.name, "runs": group.names, **group.spread()} for group in groups],
            "left_out": list(map(str, refused)),
        }
        print(json.dumps(content, indent=1))
    else:
        console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
        console.print(table(runs, names, changed))
        if any(len(group.runs) > 1 for group in groups):
            console.print(group_table(groups))
    for run, name in zip(runs, names, strict=True):
        for problem in run.problems:
            print(f"{name}: {problem}", file=sys.stderr)
    for error in refused:
        print(f"left out: {error}", file=sys.stderr)
    if picture:
        from .figures import draw  # matplotlib takes time to import

        drawn = draw(groups, Path(picture))
        print(f"picture: {picture}" if drawn else "no picture: no run has a loss yet", file=sys.stderr)


def check_picture(path: Path) -> None:
    """Looks whether a picture can be written, before all the work.

    Raises:
        ConfigError: its name ends in no format of pictures, or there is no folder to write it into.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    # LaTeX's own, which needs a TeX that is installed.
    formats = sorted(FigureCanvasBase.get_supported_filetypes().keys() - {"pgf"})
    if path.suffix[1:].lower() not in formats:
        raise ConfigError(f"--out {shown(str(path), 200)}: expected a name that ends in one of: .{', .'.join(formats)}")
    if path.is_dir():
        raise ConfigError(f"--out {shown(str(path), 200)} is a folder; expected the file to write")
    if not path.parent.is_dir():
        raise ConfigError(
            f"--out {shown(str(path), 200)}: there is no folder {shown(str(path.parent), 200)}; make it first"
        )
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{shown(str(path), 200)} cannot be written; name another place with --out")


def read_runs(folders: Iterable[str]) -> tuple[list[Run], list[UserError]]:
    """The runs that can be read, each once, and why others cannot.

    Raises:
        UserError: there is none.
    """
    runs, refused = {}, []
    for folder in folders:
        try:
            runs.setdefault(os.path.realpath(folder), read_run(folder, LIMIT))
        except UserError as error:
            refused.append(error)
    if not runs:
        raise refused[0]
    return list(runs.values()), refused


def summary(run: Run, name: str, changed: dict[str, str]) -> dict[str, Any]:
    """The numbers of one run; None where its files do not tell."""
    newest, best = (run.validations or [{}])[-1], run.best or {}
    tokens = run.last("tokens")
    return {
        "run": name,
        "path": str(run.path),
        "settings": {key: run.settings.get(key) for key in changed},
        "step": run.records[-1]["step"] if run.records else None,
        "steps": run.settings.get("training.steps"),
        "train_loss": run.last_loss,
        "validation_loss": newest.get("validation_loss"),
        "validation_step": newest.get("step"),
        "best_validation_loss": best.get("validation_loss"),
        "best_step": best.get("step"),
        "bits_per_byte": newest.get("validation_bits_per_byte"),
        "tokens": tokens,
        "tokens_per_second": run.speed,
        "goodput": run.last("goodput"),
        "seconds": max(run.seconds.values(), default=None),
        "flops": tokens * run.flops_per_token if tokens is not None and run.flops_per_token else None,
        "problems": run.problems,
    }


def table(runs: list[Run], names: list[str], changed: dict[str, str]) -> Table:
    """A line a run, the best validation loss first; runs without one behind them, by their training loss."""
    lines = [(run, summary(run, name, changed)) for run, name in zip(runs, names, strict=True)]
    lines.sort(key=lambda line: rank(line[0]))
    result = Table(title_justify="left", caption_justify="left")
    for name in ("run", "settings that differ") if changed else ("run",):
        result.add_column(name, overflow="fold")
    for name in ("step", "train loss", "validation", "best (step)", "bits/byte", "tokens", "tokens/s", "goodput",
                 "running", "FLOPs"):  # fmt: skip
        result.add_column(name, justify="right")
    for run, line in lines:
        best = line["best_validation_loss"]
        result.add_row(
            escape(line["run"]) + (" [red]*[/]" if run.problems else ""),
            *([escape(", ".join(setting_words(run, changed)))] if changed else []),
            cell(line["step"], "{:,}"), cell(line["train_loss"], "{:.4f}"), cell(line["validation_loss"], "{:.4f}"),
            "" if best is None else f"{best:.4f} ({line['best_step']:,}){'~' * run.thinned}",
            cell(line["bits_per_byte"], "{:.4f}"),
            cell(line["tokens"], count), cell(line["tokens_per_second"], "{:,.0f}"), cell(line["goodput"], "{:.1%}"),
            cell(line["seconds"], duration), cell(line["flops"], lambda value: amount(value, "")),
        )  # fmt: skip
    notes = ["* files missing or damaged, see below"] * any(run.problems for run in runs)
    notes += [f"~ the best of {VALIDATIONS} validations all over the run"] * any(run.thinned for run in runs)
    result.caption = "; ".join(notes) or None
    return result


def cell(value: float | None, form: Any) -> str:
    """A number by a format or a function; "" for None."""
    if value is None:
        return ""
    return form.format(value) if isinstance(form, str) else form(value)


def group_table(groups: list[Group]) -> Table:
    result = Table(caption="mean ± 95 % interval over seeds, from three seeds on; none if runs share them")
    result.add_column("group", overflow="fold")
    for name in ("runs", "seeds", "to step", "train loss", "validation", "best"):
        result.add_column(name, justify="right")
    for group in groups:
        spread = group.spread()
        cells = []
        for name in ("train_loss", "validation_loss", "best_validation_loss"):
            mean, half = spread[name]
            cells.append("" if mean is None else f"{mean:.4f}" + ("" if half is None else f" ± {half:.4f}"))
        step = f"{group.end:,}{' *' * group.unequal}"
        result.add_row(escape(group.name), str(len(group.runs)), str(spread["seeds"]), step, *cells)
    if any(group.unequal for group in groups):
        result.caption += "\n* some of its runs are farther: losses are of the steps that all have made"
    return result
