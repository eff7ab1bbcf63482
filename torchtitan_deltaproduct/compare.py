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
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from . import arguments
from .errors import UserError, exit_on_user_error
from .formats import amount, count, duration
from .runs import Run, read_run, shown

UNLEARNED = ("job.", "metrics.", "profiling.", "comm.", "guard.", "checkpoint.")
"""Tables that change nothing that is learned: names, logging, saving, stopping."""
SEEDS = ("debug.seed", "data.seed")
BINS = 100
"""Points of a curve of training losses."""
HIGHLIGHTED = 8
"""Groups with a line of their own in a picture; others are grey."""
# 97.5 % quantiles of Student's t for 1 to 30 degrees of freedom.
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
     2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)  # fmt: skip


def main(words: list[str] | None = None) -> None:
    parser = arguments.Parser("torchtitan_deltaproduct.compare", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", type=arguments.path, help="run folders")
    parser.add_argument("--out", metavar="PNG", type=arguments.path, help="picture (default: compare.png)")
    parser.add_argument("--json", action="store_true", help="print JSON; a picture only if --out names one")
    options = parser.parse_args(words)
    runs, refused = read_runs(options.runs)
    names = short_names(runs)
    changed = differences(runs)
    groups = grouped(runs, names, changed)
    picture = options.out or ("" if options.json else "compare.png")
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


def read_runs(folders: Iterable[str]) -> tuple[list[Run], list[UserError]]:
    """The runs that can be read, each once, and why others cannot.

    Raises:
        UserError: there is none.
    """
    runs, refused = {}, []
    for folder in folders:
        try:
            runs.setdefault(os.path.realpath(folder), read_run(folder))
        except UserError as error:
            refused.append(error)
    if not runs:
        raise refused[0]
    return list(runs.values()), refused


def short_names(runs: list[Run]) -> list[str]:
    """The paths below the folder that all lie in; of a single run, its own name."""
    paths = [os.path.realpath(run.path) for run in runs]
    common = os.path.commonpath([os.path.dirname(path) for path in paths])
    return [arguments.shown(os.path.relpath(path, common)) for path in paths]


def differences(runs: list[Run]) -> dict[str, str]:
    """Settings of what is learned that are not the same in all runs whose settings are known, and short names of them.

    Every key by its last part, `num_householder`, or whole where two would have the same name.
    """
    known = [run.settings for run in runs if run.settings]
    keys = dict.fromkeys(key for settings in known for key in settings)
    keys = [key for key in keys if not key.startswith(UNLEARNED) or key == "checkpoint.initial_load_path"]
    # A version that does not have an option says nothing of it.
    keys = [key for key in keys if len({exact(settings[key]) for settings in known if key in settings}) > 1]
    last = [key.rpartition(".")[2] for key in keys]
    return {key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)}


