"""Pictures of effective ranks and transitions (see `..figures` for the style).

    comparison(results, stem)               against position, a panel a layer; heads of one model, or a line a model
    of_one(result, stem)                    of one model:
        sequence_figure(result, path)           the same in one sequence, its document starts marked
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
from matplotlib.patches import Circle
from matplotlib.ticker import FuncFormatter, MaxNLocator

from torchtitan_deltaproduct.intervals import student_t

from ..figures import band, band_handle, binned, legend, look, picture, shade
from .results import Result
from .transitions import PLANE_BINS

MAX_POINTS = 256
"""Of a drawn curve."""
LEAST_STARTS = 3
"""Document starts of a bin that is shown: fewer have no interval that says anything."""
TRAINED = {"color": "#444444", "linewidth": 1, "linestyle": (0, (2, 2)), "zorder": 1}
MEAN = {"color": "#000000", "linewidth": 1.8}
DOCUMENT = {"color": "#E69F00", "linewidth": 0.8, "alpha": 0.75, "zorder": 0.5}


def comparison(results: list[Result], stem: Path) -> None:
    """Mean over sequences against position, of the heads of one model or of several models: `stem`.png."""
    alone, sequences = len(results) == 1, results[0].rank.shape[2]
    whose = _of(results[0]) if alone else results[0].case.data["name"]
    title = f"{whose}: {f'mean of {sequences:,} sequences' if sequences > 1 else 'one sequence'}"
    with _layers(results, title, Path(f"{stem}.png")) as (axes, handles):
        for number, result in enumerate(results):
            for axis, of_heads, means in zip(axes, result.layer_mean, result.mean, strict=False):
                own = MEAN if alone else look(number, len(results))
                if alone:
                    _heads(axis, result, means, handles)
                else:
                    (handles[result.case.model["name"]],) = axis.plot(*_averaged(result, of_heads.mean(0)), **own)
                if sequences > 1:
                    (x, mean), (_, half) = (_averaged(result, f) for f in (of_heads.mean(0), of_heads.std(0, ddof=1)))
                    band(axis, x, mean - half, mean + half, own["color"])
                    handles["band: ± 1 standard deviation over sequences"] = band_handle()


def of_one(result: Result, stem: Path) -> None:
    """The pictures of one model on one dataset."""
    sequence_figure(result, Path(f"{stem}_sequence.png"))
    beta_figure(result, Path(f"{stem}_beta.png"))
    spectrum_figure(result, Path(f"{stem}_spectrum.png"))
    if (_starts(result) >= LEAST_STARTS).any():
        documents_figure(result, Path(f"{stem}_documents.png"))


def sequence_figure(result: Result, path: Path) -> None:
    """The first sequence alone: every head, and where its documents begin."""
    count, own = result.rank.shape[2], result.starts[result.starts[:, 0] == 0, 1]
    thin = {"linewidth": 0.4} if len(own) > 16 else {}
    which = f"the first of {count:,} sequences" if count > 1 else "one sequence"
    with _layers([result], f"{_of(result)}: {which}", path) as (axes, handles):
        for axis, values in zip(axes, result.rank[:, :, 0], strict=True):
            _heads(axis, result, values, handles)
            for start in own:
                handles["document start"] = axis.axvline(start, **DOCUMENT | thin)


def documents_figure(result: Result, path: Path) -> None:
    """Left: every head against the tokens since a document start, as colours. Right: the mean of each layer."""
    change, (layers, heads) = result.change, result.mean.shape[:2]
    starts = _starts(result)
    shown = starts >= LEAST_STARTS
    starts, errors = starts[shown], np.nanstd(change.of_each[..., shown], 0, ddof=1)
    halves = errors * [student_t(int(count) - 1) / count**0.5 for count in starts]
    values = np.where(shown, change.mean, np.nan).reshape(layers * heads, -1)
    top = np.nan_to_num(np.abs(values), posinf=0).max() or 1
    title = f"{_of(result)}: effective rank less that of the last state before a document, mean of document starts"
    size = (11, min(9.5, max(4.0, 1.5 + 0.07 * len(values))))
    with picture(path, title, 1, 2, size, width_ratios=[1.25, 1]) as (figure, axes):
        left, right = axes[0]
        image = _head_rows(left, values, layers, change.edges[[0, -1]], vmin=-top, vmax=top, cmap="cividis")
        left.set(title="each head", ylabel=f"layer ({heads} heads each)")
        figure.colorbar(image, ax=left, label="change of the effective rank", pad=0.02, fraction=0.05)
        middles, handles = (change.edges[:-1] + change.edges[1:])[shown] / 2, {}
        for layer, (row, half) in enumerate(zip(change.mean.mean(1)[:, shown], halves, strict=True)):
            own = look(layer, layers) | {"color": shade(layer, layers)}
            band(right, middles, row - half, row + half, own["color"])
            (line,) = right.plot(middles, row, **own)
            if layers <= 8 or layer in (0, layers - 1):
                handles[f"layer {layer}"] = line
        handles["band: 95 % interval over document starts"] = band_handle()
        right.axhline(0, color="#777777", linewidth=0.8)
        right.set(title=f"mean of the heads; {starts.min():,} to {starts.max():,} starts a point",
                  ylabel="change of the effective rank")  # fmt: skip
        for axis in (left, right):
            mark = axis.axvline(0, **DOCUMENT | {"linewidth": 1.4, "alpha": 1, "zorder": 3})
            axis.set(xlabel="tokens since a document start", xlim=change.edges[np.flatnonzero(shown)[[0, -1]] + [0, 1]])
        legend(figure, handles | {"document start": mark}, columns=5)


def _starts(result: Result) -> np.ndarray:
    """Document starts that have states, finite ones, in each bin."""
    return np.isfinite(result.change.of_each[:, 0]).sum(0)


def beta_figure(result: Result, path: Path) -> None:
    """Share of the tokens by beta: a panel a Householder, a row a head."""
    counts = result.tally.beta
    layers, heads, n, bins = counts.shape
    rows = layers * heads
    shares = 100 * counts / np.maximum(1, counts.sum(-1, keepdims=True))
    size = (max(5.5, 1.2 + 3.6 * n), max(3.2, 1.4 + max(0.075, min(0.2, 3 / rows)) * rows))
    with picture(path, f"{_of(result)}: tokens by beta", 1, n, size, sharey=True) as (figure, axes):
        for j, axis in enumerate(axes[0]):
            own = np.ma.masked_equal(shares[:, :, j].reshape(rows, bins), 0)
            image = _head_rows(axis, own, layers, (0, result.top_beta), norm=_logarithmic(shares, 0.05))
            axis.set(title=f"Householder {j}", xlabel=r"$\beta$", ylabel="" if j else f"layer ({heads} heads each)")
        figure.colorbar(image, ax=axes, label="share of tokens (%)", pad=0.02, fraction=0.06, aspect=25)


def spectrum_figure(result: Result, path: Path) -> None:
    """Where the eigenvalues of a token's transition lie that are not those of the decay alone; a panel a layer.

    Those of one Householder are all real: a line a head; else the plane of all heads together.
    """
    counts, n = result.tally.plane, result.case.model["num_householder"]
    columns = min(len(counts), 4 if len(counts) <= 12 else 6)
    rows, plane, handles = -(-len(counts) // columns), n > 1, {}
    counts = counts.sum(1, keepdims=True) if plane else counts
    shares = 100 * counts / np.maximum(1, counts.sum((2, 3), keepdims=True))
    size = (max(6.5, 1.4 + 2.3 * columns), 0.9 + 2.5 * rows)
    several = f"the {n} eigenvalues" if plane else "the eigenvalue"
    title = f"{_of(result)}: {several} of each token's transition"
    with picture(path, title, rows, columns, size, sharex=True, sharey=True) as (figure, axes):
        names = ("real part", "imaginary part") if plane else ("eigenvalue", "share (%)")
        _outer_labels(axes, len(counts), *names)
        for layer, (axis, share) in enumerate(zip(axes.flat, shares, strict=False)):
            axis.set(title=f"layer {layer}", xlim=(-1.05, 1.05), xticks=[-1, 0, 1])
            if plane:
                shown, norm = np.ma.masked_equal(share[0].T, 0), _logarithmic(shares, 1e-3)
                image = axis.imshow(shown, norm=norm, origin="lower", extent=(-1, 1, -1, 1), interpolation="none")
                axis.add_patch(Circle((0, 0), 1, fill=False, color="#888888", linewidth=0.8))
                axis.set(ylim=(-1.05, 1.05), yticks=[-1, 0, 1])
                axis.grid(False)
            else:
                edges = np.linspace(-1, 1, PLANE_BINS + 1)
                handles |= _named_heads([axis.stairs(values, edges, color=shade(h, len(share)), linewidth=1.2)
                                         for h, values in enumerate(share.sum(2))])  # fmt: skip
        if plane:
            label = f"share of eigenvalues (%),\nin squares of {2 / PLANE_BINS:.3f}"
            figure.colorbar(image, ax=axes, label=label, pad=0.02, fraction=0.05, aspect=15 * len(axes))
        else:
            legend(figure, handles, columns=4)


def _logarithmic(shares: np.ndarray, least: float) -> LogNorm | None:
    """One scale of colours for all shares that are not 0."""
    return LogNorm(max(least, shares[shares > 0].min()), shares.max()) if (shares > 0).any() else None


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
def _layers(results: list[Result], title: str, path: Path) -> Iterator[tuple[np.ndarray, dict]]:
    """A picture with a panel a layer against position; gives the panels, and a place for the handles of its legend."""
    layers, longest = max(result.rank.shape[0] for result in results), max(r.positions[-1] for r in results)
    columns = min(layers, 2 if layers <= 4 else 4 if layers <= 16 else 6)
    rows, width = -(-layers // columns), 5.0 if columns <= 2 else 3.0 if columns <= 4 else 2.4
    size = (max(6.5, 0.6 + width * columns), 1.1 + (2.7 if columns <= 2 else 2.1) * rows)
    with picture(path, title, rows, columns, size, sharex=True, sharey=True) as (figure, axes):
        _outer_labels(axes, layers, "position (tokens)", "effective rank")
        handles: dict = {}
        yield axes.flat[:layers], handles
        axes.flat[0].set_ylim(bottom=0)
        for layer, axis in enumerate(axes.flat[:layers]):
            axis.set_title(f"layer {layer}", loc="left")
            axis.set_xlim(0, longest)
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
            axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
            for length in sorted({result.case.model["train_length"] or 0 for result in results}):
                if 0 < length <= longest:
                    handles[f"trained to {length:,} tokens"] = axis.axvline(length, **TRAINED)
        legend(figure, handles, columns=int(figure.get_figwidth() / 2))


def _averaged(result: Result, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions and values [P], at most MAX_POINTS: means of neighbours."""
    x, y, sizes = binned(MAX_POINTS, result.positions, values)
    return x / sizes, y / sizes


