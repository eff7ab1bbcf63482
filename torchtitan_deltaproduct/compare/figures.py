"""The picture of `compare`: losses by steps, tokens, seconds and FLOPs, a line a group."""

from bisect import bisect
from pathlib import Path
from typing import Any

from matplotlib.ticker import EngFormatter

from ..evaluation.figures import band, look, name_ends, picture
from ..runs import Run, shown
from .groups import Group, mean_and_interval

BINS = 50
"""Points of a curve of training losses."""
HIGHLIGHTED = 8
"""Groups with a line of their own; others are grey."""
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
