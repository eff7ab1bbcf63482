"""The architecture of a DeltaProduct language model, as the `[model]` table of a TOML spells it.

Field names are those of flash-linear-attention's `GatedDeltaProductConfig`. DeltaNet is `num_householder = 1`
without the forget gate, Gated DeltaNet the same with it: settings, not classes. This module needs only the
standard library, so that a notebook can use it:

    args = DeltaProductArgs(hidden_size=256, num_hidden_layers=4, num_heads=4, head_dim=64)
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(kw_only=True)
class DeltaProductArgs:
    vocab_size: int = 32_000
    """Rows of the embedding and of the output head; at least the tokenizer's vocabulary."""
    hidden_size: int = 768
    """Width of the residual stream."""
    num_hidden_layers: int = 24
    """Blocks (mixer + MLP)."""
    num_heads: int = 6
    """Heads of the mixer; `num_heads * head_dim` need not equal `hidden_size`."""
    head_dim: int = 128
    """Width K of queries and keys per head; the recurrent state of a head is [K, V]."""
    expand_v: float = 1.0
    """V / K: width of the values per head in units of `head_dim`; V must come out whole."""
    num_householder: int = 2
    """n_h: generalized Householder factors per token. 1 is DeltaNet."""
    allow_neg_eigval: bool = True
    """True: beta in (0, 2), transition eigenvalues in [-1, 1]; False: beta in (0, 1), eigenvalues [0, 1]."""
    use_forget_gate: bool = False
    """A scalar decay per token and head (Gated DeltaProduct)."""
    use_output_gate: bool = False
    """Gate the normalised output by silu(g_proj x)."""
    use_short_conv: bool = True
    """A causal depthwise convolution before q, k and v; SiLU follows with or without it."""
    conv_size: int = 4
    """Taps of the short convolution."""
    hidden_ratio: float = 4.0
    """MLP width as fla derives it: 256 * ceil(int(hidden_size * hidden_ratio * 2/3) / 256)."""
    intermediate_size: int | None = None
    """MLP width, given outright; overrides `hidden_ratio`."""
    norm_eps: float = 1e-6
    """Epsilon of every RMSNorm."""
    tie_word_embeddings: bool = True
    """Share the embedding with the output head."""
    init_scheme: Literal["normal", "paper"] = "normal"
    """`normal`: N(0, initializer_range) everywhere, as fla. `paper`: mixer projections Xavier-uniform with
    gain 2^-2.5, the rest N(0, initializer_range); the paper used initializer_range = 0.006."""
    initializer_range: float = 0.02
    """Standard deviation of the normal draws."""
    op_backend: Literal["auto", "recurrent", "chunk", "fla"] = "auto"
    """Implementation of the operator; `auto` picks by device and dtype and logs the reason once."""

    @property
    def head_v_dim(self) -> int:
        """Width V of the values per head."""
        return int(self.head_dim * self.expand_v)

    @property
    def mlp_size(self) -> int:
        """Width of the SwiGLU MLP."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        return 256 * -(-int(self.hidden_size * self.hidden_ratio * 2 / 3) // 256)
