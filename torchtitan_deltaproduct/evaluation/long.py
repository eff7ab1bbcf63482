"""The frame of evaluations over long sequences: models x datasets, measured in pieces that survive a kill, reported.

    class Loss(LongEvaluation):                                      # beside the defaults of its options:
        def measure(self, model, tokens, reading, advance): ...     # some sequences -> arrays
        def summarise(self, measured, options): ...                  # arrays -> results, which know their rows
        def show(self, results, stem, options, console): ...         # tables and pictures
    Loss().main(["outputs/run", "--data", "data/a"])

    OUT/NAME.json, .csv, ...    results
       /NAME/texts/             the tokens that were read (`texts`)
       /NAME/MODEL-DATA-KEY/    what was measured of them (`pieces`)

The same command again, after a kill or on another number of ranks, goes on with the pieces that are missing.
"""

import argparse
import os
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console

from torchtitan_deltaproduct.arguments import Parser, path, shown
from torchtitan_deltaproduct.checkpoint.load import LoadedModel
from torchtitan_deltaproduct.errors import ConfigError, DataError
from torchtitan_deltaproduct.formats import clock
from torchtitan_deltaproduct.models import DeltaProductLM
from torchtitan_deltaproduct.progress import Progress

from .files import read_results, short_names, short_paths, write_array, write_csv, write_json
from .options import MOST_ROWS, add_model_options, add_text_options, at_least, load_models, make_folder, output_folder
from .pieces import Arrays, Measured, Pieces, Sequences, Tokens, describe, fingerprint
from .ranks import Ranks
from .swept import Swept, made_by
from .texts import texts_of

Advance = Callable[[int], None]
"""Is told the number of tokens after each segment."""


