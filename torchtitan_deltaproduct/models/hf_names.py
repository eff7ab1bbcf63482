"""One table between our parameter names and flash-linear-attention's, and the same for configs.

Shapes are equal, so a state dict is renamed, never reshaped; every key is accounted for or an error lists it:

    fla_model.load_state_dict(to_hf(model.state_dict(), args), strict=False)   # strict but for a tied lm_head
    model.load_state_dict(from_hf(fla_model.state_dict(), args))

`from_hf` also reads the layout of the paper's released checkpoints (fla of April 2025), where each micro-step
has its own projection and convolution (`k_projs.0.weight`, `q_conv1ds.1.weight`, ...).
"""

import re
from dataclasses import fields

import torch
from torch import Tensor

from ..errors import CheckpointError
from .args import DeltaProductArgs

MODEL_TABLE = {
    "tok_embeddings.weight": "model.embeddings.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_TABLE = {
    "mixer_norm.weight": "attn_norm.weight",
    "mixer.q_proj.weight": "attn.q_proj.weight",
    "mixer.k_proj.weight": "attn.k_proj.weight",
    "mixer.v_proj.weight": "attn.v_proj.weight",
    "mixer.b_proj.weight": "attn.b_proj.weight",
    "mixer.a_proj.weight": "attn.a_proj.weight",
    "mixer.decay.A_log": "attn.A_log",
    "mixer.decay.dt_bias": "attn.dt_bias",
    "mixer.q_conv1d.weight": "attn.q_conv1d.weight",
    "mixer.k_conv1d.weight": "attn.k_conv1d.weight",
    "mixer.v_conv1d.weight": "attn.v_conv1d.weight",
    "mixer.g_proj.weight": "attn.g_proj.weight",
    "mixer.o_norm.weight": "attn.o_norm.weight",
    "mixer.o_proj.weight": "attn.o_proj.weight",
    "mlp_norm.weight": "mlp_norm.weight",
    "mlp.gate_proj.weight": "mlp.gate_proj.weight",
    "mlp.up_proj.weight": "mlp.up_proj.weight",
    "mlp.down_proj.weight": "mlp.down_proj.weight",
}
OPTIONAL = {
    "a_proj.": "use_forget_gate",
    "decay.": "use_forget_gate",
    "_conv1d.": "use_short_conv",
    "g_proj.": "use_output_gate",
}
"""Parts of our layer names that exist only with the setting named."""

FIXED_CONFIG = {
    "architectures": ["GatedDeltaProductForCausalLM"],
    "model_type": "gated_deltaproduct",
    "attn_mode": "chunk",
    "hidden_act": "swish",
    "attn": None,
    "use_cache": True,
    "fuse_norm": True,
    "fuse_swiglu": True,
    "fuse_cross_entropy": True,
    "fuse_linear_cross_entropy": False,
    "use_l2warp": False,
    "attnres_block_size": None,
}
"""Fields of fla's config that our architecture does not vary."""
OWN_FIELDS = {"init_scheme", "op_backend"}
"""Fields of ours that fla does not have; they do not change what the weights compute."""
FLA_DEFAULTS = {
    "head_dim": 256,
    "num_heads": 6,
    "hidden_size": 2048,
    "expand_v": 2.0,
    "use_output_gate": True,
    "num_hidden_layers": 21,
    "tie_word_embeddings": False,
    "allow_neg_eigval": False,
    "num_householder": 1,
}
"""What fla 0.6.0 assumes for a field that a config.json leaves out, where our default differs."""


def names(args: DeltaProductArgs) -> dict[str, str]:
    """Our name -> fla's name, for every parameter of `args`. A tied head is no parameter, here or there."""
    table = dict(MODEL_TABLE)
    if args.tie_word_embeddings:
        del table["output.weight"]
    present = {
        ours: theirs
        for ours, theirs in LAYER_TABLE.items()
        if all(getattr(args, setting) for part, setting in OPTIONAL.items() if part in ours)
    }
    for i in range(args.num_hidden_layers):
        table.update({f"layers.{i}.{ours}": f"model.layers.{i}.{theirs}" for ours, theirs in present.items()})
    return table


def to_hf(state_dict: dict[str, Tensor], args: DeltaProductArgs) -> dict[str, Tensor]:
    """Our state dict under fla's names.

    Raises:
        CheckpointError: keys are missing or left over.
    """
    table = names(args)
    _check_keys(set(state_dict), set(table), "model's")
    return {table[name]: value for name, value in state_dict.items()}


