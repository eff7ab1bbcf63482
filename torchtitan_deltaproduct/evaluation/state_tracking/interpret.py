"""What a trained mixer does: how strongly each head reflects, and in how many dimensions.

    python -m eval.state_tracking RUN --interpret              RUN/eval/interpretation.json and a PNG for each layer

A micro-step multiplies the state by I - beta k k^T: beta = 2 reflects along the key k, beta = 0 does nothing. Two
reflections make a rotation in the plane of their keys, which is how n_h = 2 follows S3 and S4 (arXiv 2502.10297,
section 5). So for each head: the distribution of beta per Householder, its mean for each group element where the
words have few, and the directions of the keys, by the singular values of the matrix of all (unit) keys. It is not
centred: k and -k are the same reflection. Measured on what the operator reads over held-out words.
"""

from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from torchtitan_deltaproduct.checkpoint.load import LoadedModel
from torchtitan_deltaproduct.models import DeltaProductLM
from torchtitan_deltaproduct.models.decode import init_cache

from ..effective_rank.singular_values import rank_of_values
from ..effective_rank.states import Glimpse, walk
from ..effective_rank.transitions import BETA_BINS, histogram
from ..files import short_names, slugs, write_json
from .problems import problem_of

MAX_ELEMENTS = 24
"""Groups of at most this order get a map of beta by element."""


def view_layers(model: DeltaProductLM, inputs: torch.Tensor, names: list[str]) -> list[list[dict]]:
    """Reads words, inputs [B, T] int64: for each layer the JSON record of each head.

    `names` are those of the tokens that are group elements; none: beta is not shown by element.
    """
    tokens, args, layers = inputs.flatten().numpy(), model.args, []
    occurrences = np.bincount(tokens, minlength=args.vocab_size)

    def look(glimpse: Glimpse) -> None:
        k = glimpse.k.double().flatten(0, 1)
        keys = spectrum(torch.einsum("rhk,rhl->hkl", k, k).cpu().numpy())
        beta = glimpse.beta.double().cpu().unflatten(1, (-1, args.num_householder)).flatten(0, 1).mT
        counts, heads = histogram(beta, BETA_BINS, 0, 2.0 if args.allow_neg_eigval else 1.0), []
        for h, rows in enumerate(beta.permute(1, 2, 0).numpy()):
            steps = []
            for j, row in enumerate(rows):
                steps.append({"householder": j, "mean": float(row.mean()), "above_1.9": float((row > 1.9).mean()),
                              "histogram": counts[h, j].tolist()})  # fmt: skip
                if names:
                    sums = zip(names, np.bincount(tokens, row, args.vocab_size), occurrences, strict=False)
                    means = {name: float(total / count) if count else None for name, total, count in sums}
                    steps[-1]["mean_by_element"] = means
            heads.append({"head": h, "householders": steps, **{name: of[h].tolist() for name, of in keys.items()}})
        layers.append(heads)

    walk(model, inputs.to(model.tok_embeddings.weight.device), init_cache(model, len(inputs)), look)
    return layers


def spectrum(moment: np.ndarray) -> dict[str, np.ndarray]:
    """The directions of the keys of each head, from moment [H, K, K], the sum of k k^T.

    Returns:
        singular_values [H, K] of the matrix of keys, descending, divided by the root of the number of keys (their
        squares sum to 1); explained [H, K], share of the squared length in the first 1 .. K directions;
        dimension_95 [H], the least number of directions with 95 % of it; effective_rank [H], of all keys.
    """
    squares = np.linalg.eigvalsh(moment)[:, ::-1].clip(0)
    squares /= squares.sum(1, keepdims=True)
    singular = np.sqrt(squares)
    explained = squares.cumsum(1)
    return {
        "singular_values": singular,
        "explained": explained,
        "dimension_95": (explained < 0.95 - 1e-12).sum(1) + 1,
        "effective_rank": rank_of_values(torch.from_numpy(singular)).numpy(),
    }


def interpret(
    loaded: LoadedModel, folder: Path, stem: str, console: Console, words: int = 256, seed: int | None = None
) -> None:
    """Writes and prints the interpretation of one model over `words` test words of its training length.

    The files in `folder` are `stem`.json and `stem`_layer0.png, ...
    """
    from .figures import interpretation_figure

    problem = problem_of(loaded.config, problem_of(loaded.config).train_length, seed)
    inputs = problem.sources[0].batch(np.arange(words))[0]["input"]
    args, run = loaded.model.args, loaded.run.resolve()
    group = None if problem.formal else problem.sources[0].problem.group
    names = list(group.names) if group is not None and group.order <= MAX_ELEMENTS else []
    record = {
        "version": 1, "run": loaded.label, "problem": problem.name, "num_householder": args.num_householder,
        "allow_neg_eigval": args.allow_neg_eigval, "tokens": int(inputs.numel()), "test_seed": problem.seed,
        "layers": [],
    }  # fmt: skip
    out = Table(title=f"{loaded.label}: {problem.name}, n_h = {args.num_householder}", title_justify="left")
    for name in ("layer", "head", "mean beta", "beta > 1.9", "keys: 95 % in", "effective rank"):
        out.add_column(name, justify="right")
    for index, heads in enumerate(view_layers(loaded.model, inputs, names)):
        record["layers"].append({"layer": index, "heads": heads})
        for head in heads:
            mean, near = ("  ".join(f"{h[key]:.2f}" for h in head["householders"]) for key in ("mean", "above_1.9"))
            dims = f"{head['dimension_95']} of {args.head_dim}"
            out.add_row(str(index), str(head["head"]), mean, near, dims, f"{head['effective_rank']:.1f}")
        title = f"{problem.name}, layer {index}: {run.parent.name}/{run.name}, step {loaded.step}"
        interpretation_figure(heads, title, args, names, folder / f"{stem}_layer{index}.png")
    write_json(folder / f"{stem}.json", record)
    console.print(out)
    console.print(f"written: {folder / stem}.json and a PNG for each layer", soft_wrap=True)


def stems(models: list[LoadedModel], folder: Path) -> list[str]:
    """How the files of each model begin in a folder for all of them."""
    if len(models) == 1 and folder.resolve() == (models[0].run / "eval").resolve():
        return ["interpretation"]
    runs = [model.run.resolve() for model in models]
    names = [f"{run.parent.name}_{run.name}" for run in runs]
    if len(set(names)) < len(names):
        names = slugs(short_names([(run, model.step) for run, model in zip(runs, models, strict=True)]))
    return [f"interpretation_{name}" for name in names]
