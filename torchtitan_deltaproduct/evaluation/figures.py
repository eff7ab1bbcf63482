"""How the pictures of the evals look: one style, colours that everybody can tell apart, legends outside of the data.

    with picture(Path("x.png"), "title", rows=1, columns=2, size=(10, 4)) as (figure, axes):
        axes[0, 0].plot(x, y)

Import `plt` from here: the backend is chosen before pyplot is imported.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend that needs no display)

# Okabe & Ito (2008), without yellow, which is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


def style() -> AbstractContextManager:
    """Context in which all figures are made."""
    return plt.rc_context(
        {
            "font.size": 10,
            "axes.titlesize": 11,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#e4e4e4",
            "grid.linewidth": 0.8,
            "legend.frameon": False,
        }
    )


@contextmanager
def picture(
    path: Path, title: str, rows: int, columns: int, size: tuple[float, float], **options
) -> Iterator[tuple[Any, np.ndarray]]:
    """A PNG of rows x columns panels: gives the figure and its axes [rows, columns]; it is written at the end.

    Args:
        path: of the PNG.
        title: of the whole; may be empty.
        rows, columns: of panels.
        size: width and height in inches.
        options: of `plt.subplots`.
    """
    with style():
        figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)
        yield figure, axes
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        save(figure, path)


def mark_trained(axis, length: int, place: float, margin: float, above: int) -> None:
    """A dashed line at a training length, named above the axis; `place` is where it is, from 0 (left) to 1.

    Within `margin` of an end the name is on the side where there is room.
    """
    axis.axvline(length, color="#444444", linewidth=1, linestyle=(0, (2, 2)), zorder=1)
    side = "left" if place < margin else "right" if place > 1 - margin else "center"
    axis.annotate(
        f"trained to {length:,} tokens", (length, 1), xycoords=("data", "axes fraction"), xytext=(0, above),
        textcoords="offset points", va="bottom", ha=side, color="#444444", fontsize=8.5,
    )  # fmt: skip


def save(figure, path: Path) -> None:
    """Writes a PNG and forgets the figure."""
    figure.savefig(path, dpi=150)
    plt.close(figure)