def from_hf(state_dict: dict[str, Tensor], args: DeltaProductArgs) -> dict[str, Tensor]:
    """fla's state dict, today's or the paper's layout, under our names.

    Raises:
        CheckpointError: keys are missing or left over, or a head said to be tied differs from the embedding.
    """
    state_dict = _stack_micro_steps(state_dict)
    head = state_dict.get("lm_head.weight")
    if args.tie_word_embeddings and head is not None:
        embedding = state_dict.get("model.embeddings.weight")
        if embedding is not None and not torch.equal(head, embedding):
            raise CheckpointError(
                "lm_head.weight differs from model.embeddings.weight, but the config ties them; "
                "set tie_word_embeddings = false to keep both"
            )
        del state_dict["lm_head.weight"]
    table = {theirs: ours for ours, theirs in names(args).items()}
    _check_keys(set(state_dict), set(table), "checkpoint's")
    return {table[name]: value for name, value in state_dict.items()}


def _stack_micro_steps(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy with the April 2025 micro-steps concatenated; of the query convolutions only 0 was ever used."""
    plain, stacks = {}, {}
    for name, value in state_dict.items():
        old = re.fullmatch(r"(.*\.attn\.)([qkvb])_(proj|conv1d)s\.(\d+)\.weight", name)
        if old is None:
            plain[name] = value
        else:
            prefix, letter, kind, j = old.groups()
            stacks.setdefault(f"{prefix}{letter}_{kind}.weight", {})[int(j)] = value
    for name, parts in stacks.items():
        if sorted(parts) != list(range(len(parts))) or name in plain:
            raise CheckpointError(f"{name} has micro-steps {sorted(parts)}; expected 0, 1, ... without gaps")
        used = parts if not name.endswith("q_conv1d.weight") else {0: parts[0]}
        plain[name] = torch.cat([used[j] for j in sorted(used)])
    return plain


def _check_keys(found: set[str], expected: set[str], whose: str) -> None:
    missing, left = sorted(expected - found), sorted(found - expected)
    if missing or left:
        raise CheckpointError(
            f"the {whose} parameters do not fit its config: {len(missing)} missing, {len(left)} left over\n"
            f"missing: {', '.join(missing) or 'none'}\nleft over: {', '.join(left) or 'none'}"
        )


def to_hf_config(
    args: DeltaProductArgs,
    *,
    max_position_embeddings: int = 4096,
    bos_token_id: int | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> dict:
    """fla's config.json for `args`, every field written out (its layer and its config differ on defaults)."""
    ours = {f.name: getattr(args, f.name) for f in fields(DeltaProductArgs) if f.name not in OWN_FIELDS}
    if float(args.hidden_ratio).is_integer():
        ours["hidden_ratio"] = int(args.hidden_ratio)
    return {
        **FIXED_CONFIG,
        **ours,
        "max_position_embeddings": max_position_embeddings,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
    }


def from_hf_config(config: dict) -> DeltaProductArgs:
    """The architecture a config.json of fla describes; `use_gate` is the April 2025 name of
    `use_output_gate`.

    Raises:
        CheckpointError: it describes something this model is not (hybrid attention, another activation, ...).
    """
    config = dict(config)
    if "use_gate" in config:
        config["use_output_gate"] = config.pop("use_gate")
    for name in ("model_type", "hidden_act", "attn", "attnres_block_size"):
        if config.get(name, FIXED_CONFIG[name]) != FIXED_CONFIG[name]:
            expected = FIXED_CONFIG[name]
            raise CheckpointError(f"{name} = {config[name]!r} is not supported; expected {expected!r}")
    if config.get("num_v_heads") not in (None, config.get("num_heads")):
        raise CheckpointError(f"num_v_heads = {config['num_v_heads']} is not supported; expected num_heads")
    if config.get("conv_bias"):
        raise CheckpointError("conv_bias = true is not supported; this model's convolutions have no bias")
    config = FLA_DEFAULTS | config
    known = {f.name for f in fields(DeltaProductArgs)} - OWN_FIELDS
    ours = {name: value for name, value in config.items() if name in known}
    _check_types(ours)
    if ours.get("hidden_ratio", 4) is None:
        del ours["hidden_ratio"]
    for name in ("expand_v", "hidden_ratio"):
        if name in ours:
            ours[name] = float(ours[name])
    return DeltaProductArgs(**ours)


def _check_types(values: dict) -> None:
    """Raises CheckpointError for a value that a field of the architecture cannot have."""
    kinds = {f.name: f.type for f in fields(DeltaProductArgs)}
    for name, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        if kinds[name] is bool:
            good, expected = isinstance(value, bool), "true or false"
        elif kinds[name] is float:
            good, expected = number or (value is None and name == "hidden_ratio"), "a number above 0"
        else:
            good = (number and isinstance(value, int)) or (value is None and kinds[name] is not int)
            expected = "a whole number above 0"
        if not good:
            raise CheckpointError(f"{name} = {value!r} cannot be; expected {expected}")
