"""How the pictures of the evals look: one style, lines that are told apart in grey too, legends outside of the data.

    with picture(Path("x.png"), "title", rows=1, columns=2, size=(10, 4)) as (figure, axes):
        axes[0, 0].plot(x, y, **look(0, 2)); axes[0, 0].plot(x, z, **look(1, 2))

Without pyplot, whose figures are global, need a choice of backend and take time to import.
"""

import textwrap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

# Okabe & Ito (2008), without yellow, which is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = "osD^vPX"
NAME_WIDTH, NAME_LINES = 44, 3
"""Characters of a line of a name, and how many lines it may have."""
MOST_LENGTHS = 6
"""Training lengths that are named in a picture, each."""
WIDEST, NARROWEST = 2.8, 1.3
STYLE = {
    "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#e4e4e4", "grid.linewidth": 0.8, "legend.frameon": False,
}  # fmt: skip


@contextmanager
def picture(
    path: Path, title: str, rows: int, columns: int, size: tuple[float, float], **options
) -> Iterator[tuple[Any, np.ndarray]]:
    """A PNG of rows x columns panels: gives the figure and its axes [rows, columns]; it is written at the end.

    The `size` is width and height in inches, `title` may be empty, `options` are those of `Figure.subplots`.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(size, layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False, **options)
        if title:
            # A character is at most about 0.1 inches wide.
            figure.suptitle(in_lines(title, 6, int(10 * size[0])), x=0.01, ha="left", fontsize=11)
        save(figure, path)


def save(figure, path: Path) -> None:
    """Writes a figure in the format of the name."""
    # Laid out here: savefig would draw all of it once to lay it out, and once to write it.
    figure.set_dpi(150)
    figure.get_layout_engine().execute(figure)
    figure.set_layout_engine("none")
    figure.savefig(path, dpi=150)


def look(index: int, count: int) -> dict:
    """Colour, dashes and width of one of some lines; later ones are thinner, so that those they cover still show."""
    width = WIDEST - (WIDEST - NARROWEST) * index / max(1, count - 1) if count > 1 else 2.0
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": LINES[index % len(LINES)], "linewidth": width}


def shade(index: int, count: int):
    """One of `count` colours from dark to light, for lines that are ordered or too many to be told apart."""
    return matplotlib.colormaps["viridis"](0.85 * index / max(1, count - 1))


def band(axis, x, low, high, colour) -> None:
    """An interval about a line; `band_handle` names it in a legend."""
    axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def band_handle() -> Patch:
    """What stands for all bands of a picture in its legend."""
    return Patch(color="#777777", alpha=0.3, linewidth=0)


def legend(figure, handles: dict[str, Any], columns: int) -> None:
    """A legend below all panels, of handles by name: lines, then what they are drawn on."""
    marks = ("band", "thin", "guessing", "document start", "trained to")
    names = sorted(handles, key=lambda name: name.startswith(marks))
    # A character is about 0.07 inches wide, the line beside a name half an inch.
    widest = 0.07 * max(min(len(name), NAME_WIDTH) for name in names) + 0.5
    columns = min(len(names), columns, max(1, int(figure.get_figwidth() / widest)))
    shown = [in_lines(name) for name in names]
    figure.legend([handles[name] for name in names], shown, loc="outside lower center", ncols=columns, fontsize=9)


def in_lines(name: str, most: int = NAME_LINES, width: int = NAME_WIDTH) -> str:
    """A name in at most so many lines of a width; of one that needs more the middle is left out."""
    lines = textwrap.wrap(name, width, break_on_hyphens=False) or [name]
    if len(lines) > most:
        half = width // 2
        lines = [*lines[: most - 1], f"... {lines[-1]}"] if most > 1 else [f"{name[:half]} ... {name[-half:]}"]
    return "\n".join(lines)


def mark_trained(axis, lengths: Iterable[int]) -> None:
    """Dashed lines at the training lengths within an axis whose limits are final, with one name above it for all."""
    low, high = axis.get_xlim()
    shown = sorted(length for length in set(lengths) if low < length <= high)
    if not shown:
        return
    ends = axis.transAxes.inverted().transform(axis.transData.transform([(length, 0) for length in shown]))[:, 0]
    for length in shown:
        axis.axvline(length, color="#444444", linewidth=1, linestyle=(0, (2, 2)), zorder=1)
    several = f"{', '.join(f'{length:,}' for length in shown[:-1])} and " if len(shown) > 1 else ""
    name = f"trained to {several}{shown[-1]:,} tokens"
    if len(shown) > MOST_LENGTHS:
        name = f"trained to {len(shown)} lengths, {shown[0]:,} to {shown[-1]:,} tokens"
    place = ends.mean() if len(name) < NAME_WIDTH else 0.5
    side = "left" if place < 0.25 else "right" if place > 0.75 else "center"
    axis.annotate(
        name, (place, 1), xycoords="axes fraction", xytext=(0, 2), textcoords="offset points", va="bottom", ha=side,
        color="#444444", fontsize=8.5,
    )  # fmt: skip


def name_ends(axis, ends: list[tuple[float, float, str, Any]], room: int = 13) -> None:
    """Names lines at the right of an axis whose limits are final: (last x, last y, name, colour) of each.

    No name is on another; a thin line leads to it from its end. There is `room` for so many lines of text.
    """
    low, high = axis.get_ylim()
    most = min(NAME_LINES, max(1, room // max(1, len(ends))))
    ends = sorted(((x, y, in_lines(name, most), colour) for x, y, name, colour in ends), key=lambda end: end[1])
    lines = [1 + name.count("\n") for _, _, name, _ in ends]
    gaps = [(high - low) * (one + other) / (2 * room) for one, other in zip(lines, lines[1:], strict=False)]
    places = [min(max(y, low), high) for _, y, _, _ in ends]
    for number, gap in enumerate(gaps, 1):
        places[number] = max(places[number], places[number - 1] + gap)
    # Those that this pushed out at the top go back, and only what is in their way goes down with them.
    places[-1:] = [min(place, high) for place in places[-1:]]
    for number, gap in reversed(list(enumerate(gaps))):
        places[number] = min(places[number], places[number + 1] - gap)
    for place, (x, y, name, colour) in zip(places, ends, strict=True):
        axis.annotate(
            name, (x, y), xytext=(1.03, place), textcoords=("axes fraction", "data"), color=colour,
            fontsize=8.5, va="center", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "relpos": (0, 0.5)},
        )  # fmt: skip


def binned(points: int, *arrays: np.ndarray) -> list[np.ndarray]:
    """Sums of neighbours, so that at most so many points are left, and last the number of neighbours in each."""
    length = len(arrays[0])
    edges = np.linspace(0, length, min(points, length) + 1).astype(int)
    return [*(np.add.reduceat(array, edges[:-1], dtype=np.float64) for array in arrays), np.diff(edges)]
