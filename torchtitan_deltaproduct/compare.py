"""Compares runs: one table and one picture, from the files in their folders.

    python -m torchtitan_deltaproduct.compare outputs/*/run
    python -m torchtitan_deltaproduct.compare outputs/n1 outputs/n2 --out n1-n2.png
    python -m torchtitan_deltaproduct.compare outputs/*/run --json

Runs whose settings differ in seeds alone are one group: mean, and 95 % interval from three seeds on (Student's t).
Seconds are those of running, without the time between launches. Reads no checkpoint and needs no torch.
"""

import json
import math
import os
import sys
from bisect import bisect
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import arguments
from .errors import ConfigError, UserError, exit_on_user_error
from .formats import amount, count, duration
from .history import VALIDATIONS
from .intervals import student_t
from .runs import Run, read_run, short_names, shown, telling

UNLEARNED = ("job.", "metrics.", "profiling.", "comm.", "guard.", "checkpoint.", "validation.enable",
             "validation.freq", "validation.prompts", "validation.sample_tokens")  # fmt: skip
"""How keys begin that change nothing that is learned: names, logging, saving, stopping, when to look."""
GENERAL = ("enable", "folder", "freq", "interval", "kind", "lengths", "mode", "name", "paths", "samples", "steps",
           "weights")  # fmt: skip
"""Last parts of keys that say nothing without their table."""
SEEDS = ("debug.seed", "data.seed")
BINS = 50
"""Points of a curve of training losses."""
LIMIT = 1 << 18
"""Bytes of a metrics.jsonl that are read, and a little for each validation."""
WHOLE = 200
"""Characters of a value in the name of a group, which tells it from others."""
HIGHLIGHTED = 8
"""Groups with a line of their own in a picture; others are grey."""


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


def differences(runs: list[Run]) -> dict[str, str]:
    """Settings of what is learned that are not the same in all runs whose settings are known, and short names of them.

    Every key by its last part, `num_householder`, or whole, `optimizer.name`, where that is in several tables or says
    nothing by itself.
    """
    known = [run.settings for run in runs if run.settings]
    every = dict.fromkeys(key for settings in known for key in settings)
    tables = Counter(key.rpartition(".")[2] for key in every)
    keys = [key for key in every if not key.startswith(UNLEARNED) or key == "checkpoint.initial_load_path"]
    # A version that does not have an option says nothing of it.
    keys = [key for key in keys if len({exact(settings[key]) for settings in known if key in settings}) > 1]
    last = {key: key.rpartition(".")[2] for key in keys}
    return {key: name if tables[name] == 1 and name not in GENERAL else key for key, name in last.items()}


