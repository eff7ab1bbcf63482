"""Continues prompts with a trained model; the text appears as it is made.

    python -m eval.generate RUN --prompt "def main():"                           the most probable text
    python -m eval.generate RUN --prompt "import " --temperature 0.8 --top-p 0.95 --seed 1 --samples 3
    python -m eval.generate RUN --prompt "class A" "class B" --stop $'\\n\\n'      two prompts as one batch
    cat notes.txt | python -m eval.generate RUN --file - --tokens 500            from standard input

Without a prompt the text begins a new document. It ends at the end of the document, at `--stop`, or after `--tokens`.
Memory and time a token do not grow with the length; prompts are read in segments. The text alone goes to standard
output; what it is and its speed go to standard error.
"""

import argparse
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from torchtitan_deltaproduct.arguments import Parser, path, text
from torchtitan_deltaproduct.checkpoint.load import LoadedModel
from torchtitan_deltaproduct.errors import ConfigError, DataError
from torchtitan_deltaproduct.progress import Progress

from ..options import add_model_options, at_least, load_models
from ..ranks import refuse_torchrun
from .decoding import SEGMENT, Settings, continue_prompts
from .sampling import Sampling
from .vocabulary import Vocabulary, open_vocabulary

MOST_SEEDS = 1 << 63
"""PyTorch takes no larger seed."""
ENDS = {"separator": "the end of the document", "stop": "--stop", "length": "--tokens"}


@dataclass(frozen=True)
class Prompt:
    """One text to continue: where it came from, what it says, and the seed of its continuation."""

    name: str
    text: str
    seed: int


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    settings = settings_of(options)
    prompts = read_texts(options)
    try:
        for loaded in load_models(options):
            vocabulary = open_vocabulary(loaded, options.tokenizer, options.eos)
            say(f"{loaded.label}, tokenizer {vocabulary.folder}")
            if len(options.models) > 1:
                print(f"=== {loaded.label}", flush=True)
            speak(loaded, vocabulary, prompts, settings, options)
    except KeyboardInterrupt:
        say("\ninterrupted")
        return 130
    except BrokenPipeError:
        # Whoever reads has had enough (`| head`); Python must not try to write the rest at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser("eval.generate", __doc__)
    add_model_options(parser, results=False)
    add = parser.add_argument
    add("--prompt", nargs="+", action="extend", default=[], type=text, metavar="TEXT",
        help="what to continue; several are continued together")  # fmt: skip
    add("--file", nargs="+", action="extend", default=[], type=path, metavar="FILE",
        help="files with a prompt each; - is standard input")  # fmt: skip
    add("--tokens", type=int, default=128, help="the most tokens to add (default: %(default)s)")
    add("--temperature", type=float, default=0.0,
        help="0: the most probable token; 1: as the model says (default: %(default)s)")  # fmt: skip
    add("--top-k", type=int, default=0, metavar="K", help="only among the K most probable tokens (default: all)")
    add("--top-p", type=float, default=1.0, metavar="P",
        help="only among the fewest tokens that have the mass P (default: %(default)s)")  # fmt: skip
    add("--seed", type=int, default=0, help="of the random choices (default: %(default)s)")
    add("--samples", type=int, default=1, help="continuations of each prompt, with seeds SEED, SEED+1, ...")
    add("--stop", nargs="+", action="extend", default=[], type=text, metavar="TEXT",
        help="strings before which the text ends")  # fmt: skip
    add("--ignore-eos", action="store_true", help="go on after the end of a document")
    add("--new-document", action="store_true", help="begin each prompt as a document begins in training, with the "
        "separator; an empty one always does")  # fmt: skip
    add("--echo", action="store_true", help="show the prompt before its continuation")
    add("--batch", type=int, default=16, help="prompts continued at a time (default: %(default)s)")
    add("--segment", type=int, default=SEGMENT, help="tokens of a prompt read at a time (default: %(default)s)")
    add("--tokenizer", type=path, metavar="FOLDER", help="with tokenizer.json (default: the model's)")
    add("--eos", default="", type=text, metavar="TOKEN", help="separator of documents (default: that of training)")
    options = parser.parse_args(arguments)
    refuse_torchrun("eval.generate")
    at_least(options, 1, "tokens", "samples", "batch", "segment")
    at_least(options, 0, "seed")
    if options.seed + options.samples > MOST_SEEDS:
        raise ConfigError(f"--seed {options.seed}: must be below 2^63, and the seeds of --samples too")
    for model in options.models[1:]:
        if not Path(model).exists():
            raise ConfigError(
                f"{model!r} is no model: every word before the first option is one\nprompts go after --prompt"
            )
    return options


