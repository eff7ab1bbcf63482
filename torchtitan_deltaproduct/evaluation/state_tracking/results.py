"""From counted words to results: one record a run, one a setting over its seeds, as table, JSON and CSV.

    result = RunResult.of(loaded, problem, counts)
    settings = by_setting([result, ...])                     # runs that differ in nothing but their seeds
    Console().print(table(settings, Criterion())); write_json(path, settings, Criterion(), {})

Accuracy "at L tokens" is the mean over all positions of words of L tokens. For formal languages, whose rows have one
answer each, it is the accuracy of rows no longer than in training, and of longer ones; `scaled` then is
(accuracy - chance) / (1 - chance), as in Grazzi et al. 2025.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from torchtitan_deltaproduct.checkpoint.load import LoadedModel
from torchtitan_deltaproduct.config.inherited import SPEED_AND_MEMORY
from torchtitan_deltaproduct.config.job import OTHER_ROUNDING
from torchtitan_deltaproduct.config.schema import schema
from torchtitan_deltaproduct.intervals import wilson
from torchtitan_deltaproduct.models.args import MLP_WIDTH
from torchtitan_deltaproduct.options import Option
from torchtitan_deltaproduct.runs import telling

from .. import files
from .horizon import horizon, predicted_horizon
from .problems import Counts, Problem

TRAINED = ("model", "data", "training", "optimizer", "lr_scheduler")
"""Tables whose options tell settings apart, but for those of `ALIKE` and the seeds."""
ALIKE = (OTHER_ROUNDING, SPEED_AND_MEMORY)
"""What a change of an option means that makes no other setting, beside a harmless one."""
SEEDS = ("data.seed", "debug.seed")
WORDS: dict[str, Callable[[Any], str]] = {
    "optimizer.name": str,
    "training.steps": "{:,} steps".format,
    "training.mixed_precision_param": str,
    "data.curriculum_start": lambda start: f"words from {start} tokens" if start else "whole words",
}
"""How values are told that need no name."""


@dataclass(frozen=True)
class Criterion:
    """The least accuracies (scaled for formal languages) at the training length and the tested one to be a solution."""

    at_training: float = 0.99
    beyond: float = 0.9


@dataclass(frozen=True)
class Share:
    """A proportion with its 95 % interval (Wilson)."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, successes: float, trials: int) -> "Share":
        low, high = wilson(successes, trials)
        return cls(successes / trials if trials else float("nan"), float(low), float(high))


