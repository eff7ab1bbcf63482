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
from pathlib import Path

import numpy as np
from rich.console import Console

from torchtitan_deltaproduct.models import DeltaProductLM

from ..files import read_results
from ..long import LongEvaluation, Progress, tokenizer_of
from ..pieces import Measured, Tokens
from .loss import POSITION, score
from .results import parse_buckets, summarise, table, write_csv, write_json


class LengthExtrapolation(LongEvaluation):
    name = "length_extrapolation"
    summary = __doc__.split("\n")[0]
    from_help = "results to put into other --buckets, or side by side; takes no models"

    def add_options(self, add) -> None:
        add("--buckets", default="", metavar="K|LAST,LAST,...",
            help="number of equal buckets, or their last positions (default: two an octave)")  # fmt: skip
        add("--x-axis", choices=("auto", "log", "linear"), default="auto",
            help="of the picture; auto: linear for equal buckets (default: %(default)s)")  # fmt: skip

    def check(self, options: argparse.Namespace) -> None:
        parse_buckets(options.buckets, 1 << 62 if options.source else options.length)

    def notes(self, case: Measured, options: argparse.Namespace) -> list[str]:
        lines, loaded, name = [f"{case.data['wanted']['data']}: {case.data['said']}"], case.loaded, case.model["name"]
        if tokenizer_of(loaded, options) is None:
            lines.append(f"{name} has no tokenizer.json: that it fits the data cannot be checked")
        if case.data["kind"] == "packed" and loaded.config.get("data", {}).get("reset_state_at_documents"):
            lines.append(f"{name} was trained with its state reset at documents; here it is carried across them")
        if case.data["sequences"] == 1:
            lines.append("one sequence: there are no standard errors")
        return lines

    def compared(self, cases: list[Measured]) -> str:
        if len({case.data["tokenizer_sha256"] for case in cases}) == 1:
            return ""
        data = cases[0].data["wanted"]["data"]
        return f"{data}: the models have different tokenizers, so their losses a token cannot be compared"

    def measure(self, model: DeltaProductLM, tokens: Tokens, reading: dict, progress: Progress) -> np.ndarray:
        """[sequences, length] of `loss.POSITION`."""
        positions = np.empty((tokens.count, tokens.length), POSITION)
        for start, loss, correct in score(model, tokens.read, tokens.length, reading["segment"]):
            segment = positions[:, start : start + loss.shape[1]]
            segment["loss"], segment["correct"] = loss, correct
            progress(loss.size)
        return positions

    def report(self, measured: list[Measured], stem: Path, options: argparse.Namespace, console: Console) -> None:
        from .figures import loss_figure

        results = summarise(measured, options.buckets)
        for data in dict.fromkeys(result.data["name"] for result in results):
            console.print(f"\n{data}", style="bold", soft_wrap=True)
            console.print(table([result for result in results if result.data["name"] == data]))
        for result in results:
            if result.verdict():
                console.print(result.verdict(), soft_wrap=True)
            if result.broken_from:
                where = f"the first in the bucket from position {result.broken_from:,}"
                console.print(f"{result.name}: losses that are not finite, {where}", soft_wrap=True)
        linear = options.x_axis == "linear" or (options.x_axis == "auto" and options.buckets.isdigit())
        loss_figure(results, stem.with_suffix(".png"), log_positions=not linear)
        write_csv(stem.with_suffix(".csv"), results)
        write_json(stem.with_suffix(".json"), results, options.made_by)
        raw = results[0].pieces.folder.parent
        console.print(f"written: {stem}.json, .csv, .png; the loss at each position is in {raw}", soft_wrap=True)


def metrics(folder: Path) -> dict[str, float | None]:
    """Losses (nats a token) up to the training length and beyond it, and the perplexity of all positions."""
    (entry,) = read_results(folder / "length_extrapolation.json")
    last, beyond = entry["buckets"][-1], entry["beyond_training"] or {}
    return {
        "loss to the training length": (beyond.get("training") or {}).get("loss"),
        "loss beyond": (beyond.get("beyond") or {}).get("loss"),
        "change": beyond.get("difference"),
        f"perplexity to {last['last']:,}": last["running_perplexity"],
        "accuracy at the end": last["accuracy"],
    }


def compare(measured: list[Measured], stem: Path) -> None:
    """The picture of several models on one dataset."""
    from .figures import loss_figure

    loss_figure(summarise(measured, ""), stem.with_suffix(".png"), log_positions=True)


evaluation = LengthExtrapolation()
main, parse = evaluation.main, evaluation.parse
SWEPT = evaluation.swept(metrics, compare)
