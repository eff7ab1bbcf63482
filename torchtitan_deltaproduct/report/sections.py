"""What a report shows of a run: its sections, each of tables, curves, samples and pictures."""

import base64
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint import scan
from ..data.shards.manifest import read_manifest
from ..errors import UserError
from ..events import last_stop
from ..files import read_bytes, read_object, read_text
from ..formats import amount, count, duration
from ..history import ends
from ..runs import Run, shown, visible
from ..status import ending
from .figures import Curve, curves_of

EMBEDDED = 24 << 20
"""Bytes of pictures in one page; others are named."""
SETTLED = "training.mixed_precision_param"
"""The option of which config.json has what "auto" came to: who asked for it is not known."""
SAMPLED = 6
"""Steps of which a prompt's samples are shown: the first, the last and others evenly."""
MADE_OF = {"streaming": "dataset", "group_word": "group", "formal_language": "language"}
"""The option of `[data]` that names the source of a kind."""
LINES = 100
"""Of a table: launches, checkpoints, events, results."""
MEASURES: dict[str, tuple[str, dict[str, str]]] = {
    "length_extrapolation": ("results", {
        "data": "data.name", "step": "model.step", "trained to": "model.train_length",
        "loss before": "beyond_training.training.loss", "loss beyond": "beyond_training.beyond.loss",
        "difference": "beyond_training.difference", "± standard error": "beyond_training.difference_se",
    }),
    "effective_rank": ("results", {
        "data": "data.name", "step": "model.step", "of at most": "model.head_dim",
        "rank at the end, first layer": "layers.0.at_end.mean", "last layer": "layers.-1.at_end.mean",
    }),
    "state_tracking": ("settings", {
        "problem": "problem", "n_h": "num_householder", "eigenvalues": "eigenvalue_range", "seeds": "seeds",
        "solved": "solved", "accuracy at the training length": "accuracy_at_training_length.mean",
        "beyond": "accuracy_at_length.mean",
    }),
}  # fmt: skip
"""Of an evaluation's JSON the list of results, and what is shown of each: name and dotted path."""


@dataclass
class Cells:
    """A table."""

    rows: list[tuple[str, ...]]
    header: tuple[str, ...] = ()
    title: str = ""


@dataclass
class Picture:
    """A PNG of an evaluation."""

    title: str
    content: bytes

    @property
    def data_uri(self) -> str:
        return "data:image/png;base64," + base64.b64encode(self.content).decode()

    def save(self, folder: Path) -> str:
        name = "eval_" + re.sub(r"[^\w.-]+", "_", self.title)
        (folder / name).write_bytes(self.content)
        return f"{folder.name}/{name}"


@dataclass
class Sample:
    """What a run wrote after a prompt, as training went on: (step and mode, text)."""

    prompt: str
    texts: list[tuple[str, str]]


@dataclass
class Section:
    """A part of the page; one that holds nothing is left out."""

    title: str
    notes: list[str] = field(default_factory=list)
    tables: list[Cells] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.notes or self.tables or self.curves or self.samples or self.pictures)


def sections_of(run: Run) -> list[Section]:
    """All that hold something, in the order of the page."""
    makers = (training, asked, launches, checkpoints, samples, evaluations, data, provenance)
    return [section for maker in makers if (section := maker(run))]


def numbers(run: Run) -> Iterator[tuple[str, str]]:
    """The tiles at the top."""
    steps = run.settings.get("training.steps")
    newest = (run.validations or [{}])[-1]
    flops, tokens = run.flops_per_token, run.last("tokens")
    values: list[tuple[str, Any, Callable[[Any], str]]] = [
        ("step", run.records[-1]["step"] if run.records else None,
         lambda step: f"{step:,}" + (f" of {steps:,}" if isinstance(steps, int) else "")),
        ("validation loss", newest.get("validation_loss"), "{:.4f}".format),
        ("best, at step", run.best, lambda best: f"{best['validation_loss']:.4f}, {best['step']:,}"),
        ("bits a byte", newest.get("validation_bits_per_byte"), "{:.4f}".format),
        ("training loss", run.last_loss, "{:.4f}".format),
        ("tokens", tokens, lambda tokens: count(int(tokens))),
        ("FLOPs", tokens * flops if tokens is not None and flops else None, lambda value: amount(value, "")),
        ("tokens a second", run.speed, "{:,.0f}".format),
        ("goodput", run.last("goodput"), "{:.1%}".format),
        ("running", max(run.seconds.values(), default=None), duration),
    ]  # fmt: skip
    return ((name, form(value)) for name, value, form in values if value is not None)


