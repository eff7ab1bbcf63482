"""What a sweep's jobs found, together: results.csv, .jsonl, .md, and the pictures that compare models.

rows = collect(sweep)                   # (job, its metrics) of each job that is done
write_results(sweep, rows)

{"eval": "length_extrapolation", "model": "DP2", "data": "code", "checkpoint": "step 66758, ...",
 "metrics": {"loss to the training length": 2.94, "loss beyond": 2.95, ...}}
"""

import json
from collections import defaultdict
from pathlib import Path

from rich.console import Console

from torchtitan_deltaproduct.errors import DataError

from ..files import DAMAGE, finite, write_atomically, write_csv
from .plan import Sweep, SweepJob, evals

Row = tuple[SweepJob, dict[str, float | None]]
"""A job that is done, and its metrics by name (None where there is none)."""


def collect(sweep: Sweep) -> list[Row]:
    """The rows of all jobs that are done; DataError if results that should be there are damaged."""
    return [(job, finite(metrics_of(job))) for job in sweep.jobs if job.is_done()]


def metrics_of(job: SweepJob) -> dict[str, float | None]:
    """What a job found; DataError if its files do not say."""
    try:
        return evals()[job.eval].metrics(job.folder)
    except (*DAMAGE, ArithmeticError) as error:
        raise DataError(f"{job.folder} holds damaged results ({error!r}); delete it and run it again") from None


def write_results(sweep: Sweep, rows: list[Row]) -> None:
    """Writes results.jsonl, results.csv (a line a metric of a job) and results.md to the sweep's folder."""
    sweep.out.mkdir(parents=True, exist_ok=True)
    records, lines = [], []
    for job, metrics in rows:
        names = {"eval": job.eval, "model": job.model.name, "data": job.data, "checkpoint": job.model.checkpoint}
        records.append(json.dumps({**names, "folder": str(job.folder), "metrics": metrics}) + "\n")
        for metric, value in metrics.items():
            number = "" if value is None else repr(value)
            lines.append([job.eval, job.data, job.model.name, job.model.checkpoint, metric, number])
    write_atomically(sweep.out / "results.jsonl", "".join(records))
    columns = ["eval", "data", "model", "checkpoint", "metric", "value"]
    write_csv(sweep.out / "results.csv", columns, lines, end="\n")
    write_atomically(sweep.out / "results.md", markdown(sweep, rows))


def markdown(sweep: Sweep, rows: list[Row]) -> str:
    """A table for each eval and dataset: a line a model, a column a metric."""
    lines = [f"# {sweep.file.stem}", ""]
    for (name, data), chosen in _by_dataset(rows).items():
        columns = list(dict.fromkeys(metric for _, metrics in chosen for metric in metrics))
        lines += [f"## {name.replace('_', ' ')}" + (f", {data}" if data else ""), ""]
        lines += ["| model | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
        for job, metrics in chosen:
            cells = [_text(metrics.get(metric)) for metric in columns]
            lines.append(f"| {job.model.name} | " + " | ".join(cells) + " |")
        lines.append("")
    missing = len(sweep.jobs) - len(rows)
    if missing:
        lines += [f"{missing} of {len(sweep.jobs)} jobs are not done.", ""]
    return "\n".join(lines)


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:,.4f}" if abs(value) < 1000 else f"{value:,.0f}"


def pictures(out: Path, jobs: list[SweepJob], console: Console) -> None:
    """Compares the models of each eval on each dataset, by jobs that are done: OUT/EVAL/compared/DATASET."""
    for (name, data), rows in _by_dataset([(job, {}) for job in jobs]).items():
        compare = evals()[name].compare
        if compare is not None:
            folder = out / name / "compared" / data
            folder.mkdir(parents=True, exist_ok=True)
            files = [job.folder / f"{name}.json" for job, _ in rows]
            compare(files, [job.model.name for job, _ in rows], folder / name)
            console.print(f"written: {folder}/{name}*.png", soft_wrap=True)


def _by_dataset(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """The rows of each eval on each dataset."""
    groups = defaultdict(list)
    for job, metrics in rows:
        groups[job.eval, job.data].append((job, metrics))
    return groups
