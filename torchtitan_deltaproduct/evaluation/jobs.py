"""Models times datasets: what the evals of long sequences ask for, how it is named, and getting it computed.

add_text_options(parser, length=32_768, sequences=32, documents="auto")
for data, data_name in datasets(options): ...
compute(jobs, ranks, console)                        # what is missing, shared among the ranks
"""

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from torchtitan_deltaproduct.arguments import path, shown, text
from torchtitan_deltaproduct.checkpoint.load import LoadedModel
from torchtitan_deltaproduct.data.progress import clock
from torchtitan_deltaproduct.data.tokenizer import tokenizer_sha256
from torchtitan_deltaproduct.errors import ConfigError, DataError

from .json_file import read_results
from .options import at_least
from .parts import Part, Parts, Sequences
from .ranks import Ranks
from .texts import Texts, Wanted, open_texts

MOST_ROWS = 8
"""Sequences of an automatic batch."""
SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class Job:
    """One model on one dataset.

    Attributes:
        loaded: the model.
        model: what results say of it: name (short), label, path, step, train_length, num_householder, ...
        data: what they say of the dataset: name (short), said (one line), and what the sequences say of themselves.
        texts: the sequences.
        parts: the measurements.
    """

    loaded: LoadedModel
    model: dict
    data: dict
    texts: Sequences
    parts: Parts

    @classmethod
    def of(cls, loaded: LoadedModel, name: str, data_name: str, texts: Sequences, parts: Parts) -> "Job":
        args = loaded.model.args
        model = {
            "name": name, "label": shown(loaded.label), "path": str(loaded.run), "step": loaded.step,
            "train_length": loaded.train_length, "num_householder": args.num_householder,
            "head_dim": args.head_dim, "head_v_dim": args.head_v_dim, "allow_neg_eigval": args.allow_neg_eigval,
            "parameters": sum(parameter.numel() for parameter in loaded.model.parameters()),
        }  # fmt: skip
        data = {"name": data_name, "said": texts.describe(), **texts.about}
        return cls(loaded, model, data, texts, parts)

    def tokens(self, part: Part) -> int:
        """Tokens of a part."""
        return (part[1] - part[0]) * self.texts.length


def add_text_options(parser: argparse.ArgumentParser, *, length: int, sequences: int, documents: str) -> None:
    """Adds --data and all that says which sequences are read, and how; with the given defaults."""
    add = parser.add_argument
    add("--data", nargs="+", default=[], type=path,
        help="prepared folder, file or folder of text, or dataset NAME[:CONFIG]")  # fmt: skip
    add("--length", type=int, default=length, help="tokens of a sequence (default: %(default)s)")
    add("--sequences", type=int, default=sequences, help="sequences at most (default: %(default)s)")
    add("--documents", choices=("auto", "long", "packed"), default=documents,
        help="documents at least as long as --length, or packed ones; auto: long if there are enough "
        "(default: %(default)s)")  # fmt: skip
    add("--seed", type=int, help="of the choice of sequences (default: 0; of generated words that of the run)")
    add("--batch", type=int, default=0,
        help=f"sequences read together (default: {MOST_ROWS}; on a CPU fewer of long ones)")  # fmt: skip
    add("--segment", type=int, default=1024, help="tokens of a sequence read at a time (default: %(default)s)")
    add("--tokenizer", type=path, metavar="FOLDER", help="with tokenizer.json (default: that of the model)")
    add("--split", default="train", help="of a dataset (default: %(default)s)")
    add("--text-field", default="text", type=text, metavar="NAME",
        help="field or column of the text (default: %(default)s)")  # fmt: skip
    add("--eos", default="", type=text, metavar="TOKEN",
        help="separator of documents in text (default: that of training)")  # fmt: skip
    add("--search-mb", type=int, default=1024, metavar="MB",
        help="text looked through for long documents, at most (default: %(default)s)")  # fmt: skip


def check_text_options(options: argparse.Namespace) -> None:
    """Raises ConfigError if a number of `add_text_options` is out of range."""
    at_least(options, 1, "length", "sequences", "segment", "search_mb")
    at_least(options, 0, "batch", "seed")


def datasets(options: argparse.Namespace) -> list[tuple[str, str]]:
    """Each dataset of --data once, with a short name.

    Raises:
        ConfigError: one has no name.
    """
    if "" in options.data:
        # As a path it would be the current folder: more likely a shell variable is not set.
        raise ConfigError("--data '': expected a prepared folder, a file or folder of text, or a dataset NAME[:CONFIG]")
    paths = list(dict.fromkeys(data.rstrip("/") or "/" for data in options.data))
    return list(zip(paths, map(shown, short_paths(paths)), strict=True))


