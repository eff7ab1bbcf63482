"""The picture of length extrapolation: loss and accuracy against position, a line a model, a row a dataset.

With several models, a third panel shows their losses minus that of the first, sequence by sequence.

    loss_figure([Result.of(...), ...], Path("length_extrapolation.png"), log_positions=True)
"""

from pathlib import Path

import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, NullLocator

from ..figures import MARKERS, band, band_handle, legend, look, mark_trained, picture
from .results import LEAST_SEQUENCES, Result

TITLE_NAME = 28
"""Characters of a model's name in a title."""


def loss_figure(results: list[Result], path: Path, log_positions: bool) -> None:
    """Draws the buckets of each result at their middles, with 95 % bands and a mark at each training length."""
    datasets = list(dict.fromkeys(result.case.data["name"] for result in results))
    models = list(dict.fromkeys(result.case.model["name"] for result in results))
    columns = 2 + any(result.compared for result in results)
    handles = {}
    with picture(path, "", len(datasets), columns, (5.3 * columns, 0.9 + 3.5 * len(datasets))) as (figure, axes):
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
        for row, name in zip(axes, datasets, strict=True):
            chosen = [result for result in results if result.case.data["name"] == name]
            for result in chosen:
                number = models.index(result.case.model["name"])
                own = look(number, len(models)) | {"marker": MARKERS[number % len(MARKERS)]}
                handles[result.case.model["name"]] = _line(row[0], result, "loss", 1, own)
                _line(row[1], result, "accuracy", 100, own)
                if result.compared:
                    _line(row[2], result, "minus_first", 1, own)
                elif columns == 3 and result is chosen[0]:
                    row[2].axhline(0, **look(number, len(models)))
            _label(row, chosen, log_positions)
            row[0].set_title(f"{name}: {_sequences(chosen[0])}", loc="left", pad=22)
        counts = {result.case.pieces.about["sequences"] for result in results}
        if max(counts) >= LEAST_SEQUENCES:
            handles["band: 95 % interval over sequences"] = band_handle()
        legend(figure, handles, columns=5)
        if min(counts) < LEAST_SEQUENCES:
            few = "one sequence is" if min(counts) == 1 else "two sequences are"
            figure.suptitle(f"No band: {few} too few for an interval", x=0.01, ha="left", fontsize=9)


def _label(row, results: list[Result], log_positions: bool) -> None:
    """Axes and marks of the panels of one dataset."""
    names = ("loss (nats a token)", "accuracy (%)", "difference in loss (nats a token)")
    for axis, name in zip(row, names, strict=False):
        axis.set_ylabel(name)
        _frame(axis, results, log_positions)
    _perplexity_axis(row[0])
    if len(row) == 3:
        row[2].set_title(f"loss minus that of {_ending(results[0].case.model['name'])}", loc="left", pad=22)
        row[2].set_visible(any(result.compared for result in results))


def _sequences(result: Result) -> str:
    count, kind = result.case.pieces.about["sequences"], result.case.data["kind"]
    return f"{count:,} {'long document' if kind == 'long' else 'sequence'}{'s' * (count != 1)}" + (
        " of packed documents" if kind == "packed" else ""
    )


def _ending(name: str) -> str:
    """As much of the end of a name as a title has room for."""
    return name if len(name) <= TITLE_NAME else f"…{name[1 - TITLE_NAME :]}"


def _middle(bucket: dict) -> float:
    return (bucket["first"] + bucket["last"]) / 2


def _line(axis, result: Result, name: str, scale: float, own: dict):
    """One curve with its band; where nothing finite is known there is a gap."""
    x = np.array([_middle(bucket) for bucket in result.buckets])
    y, low, high = (
        scale * np.array([bucket[f"{name}{part}"] for bucket in result.buckets]) for part in ("", "_low", "_high")
    )
    band(axis, x, low, high, own["color"])
    return axis.plot(x, y, **own, markersize=4.5, markevery=max(1, len(x) // 16))[0]


def _frame(axis, results: list[Result], log_positions: bool) -> None:
    """Axis of positions, and a mark at each training length."""
    length = results[0].case.length
    first = _middle(results[0].buckets[0]) / 1.06 if log_positions else 0
    axis.set_xlabel("position in the sequence (tokens)")
    if log_positions:
        axis.set_xscale("log", base=2)
        octaves = 2.0 ** np.arange(np.ceil(np.log2(first)), np.floor(np.log2(length)) + 1)
        axis.xaxis.set_major_locator(FixedLocator(octaves[:: -(-len(octaves) // 10)]))
        axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tokens_text(x)))
    axis.set_xlim(first, length)
    for trained in sorted({result.case.model["train_length"] or 0 for result in results}):
        if first < trained <= length:
            place = (np.log(trained / first) / np.log(length / first)) if log_positions else trained / length
            mark_trained(axis, trained, place)


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
    # No loss is below 0, no perplexity below 1.
    low = axis.set_ylim(bottom=max(0, low))[0]
    second = axis.secondary_yaxis("right", functions=(np.exp, lambda y: np.log(np.maximum(y, 1e-12))))
    nice = np.array([k * 10.0**e for e in range(22) for k in (1, 1.5, 2, 3, 5, 7)])
    if high - low < 1:
        nice = MaxNLocator(6).tick_values(np.exp(low), np.exp(high)).clip(1)
    inside = nice[(np.log(nice) >= low) & (np.log(nice) <= high)]
    second.yaxis.set_major_locator(FixedLocator(inside[:: max(1, len(inside) // 6)]))
    second.yaxis.set_minor_formatter(NullFormatter())
    second.yaxis.set_minor_locator(NullLocator())
    second.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.10g}"))
    second.set_ylabel("perplexity")
    second.spines["right"].set_visible(True)
