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
import os
import sys
import time
from pathlib import Path

from rich.console import Console

from torchtitan_deltaproduct.checkpoint.load import LoadedModel
from torchtitan_deltaproduct.data.progress import clock
from torchtitan_deltaproduct.data.tokenizer import tokenizer_sha256
from torchtitan_deltaproduct.errors import ConfigError, DataError, exit_on_user_error

from .options import add_model_options, at_least, load_models, output_folder
from .position_parts import Part, Parts, fingerprint, open_parts
from .position_results import (
    Result,
    parse_buckets,
    read_results,
    results_of,
    table,
    training_lengths,
    write_csv,
    write_json,
)
from .ranks import Ranks
from .texts import Texts, Wanted, open_texts

NAME = "length_extrapolation"
PART_TOKENS = 1 << 18
"""Tokens of an automatic part on a CPU, which is what a killed eval does again at most: half a minute or so."""
MOST_ROWS = 8
SECONDS_BETWEEN_LINES = 10.0


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
    add = parser.add_argument
    add("--data", nargs="+", default=[], help="prepared folder, file or folder of text, or dataset NAME[:CONFIG]")
    add("--length", type=int, default=32_768, help="positions of a sequence (default: %(default)s)")
    add("--sequences", type=int, default=32, help="sequences at most (default: %(default)s)")
    add("--documents", choices=("auto", "long", "packed"), default="auto",
        help="documents at least as long as --length, or packed ones; auto: long if there are enough")  # fmt: skip
    add("--seed", type=int, default=0, help="of the choice of sequences (default: %(default)s)")
    add("--batch", type=int, default=0,
        help=f"sequences read together (default: {MOST_ROWS}; on a CPU fewer of long ones)")  # fmt: skip
    add("--segment", type=int, default=1024, help="tokens of a sequence read at a time (default: %(default)s)")
    add("--tokenizer", metavar="FOLDER", help="with tokenizer.json (default: that of the model)")
    add("--split", default="train", help="of a dataset (default: %(default)s)")
    add("--text-field", default="text", metavar="NAME", help="field or column of the text (default: %(default)s)")
    add("--eos", default="", metavar="TOKEN", help="separator of documents in text (default: as the tokenizer says)")
    add("--search-mb", type=int, default=1024, metavar="MB",
        help="text looked through for long documents, at most (default: %(default)s)")  # fmt: skip
    add("--buckets", default="", metavar="K|LAST,LAST,...",
        help="number of equal buckets, or their last positions (default: two an octave)")  # fmt: skip
    add("--x-axis", choices=("auto", "log", "linear"), default="auto",
        help="of the picture; auto: linear for equal buckets (default: %(default)s)")  # fmt: skip
    add("--from", dest="source", nargs="+", default=[], metavar="FOLDER",
        help="results to put into other --buckets, or side by side; takes no models")  # fmt: skip
    options = parser.parse_args(arguments)
    if bool(options.source) == bool(options.models) or bool(options.source) == bool(options.data):
        raise ConfigError(f"expected MODEL... --data DATA..., or --from FOLDER alone; python -m eval.{NAME} --help")
    at_least(options, 1, "length", "sequences", "segment", "search_mb")
    at_least(options, 0, "batch", "seed")
    parse_buckets(options.buckets, 1 << 62 if options.source else options.length)
    return options


class Job:
    """One model on one dataset."""

    def __init__(self, loaded: LoadedModel, name: str, data_name: str, texts: Texts, parts: Parts):
        self.loaded, self.texts, self.parts = loaded, texts, parts
        args = loaded.model.args
        self.model = {
            "name": name, "label": loaded.label, "path": str(loaded.run), "step": loaded.step,
            "train_length": loaded.train_length, "num_householder": args.num_householder,
            "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
        }  # fmt: skip
        self.data = {"name": data_name, "said": texts.describe(), **texts.about}


def plan(loaded: list[LoadedModel], options: argparse.Namespace, folder: Path, ranks: Ranks, console) -> list[Job]:
    """Chooses the sequences of each dataset, checks that they fit each model, and says what they are."""
    jobs, names = [], short_names([(model.run, model.step) for model in loaded])
    weights = ranks.first(lambda: [fingerprint(model.model) for model in loaded])
    paths = list(dict.fromkeys(data.rstrip("/") for data in options.data))
    for data, data_name in zip(paths, short_paths(paths), strict=True):
        wanted = Wanted(
            data, options.length, options.sequences, options.documents, options.seed, options.split,
            options.text_field, options.eos, options.search_mb << 20,
        )  # fmt: skip
        said = set()
        for model, name, checksum in zip(loaded, names, weights, strict=True):
            tokenizer = Path(options.tokenizer) if options.tokenizer else model.tokenizer

            def prepare(model=model, checksum=checksum, wanted=wanted, tokenizer=tokenizer) -> tuple[Texts, Parts]:
                texts = open_texts(wanted, tokenizer, folder / "texts")
                check_fit(model, tokenizer, texts)
                batch = options.batch or automatic_batch(model, options.length)
                return texts, open_parts(folder, model, checksum, texts, batch=batch, segment=options.segment)

            texts, parts = ranks.first(prepare)
            for line in (f"{data}: {texts.describe()}", *notes(model, name, tokenizer, texts)):
                if line not in said:
                    said.add(line)
                    console.print(line, soft_wrap=True)
            jobs.append(Job(model, name, data_name, texts, parts))
        if len({job.texts.about["tokenizer_sha256"] for job in jobs if job.data["name"] == data_name}) > 1:
            console.print(f"{data}: the models have different tokenizers, so their losses a token cannot be compared")
    return jobs


