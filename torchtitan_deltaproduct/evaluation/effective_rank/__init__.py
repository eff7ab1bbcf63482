"""The effective rank of the recurrent states of a model along long sequences, and what its transitions do.

    python -m eval.effective_rank outputs/run --data data/code/validation                every 16th of 16,384 tokens
    python -m eval.effective_rank DN DP2 DP3 --data data/a book.txt --sequences 32 --every 1
    python -m eval.effective_rank outputs/run --data data/a --between-householders
    python -m eval.effective_rank outputs/state_tracking/S3_n2/seed-1 --length 512       words of the run's own problem
    python -m eval.effective_rank --from outputs/*/eval --out compared                   runs side by side
    torchrun --nproc_per_node 8 -m eval.effective_rank outputs/run --data data/a

Measured are the states of each layer and head (`singular_values`), the distribution of beta, and the eigenvalues of the
transitions (`transitions`). Results go to `--out`, by default MODEL/eval: effective_rank.json, .csv, .npz and pictures;
in effective_rank/ the tokens that were read and the measurements.
"""

import argparse
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from torchtitan_deltaproduct.checkpoint.load import LoadedModel
from torchtitan_deltaproduct.data.generated.languages import FormalSource
from torchtitan_deltaproduct.errors import ConfigError
from torchtitan_deltaproduct.models import DeltaProductLM
from torchtitan_deltaproduct.models.decode import init_cache

from ..files import digest, slugs
from ..long import Advance, LongEvaluation
from ..options import at_least
from ..pieces import Measured, Tokens
from ..state_tracking.problems import problem_of
from .results import Result, table
from .singular_values import effective_rank
from .states import Glimpse, walk
from .transitions import Tally


class Words:
    """Generated words of the problem a run was trained on, as sequences of `length` tokens; see `pieces.Sequences`.

    ConfigError if it was not trained on words.
    """

    def __init__(self, loaded: LoadedModel, options: argparse.Namespace):
        if loaded.config.get("data", {}).get("kind") not in ("group_word", "formal_language"):
            raise ConfigError(
                f"{loaded.label} was not trained on generated words: name what it shall read with --data\n"
                "expected a prepared folder, a file or folder of text, or a dataset NAME[:CONFIGURATION]"
            )
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


