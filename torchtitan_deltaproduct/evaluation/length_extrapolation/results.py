"""From raw losses to results: positions in buckets, means with standard errors, as table, JSON and CSV.

    results = summarise(measured, buckets="")            # measured: what `long` has kept
    Console().print(table(results)); results[0].entry(); results[0].rows()

The tokens of a sequence depend on each other, the sequences do not: a bucket has one mean for each sequence, and
standard errors and 95 % intervals (Student's t) are those of the mean over sequences. Perplexity is exp(loss), its
interval that of the loss. What models have in common, the text, is most of the spread: so a second model is also
compared with the first sequence by sequence, and the interval of their difference is much narrower.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from rich.table import Table

from torchtitan_deltaproduct.errors import ConfigError, DataError
from torchtitan_deltaproduct.intervals import student_t

from ..pieces import Measured, Pieces

FIRST_BUCKET = 32
"""Positions of the first automatic bucket."""
BLOCK = 1 << 16
"""Positions summed at a time."""
LEAST_SEQUENCES = 3
"""For an interval: with two, t is 12.7, and the interval of a loss reaches below 0 nats."""


def parse_buckets(text: str, length: int, marks: Iterable[int] = ()) -> list[int]:
    """Last positions of the buckets that `--buckets` asks for; that of the last one is `length`.

    `text` is empty (two buckets an octave, 32, 48, 64, 96, ..., and the `marks`, training lengths), the number of equal
    ones, or last positions with commas, `512,1024,4096`; ConfigError if it is anything else.
    """
    try:
        numbers = [int(part) for part in text.split(",") if part] if text else []
    except ValueError:
        numbers = [0]
    if any(number < 1 or number > length for number in numbers) or sorted(set(numbers)) != numbers:
        raise ConfigError(
            f"--buckets {text}: expected a number of equal buckets, 64, or rising last positions, 512,1024,4096, "
            f"up to {length:,}"
        )
    if not numbers:
        octaves = [FIRST_BUCKET << k for k in range(length.bit_length())]
        lasts = {last for octave in octaves for last in (octave, octave * 3 // 2)} | set(marks)
        return sorted({last for last in lasts if 0 < last < length} | {length})
    if "," not in text:
        return [length * (k + 1) // numbers[0] for k in range(numbers[0])]
    return sorted({*numbers, length})


@dataclass(frozen=True)
class Sums:
    """Sums over the first positions of each of S sequences."""

    edges: np.ndarray
    """[E] int64, numbers of positions, rising from 0."""
    loss: np.ndarray
    """[S, E] float64, of the losses (nats) of the first `edges[e]` positions."""
    correct: np.ndarray
    """[S, E] int64, right predictions among them."""

    @classmethod
    def of(cls, pieces: Pieces, edges: Iterable[int]) -> "Sums":
        """Reads the raw losses once, a piece at a time; 0 and the length are added to the edges."""
        length = pieces.about["length"]
        edges = np.unique([0, length, *edges])
        loss, correct = (np.zeros((pieces.about["sequences"], len(edges)), kind) for kind in (np.float64, np.int64))
        for (first, last), positions in pieces:
            for start in range(0, length, BLOCK):
                # Position t, from 0, is the last of t + 1: it counts for the first edge that is no smaller.
                edge = np.searchsorted(edges, np.arange(start, min(start + BLOCK, length)) + 1)
                for row in range(first, last):
                    values = positions[row - first, start : start + BLOCK]
                    loss[row] += np.bincount(edge, values["loss"], len(edges))
                    correct[row] += np.bincount(edge[values["correct"]], minlength=len(edges))
        return cls(edges, loss.cumsum(1), correct.cumsum(1))

    def between(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Mean loss and accuracy of each sequence at positions first .. last, counted from 1: [S] float64 each."""
        a, b = np.searchsorted(self.edges, [first - 1, last])
        assert self.edges[a] == first - 1 and self.edges[b] == last
        count = last - first + 1
        return (self.loss[:, b] - self.loss[:, a]) / count, (self.correct[:, b] - self.correct[:, a]) / count