def asked(run: Run) -> Section:
    """Settings that are not the defaults."""
    from ..config.schema import schema  # imports torchtitan, which takes seconds

    options, rows = schema(), []
    for key, value in run.settings.items():
        if key in options and value != options[key].default and not key.startswith("job.") and key != SETTLED:
            rows.append((key, shown(value, 120), shown(options[key].default, 120)))
    section = Section("What was asked")
    if file := run.settings.get("job.config_file"):
        section.notes.append(f"of {shown(file, 200)}; every setting is in config.json")
    if rows:
        section.tables.append(Cells(rows, ("setting", "value", "default")))
    if SETTLED in run.settings:
        section.notes.append(f"{SETTLED}: {shown(run.settings[SETTLED])}, as asked or as auto settled it")
    return section


def training(run: Run) -> Section:
    section = Section("Training", curves=curves_of(run))
    if any(curve.marks for curve in section.curves):
        section.notes.append("dotted lines: where a launch went on")
    if not run.whole:
        section.notes.append(f"{len(run.records):,} records were read, from all over a longer history")
    return section


def launches(run: Run) -> Section:
    """When it was started and how each launch ended; and what went wrong."""
    section = Section("Launches and failures")
    starts = [number for number, event in enumerate(run.events) if event["event"] == "launch"]
    rows = []
    for number, begin in enumerate(starts, start=1):
        end = starts[number] if number < len(starts) else len(run.events)
        launch, after = run.events[begin], run.events[begin:end]
        how = ending(last_stop(after), newest=end == len(run.events)).removeprefix(", ")
        job = f", SLURM job {launch['slurm_job']}" if launch.get("slurm_job") else ""
        host = shown(f"{launch.get('host')}{job}")
        ranks = shown(launch.get("ranks", "?"))
        rows.append((str(number), stamp(launch["time"]), f"{launch['step']:,}", ranks, host, shown(how, 200)))
    if rows:
        header = ("", "started", "from step", "ranks", "host", "ended")
        section.tables.append(Cells(rows[-LINES:], header))
    kinds = ("skipped_step", "loss_spike", "save_failed", "bad_checkpoint")
    troubles = [event for event in run.events if event["event"] in kinds]
    if troubles:
        rows = []
        for event in troubles[-LINES:]:
            rest = {key: value for key, value in event.items() if key not in ("event", "time", "step")}
            when = stamp(event.get("time"))
            rows.append((when, f"{event['step']:,}", event["event"].replace("_", " "), shown(rest, 200)))
        section.tables.append(Cells(rows, ("when", "step", "what", "more"), f"failures: {len(troubles)}"))
    elif run.events:
        section.notes.append("no step was skipped, no spike seen, no save failed")
    return section


def checkpoints(run: Run) -> Section:
    name = run.settings.get("checkpoint.folder")
    folder = run.path / (name if isinstance(name, str) and "\0" not in name else "checkpoint")
    try:
        infos = scan(folder)
    except UserError as error:
        return Section("Checkpoints", notes=[str(error)])
    rows = [
        (f"{info.step:,}", amount(info.size, "B"), stamp(info.marker.time) if info.marker else "",
         shown(info.marker.reason) if info.marker else "", "complete" if info.complete else shown(info.reason, 200))
        for info in infos[-LINES:]
    ]  # fmt: skip
    return Section("Checkpoints", tables=[Cells(rows, ("step", "size", "saved", "by", "state"))] if rows else [])


def samples(run: Run) -> Section:
    """Of RUN/samples.jsonl: `{"step": 100, "prompt": "def", "mode": "greedy", "text": " main():"}` a line."""
    expected = {"step": int, "prompt": str, "mode": str, "text": str}
    found: dict[str, dict[int, list[tuple[str, str]]]] = {}
    for record in ends(run.path / "samples.jsonl", head=1 << 20, tail=1 << 22):
        if all(isinstance(record.get(name), kind) for name, kind in expected.items()):
            by_step = found.setdefault(record["prompt"], {})
            by_step.setdefault(record["step"], []).append(
                (f"step {record['step']:,}, {shown(record['mode'])}", visible(record["text"]))
            )
    section = Section("Samples")
    for prompt, by_step in found.items():
        steps = sorted(by_step)
        some = {steps[round(i * (len(steps) - 1) / (SAMPLED - 1))] for i in range(SAMPLED)}
        heading = shown(prompt, 200) or "(the beginning of a document)"
        section.samples.append(Sample(heading, [pair for step in sorted(some) for pair in by_step[step]]))
    return section


def evaluations(run: Run) -> Section:
    """What lies in RUN/eval: tables of the results we know, and all pictures."""
    section, room = Section("Evaluations"), EMBEDDED
    folder = run.path / "eval"
    for path in inside(folder, "*.json"):
        if path.parent != folder and not path.name.startswith("results"):
            continue
        try:
            found = json.loads(read_text(path))
            table = harness_table(found) if path.parent != folder else results_table(path.stem, found)
        except (OSError, ValueError, RecursionError):
            section.notes.append(shown(f"{path.relative_to(run.path)} cannot be read", 200))
            continue
        if table:
            table.title = shown(str(path.relative_to(run.path)), 120)
            section.tables.append(table)
    for path in inside(folder, "*.png"):
        name = shown(str(path.relative_to(folder)), 120)
        size = path.stat().st_size
        if size > room:
            section.notes.append(f"{name} is left out: {amount(size, 'B')}")
            continue
        image = read_bytes(path)
        if image.startswith(b"\x89PNG\r\n\x1a\n"):
            room -= size
            section.pictures.append(Picture(name, image))
    return section


