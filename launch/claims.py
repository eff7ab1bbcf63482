"""A claim: a grid of runs, what is expected of them and from which source, and what came of it.

    claim = read_claim(CLAIMS / "S3.toml")
    verdict(claim, results_of(claim)).word                   # "as expected"
    print(page(read_claims([])))                             # docs/science.md

train_configs/claims/NAME.toml is a grid (`launch.grid`) with these tables more:

    [claim]
    title = "S3: two reflections a token follow a triangle, one does not"
    expectation = "..."                                      # and its `source`, and a `budget`; `gpus` it needs
    readme = ["{laptop_S3_n2_pm1 | solved}"]                 # sentences of README.md with numbers of the results
    columns = ["solved"]                                     # of the table (default: all, but for the horizon)

    [[expect]]
    settings = ["laptop_S3_n2_pm1"]
    metric = "solved"
    at_least = 1                                             # or `below`; or `under` another setting, seed by seed
    seeds = "most"                                           # of each setting: "all", or "most", more than half

results/NAME.json holds the numbers of every run; the page, the pictures and the sentences are made of it alone. A run
that is in it is not run again, on whatever machine, unless what it learns from has changed in the TOML (`Run.recipe`):
a claim may be run in parts.
"""

import itertools
import json
import re
import textwrap
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from torchtitan_deltaproduct.config import Environment
from torchtitan_deltaproduct.config.values import shorten
from torchtitan_deltaproduct.config.values import show as toml
from torchtitan_deltaproduct.errors import ConfigError, DataError, nearest
from torchtitan_deltaproduct.evaluation.figures import COLOURS, picture
from torchtitan_deltaproduct.evaluation.files import finite
from torchtitan_deltaproduct.evaluation.length_extrapolation.figures import seeds_figure
from torchtitan_deltaproduct.evaluation.state_tracking import HORIZON
from torchtitan_deltaproduct.evaluation.state_tracking.figures import accuracy_figure
from torchtitan_deltaproduct.evaluation.state_tracking.results import Criterion, RunResult, Setting, by_setting
from torchtitan_deltaproduct.files import read_text, write_atomically

from .grid import FINAL, Grid, read_grid
from .sbatch import ROOT
from .summary import Result, Summary, cell, markdown_table, show

CLAIMS, RESULTS, PAGE, README = (
    ROOT / "train_configs/claims",
    ROOT / "results",
    ROOT / "docs/science.md",
    ROOT / "README.md",
)
TEXTS = ("title", "expectation", "source", "budget")
OF_CLAIM = dict.fromkeys(TEXTS, (str, "a text")) | {
    "gpus": (int, "a whole number"), "readme": (list, "a list of sentences"),
    "columns": (list, "a list of names of metrics"), "drawn": (list, "a list of settings")}  # fmt: skip
OF_EXPECTATION = {
    "settings": (list, "a list of settings"), "metric": (str, "the name of a number"),
    "at_least": (int | float, "a number"), "below": (int | float, "a number"), "under": (str, "a setting"),
    "seeds": (str, '"all" or "most"')}  # fmt: skip
"""Keys of [claim] and of [[expect]]: their types, and how to say so."""
DRAWN = ("state_tracking", "length_extrapolation")
"""Evaluations whose curves are a claim's picture."""
KEPT = ("run", "step", "steps_planned", "data_seed", "model_seed", "test_seed", "train_length", "length", "chance",
        "words", "scored", "correct", "prefix_correct")  # fmt: skip
"""Of a run's record of state tracking: what its curves are drawn from."""
HEAD = """\
# What is claimed, and what came of it

Written by `python -m launch.reproduce`, of the claims in `train_configs/claims/` and the results in `results/`;
`--check` makes this page, its pictures and its numbers in README.md again and fails if anything differs. A cell is the
mean over the seeds (and the least and the greatest of them); of `solved` the number of seeds, and the 95 % interval of
their share. What a run costs is said for several at once on a GPU that NVIDIA's MPS shares out
(`nvidia-cuda-mps-control -d` before the command, which then takes `--jobs 12`).
"""


