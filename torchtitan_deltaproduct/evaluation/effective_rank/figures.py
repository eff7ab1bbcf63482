"""Pictures of effective ranks and transitions (see `figures` for the style).

    curves_figure(results, path)            against position, a panel a layer; heads of one model, or a line a model
    sequence_figure(result, path)           the same in one sequence, its document starts marked
    map_figure(results, path)               layers by position, a panel a model
    documents_figure(result, path)          the change at document starts, heads by tokens since the start
    beta_figure(result, path)               beta of each head and Householder
    spectrum_figure(result, path)           eigenvalues of the transitions in the complex plane, a panel a layer

Where there are more positions than points can be seen, neighbours are averaged.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ..figures import COLOURS, picture, plt
from .results import Result
from .transitions import PLANE_BINS

MAX_POINTS = 256
"""Points of a drawn curve; longer ones show means of neighbouring positions."""
TRAINED = {"color": "#444444", "linewidth": 1, "linestyle": (0, (2, 2)), "zorder": 1}
MAP = {"aspect": "auto", "interpolation": "none"}
DOCUMENT = {"color": "#E69F00", "linewidth": 0.8, "alpha": 0.75, "zorder": 0.5}


def comparison(results: list[Result], stem: Path) -> None:
    """The pictures of some models on one dataset: `stem`.png and `stem`_map.png."""
    curves_figure(results, Path(f"{stem}.png"))
    map_figure(results, Path(f"{stem}_map.png"))


def of_one(result: Result, stem: Path) -> None:
    """The pictures of one model on one dataset."""
    sequence_figure(result, Path(f"{stem}_sequence.png"))
    beta_figure(result, Path(f"{stem}_beta.png"))
    spectrum_figure(result, Path(f"{stem}_spectrum.png"))
    if result.change.documents:
        documents_figure(result, Path(f"{stem}_documents.png"))


def curves_figure(results: list[Result], path: Path) -> None:
    """Mean over sequences against position; the band is one standard deviation over sequences."""
    alone = len(results) == 1
    spread = ", mean and standard deviation" if results[0].rank.shape[2] > 1 else ""
    whose = f"{results[0].model['name']} on " if alone else ""
    title = f"{whose}{results[0].data['name']}: {_sequences(results[0])}{spread}"
    with _layers(max(result.rank.shape[0] for result in results), title, path) as (axes, handles):
        for layer, axis in enumerate(axes):
            for number, result in enumerate(results):
                if layer >= result.rank.shape[0]:
                    continue
                if alone:
                    handles |= _head_lines(axis, result, result.mean[layer])
                name = "mean of the heads" if alone else result.model["name"]
                handles[name] = _mean_line(axis, result, layer, "#000000" if alone else COLOURS[number % len(COLOURS)])
                if alone and result.rank.shape[2] == 1:
                    _document_lines(axis, result, handles)
            _frame(axis, results, layer, handles)


def sequence_figure(result: Result, path: Path) -> None:
    """The first sequence alone: every head, and where its documents begin."""
    with _layers(result.rank.shape[0], f"{_of(result)}: one sequence", path) as (axes, handles):
        for layer, axis in enumerate(axes):
            values = result.rank[layer, :, 0]
            handles |= _head_lines(axis, result, values)
            x, y = _binned(result.positions, values.mean(0, dtype=np.float64))
            (handles["mean of the heads"],) = axis.plot(x, y, color="#000000", linewidth=1.8)
            _document_lines(axis, result, handles)
            _frame(axis, [result], layer, handles)


def map_figure(results: list[Result], path: Path) -> None:
    """Mean over heads and sequences: layers by position, one scale of colours for all models."""
    top = max(np.nanmax(result.layer_mean.mean(1)) for result in results)
    heights = [max(1.5, 0.16 * result.rank.shape[0]) for result in results]
    title = f"{results[0].data['name']}: mean over heads and {_sequences(results[0])}"
    size = (10, 1.0 + sum(heights) + 0.75 * len(results))
    with picture(path, title, len(results), 1, size, sharex=True, height_ratios=heights) as (figure, axes):
        for axis, result in zip(axes[:, 0], results, strict=True):
            values = np.stack([_binned(result.positions, row)[1] for row in result.layer_mean.mean(1)])
            half, layers = result.every / 2, len(values)
            extent = (result.positions[0] - half, result.positions[-1] + half, layers - 0.5, -0.5)
            image = axis.imshow(values, vmin=0, vmax=top, cmap="viridis", extent=extent, **MAP)
            axis.set(ylabel="layer")
            axis.set_yticks(range(0, layers, -(-layers // 8)))
            axis.grid(False)
            trained = _training_lengths([result])
            trained_to = f", trained to {trained[0]:,} tokens (dashed)" if trained else ""
            axis.set_title(result.model["name"] + trained_to, loc="left")
            for length in trained:
                axis.axvline(length, color="white", linewidth=1.4, linestyle=(0, (3, 2)))
            axis.set_xlim(0, extent[1])
            _positions(axis, 10)
        axes[-1, 0].set_xlabel("position in the sequence (tokens)")
        full = min(results[0].model["head_dim"], results[0].model["head_v_dim"])
        figure.colorbar(image, ax=axes, label=f"effective rank (of at most {full})", pad=0.01, fraction=0.04)


def documents_figure(result: Result, path: Path) -> None:
    """Left: every head against the tokens since a document start, as colours. Right: the mean of each layer."""
    change, (layers, heads) = result.change, result.mean.shape[:2]
    values = change.mean.reshape(layers * heads, -1)
    top = np.nanmax(np.abs(values)) or 1
    starts = f"{change.documents:,} document start{'s' * (change.documents > 1)}"
    title = f"{_of(result)}: effective rank less that of the last state before a document, mean of {starts}"
    size = (11, min(9.5, max(4.0, 1.5 + 0.07 * len(values))))
    with picture(path, title, 1, 2, size, width_ratios=[1.25, 1]) as (figure, axes):
        left, right = axes[0]
        extent = (change.edges[0], change.edges[-1], len(values) - 0.5, -0.5)
        image = left.imshow(values, vmin=-top, vmax=top, cmap="RdBu_r", extent=extent, **MAP)
        _head_rows(left, layers, heads)
        left.set(title="each head", ylabel=f"layer ({heads} heads each)")
        figure.colorbar(image, ax=left, label="change of the effective rank", pad=0.02, location="left", fraction=0.05)
        middles = (change.edges[:-1] + change.edges[1:]) / 2
        for layer, row in enumerate(change.mean.mean(1)):
            right.plot(middles, row, color=_shade(layer, layers), linewidth=1.4, label=f"layer {layer}")
        right.axhline(0, color="#777777", linewidth=0.8)
        right.set(title="mean of the heads", ylabel="change of the effective rank", xlim=extent[:2])
        for axis in (left, right):
            axis.axvline(0, **DOCUMENT | {"linewidth": 1.4, "alpha": 1, "zorder": 3})
            axis.set_xlabel("tokens since a document start")
        if layers <= 12:
            right.legend(fontsize=8, ncols=1, loc="center left", bbox_to_anchor=(1.0, 0.5))
        else:
            scale = plt.cm.ScalarMappable(plt.Normalize(0, layers - 1), plt.get_cmap("viridis"))
            figure.colorbar(scale, ax=right, label="layer", pad=0.02, fraction=0.05)


def beta_figure(result: Result, path: Path) -> None:
    """Share of the tokens by beta: a panel a Householder, a row a head."""
    counts = result.numbers.tally.beta
    layers, heads, n, bins = counts.shape
    rows = layers * heads
    shares = 100 * counts / np.maximum(1, counts.sum(-1, keepdims=True))
    extent = (0, 2 if result.model["allow_neg_eigval"] else 1, rows - 0.5, -0.5)
    size = (max(5.5, 1.2 + 3.6 * n), max(3.2, 1.4 + max(0.075, min(0.2, 3 / rows)) * rows))
    with picture(path, f"{_of(result)}: tokens by beta", 1, n, size, sharey=True) as (figure, axes):
        norm = LogNorm(max(0.05, shares[shares > 0].min()), shares.max()) if (shares > 0).any() else None
        for j, axis in enumerate(axes[0]):
            own = np.ma.masked_equal(shares[:, :, j].reshape(rows, bins), 0)
            image = axis.imshow(own, norm=norm, extent=extent, **MAP)
            axis.set(title=f"Householder {j}", xlabel=r"$\beta$")
            _head_rows(axis, layers, heads)
        axes[0, 0].set_ylabel(f"layer ({heads} heads each)")
        figure.colorbar(image, ax=axes, label="share of tokens (%)", pad=0.02, fraction=0.06, aspect=25)


def spectrum_figure(result: Result, path: Path) -> None:
    """Where the eigenvalues of a token's transition lie that are not those of the decay alone; a panel a layer."""
    counts = result.numbers.tally.plane
    layers, n = len(counts), result.model["num_householder"]
    columns = min(layers, 4 if layers <= 12 else 6)
    rows = -(-layers // columns)
    several = f"the {n} eigenvalues" if n > 1 else "the eigenvalue"
    title, size = (
        f"{_of(result)}: {several} of each token's transition",
        (max(6.5, 1.4 + 2.3 * columns), 0.9 + 2.5 * rows),
    )
    with picture(path, title, rows, columns, size, sharex=True, sharey=True) as (figure, axes):
        _outer_labels(axes, layers, "real part" if n > 1 else "eigenvalue", "imaginary part" if n > 1 else "share (%)")
        if n > 1:
            _planes(figure, axes, counts.sum(1))
        else:
            _lines(figure, axes, counts.sum(3))


def _planes(figure, axes, counts: np.ndarray) -> None:
    """counts [L, real, imaginary], all heads together."""
    shares = 100 * counts / np.maximum(1, counts.sum((1, 2), keepdims=True))
    norm = LogNorm(max(1e-3, shares[shares > 0].min()), shares.max()) if (shares > 0).any() else None
    circle, ticks = np.exp(1j * np.linspace(0, 2 * np.pi, 200)), [-1, 0, 1]
    for layer, (axis, share) in enumerate(zip(axes.flat, shares, strict=False)):
        shown = np.ma.masked_equal(share.T, 0)
        image = axis.imshow(shown, norm=norm, origin="lower", extent=(-1, 1, -1, 1), interpolation="none")
        axis.plot(circle.real, circle.imag, color="#888888", linewidth=0.8)
        axis.grid(False)
        axis.set(title=f"layer {layer}", xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), xticks=ticks, yticks=ticks)
    label = f"share of eigenvalues (%),\nin squares of {2 / PLANE_BINS:.3f}"
    figure.colorbar(image, ax=axes, label=label, pad=0.02, fraction=0.05, aspect=15 * len(axes))