def settings_of(options: argparse.Namespace) -> Settings:
    """What the options ask for; ConfigError if one is out of range, or would have no effect."""
    if "" in options.stop:
        raise ConfigError("--stop '': expected a string that is not empty")
    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    if sampling.temperature == 0:
        idle = {"--top-k": sampling.top_k, "--top-p": sampling.top_p < 1, "--samples": options.samples > 1}
        if names := [name for name, given in idle.items() if given]:
            raise ConfigError(f"{names[0]} has no effect at temperature 0: give --temperature above 0")
    return Settings(options.tokens, tuple(options.stop), sampling, not options.ignore_eos, options.segment)


def read_texts(options: argparse.Namespace) -> list[Prompt]:
    """The prompts of `--prompt` and `--file`, `--samples` times each, an empty one if there are none.

    Raises DataError if a file cannot be read as UTF-8 text.
    """
    # A prompt's name is its beginning, on one line.
    shown = [(repr(prompt), prompt) for prompt in options.prompt]
    named = [(name if len(name) <= 60 else name[:57] + "...", prompt) for name, prompt in shown]
    for file in options.file:
        try:
            data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
            # A mark that some editors put in front is no text.
            named.append(("standard input" if file == "-" else file, data.decode("utf-8-sig")))
        except OSError as error:
            raise DataError(f"{file} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start:,}") from None
    seeds = range(options.seed, options.seed + options.samples)
    suffix = ", seed {}" if options.samples > 1 else ""
    return [Prompt(name + suffix.format(seed), text, seed) for name, text in named or [("a new document", "")]
            for seed in seeds]  # fmt: skip


def speak(
    loaded: LoadedModel, vocabulary: Vocabulary, prompts: list[Prompt], settings: Settings, options: argparse.Namespace
) -> None:
    """Continues prompts with one model: of one the text is shown while it comes, of several one after another."""
    alone = len(prompts) == 1
    progress = Progress("generate", settings.tokens * len(prompts), "tokens", quiet=alone)

    def show(_: int, piece: str) -> None:
        progress.advance(1)
        if alone:
            print(piece, end="", flush=True)

    if alone and options.echo:
        print(prompts[0].text, end="", flush=True)
    before = [vocabulary.separator] if options.new_document else []
    for first in range(0, len(prompts), options.batch):
        batch = prompts[first : first + options.batch]
        ids = [before + vocabulary.encode(prompt.text) for prompt in batch]
        start = time.monotonic()
        with progress:
            texts = continue_prompts(loaded.model, vocabulary, ids, settings, [prompt.seed for prompt in batch], show)
            # Texts that ended early count as whole.
            progress.update(settings.tokens * (first + len(batch)))
        seconds, added = time.monotonic() - start, sum(len(text.tokens) for text in texts)
        ends = ", ".join(sorted({ENDS[text.reason] for text in texts}))
        newline = "\n" if alone else ""
        say(f"{newline}{sum(map(len, ids)):,} tokens read, {added:,} added in {seconds:.1f} s; ended by {ends}")
        if alone:
            print(flush=True)
            return
        for place, (prompt, continuation) in enumerate(zip(batch, texts, strict=True), start=first + 1):
            text = prompt.text + continuation.text if options.echo else continuation.text
            print(f"--- {place} of {len(prompts)}: {prompt.name}\n{text}", flush=True)


def say(text: str) -> None:
    """A line on standard error, so that standard output is the text alone."""
    Console(stderr=True, highlight=False).print(text, style="dim", markup=False, soft_wrap=True)