def exact(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def setting_words(run: Run, changed: dict[str, str]) -> list[str]:
    """`num_householder 2` for each of some settings, if they are known."""
    if not run.settings:
        return ["settings unknown"]
    return [f"{name} {shown(run.settings.get(key))}" for key, name in changed.items()]


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
    lines.sort(key=lambda line: tuple(math.inf if x is None else x for x in (
        line[1]["best_validation_loss"], line[1]["train_loss"])))  # fmt: skip
    result = Table(title_justify="left", caption_justify="left")
    for name in ("run", "settings that differ"):
        result.add_column(name, overflow="fold")
    for name in ("step", "train loss", "validation", "best (step)", "bits/byte", "tokens", "tokens/s", "goodput",
                 "running", "FLOPs"):  # fmt: skip
        result.add_column(name, justify="right")
    for run, line in lines:
        best = line["best_validation_loss"]
        result.add_row(
            escape(line["run"]) + (" [red]*[/]" if run.problems else ""),
            escape(", ".join(setting_words(run, changed))),
            cell(line["step"], "{:,}"), cell(line["train_loss"], "{:.4f}"), cell(line["validation_loss"], "{:.4f}"),
            "" if best is None else f"{best:.4f} ({line['best_step']:,})", cell(line["bits_per_byte"], "{:.4f}"),
            cell(line["tokens"], count), cell(line["tokens_per_second"], "{:,.0f}"), cell(line["goodput"], "{:.1%}"),
            cell(line["seconds"], duration), cell(line["flops"], lambda value: amount(value, "")),
        )  # fmt: skip
    if any(run.problems for run in runs):
        result.caption = "* files missing or damaged, see below"
    return result


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

    def spread(self) -> dict[str, Any]:
        """Over seeds: mean and half-width of the 95 % interval (None below three) of the losses that all have."""
        result: dict[str, Any] = {"seeds": len(self.runs)}
        validations = [run.validations[-1]["validation_loss"] if run.validations else None for run in self.runs]
        bests = [run.best["validation_loss"] if run.best else None for run in self.runs]
        trained = [run.last_loss for run in self.runs]
        for name, values in (("validation_loss", validations), ("best_validation_loss", bests), ("train_loss", trained)):
            known = None not in values
            result[name] = mean_and_interval(values) if known else (None, None)
        return result


def mean_and_interval(values: list[float]) -> tuple[float, float | None]:
    """The mean, and half the width of its 95 % interval by Student's t; None for fewer than three values."""
    n, mean = len(values), sum(values) / len(values)
    if n < 3:
        return mean, None
    variance = sum((value - mean) ** 2 for value in values) / (n - 1)
    return mean, (T[n - 2] if n - 2 < len(T) else 1.96) * math.sqrt(variance / n)


def grouped(runs: list[Run], names: list[str], changed: dict[str, str]) -> list[Group]:
    """Groups by the settings that differ, seeds left out, in the order of the runs; unknown settings make no group."""
    keys = {key: name for key, name in changed.items() if key not in SEEDS}
    groups: dict[Any, Group] = {}
    for run, name in zip(runs, names, strict=True):
        identity = tuple(exact(run.settings.get(key)) for key in keys) if run.settings else id(run)
        label = ", ".join(setting_words(run, keys)) if run.settings and keys else name
        group = groups.setdefault(identity, Group(label, [], []))
        group.runs.append(run)
        group.names.append(name)
    for group in groups.values():
        if not keys and len(group.runs) > 1:
            group.name = f"{len(group.runs)} runs"
    return list(groups.values())


def group_table(groups: list[Group]) -> Table:
    result = Table(caption="95 % intervals over seeds by Student's t; fewer than three are too few for one")
    result.add_column("group", overflow="fold")
    for name in ("seeds", "train loss", "validation", "best"):
        result.add_column(name, justify="right")
    for group in groups:
        spread = group.spread()
        cells = []
        for name in ("train_loss", "validation_loss", "best_validation_loss"):
            mean, half = spread[name]
            cells.append("" if mean is None else f"{mean:.4f}" + ("" if half is None else f" ± {half:.4f}"))
        result.add_row(escape(group.name), str(spread["seeds"]), *cells)
    return result


AXES = ("steps", "tokens", "seconds of running", "FLOPs")


def curve(run: Run, validated: bool, width: float) -> dict[int, tuple[float, tuple[float | None, ...]]]:
    """The points of a run in a picture: by step, or by bin of `width` steps, the loss and where it is on each of `AXES`.

    Args:
        run: the run.
        validated: whether to take validation losses; otherwise means of training losses over bins.
        width: steps of a bin.
    """
    counted = [r for r in run.steps if r.get("tokens") is not None]
    steps = [record["step"] for record in counted]

    def place(record: dict[str, Any]) -> tuple[float | None, ...]:
        # A validation has no tokens of its own: those of the step before it.
        at = max(bisect(steps, record["step"]) - 1, 0)
        tokens = counted[at]["tokens"] if counted and record["step"] else None if record["step"] else 0
        flops = run.flops_per_token
        return (record["step"], tokens, run.seconds.get(record.get("time")),
                tokens * flops if tokens is not None and flops else None)  # fmt: skip

    if validated:
        return {record["step"]: (record["validation_loss"], place(record)) for record in run.validations}
    bins: dict[int, list[dict[str, Any]]] = {}
    for record in run.steps:
        bins.setdefault(int(record["step"] / width), []).append(record)
    return {bin: (sum(r["loss"] for r in found) / len(found), place(found[-1])) for bin, found in bins.items()}


def mean_curve(curves: list[dict], axis: int) -> list[tuple[float, float, float | None]]:
    """Where all runs of a group have a point: mean place on an axis, mean loss, half of its 95 % interval."""
    result = []
    for key in sorted(set.intersection(*map(set, curves))):
        places = [points[key][1][axis] for points in curves]
        if None not in places:
            mean, half = mean_and_interval([points[key][0] for points in curves])
            result.append((sum(places) / len(places), mean, half))
    return sorted(result, key=lambda point: point[0])


def draw(groups: list[Group], path: Path) -> bool:
    """Writes the picture: a panel for each of `AXES`; False, and no file, if no run has a loss."""
    validated = any(run.validations for group in groups for run in group.runs)
    longest = max((run.records[-1]["step"] for group in groups for run in group.runs if run.records), default=0)
    width = max(longest / BINS, 1)
    curves = [[curve(run, validated, width) for run in group.runs] for group in groups]
    ends = {number: min(loss for loss, _ in points.values())
            for number, members in enumerate(curves) for points in members if points}  # fmt: skip
    if not ends:
        return False

    from .evaluation.figures import COLOURS, picture  # matplotlib takes half a second

    best = sorted(ends, key=ends.get)[:HIGHLIGHTED]
    what = "validation loss" if validated else "training loss"
    title = f"{what}, nats a token" + (f"; grey: {len(ends) - len(best)} others" if len(ends) > len(best) else "")
    dashes = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
    with picture(path, title, 2, 2, (13, 8.5), sharey=True) as (_, panels):
        for axis, (panel, name) in enumerate(zip(panels.flat, AXES, strict=True)):
            labels, lines = [], [mean_curve(members, axis) if all(members) else [] for members in curves]
            for number in sorted(ends, key=ends.get, reverse=True):
                points = lines[number]
                if not points:
                    continue
                rank = best.index(number) if number in best else None
                x, y, half = zip(*points, strict=True)
                look = {"color": "#c8c8c8", "linewidth": 0.8, "zorder": 1}
                if rank is not None:
                    look = {"color": COLOURS[rank % len(COLOURS)], "linestyle": dashes[rank % len(dashes)],
                            "linewidth": 1.8, "zorder": 3}  # fmt: skip
                    labels.append((y[-1], x[-1], group_label(groups[number]), look["color"]))
                panel.plot(x, y, marker="o" if len(x) == 1 else None, markersize=4, **look)
                if rank is not None and half[0] is not None:
                    low, high = ([m + sign * h for m, h in zip(y, half, strict=True)] for sign in (-1, 1))
                    panel.fill_between(x, low, high, color=look["color"], alpha=0.18, linewidth=0)
            panel.set_xlabel(name)
            missing = sum(not lines[number] for number in ends)
            if missing:
                panel.set_title(f"not known of {missing} group{'s' * (missing > 1)}", fontsize=9, fontweight="normal")
            panel.set_ylim(*loss_range([points for points in lines if points]))
            label_ends(panel, labels)
    return True


def group_label(group: Group) -> str:
    """The name of a group beside its line, and what the line is of."""
    seeds = len(group.runs)
    name = group.name if len(group.name) <= 48 else group.name[:47] + "…"
    return name if seeds == 1 else f"{name} ({seeds} seeds{', too few for an interval' if seeds == 2 else ''})"


def loss_range(lines: list[list[tuple[float, float, float | None]]]) -> tuple[float, float]:
    """From the lowest loss to the highest that a line has after its first tenth: its beginning would flatten the rest."""
    low = min((y for points in lines for _, y, _ in points), default=0.0)
    high = max((y for points in lines for _, y, _ in points[len(points) // 10 :]), default=1.0)
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + margin


def label_ends(panel: Any, labels: list[tuple[float, float, str, str]]) -> None:
    """Names lines right of the panel at the height of their ends, moved apart where they would overlap."""
    low, high = panel.get_ylim()
    gap, last = 0.05 * (high - low), -math.inf
    for y, _, text, colour in sorted(labels):
        last = max(min(max(y, low), high), last + gap)
        panel.annotate(
            text.replace("$", r"\$"), (1, last), xycoords=("axes fraction", "data"), xytext=(6, 0),
            textcoords="offset points", va="center", fontsize=8, color=colour, annotation_clip=False,
        )  # fmt: skip


if __name__ == "__main__":
    exit_on_user_error(main)
