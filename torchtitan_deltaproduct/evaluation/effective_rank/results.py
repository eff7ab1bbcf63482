"""From measured ranks to results: means and spreads, what happens at document starts, as table, JSON and NPZ.

    result = Result(case)                                # case: what `long` has kept
    Console().print(table([result, ...])); result.write_npz(path); result.entry(); result.rows()

Spreads are standard deviations over sequences. The state after p tokens has position p; a document that begins after s
tokens is first seen by the state at s + 1.
"""

import math
from dataclasses import fields
from pathlib import Path

import numpy as np
from rich.table import Table

from ..pieces import Measured
from .transitions import BETA_BINS, MODULUS_BINS, PLANE_BINS, Tally

WINDOW_BINS = 32
"""Bins before and after a document start."""
CHANGE_TOKENS = 128
"""After a document start, for the change that tables tell."""
LEAST_BIN = 16
"""Tokens of such a bin, if states are not farther apart."""


class Change:
    """Effective rank around document starts, less that of the last state before each start.

    Looked at are the states as far as the next start and the one before. Starts nearer to the start of the sequence
    than the window is long do not count: the state fills up there.

    Args:
        rank: [L, H, N, P].
        positions: [P] rising, equally far apart.
        starts: [D, 2] (sequence, tokens before), sorted.

    Attributes:
        edges: [2 * WINDOW_BINS + 1] tokens since the start; the bin (a, b] has a < tokens <= b.
        mean: [L, H, 2 * WINDOW_BINS], over all starts and the states in a bin; NaN where there are none.
        states: [2 * WINDOW_BINS] their number.
        of_each: [D, L, 2 * WINDOW_BINS], the mean over heads of each start that counts, so not of those of documents
            that follow a shorter one than `every`; NaN where it has no states.
    """

    def __init__(self, rank: np.ndarray, positions: np.ndarray, starts: np.ndarray):
        width, bins = max(LEAST_BIN, int(positions[0])), 2 * WINDOW_BINS
        edges, length = width * np.arange(-WINDOW_BINS, WINDOW_BINS + 1), int(positions[-1])
        total, states = np.zeros((*rank.shape[:2], bins)), np.zeros(bins, dtype=np.int64)
        of_each = []
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
                values = rank[:, :, sequence, first:last].astype(np.float64)
                values -= values[..., middle - first - 1, None]
                place = np.searchsorted(edges, positions[first:last] - start, side="left") - 1
                added, count = np.zeros_like(total), np.bincount(place, minlength=bins)
                np.add.at(added, (slice(None), slice(None), place), values)
                total, states = total + added, states + count
                of_each.append(added.mean(1) / np.where(count > 0, count, np.nan))
        self.edges, self.states, self.mean = edges, states, total / np.where(states > 0, states, np.nan)
        self.of_each = np.stack(of_each) if of_each else np.empty((0, len(rank), bins))

    def after(self, tokens: int) -> np.ndarray:
        """[L, H] mean over the states at most so many tokens after a start; NaN if there are none."""
        chosen = (self.edges[1:] > 0) & (self.edges[1:] <= max(tokens, self.edges[WINDOW_BINS + 1])) & (self.states > 0)
        if not chosen.any():
            return np.full(self.mean.shape[:2], np.nan)
        return np.average(self.mean[..., chosen], axis=-1, weights=self.states[chosen])