def _head_rows(axis, values: np.ndarray, layers: int, span: tuple[float, float], **options):
    """values [layers * heads, X] as colours over `span`, with a line between layers, which alone are numbered."""
    heads = len(values) // layers
    extent = (*span, len(values) - 0.5, -0.5)
    image = axis.imshow(values, extent=extent, aspect="auto", interpolation="none", **options)
    axis.set_yticks(np.arange(layers) * heads + (heads - 1) / 2, range(layers))
    axis.tick_params(axis="y", length=0)
    axis.grid(False)
    for layer in range(1, layers):
        axis.axhline(layer * heads - 0.5, color="#666666", linewidth=0.6)
    return image


def _heads(axis, result: Result, values: np.ndarray, handles: dict) -> None:
    """values [H, P] as thin lines, and their mean."""
    own = {"linewidth": 0.9, "alpha": 0.9}
    lines = [axis.plot(*_averaged(result, row), color=shade(h, len(values)), **own)[0] for h, row in enumerate(values)]
    (mean,) = axis.plot(*_averaged(result, values.mean(0, dtype=np.float64)), **MEAN)
    handles |= _named_heads(lines) | {"mean of the heads": mean}


def _named_heads(lines: list) -> dict:
    """Handles of the lines of all heads; where they are many, of the first and the last."""
    if len(lines) <= 8:
        return {f"head {h}": line for h, line in enumerate(lines)}
    return {"head 0 (dark)": lines[0], f"to head {len(lines) - 1} (light)": lines[-1]}


def _of(result: Result) -> str:
    return f"{result.case.model['name']} on {result.case.data['name']}"
