"""Pictures of state tracking: accuracy against length, and what the heads do (see `..figures` for the style)."""

from pathlib import Path

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from torchtitan_deltaproduct.intervals import wilson

from ..figures import COLOURS, MARKERS, band, band_handle, binned, legend, look, mark_trained, name_ends, picture
from .results import RunResult, Setting

MAX_POINTS, LENGTH_POINTS = 128, 24
"""Points of a drawn curve by position, and by the length of rows: longer ones show means of neighbours."""


def accuracy_figure(settings: list[Setting], path: Path) -> None:
    """Accuracy against length: a row of panels a problem, a line a setting, thin lines its seeds."""
    problems = list(dict.fromkeys(setting.problem.name for setting in settings))
    columns = 1 if all(setting.problem.formal for setting in settings) else 2
    handles: dict[str, object] = {}
    with picture(path, "", len(problems), columns, (1 + 5.3 * columns, 1.1 + 3.3 * len(problems))) as (figure, axes):
        for row, name in zip(axes, problems, strict=True):
            chosen = [setting for setting in settings if setting.problem.name == name]
            name, formal, chance = name.replace("_", " "), chosen[0].problem.formal, chosen[0].problem.chance
            _panel(row[0], chosen, False, handles)
            row[0].set_title(f"{name}: right {'answers' if formal else 'at position t'}", pad=18)
            row[0].set_ylabel("accuracy (%)")
            handles["guessing"] = row[0].axhline(100 * chance, color="#555555", linestyle=":", linewidth=1.4)
            if formal:
                scaled = (lambda y, c=chance: (y / 100 - c) / (1 - c), lambda y, c=chance: 100 * (y * (1 - c) + c))
                row[0].secondary_yaxis("right", functions=scaled).set_ylabel("scaled (0: guessing)")
                row[-1].set_visible(columns == 1)
            else:
                _panel(row[1], chosen, True, handles)
                row[1].set_title(f"{name}: right at all positions up to t", pad=18)
                row[1].set_ylabel(f"share of {chosen[0].runs[0].counts.words:,} words (%)")
        if any(len(setting.runs) > 1 for setting in settings):
            handles["thin: a seed each (thick: their mean)"] = Line2D([], [], color="#777777", linewidth=0.7)
        if any(len(setting.runs) == 1 for setting in settings):
            handles["band: 95 % interval over words (Wilson)"] = band_handle()
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
        legend(figure, handles, columns=2 * columns)


def _panel(axis, settings: list[Setting], prefix: bool, handles: dict) -> None:
    """A line a setting: the mean of its seeds, which are thin lines; of one seed with its band; named at its end."""
    longest, ends = max(setting.problem.length for setting in settings), []
    for index, setting in enumerate(settings):
        # Few rows of a formal language have not all lengths, and those of another seed have others.
        at = np.flatnonzero(sum(run.counts.scored for run in setting.runs))
        own, curves = _look(settings, index), [_curve(run, prefix, at) for run in setting.runs]
        x, middles = curves[0][0], [y for _, y, _, _ in curves]
        if len(curves) == 1:
            band(axis, x, *curves[0][2:], own["color"])
        for y in middles if len(curves) > 1 else ():
            axis.plot(x, y, linewidth=0.7, alpha=0.45, color=own["color"], linestyle=own["linestyle"])
        name = ", ".join(filter(None, (setting.head, setting.short))).replace("n_h", "$n_h$")
        mean = np.nanmean(middles, axis=0)
        (handles[name],) = axis.plot(x, mean, **own, markevery=(index, max(1, len(x) // 8)), markersize=5)
        ends.append((x[-1], mean[-1], name, own["color"]))
    where = "length of the row" if settings[0].problem.formal else "position t in the word"
    axis.set(xlim=(0, longest * 1.01), ylim=(-2, 103), xlabel=f"{where} (tokens)")
    mark_trained(axis, {setting.problem.train_length for setting in settings})
    if 1 < len(settings) <= 8 and not settings[0].problem.formal:
        name_ends(axis, ends)


def _look(settings: list[Setting], index: int) -> dict:
    """Colour and marker by n_h; solid for [-1, 1], dashed for [0, 1]; further settings of the same two have dots.

    Where several all have the same two, each has its own colour and marker.
    """
    own = settings[index].runs[0]
    same = [i for i, s in enumerate(settings) if (s.runs[0].n_h, s.runs[0].range) == (own.n_h, own.range)]
    if 1 < len(same) == len(settings):
        return look(index, len(settings)) | {"marker": MARKERS[index % len(MARKERS)]}
    lines = (
        ("-", "-.", ":", (0, (8, 2, 1, 2, 1, 2)))
        if own.range == "[-1, 1]"
        else ("--", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2)))
    )
    by_n = {"color": COLOURS[(own.n_h - 1) % len(COLOURS)], "marker": MARKERS[(own.n_h - 1) % len(MARKERS)]}
    return look(index, len(settings)) | by_n | {"linestyle": lines[same.index(index) % len(lines)]}


def _curve(run: RunResult, prefix: bool, at: np.ndarray) -> tuple[np.ndarray, ...]:
    """Positions or row lengths, percentages right there (or up to there: `prefix`) and their intervals.

    `at` are the positions shown, from 0; where none of a bin has a label, there is NaN.
    """
    counts = run.counts
    right, total = counts.correct, counts.scored
    if prefix:
        right, total = counts.prefix, np.full(run.problem.length, counts.words)
    points = LENGTH_POINTS if run.problem.formal else MAX_POINTS
    right, total, x, sizes = binned(points, right[at], total[at], at + 1)
    # Neighbouring positions of one word are not independent: their mean is as uncertain as one of them.
    share = 1 if run.problem.formal else sizes
    low, high = wilson(right / share, total / share)
    middle = np.divide(right, total, out=np.full(len(total), np.nan), where=total > 0)
    return x / sizes, 100 * middle, 100 * low, 100 * high


def interpretation_figure(heads: list[dict], title: str, args, names: list[str], path: Path) -> None:
    """Of one layer: histograms of beta and explained key variance, a column a head; below, beta by group element."""
    columns, n = len(heads), args.num_householder
    heights = [2.3, 2.3, *([0.7 + 0.24 * columns * n] if names else [])]
    size, options = (max(7.5, 2.4 * columns + 0.8), 0.8 + sum(heights)), {"sharey": "row", "height_ratios": heights}
    with picture(path, title, len(heights), columns, size, **options) as (figure, axes):
        for head, beta, keys in zip(heads, *axes[:2], strict=True):
            _beta_panel(beta, head, args)
            _key_panel(keys, head)
        axes[0, 0].set_ylabel("share of tokens (%)")
        axes[1, 0].set_ylabel("explained variance (%)")
        if names:
            grid = axes[2, 0].get_gridspec()
            for axis in axes[2]:
                axis.remove()
            _element_map(figure, figure.add_subplot(grid[2, :]), heads, args, names)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=n)


def _beta_panel(axis, head: dict, args) -> None:
    top = 2 if args.allow_neg_eigval else 1
    for j, step in enumerate(head["householders"]):
        share = 100 * np.array(step["histogram"]) / max(1, sum(step["histogram"]))
        edges = np.linspace(0, top, len(share) + 1)
        axis.stairs(share, edges, fill=True, color=COLOURS[j % len(COLOURS)], alpha=0.25)
        axis.stairs(share, edges, **look(j, args.num_householder), label=f"Householder {j}")
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
