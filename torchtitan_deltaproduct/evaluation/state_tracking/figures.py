"""Pictures of state tracking: accuracy against length, and what the heads do (see `figures` for the style)."""

from pathlib import Path

import numpy as np
from matplotlib.ticker import MaxNLocator

from ..figures import COLOURS, mark_trained, picture, plt, save, style
from .problems import wilson
from .results import RunResult, Setting

MAX_POINTS = 128
"""Points of a drawn curve; longer ones show means of neighbouring positions."""


def accuracy_figure(settings: list[Setting], path: Path) -> None:
    """Accuracy against length: a row of panels a problem, a line a setting, thin lines its seeds."""
    problems = list(dict.fromkeys(setting.problem.name for setting in settings))
    handles: dict[str, object] = {}
    with picture(path, "", len(problems), 2, (10.5, 1.1 + 3.3 * len(problems))) as (figure, axes):
        for row, name in zip(axes, problems, strict=True):
            chosen = [setting for setting in settings if setting.problem.name == name]
            if chosen[0].problem.formal:
                _formal_panels(row, chosen, handles)
            else:
                _group_panels(row, chosen, handles)
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
        handles["guessing"] = handles.pop("guessing")
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, len(handles)))


def _group_panels(axes, settings: list[Setting], handles: dict) -> None:
    left, right = axes
    name, words = settings[0].problem.name, settings[0].runs[0].counts.words
    for index, setting in enumerate(settings):
        runs, look = setting.runs, _look(settings, index)
        handle = _curves(left, [_by_position(run, "correct") for run in runs], look)
        _curves(right, [_by_position(run, "prefix") for run in runs], look)
        handles.setdefault(setting.label.replace("n_h", "$n_h$"), handle)
    left.set(title=f"{name}: right at position t", ylabel="accuracy (%)")
    right.set(title=f"{name}: right at all positions up to t", ylabel=f"share of {words:,} words (%)")
    for axis in axes:
        axis.set_xlabel("position t in the word (tokens)")
        _frame(axis, settings)
    _guessing(left, settings, handles)


def _formal_panels(axes, settings: list[Setting], handles: dict) -> None:
    left, right = axes
    name = settings[0].problem.name.replace("_", " ")
    for index, setting in enumerate(settings):
        look = _look(settings, index)
        handle = _curves(left, [_by_length(run, 24) for run in setting.runs], look)
        handles.setdefault(setting.label.replace("n_h", "$n_h$"), handle)
        tops = [[bucket["scaled"] for bucket in run.buckets()] for run in setting.runs]
        middle, width = np.arange(len(tops[0])), 0.8 / len(settings)
        place = middle + width * (index - (len(settings) - 1) / 2)
        right.bar(place, np.nanmean(tops, axis=0), 0.9 * width, color=look["color"],
                  alpha=1 if look["linestyle"] == "-" else 0.45)  # fmt: skip
    buckets = settings[0].runs[0].buckets()
    right.set_xticks(range(len(buckets)), [f"{b['first']}-{b['last']}" for b in buckets], rotation=30, ha="right")
    left.set(title=f"{name}: right answers", ylabel="accuracy (%)", xlabel="length of the row (tokens)")
    right.set(xlabel="length of the row (tokens)", ylabel="scaled accuracy (1: all right)")
    right.set_title("the same, scaled", loc="left", pad=18)
    right.set_ylim(min(-0.1, right.get_ylim()[0]), 1.05)
    right.axhline(0, color="#777777", linewidth=0.8)
    _frame(left, settings)
    _guessing(left, settings, handles)


def _guessing(axis, settings: list[Setting], handles: dict) -> None:
    handle = axis.axhline(100 * settings[0].problem.chance, color="#555555", linestyle=":", linewidth=1.4)
    handles.setdefault("guessing", handle)


def _look(settings: list[Setting], index: int) -> dict:
    """Colour by n_h; solid for [-1, 1], dashed for [0, 1]; a further setting of the same two has dots."""
    own = settings[index].runs[0]
    same = [i for i, s in enumerate(settings) if (s.runs[0].n_h, s.runs[0].range) == (own.n_h, own.range)]
    lines = ("-", "-.", ":") if own.range == "[-1, 1]" else ("--", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2)))
    return {"color": COLOURS[(own.n_h - 1) % len(COLOURS)], "linestyle": lines[same.index(index) % 3]}


def _curves(axis, curves: list[tuple], look: dict):
    """The mean of some (x, y, low, high) as a line; its band for one, thin lines for several."""
    x = curves[0][0]
    if len(curves) == 1:
        axis.fill_between(x, *curves[0][2:], color=look["color"], alpha=0.15, linewidth=0)
    for _, y, _, _ in curves if len(curves) > 1 else ():
        axis.plot(x, y, linewidth=0.7, alpha=0.45, **look)
    (handle,) = axis.plot(x, np.nanmean([y for _, y, _, _ in curves], axis=0), linewidth=2, **look)
    return handle


def _by_position(run: RunResult, which: str) -> tuple:
    """Positions, percentages and their intervals, at most `MAX_POINTS`."""
    counts = run.counts
    at = np.flatnonzero(counts.scored)
    if which == "correct":
        right, total = counts.correct[at], counts.scored[at]
    else:
        right, total = counts.prefix[at], np.full(len(at), counts.words)
    return _binned(at + 1, right, total, min(MAX_POINTS, len(at)))


