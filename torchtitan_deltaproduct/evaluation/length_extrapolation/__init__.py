"""Loss, perplexity and accuracy at each position of texts far longer than those a model was trained on.

    python -m eval.length_extrapolation outputs/run --data data/code/validation                   to 32,768 tokens
    python -m eval.length_extrapolation DN DP2 DP3 --data data/a data/b --length 1000000 --sequences 8
    python -m eval.length_extrapolation outputs/run --data book.txt corpus.jsonl --documents long
    torchrun --nproc_per_node 8 -m eval.length_extrapolation outputs/run --data data/code/validation
    python -m eval.length_extrapolation --from outputs/run/eval --buckets 64                      no model runs
    python -m eval.length_extrapolation --from outputs/*/eval --out compared                      runs side by side

MODEL is a run folder (its newest complete checkpoint, or `--step`), one `checkpoint/step-N`, or a Hugging Face folder.
DATA is a prepared folder, a file or folder of text, or a dataset NAME[:CONFIGURATION]. Results go to `--out`, by
default MODEL/eval: length_extrapolation.json, .csv and .png, and in length_extrapolation/ the tokens that were read and
the loss at every position of every sequence. The same command again continues where it was stopped.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from torchtitan_deltaproduct.arguments import path
from torchtitan_deltaproduct.checkpoint.load import LoadedModel
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
    tokenizer_of,
)
from ..options import add_model_options, load_models, make_folder, output_folder
from ..parts import fingerprint
from ..ranks import Ranks
from ..texts import Texts
from .parts import Losses
from .results import (
    Result,
    parse_buckets,
    read_results,
    results_of,
    table,
    training_lengths,
    write_csv,
    write_json,
)

NAME = "length_extrapolation"
PART_TOKENS = 1 << 18
"""Tokens of an automatic part on a CPU, which is what a killed eval does again at most: half a minute or so."""


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    with Ranks() as ranks:
        width = None if sys.stdout.isatty() else 140
        console = Console(width=width, highlight=False, markup=False, quiet=ranks.rank != 0)
        if options.source:
            if ranks.rank == 0:
                rebucket(options, console)
            return
        loaded = load_models(options)
        folder = output_folder(options, loaded)
        jobs = plan(loaded, options, folder / NAME, ranks, console)
        ranks.first(lambda: refuse_other_data(folder / f"{NAME}.json", jobs))
        compute(jobs, ranks, console)
        ranks.wait()
        if ranks.rank == 0:
            marks = training_lengths([job.model for job in jobs])
            lasts = parse_buckets(options.buckets, options.length, marks)
            for job in jobs:
                job.parts.tidy()
            results = results_of([(job.model, job.data, job.parts) for job in jobs], lasts)
            report(results, folder / NAME, options, console)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m eval.{NAME}", description=__doc__.split("\n")[0])
    add_model_options(parser, optional=True)
    add_text_options(parser, length=32_768, sequences=32, documents="auto")
    add = parser.add_argument
    add("--buckets", default="", metavar="K|LAST,LAST,...",
        help="number of equal buckets, or their last positions (default: two an octave)")  # fmt: skip
    add("--x-axis", choices=("auto", "log", "linear"), default="auto",
        help="of the picture; auto: linear for equal buckets (default: %(default)s)")  # fmt: skip
    add("--from", dest="source", nargs="+", default=[], type=path, metavar="FOLDER",
        help="results to put into other --buckets, or side by side; takes no models")  # fmt: skip
    options = parser.parse_args(arguments)
    if bool(options.source) == bool(options.models) or bool(options.source) == bool(options.data):
        raise ConfigError(f"expected MODEL... --data DATA..., or --from FOLDER alone; python -m eval.{NAME} --help")
    check_text_options(options)
    parse_buckets(options.buckets, 1 << 62 if options.source else options.length)
    return options


def plan(loaded: list[LoadedModel], options: argparse.Namespace, folder: Path, ranks: Ranks, console) -> list[Job]:
    """Chooses the sequences of each dataset, checks that they fit each model, and says what they are."""
    jobs, names = [], short_names([(model.run, model.step) for model in loaded])
    weights = ranks.first(lambda: [fingerprint(model.model) for model in loaded])
    for data, data_name in datasets(options):
        said = set()
        for model, name, checksum in zip(loaded, names, weights, strict=True):

            def prepare(model=model, checksum=checksum, data=data) -> tuple[Texts, Losses]:
                texts = texts_of(data, model, options, folder)
                batch = options.batch or automatic_batch(model, options.length, PART_TOKENS)
                reading = {"batch": batch, "segment": options.segment}
                return texts, Losses.open(folder, model, checksum, texts, reading)

            texts, parts = ranks.first(prepare)
            tokenizer = tokenizer_of(model, options)
            for line in (f"{data}: {texts.describe()}", *notes(model, name, tokenizer, texts)):
                if line not in said:
                    said.add(line)
                    console.print(line, soft_wrap=True)
            jobs.append(Job.of(model, name, data_name, texts, parts))
        if len({job.texts.about["tokenizer_sha256"] for job in jobs if job.data["name"] == data_name}) > 1:
            console.print(f"{data}: the models have different tokenizers, so their losses a token cannot be compared")
    return jobs


def notes(loaded: LoadedModel, name: str, tokenizer: Path | None, texts: Texts) -> list[str]:
    """What a reader of the results should know, a line each."""
    said = []
    if tokenizer is None:
        said.append(f"{name} has no tokenizer.json: that it fits the data cannot be checked")
    if texts.about["kind"] == "packed" and loaded.config.get("data", {}).get("reset_state_at_documents"):
        said.append(f"{name} was trained with its state reset at documents; here it is carried across them")
    if texts.sequences == 1:
        said.append("one sequence: there are no standard errors")
    return said


def rebucket(options: argparse.Namespace, console: Console) -> None:
    """Writes the results of earlier runs again: in other buckets, or several side by side."""
    folders = [Path(source) for source in options.source]
    if len(folders) > 1 and not options.out:
        raise ConfigError(f"--from {' '.join(options.source)}: several results side by side need --out FOLDER")

    def rename(models: list[dict]) -> list[str]:
        return short_names([(Path(model["path"]), model["step"]) for model in models])

    results = read_results([folder / f"{NAME}.json" for folder in folders], options.buckets, rename)
    target = Path(options.out) if options.out else folders[0]
    make_folder(target)
    for line in dict.fromkeys(f"{result.data['wanted']['data']}: {result.data['said']}" for result in results):
        console.print(line, soft_wrap=True)
    report(results, target / NAME, options, console)


def report(results: list[Result], stem: Path, options: argparse.Namespace, console: Console) -> None:
    """Prints a table for each dataset and writes `stem`.json, .csv and .png."""
    from .figures import loss_figure

    for data in dict.fromkeys(result.data["name"] for result in results):
        console.print(f"\n{data}", style="bold", soft_wrap=True)
        console.print(table([result for result in results if result.data["name"] == data]))
    for result in results:
        if result.verdict():
            console.print(result.verdict(), soft_wrap=True)
        if result.broken_from:
            console.print(f"{result.model['name']}, {result.data['name']}: losses that are not finite, "
                          f"the first in the bucket from position {result.broken_from:,}", soft_wrap=True)  # fmt: skip
    write_json(stem.with_suffix(".json"), results)
    write_csv(stem.with_suffix(".csv"), results)
    linear = options.x_axis == "linear" or (options.x_axis == "auto" and options.buckets.isdigit())
    loss_figure(results, stem.with_suffix(".png"), log_positions=not linear)
    raw = results[0].parts.folder.parent
    console.print(f"written: {stem}.json, .csv, .png; the loss at each position is in {raw}", soft_wrap=True)