def _lines(figure, axes, counts: np.ndarray) -> None:
    """counts [L, H, real]: eigenvalues that are all real."""
    shares, edges = 100 * counts / np.maximum(1, counts.sum(2, keepdims=True)), np.linspace(-1, 1, PLANE_BINS + 1)
    for layer, (axis, heads) in enumerate(zip(axes.flat, shares, strict=False)):
        for h, share in enumerate(heads):
            axis.stairs(share, edges, color=_shade(h, len(heads)), linewidth=1.2, label=f"head {h}")
        axis.set(title=f"layer {layer}", xlim=(-1.05, 1.05), xticks=[-1, 0, 1])
    handles, labels = axes[0, 0].get_legend_handles_labels()
    shown = slice(None) if len(handles) <= 8 else slice(None, None, len(handles) - 1)
    figure.legend(handles[shown], labels[shown], loc="outside right center", fontsize=9)


def _outer_labels(axes, panels: int, x: str, y: str) -> None:
    """Labels at the left and below the lowest panel of each column; panels that are not needed vanish."""
    rows, columns = axes.shape
    for axis in axes.flat[panels:]:
        axis.axis("off")
    for axis in axes[:, 0]:
        axis.set_ylabel(y)
    for column in range(columns):
        bottom = axes[max(row for row in range(rows) if row * columns + column < panels), column]
        bottom.set_xlabel(x)
        bottom.tick_params(labelbottom=True)