class EffectiveRank(LongEvaluation):
    name = "effective_rank"
    summary = __doc__.split("\n")[0]
    # Small singular values are what a narrower type would hide.
    dtype, length, sequences, documents = "float32", 16_384, 8, "packed"
    piece_tokens, suffix = 1 << 16, ".npz"
    header = {
        "definition": "effective rank exp(-sum p ln p), p = singular values over their sum (Roy & Vetterli 2007); of a "
        "state of zeros 0; position p: the state after p tokens",
        "spread": "std over sequences; growth: mean at the end over that at the training length, less 1",
    }
    written = ".csv, .npz and .png; what they were made of is in {stem}/"
    own_sequences = Words
    usage = "MODEL... [--data DATA...], or --from FOLDER..."

    def add_options(self, add) -> None:
        add("--every", type=int, default=16, metavar="K",
            help="a state at each K-th token; 1: all (default: %(default)s)")  # fmt: skip
        add("--between-householders", action="store_true",
            help="also the states between the n_h steps of those tokens")  # fmt: skip
        add("--reset", action=argparse.BooleanOptionalAction, default=None,
            help="an empty state at each document start (default: as the model was trained)")  # fmt: skip

    def check(self, options: argparse.Namespace) -> None:
        at_least(options, 1, "every")
        if options.every > options.length:
            raise ConfigError(f"--every {options.every:,}: must be at most --length, {options.length:,}")

    def reading(self, loaded: LoadedModel, options: argparse.Namespace) -> dict:
        trained = bool(loaded.config.get("data", {}).get("reset_state_at_documents", False))
        how = super().reading(loaded, options)
        return {
            "every": options.every, "between": options.between_householders,
            "reset": trained if options.reset is None else options.reset,
            **how, "batch": min(how["batch"], options.sequences),
        }  # fmt: skip

    def notes(self, cases: list[Measured], options: argparse.Namespace) -> list[str]:
        lines = []
        for case, line in zip(cases, super().notes(cases, options), strict=True):
            how = "emptied" if case.pieces.about["reset"] else "carried across them"
            lines.append(line + ("" if case.data["eos_id"] is None else f"; at document starts the states are {how}"))
        return lines

    def measure(self, model: DeltaProductLM, tokens: Tokens, reading: dict, advance: Advance) -> dict:
        """Ranks and transitions; L layers, H heads, N sequences, P positions, n Householders.

        `reading` has `every`, a state at each multiple of so many tokens; `between`, after each Householder step of
        these, else after the last; `reset`, an empty state at each document start, for which a sequence is read by
        itself; `segment`, tokens of a sequence read at a time.

        Returns:
            rank [L, H, N, P, n or 1] float32, after each micro-step (or the last) of the chosen tokens; starts [D, 2]
            int64 (sequence, tokens before the document), the start of each sequence left out; the fields of `Tally`.
        """
        args, device, every = model.args, model.tok_embeddings.weight.device, reading["every"]
        eos_id = tokens.sequences.about["eos_id"]
        micro_steps = args.num_householder if reading["between"] else 1
        shape = (args.num_hidden_layers, args.num_heads, tokens.count, tokens.length // every, micro_steps)
        rank, tally, starts = np.full(shape, np.nan, dtype=np.float32), Tally.empty(args), []
        batches = [slice(row, row + 1) for row in range(tokens.count)] if reading["reset"] else [slice(0, tokens.count)]
        for rows in batches:
            cache = init_cache(model, rows.stop - rows.start)
            for start in range(0, tokens.length, reading["segment"]):
                segment = tokens.read(start, min(start + reading["segment"], tokens.length), rows)
                begins = np.argwhere(segment == eos_id) if eos_id is not None else np.empty((0, 2), np.int64)
                begins = begins[begins[:, 1] + start > 0]
                starts.append(begins + [tokens.first + rows.start, start])
                cuts = begins[:, 1].tolist() if reading["reset"] else []
                for first, last in zip([0, *cuts], [*cuts, segment.shape[1]], strict=True):
                    position = start + first

                    def look(glimpse: Glimpse, rows=rows, position=position) -> None:
                        tally.add(glimpse, 2.0 if args.allow_neg_eigval else 1.0)
                        place = position // every
                        for states in glimpse.states(reading["between"]):
                            # [p, n, B, H] -> [H, B, p, n]
                            block = effective_rank(states).permute(3, 2, 0, 1).float().cpu().numpy()
                            rank[glimpse.layer][:, rows, place : place + block.shape[2]] = block
                            place += block.shape[2]

                    if first in cuts:
                        cache = init_cache(model, len(segment))
                    if last > first:
                        stretch = torch.from_numpy(segment[:, first:last]).to(device)
                        cache = walk(model, stretch, cache, look, every, position % every)
                advance(segment.size)
        starts = np.concatenate(starts)
        return {"rank": rank, "starts": starts[np.lexsort((starts[:, 1], starts[:, 0]))], **vars(tally)}

    def summarise(self, measured: list[Measured], options: argparse.Namespace | None) -> list[Result]:
        names = list(dict.fromkeys(case.data["name"] for case in measured))
        ordered = sorted(measured, key=lambda case: names.index(case.data["name"]))
        return [Result(case) for case in ordered]

    def show(self, results: list[Result], stem: Path, options: argparse.Namespace, console: Console) -> None:
        """A table and pictures of each dataset, numbers and pictures of each result.

        Where there are several datasets or models, names of files go on with those of the one shown.
        """
        from . import figures

        datasets = list(dict.fromkeys(result.case.data["name"] for result in results))
        for data, data_slug in zip(datasets, slugs(datasets), strict=True):
            chosen = [result for result in results if result.case.data["name"] == data]
            shared = "_".join([stem.name, *([data_slug] if len(datasets) > 1 else [])])
            console.print(table(chosen))
            figures.comparison(chosen, stem.parent / shared)
            models = [result.case.model["name"] for result in chosen]
            for result, model, model_slug in zip(chosen, models, slugs(models), strict=True):
                own = "_".join([shared, *([model_slug] if len(chosen) > 1 else [])])
                result.npz = f"{own}.npz"
                result.write_npz(stem.parent / result.npz)
                figures.of_one(result, stem.parent / own)
                if not np.isfinite(result.rank).all():
                    console.print(f"{model}, {data}: states that are not finite", soft_wrap=True)

    def compare(self, results: list[Result], stem: Path) -> None:
        from .figures import comparison

        comparison(results, stem)

    def metrics(self, entry: dict) -> dict[str, float | None]:
        """Mean over layers at the training length and at the end, of the growth between them, and of the change in
        the tokens after a document start."""
        layers, positions, ranks = entry["layers"], entry["positions"], {}
        for name in (name for name in ("training_length", "end") if name in positions):
            # None of a layer whose states are not finite.
            means = [layer[f"at_{name}"]["mean"] for layer in layers]
            ranks[f"rank at {positions[name]:,}"] = None if None in means else mean(means)
        changes = [head["change_after_document_start"] for layer in layers for head in layer["heads"]]
        growth = mean([layer["growth"] for layer in layers])
        return ranks | {"growth": growth, "change at document starts": mean(changes)}


def mean(values: list[float | None]) -> float | None:
    """Of those that are known; None without any."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


evaluation = EffectiveRank()
main, parse, SWEPT = evaluation.main, evaluation.parse, evaluation.swept