def short_paths(paths: list[str]) -> list[str]:
    """As few last parts of each path as tell them apart, two at least."""
    parts = [Path(path).parts for path in paths]
    for count in range(2, max(map(len, parts))):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(paths):
            return names
    return paths


def short_names(models: list[tuple[Path, int | None]]) -> list[str]:
    """What tells models apart: the path below the folder that all runs lie in, and the step where it is known."""
    runs = [run.resolve() for run, _ in models]
    common = os.path.commonpath([run.parent for run in runs])
    steps = ["" if step is None else f" step {step}" for _, step in models]
    return [os.path.relpath(run, common) + step for run, step in zip(runs, steps, strict=True)]


def automatic_batch(loaded: LoadedModel, length: int) -> int:
    """Sequences read together: many for a GPU, which needs the work; on a CPU a part ends soon."""
    if loaded.model.tok_embeddings.weight.device.type == "cuda":
        return MOST_ROWS
    return max(1, min(MOST_ROWS, PART_TOKENS // length))


def check_fit(loaded: LoadedModel, tokenizer: Path | None, texts: Texts) -> None:
    """Raises DataError if the tokens are not those that the model knows."""
    data, largest = texts.about["wanted"]["data"], texts.about["largest_id"]
    if tokenizer is not None and tokenizer_sha256(tokenizer) != texts.about["tokenizer_sha256"]:
        raise DataError(
            f"{data} was prepared with another tokenizer than {loaded.label} was trained with\n"
            f"expected the tokenizer.json of {tokenizer}: prepare the text again with --tokenizer {tokenizer}"
        )
    if largest >= loaded.model.args.vocab_size:
        raise DataError(
            f"{data} has a token {largest:,}; {loaded.label} knows those below {loaded.model.args.vocab_size:,}\n"
            "prepare the text with the model's tokenizer"
        )


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


def compute(jobs: list[Job], ranks: Ranks, console: Console) -> None:
    """Computes the parts that are missing, this rank its share; says a line every 10 seconds."""
    # One look, by one rank: the others might see what is being written meanwhile.
    missing = ranks.first(lambda: [(i, part) for i, job in enumerate(jobs) for part in job.parts.missing()])
    total = sum(size(jobs[i], part) for i, part in missing)
    there = sum(size(job, part) for job in jobs for part in job.parts.all) - total
    if there and total:
        console.print(f"continuing: {there:,} of {there + total:,} tokens were read before")
    elif there:
        console.print(f"all {there:,} tokens were read before")
    mine = missing[ranks.rank :: ranks.world]
    own = sum(size(jobs[i], part) for i, part in mine)
    each = f" on each of {ranks.world} ranks" if ranks.world > 1 else ""
    start = said = time.monotonic()
    done = 0

    def progress(tokens: int) -> None:
        nonlocal done, said
        done += tokens
        now = time.monotonic()
        if now - said >= SECONDS_BETWEEN_LINES:
            said = now
            speed = done / (now - start)
            console.print(f"{name}: {done:,} of {own:,} tokens, {speed:,.0f} tokens/s{each}, "
                          f"{clock((own - done) / speed)} left", soft_wrap=True)  # fmt: skip

    for i, part in mine:
        job = jobs[i]
        name = f"{job.model['name']}, {job.data['name']}"
        job.parts.compute(part, job.loaded.model, job.texts, progress)
    if own:
        seconds = time.monotonic() - start
        console.print(f"{own:,} tokens in {clock(seconds)}, {own / seconds:,.0f} tokens/s{each}")


def size(job: Job, part: Part) -> int:
    """Tokens of a part."""
    return (part[1] - part[0]) * job.texts.length


def rebucket(options: argparse.Namespace, console: Console) -> None:
    """Writes the results of earlier runs again: in other buckets, or several side by side."""
    folders = [Path(source) for source in options.source]
    if len(folders) > 1 and not options.out:
        raise ConfigError(f"--from {' '.join(options.source)}: several results side by side need --out FOLDER")

    def rename(models: list[dict]) -> list[str]:
        return short_names([(Path(model["path"]), model["step"]) for model in models])

    results = read_results([folder / f"{NAME}.json" for folder in folders], options.buckets, rename)
    target = Path(options.out) if options.out else folders[0]
    target.mkdir(parents=True, exist_ok=True)
    for line in dict.fromkeys(f"{result.data['wanted']['data']}: {result.data['said']}" for result in results):
        console.print(line, soft_wrap=True)
    report(results, target / NAME, options, console)


def report(results: list[Result], stem: Path, options: argparse.Namespace, console: Console) -> None:
    """Prints a table for each dataset and writes `stem`.json, .csv and .png."""
    from .position_figures import loss_figure

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


if __name__ == "__main__":
    exit_on_user_error(main)