def inside(folder: Path, pattern: str) -> Iterator[Path]:
    """Regular files below a folder, none of them by a link that leads out of it."""
    home = folder.resolve()
    paths = sorted(folder.rglob(pattern)) if folder.is_dir() else []
    return (path for path in paths if path.is_file() and path.resolve().is_relative_to(home))


def results_table(name: str, found: Any) -> Cells | None:
    """The results of one of our evaluations; None of another's."""
    if name not in MEASURES or not isinstance(found, dict):
        return None
    key, columns = MEASURES[name]
    items = found.get(key)
    rows = [tuple(figure(look_up(item, path)) for path in columns.values()) for item in items[:LINES]] if (
        isinstance(items, list)) else []  # fmt: skip
    return Cells(rows, tuple(columns)) if rows else None


def harness_table(found: Any) -> Cells | None:
    """Tasks and metrics of a results file of lm-eval."""
    tasks = found.get("results") if isinstance(found, dict) else None
    rows = []
    for task, metrics in (tasks if isinstance(tasks, dict) else {}).items():
        for metric, value in (metrics if isinstance(metrics, dict) else {}).items():
            if "," in metric and "_stderr" not in metric and isinstance(value, int | float):
                error = metrics.get(metric.replace(",", "_stderr,", 1))
                spread = figure(error) if isinstance(error, int | float) else ""
                rows.append((shown(task), shown(metric.partition(",")[0]), figure(value), spread))
    return Cells(rows[:LINES], ("task", "metric", "value", "± standard error")) if rows else None


def look_up(item: Any, path: str) -> Any:
    """`look_up({"a": [{"b": 1}]}, "a.-1.b")` is 1; None where the path leads nowhere."""
    for part in path.split("."):
        try:
            item = item[int(part) if isinstance(item, list) else part]
        except (LookupError, TypeError, ValueError):
            return None
    return item


def figure(value: Any) -> str:
    """A measured value as a cell."""
    if isinstance(value, float):
        return f"{value:.4f}"
    return "" if value is None else shown(value)


def data(run: Run) -> Section:
    """The prepared folders, as far as they are there: sizes and shares; otherwise what kind of data it was."""
    section = Section("Data")
    for name in ("data", "validation"):
        paths, weights = (run.settings.get(f"{name}.{key}") for key in ("paths", "weights"))
        rows, counts = [], []
        for path in paths if isinstance(paths, list) else []:
            try:
                manifest = read_manifest(path)
                counts.append(manifest.tokens)
                rows.append((shown(path, 200), count(manifest.tokens), f"{manifest.documents:,}"))
            except (UserError, OSError, TypeError, ValueError):
                counts.append(None)
                rows.append((shown(path, 200), "not here", ""))
        shares = weights if isinstance(weights, list) and len(weights) == len(rows) else counts
        if rows:
            total = sum(shares) if all(isinstance(x, int | float) for x in shares) else 0
            rows = [(*row, f"{share / total:.1%}" if total else "") for row, share in zip(rows, shares, strict=True)]
            title = "training" if name == "data" else "validation"
            section.tables.append(Cells(rows, ("folder", "tokens", "documents", "share"), title))
    if not section and (kind := run.settings.get("data.kind")):
        source = run.settings.get(f"data.{MADE_OF.get(kind)}")
        section.notes.append(": ".join(shown(text) for text in (kind, source) if text))
    return section


def provenance(run: Run) -> Section:
    """Versions, commands, and what identifies the data."""
    rows = [(shown(name), shown(value, 200)) for name, value in run.part("versions").items()]
    for event in run.events:
        if event["event"] == "launch" and isinstance(event.get("arguments"), list):
            rows.append((f"arguments at {stamp(event['time'])}", shown(" ".join(map(str, event["arguments"])), 1000)))
    for path in sorted(run.path.glob("launch/*/env.json"))[-LINES:]:
        if command := read_object(path).get("command"):
            rows.append((str(path.parent.relative_to(run.path)), shown(command, 1000)))
    identity = run.part("extra").get("data_identity")
    if identity is not None:
        rows.append(("data identity", shown(identity, 200)))
    return Section("Provenance", tables=[Cells(rows)] if rows else [])


def stamp(seconds: Any) -> str:
    """A time of this machine's zone, to the second; "" for what is none."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (TypeError, ValueError, OverflowError, OSError):
        return ""
