"""The effective rank of the recurrent states of a model along long sequences, and what its transitions do.

    python -m eval.effective_rank outputs/run --data data/code/validation                every 16th of 16,384 tokens
    python -m eval.effective_rank DN DP2 DP3 --data data/a book.txt --sequences 32 --every 1
    python -m eval.effective_rank outputs/run --data data/a --between-householders
    python -m eval.effective_rank outputs/state_tracking/S3_n2/seed-1 --length 512       words of the run's own problem
    python -m eval.effective_rank --from outputs/*/eval --out compared                   runs side by side
    torchrun --nproc_per_node 8 -m eval.effective_rank outputs/run --data data/a

MODEL is a run folder (its newest complete checkpoint, or `--step`), one `checkpoint/step-N`, or a Hugging Face folder.
DATA is a prepared folder, a file or folder of text, or a dataset NAME[:CONFIGURATION]. Measured are the states of each
layer and head (`singular_values`), the distribution of beta, and the eigenvalues of the transitions (`transitions`).
Results go to `--out`, by default MODEL/eval: effective_rank.json, .csv, .npz and pictures; in effective_rank/ the
tokens that were read and the measurements. The same command again continues where it was stopped.
"""

import argparse
import sys
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path

import numpy as np
from rich.console import Console

from torchtitan_deltaproduct.arguments import path
from torchtitan_deltaproduct.checkpoint.load import LoadedModel
from torchtitan_deltaproduct.data.formal import FormalSource
from torchtitan_deltaproduct.errors import ConfigError

from ..jobs import (
    Job,
    add_text_options,
    automatic_batch,
    check_text_options,
    compute,
    datasets,
    refuse_other_data,
    short_names,
    texts_of,
)
from ..options import add_model_options, at_least, load_models, make_folder, output_folder
from ..parts import Sequences, fingerprint
from ..ranks import Ranks
from ..state_tracking.problems import problem_of
from ..texts import digest, slugs
from .parts import Measurements, Reading
from .results import Result, read_results, table, write_csv, write_json, write_npz

NAME = "effective_rank"
PART_TOKENS = 1 << 16
"""Tokens of an automatic part on a CPU, which is what a killed eval does again at most."""


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    with Ranks() as ranks:
        width = None if sys.stdout.isatty() else 140
        console = Console(width=width, highlight=False, markup=False, quiet=ranks.rank != 0)
        if options.source:
            if ranks.rank == 0:
                side_by_side(options, console)
            return
        loaded = load_models(options)
        folder = output_folder(options, loaded)
        jobs = plan(loaded, options, folder / NAME, ranks, console)
        ranks.first(lambda: refuse_other_data(folder / f"{NAME}.json", jobs))
        compute(jobs, ranks, console)
        ranks.wait()
        if ranks.rank == 0:
            for job in jobs:
                job.parts.tidy()
            report([Result(job.model, job.data, job.parts) for job in jobs], folder / NAME, console)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m eval.{NAME}", description=__doc__.split("\n")[0])
    # Small singular values are what a narrower type would hide.
    add_model_options(parser, dtype="float32", optional=True)
    add_text_options(parser, length=16_384, sequences=8, documents="packed")
    add = parser.add_argument
    add("--every", type=int, default=16, metavar="K", help="a state at each K-th token; 1: all (default: %(default)s)")
    add("--between-householders", action="store_true", help="also the states between the n_h steps of those tokens")
    add("--reset", action=argparse.BooleanOptionalAction, default=None,
        help="an empty state at each document start (default: as the model was trained)")  # fmt: skip
    add("--from", dest="source", nargs="+", default=[], type=path, metavar="FOLDER",
        help="results to show side by side; takes no models")  # fmt: skip
    options = parser.parse_args(arguments)
    if bool(options.source) == bool(options.models) or (options.source and options.data):
        raise ConfigError(f"expected MODEL... [--data DATA...], or --from FOLDER...; python -m eval.{NAME} --help")
    check_text_options(options)
    at_least(options, 1, "every")
    if options.every > options.length:
        raise ConfigError(f"--every {options.every:,}: must be at most --length, {options.length:,}")
    return options


