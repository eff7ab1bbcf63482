"""Shows the samples that a run trains on at a step, to look at what a loss spike or a skipped step came from.

    python -m torchtitan_deltaproduct.data.show_batch outputs/run --step 812 --rows 0 5 --tokens 2000

The order of samples is a function of the settings and the step, so the batch is made anew, not remembered. Run it where
the run was started from: data paths are those of its config.json.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

from rich.console import Console
from rich.text import Text

from torchtitan_deltaproduct.arguments import Parser, path
from torchtitan_deltaproduct.config.snapshots import read_snapshot
from torchtitan_deltaproduct.errors import CheckpointError, ConfigError, exit_on_user_error

from . import build_loader
from .text.tokenizer import load_tokenizer


def global_batch(run: Path, step: int):
    """The loader of a run; of a step, counted from 1, the first sample's global index, inputs and labels of all ranks.

    Raises:
        CheckpointError: the folder has no config.json. ConfigError: the step or the kind of data cannot be shown.
        DataError: the data is not there.
    """
    snapshot = read_snapshot(run / "config.json")
    if snapshot is None:
        raise CheckpointError(f"{run} has no config.json; expected the dump_folder of a run that was started")
    config, samples = snapshot["config"], snapshot.get("derived", {}).get("global_batch_size")
    if samples is None:
        raise CheckpointError(f"{run} holds imported weights: it has no steps of its own to show")
    if config["data"]["kind"] == "streaming":
        raise ConfigError(f"{run} streams its data: a step cannot be reached without reading all before it")
    if not step >= 1:
        raise ConfigError(f"--step {step}: steps count from 1")
    sizes = {"seq_len": config["training"]["seq_len"], "local_batch_size": samples, "global_batch_size": samples}
    data = SimpleNamespace(**config["data"] | {"num_workers": 0})
    loader = build_loader(data, **sizes, tokenizer_path=config["model"]["hf_assets_path"])
    first = (step - 1) * samples
    inputs, labels = loader.source.batch(loader.geometry.rows(first))
    return loader, first, inputs, labels


def main(arguments: list[str] | None = None) -> None:
    parser = Parser("torchtitan_deltaproduct.data.show_batch", __doc__)
    parser.add_argument("run", metavar="RUN", type=path, help="run folder")
    parser.add_argument("--step", type=int, required=True, metavar="S", help="step, as the log names it")
    parser.add_argument("--rows", type=int, nargs="+", metavar="R", help="rows of the batch (default: all)")
    parser.add_argument("--tokens", type=int, default=200, metavar="N", help="shown of each (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.tokens < 1:
        raise ConfigError(f"--tokens {options.tokens}: must be at least 1")
    loader, first, inputs, labels = global_batch(Path(options.run), options.step)
    rows = range(len(labels)) if options.rows is None else options.rows
    if wrong := [row for row in rows if not 0 <= row < len(labels)]:
        raise ConfigError(f"--rows {wrong[0]}: the batch has rows 0 to {len(labels) - 1}")
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    last = first + len(labels) - 1
    console.print(f"step {options.step:,}: samples {first:,} to {last:,} of {loader.source.describe()}")
    folder = loader.source.tokenizer_path
    tokenizer = load_tokenizer(folder) if folder else None
    for row in rows:
        tokens = inputs["input"][row, : options.tokens].tolist()
        console.print(f"\n[bold]row {row}[/], sample {first + row:,}, {(labels[row] >= 0).sum():,} labels:")
        if tokenizer is None:
            console.print(" ".join(map(str, tokens)))
            answers = labels[row, : options.tokens].tolist()
            console.print("labels: " + " ".join("." if answer < 0 else str(answer) for answer in answers))
        else:
            console.print(Text(tokenizer.decode(tokens)))


if __name__ == "__main__":
    exit_on_user_error(main)