@contextmanager
def _layers(layers: int, title: str, path: Path) -> Iterator[tuple[np.ndarray, dict]]:
    """A picture with a panel a layer; gives the panels, and a place for the handles of its legend."""
    columns = min(layers, 2 if layers <= 4 else 4 if layers <= 16 else 6)
    rows, width = -(-layers // columns), 5.0 if columns <= 2 else 3.0 if columns <= 4 else 2.4
    size = (max(6.5, 0.6 + width * columns), 1.1 + (2.7 if columns <= 2 else 2.1) * rows)
    with picture(path, title, rows, columns, size, sharex=True, sharey=True) as (figure, axes):
        _outer_labels(axes, layers, "position (tokens)", "effective rank")
        handles: dict = {}
        yield axes.flat[:layers], handles
        axes.flat[0].set_ylim(bottom=0)
        # Models or heads, then marks.
        marks = [name for name in handles if name == "document start" or name.startswith("trained to ")]
        for name in ("mean of the heads", *marks):
            if name in handles:
                handles[name] = handles.pop(name)
        shown = min(len(handles), int(figure.get_figwidth() / 1.7))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=shown, fontsize=9)


def _head_rows(axis, layers: int, heads: int) -> None:
    """Rows that are heads, with a line between layers, which alone are numbered."""
    axis.set_yticks(np.arange(layers) * heads + (heads - 1) / 2, range(layers))
    axis.tick_params(axis="y", length=0)
    axis.grid(False)
    for layer in range(1, layers):
        axis.axhline(layer * heads - 0.5, color="#666666", linewidth=0.6)