def refuse_other_data(file: Path, jobs: list[Job]) -> None:
    """Raises ConfigError if the results in a file are on data that the jobs do not read, and would be lost."""
    try:
        there = [entry["data"]["wanted"]["data"] for entry in read_results(file)] if file.exists() else []
    except (DataError, KeyError, TypeError):
        return
    here = {job.data["wanted"]["data"] for job in jobs}
    if others := [data for data in dict.fromkeys(there) if data not in here]:
        raise ConfigError(
            f"{file} holds results on {', '.join(others)}, which those on {', '.join(sorted(here))} would overwrite\n"
            "name another folder with --out, or all the data after --data"
        )


def texts_of(data: str, loaded: LoadedModel, options: argparse.Namespace, folder: Path) -> Texts:
    """The sequences of a dataset for a model, kept in `folder`/texts.

    Raises:
        DataError: there are none, or they are not of tokens that the model knows.
    """
    tokenizer = tokenizer_of(loaded, options)
    wanted = Wanted(
        data, options.length, options.sequences, options.documents, options.seed or 0, options.split,
        options.text_field, options.eos, options.search_mb << 20,
    )  # fmt: skip
    eos_id = None if tokenizer is None else loaded.separator(tokenizer, options.eos)
    texts = open_texts(wanted, tokenizer, folder / "texts", eos_id)
    check_fit(loaded, tokenizer, texts)
    return texts


def tokenizer_of(loaded: LoadedModel, options: argparse.Namespace) -> Path | None:
    """The folder of --tokenizer, or the model's own."""
    return Path(options.tokenizer) if options.tokenizer else loaded.tokenizer


def check_fit(loaded: LoadedModel, tokenizer: Path | None, texts: Texts) -> None:
    """Raises DataError if the tokens are not those that the model knows."""
    data, largest = texts.about["wanted"]["data"], texts.about["largest_id"]
    if tokenizer is not None and tokenizer_sha256(tokenizer) != texts.about["tokenizer_sha256"]:
        raise DataError(
            f"{data} was prepared with another tokenizer than {loaded.label} was trained with\n"
            f"expected the tokenizer.json of {tokenizer}: prepare the text again with --tokenizer {tokenizer}"
        )
    if loaded.eos_id is not None and texts.about["eos_id"] != loaded.eos_id and not texts.about["wanted"]["eos"]:
        raise DataError(
            f"{data} has the separator {texts.about['eos_id']}, and {loaded.label} was trained with {loaded.eos_id}\n"
            "prepare the text again with its separator (--eos)"
        )
    if largest >= loaded.model.args.vocab_size:
        raise DataError(
            f"{data} has a token {largest:,}; {loaded.label} knows those below {loaded.model.args.vocab_size:,}\n"
            "prepare the text with the model's tokenizer"
        )


def short_paths(paths: list[str]) -> list[str]:
    """As few last parts of each path as tell them apart, two at least."""
    parts = [Path(path).parts for path in paths]
    for count in range(2, max(map(len, parts), default=2)):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(paths):
            return names
    return paths


def short_names(models: list[tuple[Path, int | None]]) -> list[str]:
    """What tells models apart: the path below the folder that all runs lie in, and the step where it is known."""
    runs = [run.resolve() for run, _ in models]
    common = os.path.commonpath([run.parent for run in runs])
    steps = ["" if step is None else f" step {step}" for _, step in models]
    return [shown(os.path.relpath(run, common)) + step for run, step in zip(runs, steps, strict=True)]


def automatic_batch(loaded: LoadedModel, length: int, part_tokens: int) -> int:
    """Sequences read together: many for a GPU, which needs the work; on a CPU a part of `part_tokens` ends soon."""
    if loaded.model.tok_embeddings.weight.device.type == "cuda":
        return MOST_ROWS
    return max(1, min(MOST_ROWS, part_tokens // length))


def compute(jobs: list[Job], ranks: Ranks, console: Console) -> None:
    """Computes the parts that are missing, this rank its share; says a line every 10 seconds."""
    # One look, by one rank: the others might see what is being written meanwhile.
    missing = ranks.first(lambda: [(i, part) for i, job in enumerate(jobs) for part in job.parts.missing()])
    total = sum(jobs[i].tokens(part) for i, part in missing)
    there = sum(job.tokens(part) for job in jobs for part in job.parts.all) - total
    if there and total:
        console.print(f"continuing: {there:,} of {there + total:,} tokens were read before")
    elif there:
        console.print(f"all {there:,} tokens were read before")
    mine = missing[ranks.rank :: ranks.world]
    own = sum(jobs[i].tokens(part) for i, part in mine)
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