@dataclass(frozen=True)
class RunResult:
    """What one checkpoint, named by its label, can do."""

    label: str
    problem: Problem
    counts: Counts
    settings: dict
    """Dotted config keys that make the setting, such as `model.num_householder`."""
    seeds: tuple[int, int]
    """Of the data, of the weights."""
    step: int
    steps: int
    """Those that the run was to make."""

    @classmethod
    def of(cls, loaded: LoadedModel, problem: Problem, counts: Counts) -> "RunResult":
        config = loaded.config
        settings = trained_settings(config) | {"checkpoint.step": loaded.step}
        seeds = (config["data"]["seed"], config["debug"]["seed"])
        return cls(loaded.label, problem, counts, settings, seeds, loaded.step, config["training"]["steps"])

    @classmethod
    def from_dict(cls, record: dict, setting: dict) -> "RunResult":
        """The run of a record that `to_dict` made, and of the record of its setting."""
        formal = "prefix_correct" not in record
        problem = Problem(setting["problem"], formal, record["train_length"], record["length"], record["chance"], (),
                          record["test_seed"])  # fmt: skip
        counts = [record["scored"], record["correct"], record.get("prefix_correct", [0] * record["length"])]
        counts.append(record.get("least_margin", []))
        seeds = (record["data_seed"], record["model_seed"])
        return cls(record["run"], problem, Counts(record["words"], *map(np.array, counts)), setting["settings"], seeds,
                   record["step"], record["steps_planned"])  # fmt: skip

    @property
    def n_h(self) -> int:
        return self.settings["model.num_householder"]

    @property
    def range(self) -> str:
        """Of the eigenvalues."""
        return "[-1, 1]" if self.settings["model.allow_neg_eigval"] else "[0, 1]"

    @property
    def seed_name(self) -> str:
        """`3`, or `data 3, weights 42` where the two differ."""
        data, model = self.seeds
        return str(data) if data == model else f"data {data}, weights {model}"

    def same_setting(self, other: "RunResult") -> bool:
        """Whether the two differ in seeds alone, as far as both know: another version may not have had an option."""
        here, there = self.settings, other.settings
        return (self.problem.name, self.problem.length) == (other.problem.name, other.problem.length) and all(
            here[key] == there[key] for key in here.keys() & there.keys()
        )

    def same_sample(self, other: "RunResult") -> bool:
        """Whether one of two runs of a setting is a copy of the other: the same seeds, and the same answers."""
        mine, its = (
            (run.seeds, run.problem.seed, run.counts.words, run.counts.correct.tolist()) for run in (self, other)
        )
        return mine == its

    def token_accuracy(self, first: int, last: int) -> Share:
        """Mean over the labels at positions first .. last; words, not tokens, count as independent."""
        correct, scored = self.counts.between(first, last)
        if self.problem.formal or not scored:
            return Share.of(correct, scored)
        return Share.of(self.counts.words * correct / scored, self.counts.words)

    @property
    def at_training(self) -> Share:
        """Token accuracy at the training length."""
        return self.token_accuracy(1, self.problem.train_length)

    @property
    def at_length(self) -> Share:
        """Token accuracy at the tested length (formal languages: of rows longer than in training, if there are any)."""
        longer = self.problem.formal and self.problem.length > self.problem.train_length
        first = self.problem.train_length + 1 if longer else 1
        return self.token_accuracy(first, self.problem.length)

    def prefix(self, position: int) -> Share:
        """Share of words that are right at every position up to this one."""
        return Share.of(int(self.counts.prefix[position - 1]), self.counts.words)

    @property
    def horizon(self) -> int | None:
        """The last position up to which half of the words are right; None: beyond the tested length."""
        return horizon(self.counts.prefix, self.counts.words)

    @property
    def predicted_horizon(self) -> float | None:
        return predicted_horizon(self.counts.least_margin)

    def scaled(self, accuracy: float) -> float:
        """(accuracy - chance) / (1 - chance)."""
        return (accuracy - self.problem.chance) / (1 - self.problem.chance)

    def solved(self, criterion: Criterion) -> bool:
        trained, beyond = self.at_training.value, self.at_length.value
        if self.problem.formal:
            trained, beyond = self.scaled(trained), self.scaled(beyond)
        return trained >= criterion.at_training and beyond >= criterion.beyond

    def buckets(self) -> list[dict]:
        """Accuracy by length, in stretches as long as the training length: [1, T], [T + 1, 2 T], ..."""
        rows, width = [], self.problem.train_length
        for first in range(1, self.problem.length + 1, width):
            last = min(first + width - 1, self.problem.length)
            share = self.token_accuracy(first, last)
            rows.append({"first": first, "last": last, **vars(share), "scaled": self.scaled(share.value)})
        return rows

    def to_dict(self, criterion: Criterion) -> dict:
        """The record of a run; counts are complete, so that curves can be drawn again from it."""
        problem, counts = self.problem, self.counts
        record = {
            "run": self.label, "step": self.step, "steps_planned": self.steps, "data_seed": self.seeds[0],
            "model_seed": self.seeds[1], "test_seed": problem.seed, "train_length": problem.train_length,
            "length": problem.length, "chance": problem.chance, "words": counts.words,
            "accuracy_at_training_length": vars(self.at_training), "accuracy_at_length": vars(self.at_length),
            "scaled_accuracy_at_length": self.scaled(self.at_length.value), "solved": self.solved(criterion),
            "buckets": self.buckets(), "scored": counts.scored.tolist(), "correct": counts.correct.tolist(),
        }  # fmt: skip
        if not problem.formal:
            record["prefix_accuracy_at_training_length"] = vars(self.prefix(problem.train_length))
            record["prefix_accuracy_at_length"] = vars(self.prefix(problem.length))
            record["prefix_correct"] = counts.prefix.tolist()
            record |= {"horizon": self.horizon, "predicted_horizon": self.predicted_horizon}
            record["least_margin"] = counts.least_margin.round(4).tolist()
        return record