class Result:
    """One model on one dataset; L layers, H heads, N sequences, P positions, n Householders.

    Attributes:
        case: the model, the dataset and where its pieces are; DataError if one is damaged.
        between, rank: [L, H, N, P, n or 1] and [L, H, N, P] float32, after each micro-step and after the last.
        positions: [P] int64: every, 2 every, ...
        mean, layer_mean: [L, H, P] float64 over sequences, [L, N, P] over heads.
        trained: index of the last position of the training length; None if it is not known, or there is none.
        starts, tally: see `EffectiveRank.measure`, of all pieces together.
        change: at document starts.
        top_beta: the largest beta there can be.
        npz: name of its file of numbers.
    """

    def __init__(self, case: Measured):
        self.case, self.npz, every = case, "", case.pieces.about["every"]
        pieces = [arrays for _, arrays in case.pieces]
        self.between = np.concatenate([arrays["rank"] for arrays in pieces], 2)
        self.rank = self.between[..., -1]
        self.positions = every * np.arange(1, self.rank.shape[3] + 1)
        self.mean, self.layer_mean = (self.rank.mean(axis, dtype=np.float64) for axis in (2, 1))
        positions = min((case.model["train_length"] or 0) // every, len(self.positions))
        self.trained = positions - 1 if positions else None
        self.starts = np.concatenate([arrays["starts"] for arrays in pieces])
        self.tally = Tally(**{field.name: sum(arrays[field.name] for arrays in pieces) for field in fields(Tally)})
        self.change = Change(self.rank, self.positions, self.starts)
        self.top_beta = 2.0 if case.model["allow_neg_eigval"] else 1.0

    def growth(self) -> np.ndarray | None:
        """[L] mean at the end over mean at the training length, less 1; None without a position between them."""
        if self.trained is None or self.trained == len(self.positions) - 1:
            return None
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = self.layer_mean.mean(1)
            return mean[:, -1] / mean[:, self.trained] - 1

    def entry(self) -> dict:
        """The summary: layers, heads, beta and eigenvalues, where trained to and at the end."""
        at = {"end": len(self.positions) - 1} | ({} if self.trained is None else {"training_length": self.trained})
        growth, layers, after = self.growth(), [], self.change.after(CHANGE_TOKENS)
        for index, (layer_rank, layer_mean) in enumerate(zip(self.rank, self.layer_mean, strict=True)):
            heads = [
                {
                    "head": h,
                    **{f"at_{name}": spread(rank[:, p]) for name, p in at.items()},
                    "change_after_document_start": after[index, h],
                    **self._transition(index, h),
                }
                for h, rank in enumerate(layer_rank)
            ]
            own = {f"at_{name}": spread(layer_mean[:, p]) for name, p in at.items()}
            layers.append({"layer": index, **own, "growth": None if growth is None else growth[index], "heads": heads})
        return {
            "npz": self.npz, "positions": {name: int(self.positions[p]) for name, p in at.items()},
            "document_starts": len(self.starts), "document_starts_compared": len(self.change.of_each),
            "layers": layers,
        }  # fmt: skip

    def _transition(self, layer: int, head: int) -> dict:
        """Of one head: mean beta of each Householder; eigenvalues by their mean modulus and the share not real.

        And the mean rank over sequences and positions after each micro-step, if it was measured.
        """
        tally, rank = self.tally, self.between[layer, head]
        tokens, modulus = max(1, int(tally.tokens[layer])), tally.modulus[layer, head]
        many, middles = max(1, int(modulus.sum())), (np.arange(MODULUS_BINS) + 0.5) / MODULUS_BINS
        between = {"mean_after_each_householder": rank.mean((0, 1), dtype=np.float64).tolist()}
        return {
            "beta_mean": (tally.beta_sum[layer, head] / tokens).tolist(),
            "eigenvalue_modulus_mean": float(modulus @ middles / many),
            "eigenvalues_complex": int(tally.rotating[layer, head]) / many,
            "eigenvalues_negative": int(tally.negative[layer, head]) / many,
            **(between if rank.shape[-1] > 1 else {}),
        }

    def rows(self) -> list[dict]:
        """One a layer and position, the mean over heads and sequences, and its deviation."""
        mean, deviation = self.layer_mean.mean(1), deviation_of(self.layer_mean, 1)
        return [
            {"layer": layer, "position": position, "rank": mean[layer, p], "rank_std": deviation[layer, p]}
            for layer in range(len(mean))
            for p, position in enumerate(self.positions.tolist())
        ]

    def write_npz(self, path: Path) -> None:
        """All numbers: ranks, those of `Tally` and `Change`, means, spreads, and edges of the bins."""
        rank, change = self.rank, self.change
        content = {
            "rank": rank, "positions": self.positions, "document_starts": self.starts, "mean": self.mean,
            "std": deviation_of(rank, 2), "change": change.mean, "change_edges": change.edges,
            "change_states": change.states, "beta_edges": np.linspace(0, self.top_beta, BETA_BINS + 1),
            "plane_edges": np.linspace(-1, 1, PLANE_BINS + 1), "modulus_edges": np.linspace(0, 1, MODULUS_BINS + 1),
            **vars(self.tally),
        }  # fmt: skip
        if self.between.shape[-1] > 1:
            content["rank_between"] = self.between
        with open(path, "wb") as file:
            np.savez_compressed(file, **content)


def deviation_of(values: np.ndarray, axis: int) -> np.ndarray:
    """Standard deviation along an axis, float64; NaN of one value."""
    if values.shape[axis] == 1:
        return np.full(values.shape[:axis] + values.shape[axis + 1 :], np.nan)
    return values.std(axis, ddof=1, dtype=np.float64)


def spread(values: np.ndarray) -> dict:
    """[N] -> mean and standard deviation, NaN of one sequence."""
    return {"mean": float(values.mean(dtype=np.float64)), "std": float(deviation_of(values, 0))}


def table(results: list[Result]) -> Table:
    """A line a layer of each model; all results are of one dataset."""
    title = f"Effective rank on {results[0].case.data['name']}: mean over heads and sequences ± std over sequences"
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
                result.case.model["name"] if index == 0 else "", str(index),
                "" if result.trained is None else _cell(result, index, result.trained), _cell(result, index, -1),
                "" if growth is None else f"{growth[index]:+.1%}", f"{heads.min():.1f} to {heads.max():.1f}",
                f"{after[index]:+.2f}" if np.isfinite(after[index]) else "",
            )  # fmt: skip
        out.add_section()
    return out


def _cell(result: Result, layer: int, position: int) -> str:
    numbers = spread(result.layer_mean[layer, :, position])
    deviation = f" ± {numbers['std']:.2f}" if math.isfinite(numbers["std"]) else ""
    return f"{numbers['mean']:.2f}{deviation} @ {result.positions[position]:,}"
