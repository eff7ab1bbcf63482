"""Mixed precision of a model that one process holds: in forward and backward its weights are copies in another dtype.

    weights = LoweredWeights(model, torch.bfloat16)
    with weights:                               # the modules hold copies of what the weights are now
        (model(tokens, labels=labels) / n).backward()
        weights.collect()                       # their gradients are added to those of the weights
    optimizer.step()                            # of the weights, in their own dtype

FSDP2 does the same, and on one rank it does more: it copies weights and gradients into its buffers and out of them
again, and sends each group to itself. The numbers are the same to the bit.
"""

import contextlib
from collections.abc import Iterable

import torch
from torch import nn


class LoweredWeights(contextlib.AbstractContextManager):
    """Copies of the weights of `model` that are not in `dtype`; see the module docstring.

    Args:
        model: with its weights on their device.
        dtype: of the copies.
        kept: modules whose own weights stay as they are.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, kept: Iterable[nn.Module] = ()) -> None:
        kept = set(kept)
        self._places = [
            (module._parameters, name)
            for module in model.modules()
            for name, weight in module._parameters.items()
            if module not in kept and weight is not None and weight.dtype != dtype
        ]
        self._weights = [parameters[name] for parameters, name in self._places]
        self._copies = [nn.Parameter(torch.empty_like(weight, dtype=dtype)) for weight in self._weights]

    def __enter__(self) -> "LoweredWeights":
        if self._copies:
            with torch.no_grad():
                torch._foreach_copy_(self._copies, self._weights)
        self._put(self._copies)
        return self

    def __exit__(self, *error) -> None:
        self._put(self._weights)

    def _put(self, tensors: list[nn.Parameter]) -> None:
        for (parameters, name), tensor in zip(self._places, tensors, strict=True):
            parameters[name] = tensor

    @torch.no_grad()
    def collect(self) -> None:
        """Adds the gradients of the copies to those of the weights, in the weights' dtype, and lets go of them."""
        for weight, copy in zip(self._weights, self._copies, strict=True):
            if copy.grad is None:
                continue
            if weight.grad is None:
                weight.grad = copy.grad.to(weight.dtype)
            else:
                weight.grad += copy.grad
            copy.grad = None
