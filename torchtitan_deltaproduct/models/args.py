"""The architecture of a DeltaProduct language model, as the `[model]` table of a TOML spells it.

Field names are those of flash-linear-attention's `GatedDeltaProductConfig`. DeltaNet is `num_householder = 1`
without the forget gate, Gated DeltaNet the same with it: settings, not classes. This module needs only the
standard library, so that a notebook can use it:

    args = DeltaProductArgs(hidden_size=256, num_hidden_layers=4, num_heads=4, head_dim=64)
"""

from dataclasses import dataclass
from typing import Literal

from ..options import COUNT, OTHER_MODEL, POSITIVE, at_least, harmless, notable, option, read_with, within

MLP_WIDTH = harmless("two ways to give the same MLP width")
NEW_WEIGHTS = notable("no effect: the weights are drawn already")


@dataclass(kw_only=True)
class DeltaProductArgs:
    vocab_size: int = option(32_000, OTHER_MODEL, at_least(2), aliases="n_vocab padded_vocab_size")
    """Rows of the embedding and of the output head; at least the tokenizer's vocabulary."""
    hidden_size: int = option(
        768, OTHER_MODEL, COUNT, aliases="d_model dim n_embd hidden_dim model_dim width embed_dim"
    )
    """Width of the residual stream."""
    num_hidden_layers: int = option(24, OTHER_MODEL, COUNT, aliases="n_layers num_layers n_layer layers depth")
    """Blocks (mixer + MLP)."""
    num_heads: int = option(6, OTHER_MODEL, COUNT, aliases="n_heads n_head heads num_attention_heads")
    """Heads of the mixer; `num_heads * head_dim` need not equal `hidden_size`."""
    head_dim: int = option(
        128, OTHER_MODEL, within(1, 256, ", the widest head of the kernels"),
        aliases="head_size d_head qk_dim head_k_dim",
    )  # fmt: skip
    """Width K of queries and keys per head; the recurrent state of a head is [K, V]."""
    expand_v: float = option(1.0, OTHER_MODEL, POSITIVE, aliases="expand_value v_expand")
    """V / K: width of the values per head in units of `head_dim`; V must come out whole."""
    num_householder: int = option(
        2, OTHER_MODEL, within(1, 8),
        aliases="n_h nh num_householders n_householder householder num_householder_reflections",
    )  # fmt: skip
    """n_h: generalized Householder factors per token. 1 is DeltaNet."""
    allow_neg_eigval: bool = option(True, OTHER_MODEL, aliases="neg_eigval negative_eigenvalues use_neg_eigval")
    """True: beta in (0, 2), transition eigenvalues in [-1, 1]; False: beta in (0, 1), eigenvalues [0, 1]."""
    use_forget_gate: bool = option(False, OTHER_MODEL, aliases="forget_gate use_decay decay_gate gated")
    """A scalar decay per token and head (Gated DeltaProduct)."""
    use_output_gate: bool = option(False, OTHER_MODEL, aliases="use_gate output_gate gate")
    """Gate the normalised output by silu(g_proj x)."""
    use_short_conv: bool = option(True, OTHER_MODEL, aliases="short_conv use_conv conv")
    """A causal depthwise convolution before q, k and v; SiLU follows with or without it."""
    conv_size: int = option(
        4, OTHER_MODEL, at_least(2, "; use_short_conv = false turns the convolution off"),
        reader=read_with("model.use_short_conv", True), aliases="conv_width d_conv conv_kernel_size kernel_size",
    )  # fmt: skip
    """Taps of the short convolution."""
    hidden_ratio: float = option(
        4.0, MLP_WIDTH, POSITIVE,
        reader=read_with("model.intermediate_size", None,
                         otherwise="only read with no intermediate_size, which overrides it"),
    )  # fmt: skip
    """MLP width as fla derives it: 256 * ceil(int(hidden_size * hidden_ratio * 2/3) / 256)."""
    intermediate_size: int | None = option(
        None, MLP_WIDTH, COUNT, aliases="ffn_dim mlp_dim d_ff mlp_size ffn_hidden_size"
    )
    """MLP width, given outright; overrides `hidden_ratio`."""
    norm_eps: float = option(1e-6, OTHER_MODEL, POSITIVE, aliases="rms_norm_eps layer_norm_eps")
    """Epsilon of every RMSNorm."""
    tie_word_embeddings: bool = option(
        True, OTHER_MODEL, aliases="tie_embeddings tied_embeddings weight_tying share_embeddings"
    )
    """Share the embedding with the output head."""
    init_scheme: Literal["normal", "paper"] = option("normal", NEW_WEIGHTS)
    """`normal`: N(0, initializer_range) everywhere, as fla. `paper`: mixer projections Xavier-uniform with
    gain 2^-2.5, the rest N(0, initializer_range); the paper used initializer_range = 0.006."""
    initializer_range: float = option(0.02, NEW_WEIGHTS, POSITIVE)
    """Standard deviation of the normal draws."""
    op_backend: Literal["auto", "recurrent", "chunk", "triton", "fla"] = option(
        "auto", notable("results agree to rounding"), aliases="backend attn_mode kernel"
    )
    """Implementation of the operator; `auto` picks by device and dtype and logs the reason once."""

    @property
    def head_v_dim(self) -> int:
        """Width V of the values per head."""
        return int(self.head_dim * self.expand_v)

    @property
    def has_whole_values(self) -> bool:
        """Whether `head_dim * expand_v` is a whole number of at least 1."""
        width = self.head_dim * self.expand_v
        return 1 <= width < 2**63 and abs(width - round(width)) < 1e-9 and int(width) == round(width)

    @property
    def mlp_size(self) -> int:
        """Width of the SwiGLU MLP."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        return 256 * -(-int(self.hidden_size * self.hidden_ratio * 2 / 3) // 256)