def trained_settings(config: dict) -> dict:
    """By dotted key what sets a run apart from others than its seeds: what it was trained as, by its job config.

    Where the samples of a step are given, in how many pieces a rank reads them is nothing of it.
    """
    options = [option for table in TRAINED for option in schema().values() if option.table == table]
    chosen = [option for option in options if _sets_apart(option.record) and option.key not in SEEDS]
    chosen.append(schema()["checkpoint.initial_load_path"])
    tables = [(option, config.get(option.table, {})) for option in chosen]
    settings = {option.key: table[option.name] for option, table in tables if option.name in table}
    if settings.get("training.global_batch_size", -1) > 0:
        settings.pop("training.local_batch_size", None)
    return settings


def _sets_apart(option: Option) -> bool:
    """Whether runs with other values of an option learn something else: not so of folders, speed and rounding."""
    resume = option.resume
    without_effect = resume in ALIKE or (resume.kind == "harmless" and resume is not MLP_WIDTH)
    return not (option.refused or option.is_path or without_effect)


@dataclass
class Setting:
    """Runs that differ in nothing but their seeds; `differs` says what sets it apart within its n_h and range, `short`
    the least of it that does, and where that is much, only what is not as in most. `copies` of runs do not count."""

    runs: list[RunResult]
    differs: str = ""
    short: str = ""
    copies: list[RunResult] = field(default_factory=list)

    @property
    def settings(self) -> dict:
        """All that any of the runs knows."""
        return {key: value for run in self.runs for key, value in run.settings.items()}

    @property
    def problem(self) -> Problem:
        return self.runs[0].problem

    @property
    def label(self) -> str:
        return ", ".join([self.head, *([self.differs] if self.differs else [])])

    @property
    def head(self) -> str:
        return f"n_h = {self.runs[0].n_h}, {self.runs[0].range}"

    @property
    def kind(self) -> tuple:
        """Problem, n_h and range ([-1, 1] first): what tables and pictures are ordered by."""
        first = self.runs[0]
        return (first.problem.name, first.n_h, not first.settings["model.allow_neg_eigval"])

    def solved(self, criterion: Criterion) -> int:
        """The number of seeds that solved it."""
        return sum(run.solved(criterion) for run in self.runs)

    def spread(self, name: str) -> dict[str, float]:
        """Mean, min and max over the seeds of `at_training` or `at_length`."""
        values = [getattr(run, name).value for run in self.runs]
        return {"mean": float(np.mean(values)), "min": min(values), "max": max(values)}

    def to_dict(self, criterion: Criterion) -> dict:
        first, solved = self.runs[0], self.solved(criterion)
        return {
            "problem": self.problem.name, "num_householder": first.n_h, "eigenvalue_range": first.range,
            "differs": self.differs, "seeds": len(self.runs), "copies": [run.label for run in self.copies],
            "solved": solved,
            "share_solved": vars(Share.of(solved, len(self.runs))),
            "accuracy_at_training_length": self.spread("at_training"),
            "accuracy_at_length": self.spread("at_length"), "settings": self.settings,
            "runs": [run.to_dict(criterion) for run in self.runs],
        }  # fmt: skip


def by_setting(results: list[RunResult]) -> list[Setting]:
    """Groups runs, in the order of `Setting.kind`, and says what differs beyond it."""
    settings: list[Setting] = []
    for result in results:
        setting = next((one for one in settings if all(map(result.same_setting, one.runs))), None)
        if setting is None:
            settings.append(setting := Setting([]))
        (setting.copies if any(map(result.same_sample, setting.runs)) else setting.runs).append(result)
    settings.sort(key=lambda setting: setting.kind)
    for setting in settings:
        own, same = setting.settings, [other for other in settings if other.kind == setting.kind]
        others = [other.settings for other in same]
        keys = [key for key in own if any(other.get(key, own[key]) != own[key] for other in others)]
        if "training.steps" in keys and all(run.step == run.steps for other in same for run in other.runs):
            keys.remove("checkpoint.step")
        # The tested length, if theirs are others.
        end = [f"to {setting.problem.length} tokens"] * (len({other.problem.length for other in same}) > 1)
        both = (keys, telling(own, keys, others))
        setting.differs, setting.short = (", ".join([*_told(own, some), *end]) for some in both)
    return settings


