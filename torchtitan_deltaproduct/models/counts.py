"""Closed formulas, in n_h and the widths, for parameters, FLOPs and the size of the decoding state.

    parameters_by_part(args)                 # {"embedding": 24576000, "mixer projections": ..., "head": 0}
    total_parameters(args)
    training_flops_per_token(args)           # what MFU divides by

FLOPs count two per multiply-add of matrix products and of the operator: the convention of MFU and of
`torch.utils.flop_counter`. Norms, activations, the convolutions (under 0.1 %) and the embedding look-up count
as nothing; a tied head counts in full. A training step is three times the forward pass; recomputation under
activation checkpointing is not useful work and not counted.
"""

import re
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..flops import flops_per_token
from .args import DeltaProductArgs

if TYPE_CHECKING:
    from torch import nn


def parameters_by_part(args: DeltaProductArgs) -> dict[str, int]:
    """Number of parameters of each part, all layers together; a tied head has none of its own."""
    hidden, layers, heads = args.hidden_size, args.num_hidden_layers, args.num_heads
    embedding = args.vocab_size * hidden
    return {
        "embedding": embedding,
        "mixer projections": layers * _mixer_matrices(args),
        "short convolutions": layers * args.conv_size * _conv_channels(args),
        "decay": layers * 2 * heads * args.use_forget_gate,
        "mlp": layers * 3 * hidden * args.mlp_size,
        "norms": layers * (2 * hidden + args.head_v_dim) + hidden,
        "head": 0 if args.tie_word_embeddings else embedding,
    }


def total_parameters(args: DeltaProductArgs) -> int:
    """Parameters of the model, equal to the sum of `numel` over `model.parameters()`."""
    return sum(parameters_by_part(args).values())


def hidden_matrices(args: DeltaProductArgs) -> dict[str, tuple[int, int, int]]:
    """The matrices of a block that map features to features, which Muon updates.

    Those of beta and of the decay are not among them: each of their rows is one head's gate.

    Returns:
        Name in the block -> how many stand in it, one below the other; rows and columns of one. `k_proj` and `v_proj`
        hold one a micro-step, as in the paper's code.
    """
    hidden, n, mlp = args.hidden_size, args.num_householder, args.mlp_size
    keys, values = args.num_heads * args.head_dim, args.num_heads * args.head_v_dim
    gate = {"mixer.g_proj": (1, values, hidden)} if args.use_output_gate else {}
    return {
        "mixer.q_proj": (1, keys, hidden),
        "mixer.k_proj": (n, keys, hidden),
        "mixer.v_proj": (n, values, hidden),
        **gate,
        "mixer.o_proj": (1, hidden, values),
        "mlp.gate_proj": (1, mlp, hidden),
        "mlp.up_proj": (1, mlp, hidden),
        "mlp.down_proj": (1, hidden, mlp),
    }


PARTS = {
    "embedding": r"tok_embeddings\.weight",
    "mixer projections": r"layers\.\d+\.mixer\.[qkvbago]_proj\.weight",
    "short convolutions": r"layers\.\d+\.mixer\.[qkv]_conv1d\.weight",
    "decay": r"layers\.\d+\.mixer\.decay\.(A_log|dt_bias)",
    "mlp": r"layers\.\d+\.mlp\.(gate|up|down)_proj\.weight",
    "norms": r"(layers\.\d+\.(mixer_|mlp_|mixer\.o_))?norm\.weight",
    "head": r"output\.weight",
}
"""Names of the parameters of each part."""


def check_formulas(model: "nn.Module", args: DeltaProductArgs) -> None:
    """Compares the formulas with a model: a parameter that they leave out makes FLOPs, MFU and the plan wrong.

    Raises:
        ConfigError: they do not agree; names the parameter, or the part whose sizes differ.
    """
    from .init import plain_name  # imports torch, which the formulas alone do not need

    sizes, uncounted = dict.fromkeys(PARTS, 0), []
    for name, parameter in model.named_parameters():
        name = plain_name(name)
        part = next((part for part, names in PARTS.items() if re.fullmatch(names, name)), None)
        if part is None:
            uncounted.append(f"{name} {list(parameter.shape)}")
        else:
            sizes[part] += parameter.numel()
    wrong = [f"{name} is in none of them" for name in uncounted]
    wrong += [
        f"{part}: {sizes[part]:,} in the model, {count:,} by the formula"
        for part, count in parameters_by_part(args).items()
        if sizes[part] != count
    ]
    if wrong:
        shown = "; ".join(wrong[:4]) + (f"; and {len(wrong) - 4} more" if len(wrong) > 4 else "")
        raise ConfigError(
            f"the model is not the one that the formulas of models/counts.py count: {shown}\n"
            "add what is new to parameters_by_part, forward_flops_per_token and PARTS there"
        )


def paper_parameters(args: DeltaProductArgs) -> int:
    """The count of the paper's code, whose layers have n_h - 1 more query convolutions that nothing reads."""
    unused = args.use_short_conv * (args.num_householder - 1)
    per_layer = unused * args.conv_size * args.num_heads * args.head_dim
    return total_parameters(args) + args.num_hidden_layers * per_layer


def forward_flops_per_token(args: DeltaProductArgs) -> int:
    """FLOPs of one forward pass, per token."""
    matrices = _mixer_matrices(args) + 3 * args.hidden_size * args.mlp_size
    operator = flops_per_token(args.num_householder, args.num_heads, args.head_dim, args.head_v_dim)
    return args.num_hidden_layers * (2 * matrices + operator) + 2 * args.vocab_size * args.hidden_size


def training_flops_per_token(args: DeltaProductArgs) -> int:
    """FLOPs of forward and backward, per token."""
    return 3 * forward_flops_per_token(args)


def state_bytes(args: DeltaProductArgs, bytes_per_value: int = 2) -> int:
    """Bytes of the decoding cache of one sequence, whatever its length.

    Args:
        args: the architecture.
        bytes_per_value: of the convolution inputs (2 for bfloat16); the recurrent state is float32.
    """
    state = 4 * args.num_heads * args.head_dim * args.head_v_dim
    conv = bytes_per_value * (args.conv_size - 1) * _conv_channels(args)
    return args.num_hidden_layers * (state + conv)


def _mixer_matrices(args: DeltaProductArgs) -> int:
    """Entries of a mixer's projections: those of features, and those to beta and the decay of each head."""
    wide = sum(
        count * rows * columns
        for name, (count, rows, columns) in hidden_matrices(args).items()
        if name.startswith("mixer.")
    )
    return wide + args.hidden_size * args.num_heads * (args.num_householder + args.use_forget_gate)


def _conv_channels(args: DeltaProductArgs) -> int:
    n, heads = args.num_householder, args.num_heads
    return args.use_short_conv * heads * ((1 + n) * args.head_dim + n * args.head_v_dim)