@dataclass(frozen=True)
class Expectation:
    """What is expected of a metric, in each of some settings."""

    settings: list[str]
    metric: str
    at_least: float | None = None
    below: float | None = None
    under: str | None = None
    seeds: str = "all"

    def holds(self, result: Result, summary: Summary) -> bool | None:
        """Whether one run, of those of `summary`, is as expected; None if the run to compare it with is not there."""
        value = result.metrics.get(self.metric)
        if self.under is not None:
            other = next((run for run in summary.of(self.under) if run.seed == result.seed), None)
            limit = other and other.metrics.get(self.metric)
            return None if other is None else None not in (value, limit) and value < limit
        if value is None:
            return False
        return value < self.below if self.at_least is None else value >= self.at_least

    def __str__(self) -> str:
        limit = f"under that of {self.under}" if self.under is not None else ""
        limit = limit or (f"below {self.below:g}" if self.at_least is None else f"at least {self.at_least:g}")
        return f"{self.metric} {limit} in {'more than half of the' if self.seeds == 'most' else 'all'} seeds"


BATCH = "--training.global_batch_size"


@dataclass(frozen=True)
class Claim:
    """A claim, by the name of its TOML."""

    name: str
    grid: Grid
    title: str
    expectation: str
    source: str
    budget: str
    gpus: int
    readme: list[str]
    expect: list[Expectation]
    columns: list[str]
    drawn: list[str]
    """The settings whose curves are in the picture; none: all."""

    @property
    def settings(self) -> list[str]:
        return list(dict.fromkeys(run.setting for run in self.grid.runs))

    def label(self, setting: str) -> str:
        """`n_h = 2, [-1, 1]`, with group, steps, optimizer, `whole words` (no curriculum), and the dtype and the batch
        that were asked for if settings differ in them; the setting's name where that does not tell them apart."""
        parts = {
            run.setting: (
                run.config.data.group,
                f"n_h = {run.config.model.num_householder}",
                "[-1, 1]" if run.config.model.allow_neg_eigval else "[0, 1]",
                f"{run.config.training.steps:,} steps",
                run.config.optimizer.name,
                "" if run.config.data.curriculum_steps else "whole words",
                run.config.training.mixed_precision_param.replace("auto", ""),
                f"{run.config.training.global_batch_size} a batch" if BATCH in run.words else "",
            )
            for run in self.grid.runs
        }
        varied = [
            place in (1, 2) or len(set(values)) > 1 for place, values in enumerate(zip(*parts.values(), strict=True))
        ]
        labels = {name: ", ".join(filter(None, itertools.compress(values, varied))) for name, values in parts.items()}
        return labels[setting] if len(set(labels.values())) == len(labels) else setting

    @property
    def file(self) -> Path:
        return RESULTS / f"{self.name}.json"


@dataclass(frozen=True)
class Results:
    """What came of a claim: numbers of each run, and the curves of state tracking and of loss by position where they
    were evaluated."""

    summary: Summary
    curves: list[Setting]
    losses: list["Losses"] = field(default_factory=list)


@dataclass(frozen=True)
class Losses:
    """Loss by position of one run.

    Attributes:
        setting: of the run.
        seed: of the run.
        data: what was read, by its name in the claim.
        trained: training length, in tokens.
        lasts: last position of each bucket.
        loss: mean of each, in nats a token.
    """

    setting: str
    seed: int
    data: str
    trained: int
    lasts: list[int]
    loss: list[float]


@dataclass(frozen=True)
class Verdict:
    """`as expected`, `not as expected`, `measured` (nothing is expected), `incomplete` or `not run yet`, and lines that
    say why."""

    word: str
    lines: list[str]


def read_claims(names: list[str]) -> list[Claim]:
    """The claims of these names, or all; raises ConfigError for one that there is not."""
    files = {file.stem: file for file in sorted(CLAIMS.glob("*.toml"))}
    for name in names:
        if name not in files:
            raise ConfigError(f"{name}: no such claim; there are: {', '.join(files)}")
    return [read_claim(files[name]) for name in names or files]


