"""How far a model tracks state: accuracy by position on held-out words, many times longer than in training.

    python -m eval.state_tracking outputs/state_tracking/S3_n2/seed-1             one run, to 4x its training length
    python -m eval.state_tracking outputs/state_tracking/*/seed-* --length 512    a table and a picture of all
    python -m eval.state_tracking RUN --interpret                                 beta and keys of each head

RUN is a run on generated words, or an export of it by `to_hf`. Runs that differ in their seeds alone are averaged. Of a
group the table also says up to where half of the words are right throughout, and what `horizon` predicts of that.
Results go to `--out`, by default RUN/eval: state_tracking.json, .csv and .png.
"""

import argparse
import math
import sys
from pathlib import Path

from rich.console import Console

from torchtitan_deltaproduct.arguments import Parser
from torchtitan_deltaproduct.checkpoint.load import LoadedModel
from torchtitan_deltaproduct.progress import Progress

from ..files import read_results
from ..options import add_model_options, at_least, load_models, output_folder
from ..ranks import refuse_torchrun
from ..swept import Swept, made_by
from .problems import Problem, model_reader, problem_of
from .results import Criterion, RunResult, Setting, by_setting, read_settings, table, write_csv, write_json

HORIZON = ("horizon", "predicted horizon", "predicted over measured horizon")
"""Names of metrics: tokens, tokens, and their ratio, of those runs that have them."""


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    loaded = load_models(options)
    folder = output_folder(options, loaded)
    if options.interpret:
        from .interpret import interpret, stems

        for model, stem in zip(loaded, stems(loaded, folder), strict=True):
            interpret(model, folder, stem, console, words=min(options.words, 256), seed=options.seed)
        return
    results, how = [], {"rows": options.batch, "segment": options.segment}
    for model in loaded:
        problem = problem_of(model.config, options.length, options.seed)
        results.append(evaluate(model, problem, options.words, **how))
    criterion = Criterion(options.solved_at_training, options.solved_beyond)
    report(by_setting(results), criterion, folder / "state_tracking", console, made_by(words, loaded))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser("eval.state_tracking", __doc__)
    add_model_options(parser, dtype="float32")
    add = parser.add_argument
    add("--length", type=int, default=0,
        help="tokens of tested words, no fewer than in training (default: 4 times; formal languages 256)")  # fmt: skip
    add("--words", type=int, default=1024, help="words tested (default: %(default)s)")
    add("--seed", type=int, help="of the test words (default: data.seed of the run; the stream is another)")
    add("--batch", type=int, default=64, help="words read at a time (default: %(default)s)")
    add("--segment", type=int, default=256, help="tokens of a word read at a time (default: %(default)s)")
    add("--interpret", action="store_true", help="show beta and the key subspace of each head instead")
    limits = Criterion()
    add("--solved-at-training", type=float, default=limits.at_training, metavar="A",
        help="solved: accuracy at the training length of at least this (default: %(default)s)")  # fmt: skip
    add("--solved-beyond", type=float, default=limits.beyond, metavar="A",
        help="and at the tested length of at least this (default: %(default)s)")  # fmt: skip
    options = parser.parse_args(arguments)
    refuse_torchrun("eval.state_tracking")
    at_least(options, 1, "words", "batch", "segment")
    at_least(options, 0, "length")
    return options


def evaluate(loaded: LoadedModel, problem: Problem, words: int, **options) -> RunResult:
    """Reads the test words of a problem, showing how far it is; `options` are those of `Problem.count`."""
    with Progress(loaded.label, problem.tokens(words), "tokens") as progress:
        counts = problem.count(model_reader(loaded.model), words, progress=progress.advance, **options)
    return RunResult.of(loaded, problem, counts)


def report(
    settings: list[Setting], criterion: Criterion, stem: Path, console: Console, origin: dict | None = None
) -> None:
    """Prints the table and writes `stem`.json, .csv and .png."""
    console.print(table(settings, criterion))
    words = sorted({run.counts.words for setting in settings for run in setting.runs})
    console.print(
        f"{' or '.join(f'{count:,}' for count in words)} test words a run, 95 % intervals; solved: at least "
        f"{criterion.at_training:.0%} at the training length and {criterion.beyond:.0%} at the tested length"
    )
    for setting in settings:
        for copy in setting.copies:
            console.print(
                f"not counted: {copy.label}, a copy of another run (same seeds, same answers)", soft_wrap=True
            )
        for run in setting.runs if setting.problem.formal else ():
            buckets = [b for b in run.buckets() if not math.isnan(b["value"])]
            cells = [f"{b['first']}-{b['last']}: {b['value']:.1%} ({b['scaled']:.2f})" for b in buckets]
            console.print(f"{setting.problem.name}, {setting.label}, seed {run.seed_name}, accuracy (scaled) by length")
            console.print("  " + "  ".join(cells))
    write(settings, criterion, stem, origin or {})
    console.print(f"written: {stem}.json, .csv, .png", soft_wrap=True)


def write(settings: list[Setting], criterion: Criterion, stem: Path, origin: dict) -> None:
    """Writes `stem`.png, .csv and, last, .json."""
    from .figures import accuracy_figure

    accuracy_figure(settings, stem.with_suffix(".png"))
    write_csv(stem.with_suffix(".csv"), settings)
    write_json(stem.with_suffix(".json"), settings, criterion, origin)


def metrics(folder: Path) -> dict[str, float | None]:
    """Accuracy at the training length and at the tested one, whether it counts as solved, and up to where half of the
    words are right (`horizon`)."""
    (setting,) = read_results(folder / "state_tracking.json", "settings")
    values = {
        "accuracy at the training length": setting["accuracy_at_training_length"]["mean"],
        "accuracy at the tested length": setting["accuracy_at_length"]["mean"],
        "solved": float(setting["solved"]),
    }
    measured, predicted = (setting["runs"][0].get(name) for name in ("horizon", "predicted_horizon"))
    values |= {name: value for name, value in zip(HORIZON[:2], (measured, predicted), strict=True) if value is not None}
    return values | ({HORIZON[2]: predicted / measured} if measured and predicted else {})


def compare(files: list[Path], names: list[str], stem: Path) -> None:
    """The curves of several runs, over their seeds where they differ in nothing else: `stem`.png, .csv and .json."""
    write(read_settings(files), Criterion(), stem, {})


SWEPT = Swept("state_tracking", metrics, parse, compare=compare)
