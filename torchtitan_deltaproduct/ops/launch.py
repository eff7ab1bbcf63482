"""Launches of Triton kernels whose compiled form is known, without what Triton does anew each time.

    launch(kernel, (grid,), q, k, None, 4096, K=128, V=128, num_warps=4)     # kernel[(grid,)](q, ..., num_warps=4)

Triton binds arguments by name, describes each and builds a key of texts at every launch. Here the key is what a
compiled kernel depends on: dtypes and the alignment of tensors, all other arguments by value, and the device.
"""

from typing import Any

import torch
from torch import Tensor

_compiled: dict[tuple, tuple[Any, tuple]] = {}
"""Key -> the compiled kernel, and the constants that it is given after the arguments."""


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Runs `kernel` on a grid of one to three dimensions, on the device of its first argument.

    Args:
        kernel: what `triton.jit` made; its constants are its last parameters.
        arguments: all that come before the constants: tensors, numbers, None; a tensor first.
        options: the constants, and Triton's options.
    """
    # Triton launches on the current device, wherever the tensors are.
    with torch.cuda.device_of(arguments[0]):
        _launch(kernel, grid, *arguments, **options)


def _launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    kinds = []
    for x in arguments:
        kinds += (x.dtype, x.data_ptr() & 15) if isinstance(x, Tensor) else (x,)
    key = (id(kernel), torch.cuda.is_initialized() and torch.cuda.current_device(), *kinds, *options.items())
    if key in _compiled:
        compiled, constants = _compiled[key]
        compiled[(*grid, 1, 1)](*arguments, *constants)
        return
    compiled = kernel[grid](*arguments, **options)
    # The interpreter compiles nothing.
    if compiled is not None:
        _compiled[key] = compiled, tuple(options[name] for name in kernel.arg_names[len(arguments) :])


def power_of_two(number: int) -> int:
    """The smallest power of two that is not less. Triton's own goes through its machinery for constants."""
    return 1 << (number - 1).bit_length()