def mean_interval(values: np.ndarray, name: str, least: float = -math.inf, most: float = math.inf) -> dict[str, float]:
    """Mean of independent values [S], which are from `least` to `most`: `name`, its standard error, 95 % interval.

    NaN where they are not known: the error of one value, the interval of fewer than `LEAST_SEQUENCES`.
    """
    n, mean = len(values), float(np.mean(values))
    error = float(np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    half = error * student_t(n - 1) if n >= LEAST_SEQUENCES else math.nan
    low, high = np.clip([mean - half, mean + half], least, most).tolist()
    return {name: mean, f"{name}_se": error, f"{name}_low": low, f"{name}_high": high}


def statistics(sums: Sums, first: int, last: int) -> dict[str, float]:
    """All numbers of one bucket, positions first .. last counted from 1."""
    loss, accuracy = sums.between(first, last)
    running = sums.between(1, last)[0]
    return {
        "first": first, "last": last, "tokens": len(loss) * (last - first + 1),
        **_with_perplexity(loss, "loss", "perplexity"), **mean_interval(accuracy, "accuracy", 0, 1),
        **_with_perplexity(running, "running_loss", "running_perplexity"),
    }  # fmt: skip


def _with_perplexity(losses: np.ndarray, loss: str, perplexity: str) -> dict[str, float]:
    numbers = mean_interval(losses, loss, least=0)
    exponentials = {f"{perplexity}{end}": math.exp(min(numbers[loss + end], 700.0)) for end in ("", "_low", "_high")}
    return numbers | exponentials


def beyond_training(sums: Sums, train_length: int | None, length: int) -> dict | None:
    """How the loss changes beyond the training length T: the last half of all positions against T/2 < t <= T.

    The difference is taken within each sequence, which makes its interval much narrower than those of the two. None
    if T is not known or the sequences are not at least twice as long.
    """
    if not train_length or train_length < 2 or length < 2 * train_length:
        return None
    trained, beyond = (train_length // 2 + 1, train_length), (length // 2 + 1, length)
    change = sums.between(*beyond)[0] - sums.between(*trained)[0]
    both = {"training": statistics(sums, *trained), "beyond": statistics(sums, *beyond)}
    return both | mean_interval(change, "difference")


class Result:
    """One model on one dataset, in buckets that end at `lasts`, beside the `first` model on the same sequences.

    Attributes:
        case: what was measured.
        sums: of the losses up to the edges of the buckets.
        buckets: `statistics` of each, and `minus_first`: the loss minus that of the first model (NaN for itself).
        beyond: `beyond_training`.
    """

    def __init__(self, case: Measured, lasts: list[int], first: "Result | None" = None):
        length, trained = case.length, case.model["train_length"] or 0
        self.case, self.buckets = case, []
        self.sums = Sums.of(case.pieces, [*lasts, trained // 2, min(trained, length), length // 2])
        for start, last in zip([1, *(last + 1 for last in lasts[:-1])], lasts, strict=True):
            loss = self.sums.between(start, last)[0]
            change = loss - first.sums.between(start, last)[0] if first else np.full(1, np.nan)
            self.buckets.append(statistics(self.sums, start, last) | mean_interval(change, "minus_first"))
        self.beyond = beyond_training(self.sums, trained, length)

    @property
    def compared(self) -> bool:
        """Whether the buckets have a `minus_first`."""
        return any(math.isfinite(bucket["minus_first"]) for bucket in self.buckets)

    @property
    def broken_from(self) -> int | None:
        """First position of the first bucket in which a loss is not finite."""
        return next((bucket["first"] for bucket in self.buckets if not math.isfinite(bucket["loss"])), None)

    def entry(self) -> dict:
        return {"beyond_training": self.beyond, "buckets": self.buckets}

    def rows(self) -> list[dict]:
        """One a bucket."""
        about = self.case.pieces.about
        head = {"documents": self.case.data["kind"], "length": about["length"], "sequences": about["sequences"]}
        return [head | bucket for bucket in self.buckets]

    def verdict(self) -> str | None:
        """One line on what happens beyond the training length."""
        if self.beyond is None:
            return None
        change, low, high = (self.beyond[f"difference{end}"] for end in ("", "_low", "_high"))
        spans = [f"{s['first']:,} to {s['last']:,}" for s in (self.beyond["training"], self.beyond["beyond"])]
        unclear = " (no clear change)" if low <= 0 <= high else ""
        return (
            f"{self.case.name}: loss {self.beyond['training']['loss']:.3f} at positions "
            f"{spans[0]}, up to its training length; {self.beyond['beyond']['loss']:.3f} at {spans[1]}: "
            f"{_with_half_width(change, high, '+.3f')}{unclear}"
        )


def summarise(measured: list[Measured], buckets: str) -> list[Result]:
    """Results in the buckets that `--buckets` asks for, each beside the first model on the same sequences.

    Raises:
        DataError: the sequences are of different lengths. ConfigError: `buckets` is none.
    """
    lengths = {case.length: case.pieces.folder for case in measured}
    if len(lengths) > 1:
        places = ", ".join(f"{length:,} in {folder}" for length, folder in lengths.items())
        raise DataError(f"the results have different lengths: {places}\nname those of one length")
    marks = [case.model["train_length"] for case in measured if case.model["train_length"]]
    lasts = parse_buckets(buckets, measured[0].length, marks)
    first: dict[str, Result] = {}
    results = []
    for case in measured:
        texts = case.pieces.about["texts"]
        results.append(Result(case, lasts, first.get(texts)))
        first.setdefault(texts, results[-1])
    return results


def table(results: list[Result]) -> Table:
    """The results on one dataset: a row a bucket; a column a model with the loss, perplexity and accuracy."""
    marks = {result.case.model["train_length"] for result in results}
    out = Table()
    out.add_column("\npositions", justify="right")
    for result in results:
        more = "     minus first" if result.compared else ""
        # Names that do not fit are folded: cut off, two of them may look the same.
        title = f"{result.case.model['name']}\nloss ± 95 %   perpl.   acc.{more}"
        out.add_column(title, justify="right", overflow="fold")
    for rows in zip(*(result.buckets for result in results), strict=True):
        last = rows[0]["last"]
        out.add_row(f"{rows[0]['first']:,} - {last:,}", *map(_cell, rows),
                    end_section=last in marks and last < results[0].case.length)  # fmt: skip
    return out


def _cell(bucket: dict) -> str:
    if not math.isfinite(bucket["loss"]):
        return "not finite"
    loss = _with_half_width(bucket["loss"], bucket["loss_high"], ".3f")
    change = _with_half_width(bucket["minus_first"], bucket["minus_first_high"], "+.3f")
    perplexity = bucket["perplexity"]
    form = ",.2f" if perplexity < 1000 else ",.0f" if perplexity < 1e6 else ".1e"
    compared = f"   {change}" if math.isfinite(bucket["minus_first"]) else ""
    return f"{loss}  {f'{perplexity:{form}}'.rjust(7)}  {bucket['accuracy']:5.1%}{compared}"


def _with_half_width(value: float, high: float, form: str) -> str:
    return f"{value:{form}}" + (f" ± {high - value:.3f}" if math.isfinite(high) else "")