class LongEvaluation(ABC):
    """An evaluation over long sequences. The attributes are its name and the defaults of its options.

    Attributes:
        name: of the command, `python -m eval.NAME`, and of its files.
        summary: one line for --help.
        dtype, length, sequences, documents: defaults of these options.
        piece_tokens: tokens of an automatic piece on a CPU, which is what a killed run does again at most.
        suffix, version: of the files of arrays and of their content.
        header: what its JSON says before the results.
        written: which other files there are, for its last line.
        usage: what was expected of the command line, for its error.
        own_sequences: from a model and the options, what is read without --data; None: --data is needed.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    dtype: ClassVar[str] = "auto"
    length: ClassVar[int] = 32_768
    sequences: ClassVar[int] = 32
    documents: ClassVar[str] = "auto"
    piece_tokens: ClassVar[int] = 1 << 18
    suffix: ClassVar[str] = ".npy"
    version: ClassVar[int] = 1
    header: ClassVar[dict[str, str]]
    written: ClassVar[str]
    usage: ClassVar[str] = "MODEL... --data DATA..., or --from FOLDER alone"
    from_help: ClassVar[str] = "results to show side by side; takes no models"
    own_sequences: Callable[..., Sequences] | None = None

    @abstractmethod
    def measure(self, model: DeltaProductLM, tokens: Tokens, reading: dict[str, Any], advance: Advance) -> Arrays:
        """Measures some sequences with a model that is whole on its device, read as `reading` says.

        Returns an array [sequences, length] (suffix .npy), or several by name (.npz).
        """

    @abstractmethod
    def summarise(self, measured: list[Measured], options: argparse.Namespace | None) -> list[Any]:
        """A result of each case, with `case`, `entry()` for JSON and `rows()` for CSV; options None: the defaults.

        The latter are dicts, of what is said beside that which all evaluations say of a case.
        """

    @abstractmethod
    def show(self, results: list[Any], stem: Path, options: argparse.Namespace, console: Console) -> None:
        """Prints tables and writes pictures and whatever else is not JSON or CSV; names begin with `stem`."""

    @abstractmethod
    def compare(self, results: list[Any], stem: Path) -> None:
        """Writes pictures of several models on one dataset."""

    @abstractmethod
    def metrics(self, entry: dict[str, Any]) -> dict[str, float | None]:
        """What of a result's JSON goes into the table of a sweep."""

    def add_options(self, add: Callable[..., Any]) -> None:  # noqa: B027 (there need be none)
        """Adds options of its own; `add` is that of the parser."""

    def check(self, options: argparse.Namespace) -> None:  # noqa: B027
        """Raises ConfigError if an option of its own is out of range."""

    def notes(self, cases: list[Measured], options: argparse.Namespace) -> list[str]:
        """What a reader of the results should know of the models on one dataset before they are measured."""
        return [f"{case.data['wanted']['data']}: {case.data['said']}" for case in cases]

    def reading(self, loaded: LoadedModel, options: argparse.Namespace) -> dict[str, Any]:
        """How a model reads sequences: `batch`, the sequences of a piece, and all that changes what is measured.

        A GPU needs the work of many sequences; on a CPU a piece ends soon.
        """
        on_cuda = loaded.model.tok_embeddings.weight.device.type == "cuda"
        automatic = MOST_ROWS if on_cuda else max(1, min(MOST_ROWS, self.piece_tokens // options.length))
        return {"batch": options.batch or automatic, "segment": options.segment}

    # What follows is the same for all.

    def parse(self, arguments: list[str] | None) -> argparse.Namespace:
        """The command line; ConfigError if it is wrong."""
        parser = Parser(f"eval.{self.name}", self.summary)
        add_model_options(parser, dtype=self.dtype, optional=True)
        add_text_options(parser, length=self.length, sequences=self.sequences, documents=self.documents)
        self.add_options(parser.add_argument)
        parser.add_argument("--from", dest="source", nargs="+", default=[], type=path, metavar="FOLDER",
                            help=self.from_help)  # fmt: skip
        options = parser.parse_args(arguments)
        lacking = self.own_sequences is None and not options.source and not options.data
        if bool(options.source) == bool(options.models) or (options.source and options.data) or lacking:
            raise ConfigError(f"expected {self.usage}; python -m eval.{self.name} --help")
        at_least(options, 1, "length", "sequences", "segment", "search_mb")
        at_least(options, 0, "batch", "seed")
        self.check(options)
        return options

    def main(self, arguments: list[str] | None = None) -> None:
        """Runs the command line."""
        options = self.parse(arguments)
        words = sys.argv[1:] if arguments is None else arguments
        with Ranks() as ranks:
            width = None if sys.stdout.isatty() else 140
            console = Console(width=width, highlight=False, markup=False, quiet=ranks.rank != 0)
            if options.source:
                options.made_by = made_by(words, [])
                if ranks.rank == 0:
                    self.show_again(options, console)
                return
            loaded = load_models(options)
            options.made_by = made_by(words, loaded)
            folder = output_folder(options, loaded)
            cases = self.plan(loaded, options, folder / self.name, ranks, console)
            ranks.first(lambda: refuse_other_data(folder / f"{self.name}.json", cases))
            self.compute(cases, ranks, console)
            ranks.wait()
            if ranks.rank == 0:
                for case in cases:
                    case.pieces.tidy()
                self.report(cases, folder / self.name, options, console)

    def plan(
        self, loaded: list[LoadedModel], options: argparse.Namespace, folder: Path, ranks: Ranks, console: Console
    ) -> list[Measured]:
        """Chooses the sequences of each dataset, checks that they fit each model, and says what they are."""
        cases, names = [], short_names([(model.run, model.step) for model in loaded])
        weights = ranks.first(lambda: [fingerprint(model.model) for model in loaded])
        for data, data_name in datasets(options) or [("", "")]:
            for model, name, checksum in zip(loaded, names, weights, strict=True):
                sequences, pieces = ranks.first(partial(self.open, model, checksum, data, options, folder))
                about = {"name": data_name or sequences.about["wanted"]["data"], "said": sequences.describe()}
                described = describe(model, name, checksum)
                cases.append(Measured(described, about | sequences.about, pieces, model, sequences))
            for line in dict.fromkeys(self.notes(cases[-len(loaded) :], options)):
                console.print(line, soft_wrap=True)
        return cases

    def open(
        self, model: LoadedModel, weights: str, data: str, options: argparse.Namespace, folder: Path
    ) -> tuple[Sequences, Pieces]:
        """What a model reads of a dataset ("": its own sequences), and where its measurements are kept."""
        sequences = texts_of(data, model, options, folder) if data else self.own_sequences(model, options)
        reading = self.reading(model, options)
        return sequences, Pieces.open(folder, model, weights, sequences, reading, self.suffix, self.version)

    def compute(self, cases: list[Measured], ranks: Ranks, console: Console) -> None:
        """Computes the pieces that are missing, this rank its share; shows how far it is."""
        # One look, by one rank: the others might see what is being written meanwhile.
        missing = ranks.first(lambda: [(i, piece) for i, case in enumerate(cases) for piece in case.pieces.missing()])
        total = sum(cases[i].tokens(piece) for i, piece in missing)
        there = sum(case.tokens(piece) for case in cases for piece in case.pieces.all) - total
        if there and total:
            console.print(f"continuing: {there:,} of {there + total:,} tokens were read before")
        elif there:
            console.print(f"all {there:,} tokens were read before")
        mine = [(cases[i], piece) for i, piece in missing[ranks.rank :: ranks.world]]
        total = sum(case.tokens(piece) for case, piece in mine)
        with Progress("", total, "tokens", quiet=ranks.rank != 0) as progress:
            for case, piece in mine:
                progress.title, tokens = case.name, Tokens(case.sequences, *piece)
                arrays = self.measure(case.loaded.model, tokens, case.pieces.about, progress.advance)
                write_array(case.pieces.path(piece), arrays)
        if mine:
            each = f" on each of {ranks.world} ranks" if ranks.world > 1 else ""
            seconds = progress.seconds
            console.print(f"{total:,} tokens in {clock(seconds)}, {total / seconds:,.0f} tokens/s{each}")

    def report(self, measured: list[Measured], stem: Path, options: argparse.Namespace, console: Console) -> None:
        """Shows all results and writes them, `stem`.json last: where it is, everything is."""
        results = self.summarise(measured, options)
        self.show(results, stem, options, console)
        entries, rows = [], []
        for result in results:
            model, data, pieces = result.case.model, result.case.data, result.case.pieces
            common = {"model": model, "data": data, "settings": pieces.about}
            entries.append(common | {"raw": os.path.relpath(pieces.folder, stem.parent)} | result.entry())
            head = {"model": model["label"], "step": model["step"], "train_length": model["train_length"]}
            rows += [head | {"data": data["name"]} | row for row in result.rows()]
        write_csv(stem.with_suffix(".csv"), list(rows[0]), (row.values() for row in rows))
        content = {"version": self.version, **self.header, "made_by": options.made_by, "results": entries}
        write_json(stem.with_suffix(".json"), content)
        others = self.written.format(stem=stem, raw=measured[0].pieces.folder.parent)
        console.print(f"written: {stem}.json, {others}", soft_wrap=True)

    @property
    def swept(self) -> Swept:
        """How a sweep runs it and reads its results."""

        def metrics(folder: Path) -> dict[str, float | None]:
            (entry,) = read_results(folder / f"{self.name}.json")
            return self.metrics(entry)

        def compare(files: list[Path], names: list[str], stem: Path) -> None:
            self.compare(self.summarise(self.read(files, names), None), stem)

        return Swept(self.name, metrics, self.parse, reads_data=True, compare=compare)

    def show_again(self, options: argparse.Namespace, console: Console) -> None:
        """Reports the measurements of earlier runs again, of several side by side."""
        folders = [Path(source) for source in dict.fromkeys(options.source)]
        if len(folders) > 1 and not options.out:
            raise ConfigError(f"--from {' '.join(options.source)}: several results side by side need --out FOLDER")
        measured = self.read([folder / f"{self.name}.json" for folder in folders])
        target = make_folder(Path(options.out) if options.out else folders[0])
        for line in dict.fromkeys(LongEvaluation.notes(self, measured, options)):
            console.print(line, soft_wrap=True)
        self.report(measured, target / self.name, options, console)

    def read(self, files: list[Path], names: list[str] | None = None) -> list[Measured]:
        """The measurements behind the NAME.json of earlier runs; DataError if they are not there, or damaged.

        `names` are for the models; None: short ones, for they were named in different files.
        """
        entries = [(file.parent, entry) for file in files for entry in read_results(file)]
        models = [entry["model"] for _, entry in entries]
        if names is None and len(files) == 1:
            names = [model["name"] for model in models]
        names = names or short_names([(Path(model["path"]), model["step"]) for model in models])
        # Datasets too, which had the same short name if they were measured one by one.
        paths = [entry["data"]["wanted"]["data"].rstrip("/") or "/" for _, entry in entries]
        unique = list(dict.fromkeys(paths))
        data_names, measured = dict(zip(unique, map(shown, short_paths(unique)), strict=True)), []
        # One model that read one dataset in two ways is known by the folders of its results.
        twice = Counter(zip(names, paths, strict=True))
        places = [str(file.parent) for file in files]
        places = dict(zip(places, map(shown, short_paths(places)), strict=True))
        for (folder, entry), name, data in zip(entries, names, paths, strict=True):
            pieces = Pieces.at(folder / entry["raw"], self.suffix, self.version)
            name += f" in {places[str(folder)]}" if twice[name, data] > 1 else ""
            model = entry["model"] | {"name": name, "weights": pieces.about["weights"]}
            measured.append(Measured(model, entry["data"] | {"name": data_names[data]}, pieces))
        return measured


def datasets(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Each dataset of --data once, with a short name; ConfigError if one has no name."""
    if "" in options.data:
        # As a path it would be the current folder: more likely a shell variable is not set.
        raise ConfigError("--data '': expected a prepared folder, a file or folder of text, or a dataset NAME[:CONFIG]")
    paths = list(dict.fromkeys(data.rstrip("/") or "/" for data in options.data))
    return list(zip(paths, map(shown, short_paths(paths)), strict=True))


def refuse_other_data(file: Path, cases: list[Measured]) -> None:
    """Raises ConfigError if the results in a file are on data that are not read now, and would be lost."""
    try:
        there = [entry["data"]["wanted"]["data"] for entry in read_results(file)] if file.exists() else []
    except (DataError, KeyError, TypeError):
        return
    here = {case.data["wanted"]["data"] for case in cases}
    if others := [data for data in dict.fromkeys(there) if data not in here]:
        raise ConfigError(
            f"{file} holds results on {', '.join(others)}, which those on {', '.join(sorted(here))} would overwrite\n"
            "name another folder with --out, or all the data after --data"
        )