def exact(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def setting_words(run: Run, changed: dict[str, str], width: int = 40) -> list[str]:
    """`num_householder 2` for each of some settings, if they are known; values of at most `width` characters."""
    if not run.settings:
        return ["settings unknown"]
    return [f"{name} {shown(run.settings.get(key), width)}" for key, name in changed.items()]


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


def rank(run: Run) -> tuple[float, float]:
    """Its best validation loss; then its training loss."""
    return (run.best["validation_loss"] if run.best else math.inf, math.inf if run.last_loss is None else run.last_loss)


def cell(value: float | None, form: Any) -> str:
    """A number by a format or a function; "" for None."""
    if value is None:
        return ""
    return form.format(value) if isinstance(form, str) else form(value)


@dataclass
class Group:
    """Runs that differ in seeds alone."""

    name: str
    runs: list[Run]
    names: list[str]
    short: str = ""
    """The least of the name that tells it from other groups, for a picture."""

    def rank(self) -> tuple[float, float]:
        """That of the best of its runs."""
        return min(map(rank, self.runs))

    @property
    def seeds(self) -> int:
        """How many different ones its runs have: a copy of a run is no other sample."""
        return len({tuple(exact(run.settings.get(key)) for key in SEEDS) for run in self.runs})

    def with_losses(self, validated: bool) -> "Group | None":
        """Those of its runs that have validation losses, or training losses; None if there is none."""
        kept = [number for number, run in enumerate(self.runs) if (run.validations if validated else run.steps)]
        return replace(self, runs=[self.runs[n] for n in kept], names=[self.names[n] for n in kept]) if kept else None

    @property
    def end(self) -> int:
        """The last step that all of its runs have made: means are of losses up to it."""
        return min(run.records[-1]["step"] if run.records else 0 for run in self.runs)

    @property
    def unequal(self) -> bool:
        """Whether some of its runs are farther than others."""
        return any(run.records and run.records[-1]["step"] > self.end for run in self.runs)

    def equal_runs(self) -> list[Run]:
        """Its runs up to that step."""
        return [replace(run, records=[r for r in run.records if r["step"] <= self.end]) for run in self.runs]

    def spread(self) -> dict[str, Any]:
        """Over runs: mean and half-width of the 95 % interval (None below three seeds) of the losses that all have.

        Of runs of unequal lengths there is none where one is too long to be read whole: what is left of it up to that
        step are samples far apart.
        """
        result: dict[str, Any] = {"seeds": self.seeds, "step": self.end}
        runs = self.equal_runs()
        losses = [{record["step"]: record["validation_loss"] for record in run.validations} for run in runs]
        last = max(set.intersection(*map(set, losses)), default=None)
        for name, values in (
            ("validation_loss", [own.get(last) for own in losses]),
            ("best_validation_loss", [run.best["validation_loss"] if run.best else None for run in runs]),
            ("train_loss", [run.last_loss for run in runs]),
        ):
            known = None not in values and (not self.unequal or all(run.whole for run in self.runs))
            result[name] = mean_and_interval(values, self.seeds) if known else (None, None)
        return result


def mean_and_interval(values: list[float], seeds: int) -> tuple[float, float | None]:
    """The mean, and half the width of its 95 % interval by Student's t; None for fewer than three values.

    Nor is there an interval where the values are of fewer seeds: they are not independent.
    """
    n, mean = len(values), sum(values) / len(values)
    if n < 3 or seeds < n:
        return mean, None
    variance = sum((value - mean) ** 2 for value in values) / (n - 1)
    return mean, student_t(n - 1) * math.sqrt(variance / n)


def grouped(runs: list[Run], names: list[str], changed: dict[str, str]) -> list[Group]:
    """Groups by the settings that differ, seeds left out, in the order of the runs; unknown settings make no group."""
    keys = {key: name for key, name in changed.items() if key not in SEEDS}
    groups: dict[Any, Group] = {}
    for run, name in zip(runs, names, strict=True):
        identity = tuple(exact(run.settings.get(key)) for key in keys) if run.settings else id(run)
        label = ", ".join(setting_words(run, keys, WHOLE)) if run.settings and keys else name
        group = groups.setdefault(identity, Group(label, [], []))
        group.runs.append(run)
        group.names.append(name)
    settings = [group.runs[0].settings for group in groups.values()]
    for group in groups.values():
        own = group.runs[0].settings
        least = telling(own, [key for key in keys if key in own], settings)
        group.short = ", ".join(setting_words(group.runs[0], {key: keys[key] for key in least}, WHOLE)) or group.name
        if not keys and len(group.runs) > 1:
            group.name = group.short = f"{len(group.runs)} runs"
    return list(groups.values())


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


AXES = ("steps", "tokens", "seconds of running", "FLOPs")


def curve(run: Run, validated: bool, width: float) -> dict[int, tuple[float, tuple[float | None, ...]]]:
    """The points of a run: by step, or by bin of `width` steps, the loss and where it is on each of `AXES`.

    Args:
        run: the run.
        validated: whether to take validation losses; otherwise means of training losses over bins.
        width: steps of a bin.
    """
    counted = [r for r in run.steps if r.get("tokens") is not None]
    steps = [record["step"] for record in counted]

    def place(record: dict[str, Any]) -> tuple[float | None, ...]:
        # A validation has no tokens of its own: those of the newest step read before it, and in proportion.
        step = record["step"]
        at = counted[max(bisect(steps, step) - 1, 0)] if counted else {"step": 0}
        tokens = at["tokens"] / at["step"] * step if at["step"] > 0 else None
        flops = tokens * run.flops_per_token if tokens is not None and run.flops_per_token else None
        return step, tokens, run.seconds.get(record.get("time")), flops

    if validated:
        return {record["step"]: (record["validation_loss"], place(record)) for record in run.validations}
    bins: dict[int, list[dict[str, Any]]] = {}
    for record in run.steps:
        bins.setdefault(int(record["step"] / width), []).append(record)
    return {number: (sum(r["loss"] for r in within) / len(within), place(within[-1]))
            for number, within in bins.items()}  # fmt: skip


Points = list[tuple[float, float, float | None]]
"""Of a line: place on an axis, loss, half of its 95 % interval."""


def mean_curve(curves: list[dict], axis: int, seeds: int) -> Points:
    """The mean of a group's curves, of so many seeds, where all of them have a point."""
    result = []
    for key in sorted(set.intersection(*map(set, curves))):
        places = [points[key][1][axis] for points in curves]
        if None not in places:
            result.append((sum(places) / len(places), *mean_and_interval([points[key][0] for points in curves], seeds)))
    return sorted(result, key=lambda point: point[0])


def draw(groups: list[Group], path: Path) -> bool:
    """Writes the picture: a panel for each of `AXES`, lines for the first of the groups and grey ones for the others.

    Returns:
        False, and there is no file, if no run has a loss yet.
    """
    validated = any(run.validations for group in groups for run in group.runs)
    absent = [name for group in groups for name in group.names]
    groups = [part for group in groups if (part := group.with_losses(validated))]
    steps = [record["step"] for group in groups for run in group.runs for record in run.records[-1:]]
    width = max(max(steps, default=0) / BINS, 1)
    curves = [[curve(run, validated, width) for run in group.equal_runs()] for group in groups]
    lines = [[mean_curve(members, axis, group.seeds) for group, members in zip(groups, curves, strict=True)]
             for axis in range(len(AXES))]  # fmt: skip
    drawn = [number for number, points in enumerate(lines[0]) if points]
    if not drawn:
        return False

    from .evaluation.figures import picture  # matplotlib takes time to import

    others, shown_runs = len(drawn) - HIGHLIGHTED, {name for number in drawn for name in groups[number].names}
    absent = [name for name in absent if name not in shown_runs]
    title = f"{'validation' if validated else 'training'} loss, nats a token"
    title += f"; {others} more groups in grey" if others > 0 else ""
    if absent:
        title += f"; not drawn, without {'validations' if validated else 'losses'}: {shown(', '.join(absent), 60)}"
    title = title.replace("$", r"\$")
    with picture(path, title, 2, 2, (13, 8.5), sharey=True) as (_, panels):
        # Shared by all panels.
        panels[0, 0].set_ylim(*loss_range([lines[0][number] for number in drawn]))
        for panel, name, all_points in zip(panels.flat, AXES, lines, strict=True):
            # The two panels of a row end at the same heights: the names on the right are for both.
            named = panel in panels[:, 1]
            draw_panel(panel, name, [(groups[number], all_points[number]) for number in drawn], named)
    return True


def draw_panel(panel: Any, name: str, lines: list[tuple[Group, Points]], named: bool) -> None:
    """Loss on one axis, the groups in their order; their names at the ends of the lines if it is `named`."""
    from matplotlib.ticker import EngFormatter

    from .evaluation.figures import band, look, name_ends

    unit = 1
    if name.startswith("seconds") and max((points[-1][0] for _, points in lines if points), default=0) > 3 * 3600:
        name, unit = "hours of running", 3600
    labels = []
    for number, (group, points) in enumerate(lines):
        if not points:
            continue
        x, y, half = zip(*((place / unit, loss, half) for place, loss, half in points), strict=True)
        style = {"color": "#c8c8c8", "linewidth": 0.8, "zorder": 1}
        if number < HIGHLIGHTED:
            style = look(number, HIGHLIGHTED) | {"zorder": 3}
            labels.append((x[-1], y[-1], group_label(group).replace("$", r"\$"), style["color"]))
            if half[0] is not None:
                low, high = ([m + sign * h for m, h in zip(y, half, strict=True)] for sign in (-1, 1))
                band(panel, x, low, high, style["color"])
        panel.plot(x, y, marker="o" if len(x) == 1 else None, **style)
    panel.set_xlabel(name)
    panel.xaxis.set_major_formatter(EngFormatter(sep=" "))
    if missing := sum(not points for _, points in lines):
        panel.set_title(f"not known of {missing} of {len(lines)}", fontsize=9, fontweight="normal")
    if named:
        name_ends(panel, labels, room=19)


def group_label(group: Group) -> str:
    """The name of a group beside its line, and what the line is of."""
    runs = len(group.runs)
    name = group.name if len(group.name) <= 44 else group.short if runs > 1 else group.names[0]
    if runs == 1:
        return name
    of = f"{runs} seeds" if group.seeds == runs else f"{runs} runs of {group.seeds} seed{'s' * (group.seeds > 1)}"
    of += ", no interval" if runs == 2 or group.seeds < runs else ""
    return f"{name} ({of}{f', to step {group.end:,}' if group.unequal else ''})"


def loss_range(lines: list[Points]) -> tuple[float, float]:
    """All losses after the first eighth of a line, the last three at least, with their intervals.

    The beginning would flatten the rest.
    """
    late = [
        point
        for points in lines
        for place, point in enumerate(points)
        if point[0] >= points[-1][0] / 8 or place >= len(points) - 3
    ]
    low = min((y - (half or 0) for _, y, half in late), default=0.0)
    high = max((y + (half or 0) for _, y, half in late), default=1.0)
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + margin


if __name__ == "__main__":
    exit_on_user_error(main)
