"""The picture of length extrapolation: loss and accuracy against position, a line a model, a row a dataset.

With several models, a third panel shows their losses minus that of the first, sequence by sequence.

    loss_figure([result, ...], Path("length_extrapolation.png"), log_positions=True)
"""

from pathlib import Path

import numpy as np
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ..figures import MARKERS, band, band_handle, in_lines, legend, look, mark_trained, name_ends, picture
from .results import LEAST_SEQUENCES, Result

TITLE_WIDTH = 38
"""Characters of a line of a panel's title."""


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
            row[0].set_title(in_lines(f"{name}: {_sequences(chosen[0])}", width=TITLE_WIDTH), loc="left", pad=22)
        counts = {result.case.pieces.about["sequences"] for result in results}
        if max(counts) >= LEAST_SEQUENCES:
            handles["band: 95 % interval over sequences"] = band_handle()
        legend(figure, handles, columns=5)
        if min(counts) < LEAST_SEQUENCES:
            few = "one sequence is" if min(counts) == 1 else "two sequences are"
            figure.suptitle(f"No band: {few} too few for an interval", x=0.01, ha="left", fontsize=9)


def seeds_figure(curves: dict[str, list[np.ndarray]], lasts: list[int], trained: int, title: str, path: Path) -> None:
    """Loss by position of settings with several seeds: thick their mean, thin each of them.

    Args:
        curves: of each setting the mean losses of buckets, in nats a token, an array a seed.
        lasts: the last position of each bucket.
        trained: training length, in tokens.
        title: of the picture.
        path: of the PNG.
    """
    edges = np.array([0, *lasts])
    middles = (edges[:-1] + 1 + edges[1:]) / 2
    with picture(path, "", 1, 1, (7.6, 4.2)) as (figure, ((axis,),)):
        ends = []
        for number, (name, seeds) in enumerate(curves.items()):
            own = look(number, len(curves))
            for losses in seeds if len(seeds) > 1 else ():
                axis.plot(middles, losses, linewidth=0.7, alpha=0.45, color=own["color"], linestyle=own["linestyle"])
            mean = np.mean(seeds, axis=0)
            axis.plot(middles, mean, **own, marker=MARKERS[number % len(MARKERS)], markevery=(number, 6), markersize=5)
            ends.append((middles[-1], mean[-1], name.replace("n_h", "$n_h$"), own["color"]))
        _positions(axis, middles[0] / 1.06, lasts[-1], {trained})
        axis.set(ylabel="loss (nats a token)", title=title)
        axis.title.set_position((0, 1.06))
        name_ends(axis, ends)


def _positions(axis, first: float, length: int, trained: set[int]) -> None:
    """An axis of positions by octaves, with a mark at each training length."""
    axis.set(xlabel="position in the sequence (tokens)")
    axis.set_xscale("log", base=2)
    octaves = 2.0 ** np.arange(np.ceil(np.log2(first)), np.floor(np.log2(length)) + 1)
    axis.xaxis.set_major_locator(FixedLocator(octaves[:: -(-len(octaves) // 10)]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tokens_text(x)))
    axis.set_xlim(first, length)
    mark_trained(axis, trained)


def _label(row, results: list[Result], log_positions: bool) -> None:
    """Axes and marks of the panels of one dataset: positions, and each training length."""
    length, trained = results[0].case.length, {result.case.model["train_length"] or 0 for result in results}
    first = _middle(results[0].buckets[0]) / 1.06
    names = ("loss (nats a token)", "accuracy (%)", "difference in loss (nats a token)")
    for axis, name in zip(row, names, strict=False):
        axis.set(ylabel=name)
        if log_positions:
            _positions(axis, first, length, trained)
            continue
        axis.set(xlabel="position in the sequence (tokens)", xlim=(0, length))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tokens_text(x)))
        mark_trained(axis, trained)
    _perplexity_axis(row[0])
    if len(row) == 3:
        row[2].set_title(
            in_lines(f"loss minus that of {results[0].case.model['name']}", width=TITLE_WIDTH), loc="left", pad=22
        )
        row[2].set_visible(any(result.compared for result in results))


def _sequences(result: Result) -> str:
    count, kind = result.case.pieces.about["sequences"], result.case.data["kind"]
    return f"{count:,} {'long document' if kind == 'long' else 'sequence'}{'s' * (count != 1)}" + (
        " of packed documents" if kind == "packed" else ""
    )


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


def tokens_text(tokens: float) -> str:
    """`512`, `4k`, `1M`: powers of two as they are spoken of, other numbers in full."""
    for unit, name in ((2**20, "M"), (2**10, "k")):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens / unit:.0f}{name}"
    return f"{tokens:,.0f}"


def _perplexity_axis(axis) -> None:
    """exp(loss) on the right, at the marks of the loss; no loss is below 0, no perplexity below 1."""
    low, high = axis.set_ylim(bottom=max(0, axis.get_ylim()[0]))
    if np.isfinite([low, high]).all() and high <= 50:
        ticks = [loss for loss in axis.get_yticks() if low <= loss <= high]
        labels = [f"{perplexity:,.0f}" if perplexity >= 100 else f"{perplexity:.3g}" for perplexity in np.exp(ticks)]
        second = axis.secondary_yaxis("right")
        second.set_yticks(ticks, labels)
        second.set_ylabel("perplexity")
        second.spines["right"].set_visible(True)