class Words:
    """Generated words of the problem a run was trained on, as sequences of `length` tokens; see `texts.Texts`."""

    def __init__(self, loaded: LoadedModel, options: argparse.Namespace):
        problem = problem_of(loaded.config, options.length, options.seed)
        self.length, self.sequences, self.source = options.length, options.sequences, problem.sources[-1]
        if problem.formal:
            # Rows as long as they can be: their states after the end would be those of padding.
            step, name = self.source.language.step, problem.name
            self.source = FormalSource(name, self.length, self.length - step + 1, self.length, problem.seed, "test")
        order = self.source.order()
        self.about = {
            "wanted": {"data": problem.name}, "source": order, "eos_id": None, "sha256": digest(order),
            "kind": "words", "sequences": self.sequences, "length": self.length,
        }  # fmt: skip

    @lru_cache(maxsize=1)  # noqa: B019 (there is one for each run, as long as the program)
    def _batch(self, first: int, last: int) -> np.ndarray:
        return self.source.batch(np.arange(first, last))[0]["input"].numpy()

    def read(self, first: int, last: int, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) of the words first .. last - 1."""
        return self._batch(first, last)[:, start:stop]

    def describe(self) -> str:
        return f"{self.sequences:,} generated words of {self.length:,} tokens"


def plan(loaded: list[LoadedModel], options: argparse.Namespace, folder: Path, ranks: Ranks, console) -> list[Job]:
    """Chooses the sequences of each dataset, checks that they fit each model, and says what they are."""
    jobs, names = [], short_names([(model.run, model.step) for model in loaded])
    weights = ranks.first(lambda: [fingerprint(model.model) for model in loaded])
    for data, data_name in datasets(options) or [("", "")]:
        said = set()
        for model, name, checksum in zip(loaded, names, weights, strict=True):
            reading = reading_of(model, options)

            def prepare(model=model, checksum=checksum, data=data, reading=reading) -> tuple[Sequences, Measurements]:
                texts = texts_of(data, model, options, folder) if data else words_of(model, options)
                return texts, Measurements.open(folder, model, checksum, texts, asdict(reading))

            texts, parts = ranks.first(prepare)
            jobs.append(Job.of(model, name, data_name or texts.about["wanted"]["data"], texts, parts))
            how = "emptied" if reading.reset else "carried across them"
            starts = "" if texts.about["eos_id"] is None else f"; at document starts the states are {how}"
            line = f"{data or jobs[-1].data['name']}: {texts.describe()}{starts}"
            if line not in said:
                said.add(line)
                console.print(line, soft_wrap=True)
    return jobs


def reading_of(loaded: LoadedModel, options: argparse.Namespace) -> Reading:
    """How the sequences are read by a model."""
    trained = bool(loaded.config.get("data", {}).get("reset_state_at_documents", False))
    reset = trained if options.reset is None else options.reset
    batch = min(options.batch or automatic_batch(loaded, options.length, PART_TOKENS), options.sequences)
    return Reading(options.every, options.between_householders, reset, batch, options.segment)


def words_of(loaded: LoadedModel, options: argparse.Namespace) -> Words:
    """Words of the run's own problem, for want of a dataset.

    Raises:
        ConfigError: the run was not trained on words.
    """
    if loaded.config.get("data", {}).get("kind") not in ("group_word", "formal_language"):
        raise ConfigError(
            f"{loaded.label} was not trained on generated words: name what it shall read with --data\n"
            "expected a prepared folder, a file or folder of text, or a dataset NAME[:CONFIGURATION]"
        )
    return Words(loaded, options)


def side_by_side(options: argparse.Namespace, console: Console) -> None:
    """Shows earlier results together."""
    if not options.out:
        raise ConfigError(f"--from {' '.join(options.source)}: what is shown together needs --out FOLDER")

    def rename(models: list[dict]) -> list[str]:
        return short_names([(Path(model["path"]), model["step"]) for model in models])

    target = Path(options.out)
    results = read_results([Path(folder) / f"{NAME}.json" for folder in options.source], rename)
    make_folder(target)
    report(results, target / NAME, console)


def report(results: list[Result], stem: Path, console: Console) -> None:
    """Prints a table for each dataset; writes `stem`.json, and the numbers and pictures of each result.

    Where there are several datasets or models, names of files go on with those of the one shown.
    """
    from . import figures

    names = list(dict.fromkeys(result.data["name"] for result in results))
    folder, npz = stem.parent, []
    for data, data_slug in zip(names, slugs(names), strict=True):
        chosen = [result for result in results if result.data["name"] == data]
        shared = "_".join([stem.name, *([data_slug] if len(names) > 1 else [])])
        console.print(table(chosen))
        figures.curves_figure(chosen, folder / f"{shared}.png")
        figures.map_figure(chosen, folder / f"{shared}_map.png")
        for result, model_slug in zip(chosen, slugs([result.model["name"] for result in chosen]), strict=True):
            own = "_".join([shared, *([model_slug] if len(chosen) > 1 else [])])
            npz.append(f"{own}.npz")
            write_npz(folder / npz[-1], result)
            figures.sequence_figure(result, folder / f"{own}_sequence.png")
            figures.beta_figure(result, folder / f"{own}_beta.png")
            figures.spectrum_figure(result, folder / f"{own}_spectrum.png")
            if result.change.documents:
                figures.documents_figure(result, folder / f"{own}_documents.png")
            if not np.isfinite(result.rank).all():
                console.print(f"{result.model['name']}, {data}: states that are not finite", soft_wrap=True)
    ordered = [result for data in names for result in results if result.data["name"] == data]
    write_json(stem.with_suffix(".json"), ordered, npz)
    write_csv(stem.with_suffix(".csv"), ordered)
    console.print(f"written: {stem}.json, .csv, .npz and .png; what they were made of is in {stem}/", soft_wrap=True)