def read_claim(file: Path, seeds: list[int] | None = None, out: str = "", overrides: list[str] | None = None) -> Claim:
    """Reads a claim; the other arguments are those of `read_grid`. As it is written, runs are marked as recorded.

    Raises:
        ConfigError: what is wrong with it.
    """
    grid = read_grid(file, seeds or [], out, overrides or [], Environment())
    table, settings = grid.tree.get("claim", {}), {run.setting for run in grid.runs}
    refuse_wrong(f"{file}: [claim]", table, OF_CLAIM, TEXTS)
    texts = [" ".join(table[name].split()) for name in TEXTS]
    expect = expectations(file, grid.tree.get("expect", []), settings)
    drawn = table.get("drawn", [])
    refuse_unknown(f"{file}: [claim]: drawn", drawn, settings)
    lists = table.get("readme", []), expect, table.get("columns", []), drawn
    if not expect and not any(job.eval in DRAWN for job in grid.evaluations):
        raise ConfigError(f"{file}: nothing to draw: it needs an [[expect]], or a table of {' or '.join(DRAWN)}")
    claim = Claim(file.stem, grid, *texts, table.get("gpus", 0), *lists)
    if not grid.as_written:
        return claim
    return with_recorded(claim)


def with_recorded(claim: Claim) -> Claim:
    """The same with the results of its runs as results/NAME.json holds them now."""
    recorded = {(result.setting, result.seed): result for result in results_of(claim).summary.results}
    runs = [replace(run, recorded=recorded.get((run.setting, run.seed))) for run in claim.grid.runs]
    return replace(claim, grid=replace(claim.grid, runs=runs))


def refuse_wrong(where: str, table: Any, kinds: dict[str, tuple[Any, str]], needed: Collection[str]) -> None:
    """Raises ConfigError for a key that a table lacks, or that is none of `kinds`: its type, and that in words."""
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: expected a table")
    for key, value in table.items():
        if key not in kinds:
            near = nearest(key, kinds)
            raise ConfigError(f"{where}: {key}: no such key" + (f"; nearest: {near!r}" if near else ""))
        kind, words = kinds[key]
        texts = not isinstance(value, list) or all(isinstance(item, str) for item in value)
        if not isinstance(value, kind) or isinstance(value, bool) or not texts:
            raise ConfigError(f"{where}: {key} = {shorten(toml(value))}: expected {words}")
    if missing := [key for key in needed if key not in table]:
        raise ConfigError(f"{where}: it needs {' and '.join(missing)}")


def refuse_unknown(where: str, names: list[str], settings: set[str]) -> None:
    for name in names:
        if name not in settings:
            raise ConfigError(f"{where}: no setting {toml(name)}; there are: {', '.join(sorted(settings))}")


def expectations(file: Path, entries: Any, settings: set[str]) -> list[Expectation]:
    """The tables [[expect]] of a claim; ConfigError says what is wrong with one."""
    if not isinstance(entries, list):
        raise ConfigError(f"{file}: [expect]: expected [[expect]], one table an expectation")
    for number, entry in enumerate(entries, start=1):
        where = f"{file}: [[expect]] number {number}"
        refuse_wrong(where, entry, OF_EXPECTATION, ("settings", "metric"))
        if len(limits := {"at_least", "below", "under"} & entry.keys()) != 1:
            found = " and ".join(sorted(limits)) or "none"
            raise ConfigError(f"{where}: expected one of at_least, below and under, found {found}")
        if entry.get("seeds", "all") not in ("all", "most"):
            raise ConfigError(f'{where}: seeds = {toml(entry["seeds"])}: expected "all" or "most"')
        refuse_unknown(where, [*entry["settings"], *([entry["under"]] if "under" in entry else [])], settings)
    return [Expectation(**entry) for entry in entries]


