"""What a trained mixer does: how strongly each head reflects, and in how many dimensions.

    python -m eval.state_tracking RUN --interpret              RUN/eval/interpretation.json and a PNG for each layer

A micro-step multiplies the state by I - beta k k^T: beta = 2 reflects along the key k, beta = 0 does nothing. Two
reflections make a rotation in the plane of their keys, which is how n_h = 2 follows S3 and S4 (arXiv 2502.10297,
section 5). So for each head: the distribution of beta per Householder, its mean for each group element where the
words have few, and the directions of the keys, by the singular values of the matrix of all (unit) keys. It is not
centred: k and -k are the same reflection. Measured on what the mixer hands to its operator over held-out words.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from torchtitan_deltaproduct.checkpoint.load import LoadedModel
from torchtitan_deltaproduct.models import DeltaProductLM
from torchtitan_deltaproduct.ops.normalize import l2norm

from ..files import short_names, slugs, write_json
from .problems import problem_of

BINS = 40
"""Bins of the histograms of beta, over [0, 2] or [0, 1]."""
MAX_ELEMENTS = 24
"""Groups of at most this order get a map of beta by element."""


@dataclass
class LayerView:
    """Sums over the tokens read in one layer; H heads, n Householders, K = head_dim.

    Attributes:
        histogram: [H, n, BINS] counts of beta.
        beta_sum: [H, n, vocab] sum of beta over the occurrences of each input token.
        near_two: [H, n] count of beta > 1.9.
        moment: [H, K, K] float64, sum of k k^T over unit keys of all Householders.
    """

    histogram: np.ndarray
    beta_sum: np.ndarray
    near_two: np.ndarray
    moment: np.ndarray


def view_layers(model: DeltaProductLM, inputs: torch.Tensor) -> tuple[list[LayerView], np.ndarray]:
    """Runs words through a model and looks at the operands of each layer.

    Args:
        model: to look at.
        inputs: [B, T] int64.

    Returns:
        One view a layer, and [vocab] how often each token was read.
    """
    seen = []

    def look(mixer, arguments) -> None:
        _, k, _, _, beta = mixer.operands(*arguments)
        seen.append(_view(k, beta, inputs, model.args))

    hooks = [layer.mixer.register_forward_pre_hook(look) for layer in model.layers.values()]
    try:
        with torch.no_grad():
            model(inputs.to(model.tok_embeddings.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    return seen, np.bincount(inputs.flatten().numpy(), minlength=model.args.vocab_size)


def _view(k: torch.Tensor, beta: torch.Tensor, inputs: torch.Tensor, args) -> LayerView:
    """k [B, T*n, H, K] not normalised, beta [B, T*n, H], inputs [B, T]."""
    n, heads = args.num_householder, args.num_heads
    k = l2norm(k.double()).flatten(0, 1)
    values = beta.double().reshape(-1, n, heads).permute(2, 1, 0).cpu().numpy()
    top = 2.0 if args.allow_neg_eigval else 1.0
    tokens = inputs.flatten().numpy()
    count = np.array([[np.histogram(row, BINS, (0, top))[0] for row in head] for head in values])
    total = np.array([[np.bincount(tokens, row, args.vocab_size) for row in head] for head in values])
    moment = torch.einsum("rhk,rhl->hkl", k, k).cpu().numpy()
    return LayerView(count, total, (values > 1.9).sum(-1), moment)


def spectrum(moment: np.ndarray) -> dict[str, np.ndarray]:
    """The directions of the keys of each head.

    Args:
        moment: [H, K, K], sum of k k^T.

    Returns:
        singular_values [H, K] of the matrix of keys, descending, divided by the root of the number of keys (their
        squares sum to 1); explained [H, K], share of the squared length in the first 1 .. K directions;
        dimension_95 [H], the least number of directions with 95 % of it; effective_rank [H], exp(-sum p ln p) with
        p the singular values over their sum (Roy & Vetterli 2007).
    """
    squares = np.linalg.eigvalsh(moment)[:, ::-1].clip(0)
    squares /= squares.sum(1, keepdims=True)
    singular = np.sqrt(squares)
    p = singular / singular.sum(1, keepdims=True)
    entropy = -(p * np.log(p, out=np.zeros_like(p), where=p > 0)).sum(1)
    explained = squares.cumsum(1)
    return {
        "singular_values": singular,
        "explained": explained,
        "dimension_95": (explained < 0.95 - 1e-12).sum(1) + 1,
        "effective_rank": np.exp(entropy),
    }


def interpret(
    loaded: LoadedModel, folder: Path, stem: str, console: Console, words: int = 256, seed: int | None = None
) -> None:
    """Writes and prints the interpretation of one model over `words` test words of its training length.

    The files in `folder` are `stem`.json and `stem`_layer0.png, ...
    """
    from .figures import interpretation_figure

    train_length = problem_of(loaded.config).train_length
    problem = problem_of(loaded.config, train_length, seed)
    inputs, _ = problem.sources[0].batch(np.arange(words))
    views, occurrences = view_layers(loaded.model, inputs["input"])
    args, run = loaded.model.args, loaded.run.resolve()
    group = None if problem.formal else problem.sources[0].problem.group
    names = list(group.names) if group is not None and group.order <= MAX_ELEMENTS else None
    record = {
        "version": 1, "run": loaded.label, "problem": problem.name, "num_householder": args.num_householder,
        "allow_neg_eigval": args.allow_neg_eigval, "tokens": int(inputs["input"].numel()), "test_seed": problem.seed,
        "layers": [],
    }  # fmt: skip
    out = Table(title=f"{loaded.label}: {problem.name}, n_h = {args.num_householder}", title_justify="left")
    for name in ("layer", "head", "mean beta", "beta > 1.9", "keys: 95 % in", "effective rank"):
        out.add_column(name, justify="right")
    for index, view in enumerate(views):
        keys = spectrum(view.moment)
        heads = _head_records(view, keys, args, occurrences, names)
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


def _head_records(view: LayerView, keys: dict, args, occurrences: np.ndarray, names: list[str] | None) -> list[dict]:
    """One JSON record a head."""
    tokens = int(occurrences.sum())
    records = []
    for h in range(args.num_heads):
        steps = []
        for j in range(args.num_householder):
            step = {
                "householder": j,
                "mean": float(view.beta_sum[h, j].sum() / tokens),
                "above_1.9": float(view.near_two[h, j] / tokens),
                "histogram": view.histogram[h, j].tolist(),
            }
            if names is not None:
                sums = view.beta_sum[h, j][: len(names)]
                step["mean_by_element"] = {
                    name: float(total / count) if count else None
                    for name, total, count in zip(names, sums, occurrences, strict=False)
                }
            steps.append(step)
        own = {name: values[h].tolist() for name, values in keys.items()}
        records.append({"head": h, "householders": steps, **own})
    return records
