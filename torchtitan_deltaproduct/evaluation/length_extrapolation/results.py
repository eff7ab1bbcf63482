"""From raw losses to results: positions in buckets, means with standard errors, as table, JSON and CSV.

    results = results_of([(model, data, parts), ...], lasts=default_buckets(32_768))
    Console().print(table(results)); write_json(path, results); write_csv(path, results)

The tokens of a sequence depend on each other, the sequences do not: a bucket has one mean for each sequence, and
standard errors and 95 % intervals (Student's t) are those of the mean over sequences. Perplexity is exp(loss), its
interval that of the loss. What models have in common, the text, is most of the spread: so a second model is also
compared with the first sequence by sequence, and the interval of their difference is much narrower.
"""

import csv
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from rich.table import Table

from torchtitan_deltaproduct.errors import ConfigError, DataError

from ..json_file import read_results as read_entries
from ..json_file import write_json as write_json_file
from .parts import Losses, Sums

VERSION = 1
FIRST_BUCKET = 32
"""Positions of the first automatic bucket."""


def default_buckets(length: int, marks: tuple[int, ...] = ()) -> list[int]:
    """Last positions of two buckets an octave, 32, 48, 64, 96, ..., of the `marks` below `length`, and `length`."""
    octaves = [FIRST_BUCKET << k for k in range(length.bit_length())]
    found = {last for octave in octaves for last in (octave, octave * 3 // 2)} | set(marks)
    return sorted({last for last in found if 0 < last < length} | {length})


def parse_buckets(text: str, length: int, marks: tuple[int, ...] = ()) -> list[int]:
    """Last positions of the buckets that `--buckets` asks for.

    Args:
        text: empty (`default_buckets`), the number of equal ones, or last positions with commas, `512,1024,4096`.
        length: last position of all; ends the last bucket.
        marks: training lengths.

    Raises:
        ConfigError: anything else.
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
        return default_buckets(length, marks)
    if "," not in text:
        return [length * (k + 1) // numbers[0] for k in range(numbers[0])]
    return sorted({*numbers, length})


@lru_cache
def student_t(degrees: int, share: float = 0.95) -> float:
    """The t with P(|T| < t) = share."""
    from scipy.stats import t  # takes a second to import

    return float(t.ppf((1 + share) / 2, degrees))


def mean_interval(values: np.ndarray) -> dict[str, float]:
    """Mean of independent values [S], its standard error and 95 % interval; NaN where they are not known."""
    n, mean = len(values), float(np.mean(values))
    error = float(np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    half = error * student_t(n - 1) if n > 1 else math.nan
    return {"": mean, "_se": error, "_low": mean - half, "_high": mean + half}


def statistics(sums: Sums, first: int, last: int) -> dict[str, float]:
    """All numbers of one bucket, positions first .. last counted from 1."""
    loss, accuracy = sums.between(first, last)
    running, _ = sums.between(1, last)
    out: dict[str, float] = {"first": first, "last": last, "tokens": len(loss) * (last - first + 1)}
    out |= {f"loss{key}": value for key, value in mean_interval(loss).items()}
    out |= {f"perplexity{key}": _exp(out[f"loss{key}"]) for key in ("", "_low", "_high")}
    share = mean_interval(accuracy)
    share |= {"_low": max(share["_low"], 0.0), "_high": min(share["_high"], 1.0)} if len(loss) > 1 else {}
    out |= {f"accuracy{key}": value for key, value in share.items()}
    out |= {f"running_loss{key}": value for key, value in mean_interval(running).items()}
    return out | {f"running_perplexity{key}": _exp(out[f"running_loss{key}"]) for key in ("", "_low", "_high")}


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))


def beyond_training(sums: Sums, train_length: int | None, length: int) -> dict | None:
    """How the loss changes beyond the training length T: the last half of all positions against T/2 < t <= T.

    The difference is taken within each sequence, which makes its interval much narrower than those of the two. None
    if T is not known or the sequences are not at least twice as long.
    """
    if not train_length or train_length < 2 or length < 2 * train_length:
        return None
    stretches = [(train_length // 2 + 1, train_length), (length // 2 + 1, length)]
    trained, beyond = (statistics(sums, *stretch) for stretch in stretches)
    change = sums.between(*stretches[1])[0] - sums.between(*stretches[0])[0]
    named = {f"difference{key}": value for key, value in mean_interval(change).items()}
    return {"training": trained, "beyond": beyond, **named}


@dataclass(frozen=True)
class Result:
    """One model on one dataset.

    Attributes:
        model: name (short), label, path, step, train_length, num_householder, parameters.
        data: name (short), said (one line), and `Texts.about`.
        parts: the raw losses.
        sums: of the losses up to the edges of the buckets.
        buckets: `statistics` of each, and `minus_first`: the loss minus that of the first model (NaN for itself).
        beyond: `beyond_training`.
    """

    model: dict
    data: dict
    parts: Losses
    sums: Sums
    buckets: list[dict]
    beyond: dict | None

    @classmethod
    def of(cls, model: dict, data: dict, parts: Losses, lasts: list[int], first: "Result | None" = None) -> "Result":
        """Reads the raw losses once.

        Args:
            model, data, parts: as the attributes.
            lasts: last positions of the buckets.
            first: of the first model on the same sequences, in the same buckets.
        """
        length, trained = parts.about["length"], model["train_length"] or 0
        sums = parts.sums([*lasts, trained // 2, min(trained, length), length // 2])
        firsts = [1, *(last + 1 for last in lasts[:-1])]
        buckets = []
        for start, last in zip(firsts, lasts, strict=True):
            change = mean_interval(np.full(1, np.nan))
            if first is not None:
                change = mean_interval(sums.between(start, last)[0] - first.sums.between(start, last)[0])
            named = {f"minus_first{key}": value for key, value in change.items()}
            buckets.append(statistics(sums, start, last) | named)
        return cls(model, data, parts, sums, buckets, beyond_training(sums, trained, length))

    @property
    def length(self) -> int:
        return self.parts.about["length"]

    @property
    def compared(self) -> bool:
        """Whether the buckets have a `minus_first`."""
        return any(math.isfinite(bucket["minus_first"]) for bucket in self.buckets)

    @property
    def broken_from(self) -> int | None:
        """First position of the first bucket in which a loss is not finite."""
        return next((bucket["first"] for bucket in self.buckets if not math.isfinite(bucket["loss"])), None)

    def verdict(self) -> str | None:
        """One line on what happens beyond the training length."""
        if self.beyond is None:
            return None
        half = self.beyond["difference_high"] - self.beyond["difference"]
        spans = [f"{s['first']:,} to {s['last']:,}" for s in (self.beyond["training"], self.beyond["beyond"])]
        unclear = " (no clear change)" if abs(self.beyond["difference"]) <= half else ""
        return (
            f"{self.model['name']}, {self.data['name']}: loss {self.beyond['training']['loss']:.3f} at positions "
            f"{spans[0]}, up to its training length; {self.beyond['beyond']['loss']:.3f} at {spans[1]}: "
            f"{_with_error(self.beyond, 'difference', '+.3f')}{unclear}"
        )

    def to_dict(self, folder: Path) -> dict:
        """For JSON; raw results are named relative to the `folder` of the file."""
        kept = ("dtype", "device", "batch", "segment", "length", "sequences")
        return {
            "model": self.model | {"weights": self.parts.about["weights"]},
            "data": self.data,
            "settings": {key: self.parts.about[key] for key in kept},
            "raw": os.path.relpath(self.parts.folder, folder),
            "beyond_training": self.beyond,
            "buckets": self.buckets,
        }


def results_of(found: list[tuple[dict, dict, Losses]], lasts: list[int]) -> list[Result]:
    """Results of (model, data, raw losses), each beside that of the first model on the same sequences."""
    results: list[Result] = []
    for model, data, parts in found:
        first = next((other for other in results if other.parts.about["texts"] == parts.about["texts"]), None)
        results.append(Result.of(model, data, parts, lasts, first))
    return results


def table(results: list[Result]) -> Table:
    """The results on one dataset: a row a bucket; a column a model with the loss, perplexity and accuracy."""
    marks = {result.model["train_length"] for result in results}
    out = Table()
    out.add_column("\npositions", justify="right")
    for result in results:
        more = "     minus first" if result.compared else ""
        # Names that do not fit are folded: cut off, two of them may look the same.
        title = f"{result.model['name']}\nloss ± 95 %   perpl.   acc.{more}"
        out.add_column(title, justify="right", overflow="fold")
    for rows in zip(*(result.buckets for result in results), strict=True):
        cells = [_cell(row) for row in rows]
        last = rows[0]["last"]
        out.add_row(f"{rows[0]['first']:,} - {last:,}", *cells, end_section=last in marks and last < results[0].length)
    return out


def _cell(bucket: dict) -> str:
    if not math.isfinite(bucket["loss"]):
        return "not finite"
    change = bucket["minus_first"]
    more = f"   {_with_error(bucket, 'minus_first', '+.3f')}" if math.isfinite(change) else ""
    return f"{_with_error(bucket, 'loss', '.3f')}  {_short(bucket['perplexity'])}  {bucket['accuracy']:5.1%}{more}"


def _with_error(bucket: dict, name: str, form: str) -> str:
    half = bucket[f"{name}_high"] - bucket[name]
    return f"{bucket[name]:{form}}" + (f" ± {half:.3f}" if math.isfinite(half) else "")


def _short(perplexity: float) -> str:
    form = ",.2f" if perplexity < 1000 else ",.0f" if perplexity < 1e6 else ".1e"
    return f"{perplexity:{form}}".rjust(7)


def write_json(path: Path, results: list[Result]) -> None:
    """Everything, and where the raw results lie."""
    content = {
        "version": VERSION,
        "units": "loss in nats a token; positions counted from 1: position t predicts a token from the t before it",
        "intervals": "95 %, Student's t over sequences; the tokens of a sequence do not count as independent",
        "results": [result.to_dict(path.parent) for result in results],
    }
    write_json_file(path, content)


def write_csv(path: Path, results: list[Result]) -> None:
    """One row a model, dataset and bucket; fields are empty where JSON has null."""
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as stream:
        writer = csv.writer(stream)
        writer.writerow(["model", "step", "train_length", "data", "documents", "length", "sequences",
                         *results[0].buckets[0]])  # fmt: skip
        for result in results:
            head = [result.model["label"], result.model["step"], result.model["train_length"], result.data["name"],
                    result.data["kind"], result.length, result.parts.about["sequences"]]  # fmt: skip
            for bucket in result.buckets:
                writer.writerow([*head, *(_text(value) for value in bucket.values())])


def _text(value: float) -> str | int:
    if isinstance(value, int):
        return value
    return f"{value:.6f}" if math.isfinite(value) else ""


def read_results(paths: list[Path], buckets: str, rename: Callable[[list[dict]], list[str]]) -> list[Result]:
    """Results of earlier runs in other buckets, from their raw losses.

    Args:
        paths: their length_extrapolation.json.
        buckets: as `parse_buckets`.
        rename: short names of models that were named in different files.

    Raises:
        DataError: a file, or raw results it names, are not there, or they are of different lengths. ConfigError:
            `buckets` is none.
    """
    found = [
        (entry["model"], entry["data"], Losses.at(path.parent / entry["raw"]))
        for path in paths
        for entry in read_entries(path)
    ]
    lengths = {parts.about["length"]: parts.folder for _, _, parts in found}
    if len(lengths) > 1:
        said = ", ".join(f"{length:,} in {folder}" for length, folder in lengths.items())
        raise DataError(f"the results have different lengths: {said}\nname those of one length")
    names = rename([model for model, _, _ in found])
    found = [(model | {"name": name}, data, parts) for (model, data, parts), name in zip(found, names, strict=True)]
    lasts = parse_buckets(buckets, found[0][2].about["length"], training_lengths([model for model, _, _ in found]))
    return results_of(found, lasts)


def training_lengths(models: list[dict]) -> tuple[int, ...]:
    """Those of `Result.model` that are known."""
    return tuple(sorted({model["train_length"] for model in models if model["train_length"]}))