def verdict(claim: Claim, results: Results) -> Verdict:
    """What came of a claim, in words; the runs that are not as expected are named where an expectation is missed."""
    summary, lines, holds = results.summary, [], True
    if not summary.results:
        return Verdict("not run yet", [])
    known = {name for result in summary.results for name in result.metrics}
    for one in claim.expect:
        if one.metric not in known and not summary.missing:
            near = nearest(one.metric, known)
            raise ConfigError(
                f"{claim.grid.file}: [[expect]] metric = {toml(one.metric)}: no run has a number of that name"
                + (f"; nearest: {near!r}" if near else f"; there are: {', '.join(sorted(known))}")
            )
        for setting in one.settings:
            judged = [(run, one.holds(run, summary)) for run in summary.of(setting)]
            good, bad = ([run for run, right in judged if right is answer] for answer in (True, False))
            fits = len(bad) < len(good) if one.seeds == "most" else bool(good) and not bad
            holds &= fits
            if bad and not fits:
                lines.append(
                    f"{claim.label(setting)}: {one}; not in {', '.join(_seed(run, one.metric) for run in bad)}"
                )
            elif not good and not summary.missing:
                lines.append(f"{claim.label(setting)}: {one}; no seed to judge it by")
    if summary.missing:
        return Verdict("incomplete", [summary.note(), *lines])
    if not claim.expect:
        return Verdict("measured", [])
    return Verdict("as expected" if holds else "not as expected", lines)


def _seed(run: Result, metric: str) -> str:
    """`seed 3`, with its number where that is more than yes or no."""
    value = run.metrics.get(metric)
    shown = "none" if value is None else "" if metric == "solved" else show(value, False)
    return f"seed {run.seed}" + (f" ({shown})" if shown else "")


def write_results(claim: Claim, results: Results, origin: dict) -> None:
    """Writes results/NAME.json: `origin`, those of results that were there before, the numbers of each run, and the
    counts that curves are drawn from."""
    curves = []
    for setting in results.curves:
        record = setting.to_dict(Criterion())
        kept = {name: record[name] for name in ("problem", "settings")}
        curves.append(kept | {"runs": [{key: run[key] for key in KEPT if key in run} for run in record["runs"]]})
    earlier = []
    if any(run.recorded for run in claim.grid.runs):
        before = json.loads(read_text(claim.file))
        earlier = [*before.get("earlier", []), before["origin"]]
    lines = [
        f'"origin": {json.dumps(origin)}',
        *([_list("earlier", earlier)] if earlier else []),
        _list("runs", [vars(result) for result in results.summary.results]),
        _list("state_tracking", curves),
        *([_list("losses", [vars(losses) for losses in results.losses])] if results.losses else []),
    ]
    RESULTS.mkdir(exist_ok=True)
    write_atomically(claim.file, "{\n" + ",\n".join(lines) + "\n}\n")


def _list(name: str, records: list[dict]) -> str:
    """A member of a JSON object with one record a line, so that a change is seen in its line."""
    return f'"{name}": [\n' + ",\n".join(json.dumps(finite(record)) for record in records) + "\n]"


def results_of(claim: Claim) -> Results:
    """What results/NAME.json holds of the claim's runs as its TOML has them; DataError if it is damaged."""
    planned = {(run.setting, run.seed): run.recipe for run in claim.grid.runs}
    if not claim.file.exists():
        return Results(Summary([], len(planned)), [])
    try:
        content = json.loads(read_text(claim.file))
        runs = [Result(**record) for record in content["runs"]]
        curves = [RunResult.from_dict(run, setting) for setting in content["state_tracking"] for run in setting["runs"]]
        losses = [Losses(**record) for record in content.get("losses", [])]
        for run in runs:
            sum(value for value in run.metrics.values() if value is not None)
        if len({(run.setting, run.seed) for run in runs}) < len(runs):
            raise ValueError("several results of one run")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"{claim.file} is damaged ({error})\n"
            f"restore it (git checkout {claim.file}), or delete it and run the claim again"
        ) from None
    kept = [run for run in runs if planned.get((run.setting, run.seed)) == run.recipe]
    names = {f"/{run.setting}/seed-{run.seed} step " for run in kept}
    drawn = [curve for curve in curves if any(name in curve.label for name in names)]
    of = {(run.setting, run.seed) for run in kept}
    losses = [one for one in losses if (one.setting, one.seed) in of]
    return Results(Summary(kept, len(planned)), by_setting(drawn), losses)


