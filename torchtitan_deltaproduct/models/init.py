"""Initial weights that depend on (seed, parameter name) and on nothing else.

Each parameter is drawn whole on the CPU in float32 by its own generator, then copied, and not kept; a sharded one
(DTensor) takes its slice of the same draw, which costs as much: the CPU's generator cannot be moved on without drawing.
So one rank and many, FSDP and tensor parallelism, CPU and GPU start from equal weights, and a parameter added to the
model moves none of the others. Only `normal_` and `uniform_` are used, which give the same numbers in torch 2.11 and
2.13 (`trunc_normal_` does not). Where a checkpoint is loaded nothing is drawn (`left_undrawn`):

    init_parameters(model, model.args, seed=42)
"""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .args import DeltaProductArgs

WRAPPER_PREFIXES = ("_orig_mod.", "_checkpoint_wrapped_module.")
DT_RANGE = (1e-3, 1e-1)
"""Range of the log-uniform step size behind `dt_bias` (Mamba's convention, as in fla)."""
A_MAX = 16.0
"""Upper end of the uniform decay rate behind `A_log`."""
XAVIER_GAIN = 2**-2.5
"""Gain of the paper's mixer projections."""


_undrawn = False


@contextmanager
def left_undrawn() -> Iterator[None]:
    """Within it, `init_parameters` draws nothing: weights are NaN until a checkpoint is loaded."""
    global _undrawn
    _undrawn = True
    try:
        yield
    finally:
        _undrawn = False


@torch.no_grad()
def init_parameters(model: nn.Module, args: DeltaProductArgs, seed: int) -> None:
    """Fills every parameter of `model`, which must not be on the meta device.

    Raises:
        ValueError: a parameter is still on the meta device.
    """
    # Slow to import: a command that makes no weights need not wait for it.
    from torch.distributed.tensor import DTensor, distribute_tensor

    for name, parameter in model.named_parameters():
        name = plain_name(name)
        if parameter.is_meta:
            raise ValueError(f"{name} is on the meta device; call model.to_empty(device=...) first")
        if _undrawn:
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            local.fill_(math.nan)
            continue
        full = draw(name, parameter.shape, args, seed)
        if isinstance(parameter, DTensor):
            full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.to_local().copy_(full.to_local())
        else:
            parameter.copy_(full)


def plain_name(name: str) -> str:
    """A parameter's name without what torch.compile and activation checkpointing put into it."""
    for prefix in WRAPPER_PREFIXES:
        name = name.replace(prefix, "")
    return name


def draw(name: str, shape: torch.Size, args: DeltaProductArgs, seed: int) -> Tensor:
    """The initial value of one parameter: float32, on the CPU, a function of the arguments alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    value = torch.empty(shape, dtype=torch.float32)
    module, leaf = name.split(".")[-2:]
    if module.endswith("norm"):
        return value.fill_(1.0)
    if leaf == "A_log":
        # uniform_ can return 0, whose logarithm would freeze the head's decay at none.
        return value.uniform_(0.0, A_MAX, generator=generator).clamp_(min=1e-6).log_()
    if leaf == "dt_bias":
        low, high = (math.log(end) for end in DT_RANGE)
        step = value.uniform_(low, high, generator=generator).exp_()
        return step + torch.log(-torch.expm1(-step))
    if args.init_scheme == "paper" and ".mixer." in name and value.ndim == 2:
        bound = XAVIER_GAIN * math.sqrt(6.0 / (shape[1] + rows_per_micro_step(module, shape[0], args)))
        return value.uniform_(-bound, bound, generator=generator)
    return value.normal_(0.0, args.initializer_range, generator=generator)


def rows_per_micro_step(module: str, rows: int, args: DeltaProductArgs) -> int:
    """Fan-out in the paper's code, which has one matrix a micro-step where ours are stacked."""
    return rows // args.num_householder if module in ("k_proj", "v_proj", "b_proj") else rows