def _told(own: dict, keys: list[str]) -> list[str]:
    """`7,840 steps`, `Muon`, `decay_ratio 0.3`: some of the values of a setting."""
    return [WORDS[key](own[key]) if key in WORDS else f"{key.split('.')[1]} {own[key]}" for key in keys]


def read_settings(paths: list[Path]) -> list[Setting]:
    """The runs of several files of `write_json`, by setting; DataError if one is damaged."""
    records = [setting for path in paths for setting in files.read_results(path, "settings")]
    return by_setting([RunResult.from_dict(run, setting) for setting in records for run in setting["runs"]])


def table(settings: list[Setting], criterion: Criterion) -> Table:
    """One line a setting, and one a seed where there are several."""
    out = Table(title="State tracking: token accuracy on held-out words", title_justify="left")
    for name in ("problem", "setting", "seed"):
        out.add_column(name)
    for name in ("training length", "tested length", "whole words", "half right to", "solved"):
        out.add_column(name, justify="right")
    for setting in settings:
        names, seeds = (setting.problem.name, setting.label), len(setting.runs)
        if seeds > 1:
            lengths = {"at_training": setting.problem.train_length, "at_length": setting.problem.length}
            means = [f"{setting.spread(name)['mean']:.1%} @ {length:,}" for name, length in lengths.items()]
            solved = f"{setting.solved(criterion)} of {seeds}"
            out.add_row(*names, f"mean of {seeds}", *means, "", "", solved, style="bold")
            names = ("", "")
        for run in setting.runs:
            unfinished = f" (step {run.step:,} of {run.steps:,})" if run.step < run.steps else ""
            solved = "[green]yes[/]" if run.solved(criterion) else "[red]no[/]"
            out.add_row(*names, run.seed_name + unfinished, *_numbers(run), solved)
        out.add_section()
    return out


def _numbers(run: RunResult) -> list[str]:
    cells = []
    for share, length in ((run.at_training, run.problem.train_length), (run.at_length, run.problem.length)):
        scaled = f", scaled {run.scaled(share.value):.2f}" if run.problem.formal else ""
        cells.append(f"{share.value:.1%} @ {length:,}{scaled}\n[dim]{share.low:.1%} to {share.high:.1%}[/]")
    if run.problem.formal:
        return [*cells, "", ""]
    reached = f"over {run.problem.length:,}" if run.horizon is None else f"{run.horizon:,}"
    predicted = "" if run.predicted_horizon is None else f"\n[dim]predicted {run.predicted_horizon:,.0f}[/]"
    return [*cells, f"{run.prefix(run.problem.length).value:.1%}", reached + predicted]


def write_json(path: Path, settings: list[Setting], criterion: Criterion, made_by: dict) -> None:
    """Everything: settings over their runs, runs with the counts of every position."""
    files.write_json(path, {
        "version": 1,
        "criterion": vars(criterion),
        "intervals": "Wilson, 95 %; words count as independent, the tokens of a word do not",
        "made_by": made_by,
        "settings": [setting.to_dict(criterion) for setting in settings],
    })  # fmt: skip


def write_csv(path: Path, settings: list[Setting]) -> None:
    """One row a run and position that has a label, the position counted from 1."""
    names = ["problem", "num_householder", "eigenvalue_range", "differs", "data_seed", "model_seed", "run", "position",
             "scored", "correct", "accuracy", "accuracy_low", "accuracy_high", "prefix_accuracy", "prefix_low",
             "prefix_high"]  # fmt: skip
    rows = []
    for setting, run in [(one, run) for one in settings for run in one.runs]:
        counts, head = run.counts, [setting.problem.name, run.n_h, run.range, setting.differs, *run.seeds, run.label]
        shares = [counts.accuracy(), *wilson(counts.correct, counts.scored)]
        prefix = [counts.prefix / counts.words, *wilson(counts.prefix, counts.words)]
        shares += [[""] * len(counts.scored)] * 3 if run.problem.formal else prefix
        for i in np.flatnonzero(counts.scored):
            rows.append([*head, i + 1, counts.scored[i], counts.correct[i], *(share[i] for share in shares)])
    files.write_csv(path, names, rows)
