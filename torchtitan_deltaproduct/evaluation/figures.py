"""How the pictures of the evals look: one style, colours that everybody can tell apart, legends outside of the data.

    with style():
        figure, axes = plt.subplots(layout="constrained")
        save(figure, Path("x.png"))

Import `plt` from here: the backend is chosen before pyplot is imported.
"""

from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib

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


def save(figure, path: Path) -> None:
    """Writes a PNG and forgets the figure."""
    figure.savefig(path, dpi=150)
    plt.close(figure)
