"""Loss, perplexity and accuracy at each position of texts far longer than those a model was trained on.

    python -m eval.length_extrapolation outputs/run --data data/code/validation                   to 32,768 tokens
    python -m eval.length_extrapolation DN DP2 DP3 --data data/a data/b --length 1000000 --sequences 8
    python -m eval.length_extrapolation outputs/run --data book.txt corpus.jsonl --documents long
    torchrun --nproc_per_node 8 -m eval.length_extrapolation outputs/run --data data/code/validation
    python -m eval.length_extrapolation --from outputs/run/eval --buckets 64                      no model runs
    python -m eval.length_extrapolation --from outputs/*/eval --out compared                      runs side by side

Results go to `--out`, by default MODEL/eval: length_extrapolation.json, .csv and .png, and in length_extrapolation/ the
tokens that were read and the loss at every position of every sequence.
"""

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console

from torchtitan_deltaproduct.models import DeltaProductLM

from ..long import Advance, LongEvaluation
from ..pieces import Measured, Tokens
from ..texts import tokenizer_of
from .loss import POSITION, score
from .results import LEAST_SEQUENCES, Result, parse_buckets, summarise, table


class LengthExtrapolation(LongEvaluation):
    name = "length_extrapolation"
    summary = __doc__.split("\n")[0]
    header = {
        "units": "loss in nats a token; positions counted from 1: position t predicts a token from the t before it",
        "intervals": "95 %, Student's t over sequences; the tokens of a sequence do not count as independent",
    }
    written = ".csv, .png; the loss at each position is in {raw}"
    from_help = "results to put into other --buckets, or side by side; takes no models"

    def add_options(self, add) -> None:
        add("--buckets", default="", metavar="K|LAST,LAST,...",
            help="number of equal buckets, or their last positions (default: two an octave)")  # fmt: skip
        add("--x-axis", choices=("auto", "log", "linear"), default="auto",
            help="of the picture; auto: linear for equal buckets (default: %(default)s)")  # fmt: skip

    def check(self, options: argparse.Namespace) -> None:
        parse_buckets(options.buckets, 1 << 62 if options.source else options.length)

    def notes(self, cases: list[Measured], options: argparse.Namespace) -> list[str]:
        lines = super().notes(cases, options)
        for case in cases:
            name, count = case.model["name"], case.data["sequences"]
            if tokenizer_of(case.loaded, options) is None:
                lines.append(f"{name} has no tokenizer.json: that it fits the data cannot be checked")
            if case.data["kind"] == "packed" and case.loaded.config.get("data", {}).get("reset_state_at_documents"):
                lines.append(f"{name} was trained with its state reset at documents; here it is carried across them")
            if count < LEAST_SEQUENCES:
                lines.append(["one sequence: there are no standard errors",
                              "two sequences are too few for an interval"][count - 1])  # fmt: skip
        if len({case.data["tokenizer_sha256"] for case in cases}) > 1:
            data = cases[0].data["wanted"]["data"]
            lines.append(f"{data}: the models have different tokenizers, so their losses a token cannot be compared")
        return lines

    def measure(self, model: DeltaProductLM, tokens: Tokens, reading: dict, advance: Advance) -> np.ndarray:
        """[sequences, length] of `loss.POSITION`."""
        positions = np.empty((tokens.count, tokens.length), POSITION)
        for start, loss, correct in score(model, tokens.read, tokens.length, reading["segment"]):
            segment = positions[:, start : start + loss.shape[1]]
            segment["loss"], segment["correct"] = loss, correct
            advance(loss.size)
        return positions

    def summarise(self, measured: list[Measured], options: argparse.Namespace | None) -> list[Result]:
        return summarise(measured, options.buckets if options else "")

    def show(self, results: list[Result], stem: Path, options: argparse.Namespace, console: Console) -> None:
        for data in dict.fromkeys(result.case.data["name"] for result in results):
            console.print(f"\n{data}", style="bold", soft_wrap=True)
            console.print(table([result for result in results if result.case.data["name"] == data]))
        for result in results:
            if verdict := result.verdict():
                console.print(verdict, soft_wrap=True)
            if result.broken_from:
                where = f"the first in the bucket from position {result.broken_from:,}"
                console.print(f"{result.case.name}: losses that are not finite, {where}", soft_wrap=True)
        linear = options.x_axis == "linear" or (options.x_axis == "auto" and options.buckets.isdigit())
        self.compare(results, stem, log_positions=not linear)

    def compare(self, results: list[Result], stem: Path, log_positions: bool = True) -> None:
        from .figures import loss_figure

        loss_figure(results, stem.with_suffix(".png"), log_positions)

    def metrics(self, entry: dict) -> dict[str, float | None]:
        """Losses (nats a token) up to the training length and beyond it, and the perplexity of all positions."""
        last, beyond = entry["buckets"][-1], entry["beyond_training"] or {}
        return {
            "loss to the training length": (beyond.get("training") or {}).get("loss"),
            "loss beyond": (beyond.get("beyond") or {}).get("loss"),
            "change": beyond.get("difference"),
            f"perplexity to {last['last']:,}": last["running_perplexity"],
            "accuracy at the end": last["accuracy"],
        }


evaluation = LengthExtrapolation()
main, parse, SWEPT = evaluation.main, evaluation.parse, evaluation.swept
