"""From measured ranks to results: means and spreads, what happens at document starts, as table, JSON and NPZ.

    result = Result(model, data, pieces)
    Console().print(table([result, ...])); result.write_npz(path); result.entry(folder); result.rows()

Spreads are over sequences: standard deviation, and the 10 %, 50 % and 90 % quantiles. The state after p tokens has
position p; a document that begins after s tokens is first seen by the state at s + 1.
"""

import math
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from rich.table import Table

from ..pieces import Pieces
from .measure import Numbers
from .transitions import ANGLE_BINS, BETA_BINS, DECAY_BINS, MODULUS_BINS, PLANE_BINS

QUANTILES = (0.1, 0.5, 0.9)
WINDOW_BINS = 32
"""Bins before and after a document start."""
CHANGE_TOKENS = 128
"""After a document start, for the change that tables tell."""
LEAST_BIN = 16
"""Tokens of such a bin, if states are not farther apart."""


@dataclass(frozen=True)
class Change:
    """Effective rank around document starts, less that of the last state before each start.

    Starts nearer to the start of the sequence than the window is long do not count: the state fills up there.

    Attributes:
        edges: [2 * WINDOW_BINS + 1] tokens since the start; the bin (a, b] has a < tokens <= b.
        mean: [L, H, 2 * WINDOW_BINS], over all starts and the states in a bin; NaN where there are none.
        states: [2 * WINDOW_BINS] their number.
        documents: starts that count, those of documents that follow a shorter one than `every` left out too.
    """

    edges: np.ndarray
    mean: np.ndarray
    states: np.ndarray
    documents: int

    def after(self, tokens: int) -> np.ndarray:
        """[L, H] mean over the states at most so many tokens after a start; NaN if there are none."""
        chosen = (self.edges[1:] > 0) & (self.edges[1:] <= max(tokens, self.edges[WINDOW_BINS + 1])) & (self.states > 0)
        if not chosen.any():
            return np.full(self.mean.shape[:2], np.nan)
        return np.average(self.mean[..., chosen], axis=-1, weights=self.states[chosen])


