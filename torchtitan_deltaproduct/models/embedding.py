"""The embedding of tokens, whose gradient has the same bits in every run.

    embedding = Embedding(32000, 1024)
    x = embedding(tokens)                           # [B, T] int64 -> [B, T, 1024]

From torch 2.11 on, a GPU adds up the gradients of a vocabulary of few symbols, as those of a group have, with atomics:
in an order of its own in each run. Its other kernel, the one of before, sorts the tokens first.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..torch_internals import deterministic_kernels


class Embedding(nn.Embedding):
    """torch's; see the module docstring."""

    def forward(self, tokens: Tensor) -> Tensor:
        """[...] int64 -> [..., size]."""
        return _Lookup.apply(self.weight, tokens)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.rows = weight.shape[0]
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (tokens,) = ctx.saved_tensors
        with deterministic_kernels():
            return torch.ops.aten.embedding_dense_backward(gradient, tokens, ctx.rows, -1, False), None