def together(claim: Claim, recorded: Results, new: Results) -> Results:
    """The results of a claim that were recorded, and those of runs that were not."""
    order = {(run.setting, run.seed): place for place, run in enumerate(claim.grid.runs)}
    runs = sorted(
        [*recorded.summary.results, *new.summary.results], key=lambda result: order[result.setting, result.seed]
    )
    curves = [run for setting in recorded.curves + new.curves for run in setting.runs]
    losses = sorted(recorded.losses + new.losses, key=lambda one: order[one.setting, one.seed])
    return Results(Summary(runs, len(order)), by_setting(curves), losses)


def draw(claim: Claim, results: Results, path: Path) -> None:
    """The picture of a claim: its curves, or its first expected metric, a dot a run."""
    if results.curves:
        shown = {f"/{setting}/seed-" for setting in claim.drawn or claim.settings}
        curves = [run for setting in results.curves for run in setting.runs if any(name in run.label for name in shown)]
        accuracy_figure(by_setting(curves), path)
        return
    if results.losses:
        first = results.losses[0]
        same = [one for one in results.losses if (one.data, one.lasts) == (first.data, first.lasts)]
        curves = {claim.label(name): [np.array(one.loss) for one in same if one.setting == name]
                  for name in claim.settings}  # fmt: skip
        curves = {label: seeds for label, seeds in curves.items() if seeds}
        seeds_figure(curves, first.lasts, first.trained, f"{first.data}: loss by position", path)
        return
    metric = claim.expect[0].metric
    with picture(path, "", 1, 1, (6.5, 1 + 0.4 * len(claim.settings))) as (_, axes):
        for row, setting in enumerate(claim.settings):
            values = [run.metrics[metric] for run in results.summary.of(setting) if run.metrics.get(metric) is not None]
            axes[0, 0].plot(values, np.full(len(values), row), "o", color=COLOURS[row % len(COLOURS)])
        axes[0, 0].set_yticks(range(len(claim.settings)), map(claim.label, claim.settings))
        axes[0, 0].set_xlabel(metric)
        axes[0, 0].invert_yaxis()


def page(claims: list[Claim]) -> str:
    """docs/science.md: a section a claim."""
    return "\n".join([HEAD, *map(section, claims)])


def section(claim: Claim) -> str:
    """Expectation and source, command, table, picture and verdict of a claim."""
    results = results_of(claim)
    judged = verdict(claim, results)
    drawn = f"\n![{claim.title}](../results/{claim.name}.png)\n" if results.summary.results else ""
    lines = "".join(f"\n- {line}" for line in judged.lines)
    return f"""\
## {claim.title}

{textwrap.fill(f"Expected: {claim.expectation} Source: {claim.source}.", 120)}

Command: `python -m launch.reproduce {claim.name}` ({claim.budget})

{table(claim, results.summary)}{drawn}
Verdict: **{judged.word}**{":" if lines else ""}{lines}
"""


def table(claim: Claim, summary: Summary) -> str:
    """The table of a claim as Markdown: evaluations where there are any, and a row for what was not run, too.

    Of a claim without any results its settings in words.
    """
    if not summary.results:
        return textwrap.fill(f"Settings: {'; '.join(map(claim.label, claim.settings))}.", 120)
    known = dict.fromkeys(name for result in summary.results for name in result.metrics)
    hidden = {*HORIZON, *(FINAL if claim.grid.evaluations else ())}
    header, lines = summary.without(
        [name for name in known if name not in (claim.columns or known.keys() - hidden)]
    ).cells()
    rows = {line[0]: line for line in lines}
    blank = ["not run yet", *[""] * (len(header) - 2)]
    lines = [[claim.label(setting), *rows.get(setting, ["", *blank])[1:]] for setting in claim.settings]
    return markdown_table(header, lines)


def sentences(claim: Claim) -> list[str]:
    """The claim's sentences of README.md, with the numbers of its results in the place of `{setting | metric}`."""
    summary = results_of(claim).summary

    def number(match: re.Match) -> str:
        setting, metric = match[1], match[2]
        return cell(metric, [run.metrics.get(metric) for run in summary.of(setting)]).partition(" (")[0]

    return [re.sub(r"\{([^|}]+?) *\| *([^}]+?)\}", number, sentence) for sentence in claim.readme]