@dataclass
class Result:
    """One model on one dataset; L layers, H heads, N sequences, P positions.

    Attributes:
        model, data, pieces: see `Measured`.
        numbers: all that was measured.
        change: at document starts.
        npz: name of its file of numbers.
    """

    model: dict
    data: dict
    pieces: Pieces
    numbers: Numbers = field(init=False)
    change: Change = field(init=False)
    npz: str = ""

    def __post_init__(self):
        self.numbers = Numbers.of(self.pieces)
        self.change = document_change(self.rank, self.positions, self.numbers.starts)

    @property
    def rank(self) -> np.ndarray:
        """[L, H, N, P] float32 after the last micro-step."""
        return self.numbers.rank[..., -1]

    @property
    def every(self) -> int:
        return self.pieces.about["every"]

    @cached_property
    def positions(self) -> np.ndarray:
        """[P] int64: every, 2 every, ..."""
        return self.every * np.arange(1, self.numbers.rank.shape[3] + 1)

    @cached_property
    def mean(self) -> np.ndarray:
        """[L, H, P] float64 over sequences."""
        return self.rank.mean(2, dtype=np.float64)

    @cached_property
    def layer_mean(self) -> np.ndarray:
        """[L, N, P] float64 over heads."""
        return self.rank.mean(1, dtype=np.float64)

    @property
    def trained(self) -> int | None:
        """Index of the last position of the training length; None if it is not known, or there is none."""
        length = self.model["train_length"]
        index = -1 if length is None else min(length // self.every, len(self.positions)) - 1
        return index if index >= 0 else None

    def growth(self) -> np.ndarray | None:
        """[L] mean at the end over mean at the training length, less 1; None without a position between them."""
        if self.trained is None or self.trained == len(self.positions) - 1:
            return None
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = self.layer_mean.mean(1)
            return mean[:, -1] / mean[:, self.trained] - 1

    def spread(self, values: np.ndarray) -> dict:
        """[N] -> mean, standard deviation (None of one sequence) and quantiles."""
        values = values.astype(np.float64)
        quantiles = zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)
        return {
            "mean": values.mean(),
            "std": values.std(ddof=1) if len(values) > 1 else math.nan,
            **{f"q{100 * level:.0f}": value for level, value in quantiles},
        }

    def entry(self, folder: Path) -> dict:
        """The summary for a file in `folder`: layers, heads, beta and eigenvalues, where trained to and at the end."""
        at = {"end": len(self.positions) - 1} | ({} if self.trained is None else {"training_length": self.trained})
        growth, layers = self.growth(), []
        for index in range(self.rank.shape[0]):
            heads = [
                {
                    "head": h,
                    **{f"at_{name}": self.spread(self.rank[index, h, :, p]) for name, p in at.items()},
                    "change_after_document_start": self.change.after(CHANGE_TOKENS)[index, h],
                    **self._transition(index, h),
                    **self._between(index, h),
                }
                for h in range(self.rank.shape[1])
            ]
            own = {f"at_{name}": self.spread(self.layer_mean[index, :, p]) for name, p in at.items()}
            layers.append({"layer": index, **own, "growth": None if growth is None else growth[index], "heads": heads})
        return {
            "model": self.model, "data": self.data, "settings": self.pieces.about, "npz": self.npz,
            "raw": os.path.relpath(self.pieces.folder, folder),
            "positions": {name: int(self.positions[p]) for name, p in at.items()},
            "document_starts": len(self.numbers.starts), "document_starts_compared": self.change.documents,
            "layers": layers,
        }  # fmt: skip

    def _between(self, layer: int, head: int) -> dict:
        """Of one head: mean over sequences and positions after each micro-step, if they were measured."""
        if self.numbers.rank.shape[-1] == 1:
            return {}
        return {"mean_after_each_householder": self.numbers.rank[layer, head].mean((0, 1), dtype=np.float64).tolist()}

    def _transition(self, layer: int, head: int) -> dict:
        """Of one head: mean beta of each Householder; eigenvalues by their mean modulus and the share not real."""
        tally = self.numbers.tally
        tokens, modulus = max(1, int(tally.tokens[layer])), tally.modulus[layer, head]
        many, middles = max(1, int(modulus.sum())), (np.arange(MODULUS_BINS) + 0.5) / MODULUS_BINS
        return {
            "beta_mean": (tally.beta_sum[layer, head] / tokens).tolist(),
            "eigenvalue_modulus_mean": float(modulus @ middles / many),
            "eigenvalues_complex": int(tally.rotating[layer, head]) / many,
            "eigenvalues_negative": int(tally.negative[layer, head]) / many,
        }

    def rows(self) -> list[list]:
        """For CSV: one a layer and position, the mean over heads and sequences, and its deviation."""
        head = [self.model["label"], self.model["step"], self.model["train_length"], self.data["name"]]
        mean, several = self.layer_mean.mean(1), self.layer_mean.shape[1] > 1
        deviation = self.layer_mean.std(1, ddof=1) if several else np.full_like(mean, np.nan)
        return [
            [*head, layer, *column]
            for layer, (ranks, spreads) in enumerate(zip(mean, deviation, strict=True))
            for column in zip(self.positions.tolist(), ranks, spreads, strict=True)
        ]

    def write_npz(self, path: Path) -> None:
        """All numbers: those of `Numbers`, `Tally` and `Change`, means, spreads, and edges of the bins."""
        rank, tally, change = self.rank, self.numbers.tally, self.change
        top = 2.0 if self.model["allow_neg_eigval"] else 1.0
        content = {
            "rank": rank, "positions": self.positions, "document_starts": self.numbers.starts, "mean": self.mean,
            "std": rank.std(2, ddof=1, dtype=np.float64) if rank.shape[2] > 1 else np.full(self.mean.shape, np.nan),
            "quantiles": np.quantile(rank, QUANTILES, axis=2), "quantile_levels": np.array(QUANTILES),
            "change": change.mean, "change_edges": change.edges, "change_states": change.states,
            "beta_edges": np.linspace(0, top, BETA_BINS + 1), "decay_edges": np.linspace(0, 1, DECAY_BINS + 1),
            "plane_edges": np.linspace(-1, 1, PLANE_BINS + 1), "modulus_edges": np.linspace(0, 1, MODULUS_BINS + 1),
            "angle_edges": np.linspace(0, math.pi, ANGLE_BINS + 1),
            **vars(tally),
        }  # fmt: skip
        if self.numbers.rank.shape[-1] > 1:
            content["rank_between"] = self.numbers.rank
        with open(path, "wb") as file:
            np.savez_compressed(file, **content)