def _by_length(run: RunResult, bins: int) -> tuple:
    """Row lengths, percentages and their intervals, the lengths in about `bins` stretches."""
    at = np.flatnonzero(run.counts.scored)
    return _binned(at + 1, run.counts.correct[at], run.counts.scored[at], min(bins, len(at)), pool=True)


def _binned(x: np.ndarray, right: np.ndarray, total: np.ndarray, bins: int, pool: bool = False) -> tuple:
    edges = np.linspace(0, len(x), bins + 1).astype(int)
    starts, sizes = edges[:-1], np.diff(edges)
    right, total = np.add.reduceat(right, starts), np.add.reduceat(total, starts)
    x = np.add.reduceat(x, starts) / sizes
    # Neighbouring positions of one word are not independent: their mean is as uncertain as one of them.
    share = 1 if pool else sizes
    low, high = wilson(right / share, total / share)
    return x, 100 * right / total, 100 * low, 100 * high


def _frame(axis, settings: list[Setting]) -> None:
    """Ranges, and a mark at each training length."""
    longest = max(setting.problem.length for setting in settings)
    axis.set(xlim=(0, longest * 1.01), ylim=(-2, 103))
    for length in sorted({setting.problem.train_length for setting in settings}):
        mark_trained(axis, length, length / longest, margin=0.2, above=1)
    axis.set_title(axis.get_title(loc="left"), loc="left", pad=18)


def interpretation_figure(heads: list[dict], title: str, args, names: list[str] | None, path: Path) -> None:
    """Of one layer: histograms of beta and explained key variance, a column a head; below, beta by group element."""
    columns, n = len(heads), args.num_householder
    map_height = 0.7 + 0.24 * columns * n if names else 0
    with style():
        figure = plt.figure(figsize=(max(7.5, 2.4 * columns + 0.8), 5.4 + map_height), layout="constrained")
        figure.suptitle(title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        grid = figure.add_gridspec(3 if names else 2, columns, height_ratios=[2.3, 2.3, map_height][: 2 + bool(names)])
        first, tallest = None, 0.0
        for index, head in enumerate(heads):
            beta = figure.add_subplot(grid[0, index], sharey=first)
            first = beta if first is None else first
            _beta_panel(beta, head, args)
            tallest = max(tallest, beta.get_ylim()[1])
            keys = figure.add_subplot(grid[1, index])
            _key_panel(keys, head)
            if index == 0:
                beta.set_ylabel("share of tokens (%)")
                keys.set_ylabel("explained variance (%)")
            else:
                beta.tick_params(labelleft=False)
                keys.tick_params(labelleft=False)
        first.set_ylim(0, tallest)
        if names:
            _element_map(figure, figure.add_subplot(grid[2, :]), heads, args, names)
        handles, labels = first.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=n)
        save(figure, path)


def _beta_panel(axis, head: dict, args) -> None:
    top = 2 if args.allow_neg_eigval else 1
    for j, step in enumerate(head["householders"]):
        share = 100 * np.array(step["histogram"]) / max(1, sum(step["histogram"]))
        edges = np.linspace(0, top, len(share) + 1)
        axis.stairs(share, edges, fill=True, color=COLOURS[j % len(COLOURS)], alpha=0.25)
        axis.stairs(share, edges, color=COLOURS[j % len(COLOURS)], linewidth=1.6, label=f"Householder {j}")
    axis.set(title=f"head {head['head']}", xlim=(-0.02 * top, 1.02 * top), xlabel=r"$\beta$")
    axis.set_xticks([0, top / 2, top])


def _key_panel(axis, head: dict) -> None:
    explained = 100 * np.array(head["explained"])
    directions = np.arange(1, len(explained) + 1)
    dimension = head["dimension_95"]
    axis.axhline(95, color="#777777", linestyle=":", linewidth=1.2)
    axis.plot(directions, explained, color="#444444", marker="o", markersize=3, linewidth=1.4)
    axis.plot(dimension, explained[dimension - 1], marker="o", markersize=8, color=COLOURS[1])
    axis.annotate(
        f"95 % in {dimension}\neff. rank {head['effective_rank']:.1f}", (0.97, 0.06), xycoords="axes fraction",
        ha="right", va="bottom", fontsize=9,
    )  # fmt: skip
    axis.set(xlabel="directions of the keys", xlim=(0.4, len(explained) + 0.6), ylim=(0, 105))
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _element_map(figure, axis, heads: list[dict], args, names: list[str]) -> None:
    """Mean beta of each head and Householder (rows) at each group element (columns)."""
    steps = [(head["head"], step) for head in heads for step in head["householders"]]
    values = np.array([[step["mean_by_element"][name] for name in names] for _, step in steps], dtype=float)
    top = 2 if args.allow_neg_eigval else 1
    image = axis.imshow(values, vmin=0, vmax=top, cmap="cividis", aspect="auto")
    axis.set_yticks(range(len(steps)), [f"head {h}, Householder {step['householder']}" for h, step in steps])
    crowded = len(names) > 8
    axis.set_xticks(range(len(names)), names, rotation=40 * crowded, ha="right" if crowded else "center")
    axis.set(title=r"mean $\beta$ at each group element", xlabel="group element (cycles)")
    axis.grid(False)
    axis.tick_params(length=0)
    if values.size <= 200:
        for (row, column), value in np.ndenumerate(values):
            colour = "black" if value > 0.6 * top else "white"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color=colour)
    figure.colorbar(image, ax=axis, label=r"$\beta$", pad=0.01, fraction=0.03)
