"""One block of the model: pre-norm mixer and pre-norm SwiGLU, each added to the residual stream.

block = Block(DeltaProductArgs(hidden_size=256, num_heads=4, head_dim=64))
y = block(x)                                    # [B, T, 256]; compiles with fullgraph=True
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .args import DeltaProductArgs
from .mixer import DeltaProductMixer, MixerCache, Operator


class SwiGLU(nn.Module):
    """`down(silu(gate x) * up x)`."""

    def __init__(self, hidden_size: int, mlp_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, mlp_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, mlp_size, bias=False)
        self.down_proj = nn.Linear(mlp_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + mixer(norm x), then x + mlp(norm x)."""

    def __init__(self, args: DeltaProductArgs):
        super().__init__()
        self.mixer_norm = nn.RMSNorm(args.hidden_size, args.norm_eps)
        self.mixer = DeltaProductMixer(args)
        self.mlp_norm = nn.RMSNorm(args.hidden_size, args.norm_eps)
        self.mlp = SwiGLU(args.hidden_size, args.mlp_size)

    def forward(
        self,
        x: Tensor,
        decay: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """x: [B, T, hidden]; the other arguments as in `DeltaProductMixer.forward`."""
        x = x + self.mixer(self.mixer_norm(x), decay, positions)
        return x + self.mlp(self.mlp_norm(x))

    def extend(self, x: Tensor, cache: MixerCache, operator: Operator | None = None) -> tuple[Tensor, MixerCache]:
        """Continues a sequence from `cache`: the decoding twin of `forward`; `operator` as the mixer takes it."""
        mixed, cache = self.mixer.extend(self.mixer_norm(x), cache, operator)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), cache