def _head_lines(axis, result: Result, values: np.ndarray) -> dict:
    """values [H, P] as thin lines; a handle for each head, or where they are many for the first and the last."""
    heads = len(values)
    lines = [
        axis.plot(*_binned(result.positions, row), color=_shade(h, heads), linewidth=0.9, alpha=0.9)[0]
        for h, row in enumerate(values)
    ]
    shown = range(heads) if heads <= 8 else (0, heads - 1)
    return {f"head {h}": lines[h] for h in shown}


def _mean_line(axis, result: Result, layer: int, colour: str):
    """Mean over heads and sequences with one standard deviation over sequences."""
    x, y = _binned(result.positions, result.layer_mean[layer].mean(0))
    if result.rank.shape[2] > 1:
        _, half = _binned(result.positions, result.layer_mean[layer].std(0, ddof=1))
        axis.fill_between(x, y - half, y + half, color=colour, alpha=0.15, linewidth=0)
    return axis.plot(x, y, color=colour, linewidth=1.8)[0]


def _document_lines(axis, result: Result, handles: dict) -> None:
    starts = result.numbers.starts
    own = starts[starts[:, 0] == 0, 1]
    for start in own:
        handles["document start"] = axis.axvline(start, **DOCUMENT | ({"linewidth": 0.4} if len(own) > 16 else {}))


def _frame(axis, results: list[Result], layer: int, handles: dict) -> None:
    axis.set_title(f"layer {layer}", loc="left")
    axis.set_xlim(0, max(result.positions[-1] for result in results))
    _positions(axis)
    for length in _training_lengths(results):
        handles[f"trained to {length:,} tokens"] = axis.axvline(length, **TRAINED)


def _positions(axis, ticks: int = 5) -> None:
    axis.xaxis.set_major_locator(MaxNLocator(ticks, integer=True, steps=[1, 2, 5, 10]))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))


def _training_lengths(results: list[Result]) -> list[int]:
    """Those that can be shown."""
    longest = max(result.positions[-1] for result in results)
    return [n for n in sorted({result.model["train_length"] or 0 for result in results}) if 0 < n <= longest]


def _binned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MAX_POINTS points: means of neighbours."""
    edges = np.linspace(0, len(x), min(MAX_POINTS, len(x)) + 1).astype(int)
    sizes = np.diff(edges)
    return np.add.reduceat(x, edges[:-1]) / sizes, np.add.reduceat(y, edges[:-1], dtype=np.float64) / sizes


def _shade(index: int, count: int):
    return plt.get_cmap("viridis")(0.92 * index / max(1, count - 1))


def _sequences(result: Result) -> str:
    count = result.rank.shape[2]
    return f"{count:,} sequences" if count > 1 else "one sequence"


def _of(result: Result) -> str:
    return f"{result.model['name']} on {result.data['name']}"
