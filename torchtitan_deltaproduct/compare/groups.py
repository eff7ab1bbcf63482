"""Runs whose settings differ in seeds alone are one group, and its numbers are means over them."""

import json
import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from ..intervals import student_t
from ..runs import Run, shown, telling

UNLEARNED = ("job.", "metrics.", "profiling.", "comm.", "guard.", "checkpoint.", "validation.enable",
             "validation.freq", "validation.prompts", "validation.sample_tokens")  # fmt: skip
"""How keys begin that change nothing that is learned: names, logging, saving, stopping, when to look."""
GENERAL = ("enable", "folder", "freq", "interval", "kind", "lengths", "mode", "name", "paths", "samples", "steps",
           "weights")  # fmt: skip
"""Last parts of keys that say nothing without their table."""
SEEDS = ("debug.seed", "data.seed")
WHOLE = 200
"""Characters of a value in the name of a group, which tells it from others."""


def differences(runs: list[Run]) -> dict[str, str]:
    """Settings of what is learned that are not the same in all runs whose settings are known, and short names of them.

    Every key by its last part, `num_householder`, or whole, `optimizer.name`, where that is in several tables or says
    nothing by itself.
    """
    known = [run.settings for run in runs if run.settings]
    every = dict.fromkeys(key for settings in known for key in settings)
    tables = Counter(key.rpartition(".")[2] for key in every)
    keys = [key for key in every if not key.startswith(UNLEARNED) or key == "checkpoint.initial_load_path"]
    # A version that does not have an option says nothing of it.
    keys = [key for key in keys if len({exact(settings[key]) for settings in known if key in settings}) > 1]
    last = {key: key.rpartition(".")[2] for key in keys}
    return {key: name if tables[name] == 1 and name not in GENERAL else key for key, name in last.items()}


def exact(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def setting_words(run: Run, changed: dict[str, str], width: int = 40) -> list[str]:
    """`num_householder 2` for each of some settings, if they are known; values of at most `width` characters."""
    if not run.settings:
        return ["settings unknown"]
    return [f"{name} {shown(run.settings.get(key), width)}" for key, name in changed.items()]


def rank(run: Run) -> tuple[float, float]:
    """Its best validation loss; then its training loss."""
    return (run.best["validation_loss"] if run.best else math.inf, math.inf if run.last_loss is None else run.last_loss)


@dataclass
class Group:
    """Runs that differ in seeds alone."""

    name: str
    runs: list[Run]
    names: list[str]
    short: str = ""
    """The least of the name that tells it from other groups, for a picture."""

    def rank(self) -> tuple[float, float]:
        """That of the best of its runs."""
        return min(map(rank, self.runs))

    @property
    def seeds(self) -> int:
        """How many different ones its runs have: a copy of a run is no other sample."""
        return len({tuple(exact(run.settings.get(key)) for key in SEEDS) for run in self.runs})

    def with_losses(self, validated: bool) -> "Group | None":
        """Those of its runs that have validation losses, or training losses; None if there is none."""
        kept = [number for number, run in enumerate(self.runs) if (run.validations if validated else run.steps)]
        return replace(self, runs=[self.runs[n] for n in kept], names=[self.names[n] for n in kept]) if kept else None

    @property
    def end(self) -> int:
        """The last step that all of its runs have made: means are of losses up to it."""
        return min(run.records[-1]["step"] if run.records else 0 for run in self.runs)

    @property
    def unequal(self) -> bool:
        """Whether some of its runs are farther than others."""
        return any(run.records and run.records[-1]["step"] > self.end for run in self.runs)

    def equal_runs(self) -> list[Run]:
        """Its runs up to that step."""
        return [replace(run, records=[r for r in run.records if r["step"] <= self.end]) for run in self.runs]

    def spread(self) -> dict[str, Any]:
        """Over runs: mean and half-width of the 95 % interval (None below three seeds) of the losses that all have.

        Of runs of unequal lengths there is none where one is too long to be read whole: what is left of it up to that
        step are samples far apart.
        """
        result: dict[str, Any] = {"seeds": self.seeds, "step": self.end}
        runs = self.equal_runs()
        losses = [{record["step"]: record["validation_loss"] for record in run.validations} for run in runs]
        last = max(set.intersection(*map(set, losses)), default=None)
        for name, values in (
            ("validation_loss", [own.get(last) for own in losses]),
            ("best_validation_loss", [run.best["validation_loss"] if run.best else None for run in runs]),
            ("train_loss", [run.last_loss for run in runs]),
        ):
            known = None not in values and (not self.unequal or all(run.whole for run in self.runs))
            result[name] = mean_and_interval(values, self.seeds) if known else (None, None)
        return result


def mean_and_interval(values: list[float], seeds: int) -> tuple[float, float | None]:
    """The mean, and half the width of its 95 % interval by Student's t; None for fewer than three values.

    Nor is there an interval where the values are of fewer seeds: they are not independent.
    """
    n, mean = len(values), sum(values) / len(values)
    if n < 3 or seeds < n:
        return mean, None
    variance = sum((value - mean) ** 2 for value in values) / (n - 1)
    return mean, student_t(n - 1) * math.sqrt(variance / n)


def grouped(runs: list[Run], names: list[str], changed: dict[str, str]) -> list[Group]:
    """Groups by the settings that differ, seeds left out, in the order of the runs; unknown settings make no group."""
    keys = {key: name for key, name in changed.items() if key not in SEEDS}
    groups: dict[Any, Group] = {}
    for run, name in zip(runs, names, strict=True):
        identity = tuple(exact(run.settings.get(key)) for key in keys) if run.settings else id(run)
        label = ", ".join(setting_words(run, keys, WHOLE)) if run.settings and keys else name
        group = groups.setdefault(identity, Group(label, [], []))
        group.runs.append(run)
        group.names.append(name)
    settings = [group.runs[0].settings for group in groups.values()]
    for group in groups.values():
        own = group.runs[0].settings
        least = telling(own, [key for key in keys if key in own], settings)
        group.short = ", ".join(setting_words(group.runs[0], {key: keys[key] for key in least}, WHOLE)) or group.name
        if not keys and len(group.runs) > 1:
            group.name = group.short = f"{len(group.runs)} runs"
    return list(groups.values())
