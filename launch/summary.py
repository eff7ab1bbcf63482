"""The results of many runs, grouped over their seeds: one table for the terminal and for Markdown.

    summary = Summary([Result("n2_pm1", 1, {"solved": 1.0, "loss": 0.01}), ...], planned=4)
    console.print(summary.table())
    summary.write(Path("outputs/state_tracking"))            # results.jsonl, results.csv, results.md

A setting's cell is the mean over its seeds, with the least and the greatest of them; of `solved` it is the number of
seeds, with the 95 % interval of the share (Wilson).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table

from torchtitan_deltaproduct.evaluation.files import finite, write_csv
from torchtitan_deltaproduct.files import write_atomically
from torchtitan_deltaproduct.intervals import wilson


@dataclass(frozen=True)
class Result:
    """What one finished run came to: numbers by name, None where there is none, and the recipe they are of."""

    setting: str
    seed: int
    metrics: dict[str, float | None]
    recipe: str = ""


@dataclass(frozen=True)
class Summary:
    """Results of the finished ones of `planned` runs, of whose evaluations some may be left to do."""

    results: list[Result]
    planned: int
    left: int = 0

    @property
    def missing(self) -> int:
        return self.planned - len(self.results)

    def of(self, setting: str) -> list[Result]:
        """The results of a setting, a seed each."""
        return [result for result in self.results if result.setting == setting]

    def without(self, names: Sequence[str]) -> "Summary":
        """The same without some metrics."""
        kept = [
            replace(result, metrics={k: v for k, v in result.metrics.items() if k not in names})
            for result in self.results
        ]
        return replace(self, results=kept)

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """The header of the table, and a line a setting."""
        metrics = list(dict.fromkeys(name for result in self.results for name in result.metrics))
        lines = []
        for setting in dict.fromkeys(result.setting for result in self.results):
            seeds = self.of(setting)
            cells = [cell(name, [result.metrics.get(name) for result in seeds]) for name in metrics]
            lines.append([setting, str(len(seeds)), *cells])
        return ["setting", "seeds", *metrics], lines

    def note(self) -> str:
        """What is missing, in words, or ""."""
        runs = f"{self.missing} of {self.planned} runs" if self.missing else ""
        evaluations = f"{self.left} evaluations of finished runs (--dry-run says which)" if self.left else ""
        return " and ".join(filter(None, (runs, evaluations))) + " are not done." if runs or evaluations else ""

    def table(self) -> Table:
        """The table for a terminal."""
        header, lines = self.cells()
        table = Table(caption=self.note() or None, caption_justify="left")
        for name in header:
            table.add_column(name, justify="left" if name == "setting" else "right", overflow="fold")
        for line in lines:
            table.add_row(*line)
        return table

    def markdown(self) -> str:
        """The same as Markdown."""
        header, lines = self.cells()
        return (markdown_table(header, lines) if lines else "") + (f"\n{self.note()}\n" if self.note() else "")

    def write(self, folder: Path) -> None:
        """Writes results.jsonl (a line a run), results.csv (a line a number of a run) and results.md."""
        records = [finite(vars(result)) for result in self.results]
        write_atomically(folder / "results.jsonl", "".join(json.dumps(record) + "\n" for record in records))
        numbers = [
            [result.setting, result.seed, name, "" if value is None else repr(value)]
            for result in self.results
            for name, value in result.metrics.items()
        ]
        write_csv(folder / "results.csv", ["setting", "seed", "metric", "value"], numbers, end="\n")
        write_atomically(folder / "results.md", self.markdown())


def markdown_table(header: list[str], lines: list[list[str]]) -> str:
    """A table in Markdown, all but the first column to the right."""
    rows = [header, ["---", *["---:"] * (len(header) - 1)], *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def cell(name: str, values: list[float | None]) -> str:
    """One number over the seeds of a setting."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    if name.endswith("solved"):
        low, high = wilson(sum(known), len(known))
        return f"{sum(known):.0f} of {len(known)} ({100 * low:.0f} to {100 * high:.0f} %)"
    percent = "accuracy" in name
    shown = sum(known) / len(known), min(known), max(known)
    mean, low, high = (show(value, percent, max(map(abs, shown))) for value in shown)
    notes = [f"{low} to {high}"] if len(known) > 1 else []
    if missing := len(values) - len(known):
        # A seed without a horizon did not fall below half in the test: those with one are not the best.
        beyond = f"{missing} of {len(values)} beyond the tested length"
        notes.append(beyond if name == "horizon" else f"of {len(known)} of {len(values)} seeds")
    return mean + (" %" if percent else "") + (f" ({', '.join(notes)})" if notes else "")


def show(value: float, percent: bool, largest: float = 0.0) -> str:
    """A number, with as few digits as a larger one beside it."""
    if percent:
        return f"{100 * value:.1f}"
    size = max(abs(value), largest)
    return f"{value:.4f}" if size < 100 else f"{value:,.1f}" if size < 1000 else f"{value:,.0f}"