def document_change(rank: np.ndarray, positions: np.ndarray, starts: np.ndarray) -> Change:
    """Looks at the states around each document start, as far as the next start and the one before.

    Args:
        rank: [L, H, N, P].
        positions: [P] rising, equally far apart.
        starts: [D, 2] (sequence, tokens before), sorted.
    """
    width = max(LEAST_BIN, int(positions[0]))
    edges, length = width * np.arange(-WINDOW_BINS, WINDOW_BINS + 1), int(positions[-1])
    total, states = np.zeros((*rank.shape[:2], 2 * WINDOW_BINS)), np.zeros(2 * WINDOW_BINS, dtype=np.int64)
    documents = 0
    for sequence in np.unique(starts[:, 0]):
        own = starts[starts[:, 0] == sequence, 1]
        for before, start, after in zip([0, *own[:-1]], own, [*own[1:], length], strict=True):
            if start + edges[0] < 0:
                continue
            first, middle, last = np.searchsorted(
                positions, [max(before, start + edges[0]), start, min(after, start + edges[-1])], side="right"
            )
            if middle == first:
                continue
            documents += 1
            values = rank[:, :, sequence, first:last].astype(np.float64)
            values -= values[..., middle - first - 1, None]
            bins = np.searchsorted(edges, positions[first:last] - start, side="left") - 1
            np.add.at(total, (slice(None), slice(None), bins), values)
            states += np.bincount(bins, minlength=2 * WINDOW_BINS)
    with np.errstate(invalid="ignore"):
        return Change(edges, total / np.where(states > 0, states, np.nan), states, documents)


def table(results: list[Result]) -> Table:
    """A line a layer of each model; all results are of one dataset."""
    first = results[0]
    title = f"Effective rank on {first.data['name']}: mean over heads and sequences ± std over sequences"
    out = Table(title=title, title_justify="left", min_width=len(title))
    for name in ("model", "layer"):
        out.add_column(name)
    for name in ("at the training length", "at the end", "growth", "heads at the end", "new document"):
        out.add_column(name, justify="right")
    for result in results:
        growth, after = result.growth(), result.change.after(CHANGE_TOKENS).mean(1)
        for index in range(result.rank.shape[0]):
            heads = result.mean[index, :, -1]
            out.add_row(
                result.model["name"] if index == 0 else "", str(index),
                "" if result.trained is None else _cell(result, index, result.trained), _cell(result, index, -1),
                "" if growth is None else f"{growth[index]:+.1%}", f"{heads.min():.1f} to {heads.max():.1f}",
                f"{after[index]:+.2f}" if np.isfinite(after[index]) else "",
            )  # fmt: skip
        out.add_section()
    return out


def _cell(result: Result, layer: int, position: int) -> str:
    values = result.layer_mean[layer, :, position]
    spread = f" ± {values.std(ddof=1):.2f}" if len(values) > 1 else ""
    return f"{values.mean():.2f}{spread} @ {result.positions[position]:,}"
