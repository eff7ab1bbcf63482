"""What a sweep's jobs found, together: results.csv, .jsonl, .md, and the pictures that compare models.

    rows = collect(sweep)                   # one record a job that is done
    write_results(sweep, rows)

    {"eval": "length_extrapolation", "model": "DP2", "data": "code", "checkpoint": "step 66758, ...",
     "metrics": {"loss to the training length": 2.94, "loss beyond": 2.95, ...}}
"""

import csv
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from torchtitan_deltaproduct.data.manifest import write_atomically
from torchtitan_deltaproduct.errors import DataError
from torchtitan_deltaproduct.files import read_text

from ..common.json_file import finite, read_results
from .plan import Job, Sweep


@dataclass(frozen=True)
class Row:
    """What one job found: names of metrics and their values (None where there is none)."""

    job: Job
    metrics: dict[str, float | None]

    def to_dict(self) -> dict[str, Any]:
        job = self.job
        return {"eval": job.eval, "model": job.model.name, "data": job.data, "checkpoint": job.model.checkpoint,
                "folder": str(job.folder), "metrics": finite(self.metrics)}  # fmt: skip


def collect(sweep: Sweep) -> list[Row]:
    """The rows of all jobs that are done.

    Raises:
        DataError: results that should be there are not, or are damaged.
    """
    return [Row(job, metrics(job)) for job in sweep.jobs if job.is_done()]


def metrics(job: Job) -> dict[str, float | None]:
    """What a job found; DataError if its files do not say."""
    try:
        return READERS[job.eval](job.folder)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise DataError(f"{job.folder} holds damaged results ({error!r}); delete it and run it again") from None


def length_extrapolation(folder: Path) -> dict[str, float | None]:
    """Losses (nats a token) up to the training length and beyond it, and the perplexity of all positions."""
    (entry,) = read_results(folder / "length_extrapolation.json")
    last, beyond = entry["buckets"][-1], entry["beyond_training"] or {}
    found = {
        "loss to the training length": (beyond.get("training") or {}).get("loss"),
        "loss beyond": (beyond.get("beyond") or {}).get("loss"),
        "change": beyond.get("difference"),
    }
    found[f"perplexity to {last['last']:,}"] = last["running_perplexity"]
    return found | {"accuracy at the end": last["accuracy"]}


def effective_rank(folder: Path) -> dict[str, float | None]:
    """Mean over layers at the training length and at the end, and the mean growth between them."""
    (entry,) = read_results(folder / "effective_rank.json")
    layers, positions = entry["layers"], entry["positions"]
    found = {
        f"rank at {positions[name]:,}": sum(layer[f"at_{name}"]["mean"] for layer in layers) / len(layers)
        for name in ("training_length", "end")
        if name in positions
    }
    growth = [layer["growth"] for layer in layers if layer["growth"] is not None]
    return found | {"growth": sum(growth) / len(growth) if growth else None}


def state_tracking(folder: Path) -> dict[str, float | None]:
    """Accuracy at the training length and at the tested one, and whether it counts as solved."""
    path = folder / "state_tracking.json"
    (setting,) = json.loads(read_text(path))["settings"]
    return {
        "accuracy at the training length": setting["accuracy_at_training_length"]["mean"],
        "accuracy at the tested length": setting["accuracy_at_length"]["mean"],
        "solved": float(setting["solved"]),
    }


def lm_harness(folder: Path) -> dict[str, float | None]:
    """Every metric of every task, as lm-eval names them."""
    files = sorted(folder.rglob("results_*.json"))
    if not files:
        raise DataError(f"{folder} has no results_*.json of lm-eval\nmake it again: run the eval once more")
    found = {}
    for task, metrics in json.loads(read_text(files[-1]))["results"].items():
        for name, value in metrics.items():
            metric, _, variant = name.partition(",")
            if isinstance(value, int | float) and not metric.endswith("_stderr") and variant:
                found[f"{task} {metric}" + ("" if variant == "none" else f" ({variant})")] = float(value)
    return found


READERS: dict[str, Callable[[Path], dict[str, float | None]]] = {
    "length_extrapolation": length_extrapolation,
    "effective_rank": effective_rank,
    "state_tracking": state_tracking,
    "lm_harness": lm_harness,
}
"""How the results of each eval become a row."""


def write_results(sweep: Sweep, rows: list[Row]) -> None:
    """Writes results.jsonl, results.csv (a line a metric of a job) and results.md to the sweep's folder."""
    sweep.out.mkdir(parents=True, exist_ok=True)
    write_atomically(sweep.out / "results.jsonl", "".join(json.dumps(row.to_dict()) + "\n" for row in rows))
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["eval", "data", "model", "checkpoint", "metric", "value"])
    for row in rows:
        job = row.job
        for metric, value in finite(row.metrics).items():
            writer.writerow([job.eval, job.data, job.model.name, job.model.checkpoint, metric, value])
    write_atomically(sweep.out / "results.csv", table.getvalue())
    write_atomically(sweep.out / "results.md", markdown(sweep, rows))


def markdown(sweep: Sweep, rows: list[Row]) -> str:
    """A table for each eval and dataset: a line a model, a column a metric."""
    lines = [f"# {sweep.file.stem}", ""]
    groups = list(dict.fromkeys((row.job.eval, row.job.data) for row in rows))
    for name, data in groups:
        chosen = [row for row in rows if (row.job.eval, row.job.data) == (name, data)]
        metrics = list(dict.fromkeys(metric for row in chosen for metric in row.metrics))
        lines += [f"## {name.replace('_', ' ')}" + (f", {data}" if data else ""), ""]
        lines += ["| model | " + " | ".join(metrics) + " |", "| --- |" + " ---: |" * len(metrics)]
        for row in chosen:
            cells = [_text(row.metrics.get(metric)) for metric in metrics]
            lines.append(f"| {row.job.model.name} | " + " | ".join(cells) + " |")
        lines.append("")
    missing = len(sweep.jobs) - len(rows)
    if missing:
        lines += [f"{missing} of {len(sweep.jobs)} jobs are not done.", ""]
    return "\n".join(lines)


def _text(value: float | None) -> str:
    return "" if value is None else f"{value:,.4f}" if abs(value) < 1000 else f"{value:,.0f}"


def pictures(sweep: Sweep, rows: list[Row], console: Console) -> None:
    """Compares the models of each eval on each dataset: pictures in OUT/EVAL/compared/DATASET."""
    for name, data in dict.fromkeys((row.job.eval, row.job.data) for row in rows if row.job.data):
        chosen = [row.job for row in rows if (row.job.eval, row.job.data) == (name, data)]
        folder = sweep.out / name / "compared" / data
        folder.mkdir(parents=True, exist_ok=True)
        paths = [job.folder / f"{name}.json" for job in chosen]
        names = [job.model.name for job in chosen]
        if name == "length_extrapolation":
            from ..positions.figures import loss_figure
            from ..positions.results import read_results as of_positions

            results = of_positions(paths, "", lambda models, names=names: names)
            loss_figure(results, folder / f"{name}.png", log_positions=True)
        else:
            from ..states.figures import curves_figure, map_figure
            from ..states.results import read_results as of_states

            found = of_states(paths, lambda models, names=names: names)
            curves_figure(found, folder / f"{name}.png")
            map_figure(found, folder / f"{name}_map.png")
        console.print(f"written: {folder}/{name}*.png", soft_wrap=True)
