"""The picture of length extrapolation: loss and accuracy against position, a line a model, a row a dataset.

With several models, a third panel shows their losses minus that of the first, sequence by sequence.

    loss_figure([Result.of(...), ...], Path("length_extrapolation.png"), log_positions=True)
"""

from pathlib import Path

import numpy as np
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from ..figures import COLOURS, mark_trained, picture
from .results import Result

LINES = ("-", "--", "-.", ":")
TITLE_NAME = 28
"""Characters of a model's name in a title."""


def loss_figure(results: list[Result], path: Path, log_positions: bool) -> None:
    """Draws the buckets of each result at their middles, with 95 % bands and a mark at each training length.

    Args:
        results: of any number of models and datasets.
        path: of the PNG.
        log_positions: a logarithmic axis of positions.
    """
    datasets = list(dict.fromkeys(result.data["name"] for result in results))
    models = list(dict.fromkeys(result.model["name"] for result in results))
    columns = 2 + any(result.compared for result in results)
    size, handles = (5.3 * columns, 0.9 + 3.5 * len(datasets)), {}
    with picture(path, "", len(datasets), columns, size) as (figure, axes):
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
        for row, name in zip(axes, datasets, strict=True):
            chosen = [result for result in results if result.data["name"] == name]
            for result in chosen:
                number = models.index(result.model["name"])
                look = {"color": COLOURS[number % len(COLOURS)], "linestyle": LINES[number // len(COLOURS) % 4]}
                handles[result.model["name"]] = _line(row[0], result, "loss", 1, look)
                _line(row[1], result, "accuracy", 100, look)
                if result.compared:
                    _line(row[2], result, "minus_first", 1, look)
            _label(row, chosen, log_positions)
            row[0].set_title(f"{name}: {_sequences(chosen[0])}", loc="left", pad=22)
        handles["95 % over sequences"] = Patch(color="#777777", alpha=0.25, linewidth=0)
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, len(handles)))


def _label(row, results: list[Result], log_positions: bool) -> None:
    """Axes and marks of the panels of one dataset."""
    names = ("loss (nats a token)", "accuracy (%)", "difference in loss (nats a token)")
    for axis, name in zip(row, names, strict=False):
        axis.set_ylabel(name)
        _frame(axis, results, log_positions)
    _perplexity_axis(row[0])
    if len(row) == 3:
        row[2].axhline(0, color=COLOURS[0], linewidth=1.8)
        row[2].set_title(f"loss minus that of {_ending(results[0].model['name'])}", loc="left", pad=22)
        row[2].set_visible(any(result.compared for result in results))


def _sequences(result: Result) -> str:
    count, kind = result.pieces.about["sequences"], result.data["kind"]
    return f"{count:,} {'long document' if kind == 'long' else 'sequence'}{'s' * (count != 1)}" + (
        " of packed documents" if kind == "packed" else ""
    )


def _ending(name: str) -> str:
    """As much of the end of a name as a title has room for."""
    return name if len(name) <= TITLE_NAME else f"…{name[1 - TITLE_NAME :]}"


def _middle(bucket: dict) -> float:
    return (bucket["first"] + bucket["last"]) / 2


def _line(axis, result: Result, name: str, scale: float, look: dict):
    """One curve with its band; where nothing finite is known there is a gap."""
    x = np.array([_middle(bucket) for bucket in result.buckets])
    y, low, high = (
        scale * np.array([bucket[f"{name}{part}"] for bucket in result.buckets]) for part in ("", "_low", "_high")
    )
    axis.fill_between(x, low, high, color=look["color"], alpha=0.15, linewidth=0)
    marker = {"marker": "o", "markersize": 3.5} if len(x) <= 48 else {}
    (line,) = axis.plot(x, y, linewidth=1.8, **look, **marker)
    return line


def _frame(axis, results: list[Result], log_positions: bool) -> None:
    """Axis of positions, and a mark at each training length."""
    length = max(result.length for result in results)
    first = _middle(results[0].buckets[0]) / 1.06 if log_positions else 0
    axis.set_xlabel("position in the sequence (tokens)")
    if log_positions:
        axis.set_xscale("log", base=2)
        octaves = 2.0 ** np.arange(np.ceil(np.log2(first)), np.floor(np.log2(length)) + 1)
        axis.xaxis.set_major_locator(FixedLocator(octaves[:: -(-len(octaves) // 10)]))
        axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tokens_text(x)))
    axis.set_xlim(first, length)
    for trained in sorted({result.model["train_length"] or 0 for result in results}):
        if not first < trained <= length:
            continue
        place = (np.log(trained / first) / np.log(length / first)) if log_positions else trained / length
        mark_trained(axis, trained, place, margin=0.25, above=3)


def tokens_text(tokens: float) -> str:
    """`512`, `4k`, `1M`: powers of two as they are spoken of, other numbers in full."""
    for unit, name in ((2**20, "M"), (2**10, "k")):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens / unit:.0f}{name}"
    return f"{tokens:,.0f}"


def _perplexity_axis(axis) -> None:
    """exp(loss) on the right."""
    low, high = axis.get_ylim()
    if not np.isfinite([low, high]).all() or high > 50:
        return
    second = axis.secondary_yaxis("right", functions=(np.exp, lambda y: np.log(np.maximum(y, 1e-12))))
    nice = np.array([k * 10.0**e for e in range(-1, 22) for k in (1, 1.5, 2, 3, 5, 7)])
    inside = nice[(np.log(nice) >= low) & (np.log(nice) <= high)]
    second.yaxis.set_major_locator(FixedLocator(inside[:: max(1, len(inside) // 6)]))
    second.yaxis.set_minor_formatter(NullFormatter())
    second.yaxis.set_minor_locator(NullLocator())
    second.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.10g}"))
    second.set_ylabel("perplexity")
    second.spines["right"].set_visible(True)
