"""Everything that is changed inside torchtitan, in one place; what it is imported without: `config.stand_ins`.

Written for torchtitan 0.2.2, which pyproject.toml pins. Each patch first looks for the part that it replaces; where
that is missing, the run ends at its start with an error that names this file.

    bind_device("cpu", device_module, peak_flops=lambda name: 0.0)     # before anything else of torchtitan is used
    add_train_spec("deltaproduct", spec)
    with without_checkpoints_and_autocast(job_config): super().__init__(job_config)
"""

import contextlib
from collections.abc import Callable, Iterator
from importlib.metadata import version
from types import ModuleType
from typing import Any

from torchtitan.config import JobConfig

WRITTEN_FOR = "0.2.2"


def expect(holder: Any, *names: str) -> None:
    """Raises RuntimeError if a part of torchtitan that is to be replaced is not there."""
    missing = [name for name in names if not hasattr(holder, name)]
    if missing:
        raise RuntimeError(
            f"torchtitan {version('torchtitan')} has no {getattr(holder, '__name__', holder)}.{', '.join(missing)}; "
            f"titan/patches.py was written for {WRITTEN_FOR}: install that, or adapt it"
        )


def bind_device(device_type: str, module: ModuleType, peak_flops: Callable[[str], float]) -> None:
    """Makes torchtitan run on a device.

    It falls back to "cuda" on a machine without an accelerator, and five of its modules bind the name by value as they
    are imported. Its lookup of peak FLOP/s calls `lspci` and takes an unknown device for an A100.

    Args:
        device_type: `cuda` or `cpu`.
        module: what torchtitan asks for the device's name and memory, as it does `torch.cuda`.
        peak_flops: device name -> FLOP/s, 0.0 where unknown.
    """
    from torchtitan.components import metrics
    from torchtitan.distributed import parallel_dims
    from torchtitan.distributed import utils as dist_utils
    from torchtitan.tools import profiling, utils

    both, name_only, module_only = (utils, dist_utils, metrics), (parallel_dims,), (profiling,)
    for holder in (*both, *name_only):
        expect(holder, "device_type")
        holder.device_type = device_type
    for holder in (*both, *module_only):
        expect(holder, "device_module")
        holder.device_module = module
    expect(utils, "get_peak_flops")
    utils.get_peak_flops = peak_flops


def add_train_spec(name: str, spec: Any) -> None:
    """Registers `spec` under `name`, in place of an earlier one: a process may train more than once."""
    from torchtitan.protocols import train_spec as registry

    expect(registry, "_extra_train_specs", "register_train_spec")
    registry._extra_train_specs.pop(name, None)
    registry.register_train_spec(name, spec)


@contextlib.contextmanager
def without_checkpoints_and_autocast(job_config: JobConfig) -> Iterator[None]:
    """Within it, torchtitan builds a Trainer whose CheckpointManager does nothing and which has no autocast context.

    The stock Trainer makes its manager by name; switched off, that one starts no process group and no thread, and ours
    takes its place. Mixed precision is given to fully_shard in every layout; of the autocast context, which would lower
    the float32 products of the operator, already the making warns on a CPU.
    """
    from torchtitan.distributed import utils

    expect(utils, "maybe_enable_amp")
    autocast, utils.maybe_enable_amp = utils.maybe_enable_amp, lambda *args: contextlib.nullcontext()
    enable, job_config.checkpoint.enable = job_config.checkpoint.enable, False
    try:
        yield
    finally:
        job_config.checkpoint.enable, utils.maybe_enable_amp = enable, autocast
