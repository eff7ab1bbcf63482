"""Every private part of torch that this project touches, so that a new torch means reading one file.

Written for torch 2.11 to 2.13, the range that pyproject.toml allows. Each function looks for the part it needs and
raises an error that names this file where it is not there.

    forget_checkpoint_process(terminate=True)
    storage = shared_memory(1 << 30); pin(storage.data_ptr(), 1 << 30)

torch's `_foreach_*` functions, `DTensor._spec` and the class `pickle._Unpickler` have no public names either; they are
used where they are needed.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

WRITTEN_FOR = "torch 2.11 to 2.13"


def part(holder: Any, name: str) -> Any:
    """`holder.name`.

    Raises:
        RuntimeError: this torch has no such part.
    """
    if not hasattr(holder, name):
        raise RuntimeError(
            f"torch {torch.__version__} has no {getattr(holder, '__name__', holder)}.{name}; "
            f"torch_internals.py was written for {WRITTEN_FOR}: install one of these, or adapt it"
        )
    return getattr(holder, name)


def constant_result(function: Callable) -> Callable:
    """As `torch.compiler.assume_constant_result`, without loading the compiler, which is slow."""
    function._dynamo_marked_constant = True
    return function


@contextlib.contextmanager
def deterministic_kernels() -> Iterator[None]:
    """Within it torch takes kernels that are deterministic, where it has a choice.

    `torch.use_deterministic_algorithms` would also load the compiler, change its settings, and fill fresh memory.
    """
    set_mode, memory = part(torch._C, "_set_deterministic_algorithms"), torch.utils.deterministic
    before, only_warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    filled, memory.fill_uninitialized_memory = memory.fill_uninitialized_memory, False
    set_mode(True, warn_only=True)
    try:
        yield
    finally:
        set_mode(before, warn_only=only_warns)
        memory.fill_uninitialized_memory = filled


@contextlib.contextmanager
def process_group_in(store: dist.Store, rank: int, world_size: int) -> Iterator[None]:
    """Within it, `torch.distributed.init_process_group` takes this store, whoever calls it."""
    original = part(dist, "init_process_group")
    dist.init_process_group = partial(original, store=store, rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.init_process_group = original


def checkpointed(module: nn.Module, policy: Callable[..., CheckpointPolicy], **options: Any) -> nn.Module:
    """`module` under selective activation checkpointing by a policy (`torch.utils.checkpoint`).

    Its parameters keep their names in state dicts. torch warns of in-place operations, whatever the module: not here.
    """
    from torch.distributed.algorithms._checkpoint import checkpoint_wrapper

    logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
    context = partial(create_selective_checkpoint_contexts, policy)
    return part(checkpoint_wrapper, "checkpoint_wrapper")(module, context_fn=context, **options)


def forget_checkpoint_process(terminate: bool = False) -> None:
    """Lets go of the process that writes asynchronous checkpoints; the next save starts a new one.

    Args:
        terminate: end it first. Otherwise it ends by itself once nobody refers to it.
    """
    from torch.distributed.checkpoint import _async_process_executor as executor

    process = part(executor, "_CHECKPOINT_PROCESS")
    if terminate and process is not None:
        part(process, "_save_process").terminate()
    executor._CHECKPOINT_PROCESS = None


@cache
def muon_parts() -> tuple[Callable, Callable]:
    """torch.optim.Muon's orthogonalisation, and its learning rate of a matrix by its shape."""
    module = import_module("torch.optim._muon")
    return part(module, "_zeropower_via_newtonschulz"), part(module, "_adjust_lr")


def force_compiler_settings(config: ModuleType, settings: dict[str, Any]) -> None:
    """Sets what `config` (`torch._dynamo.config`, `torch._inductor.config`) names, for good and for all threads.

    An assignment is not enough. Whenever Dynamo has compiled a function it calls `torch.use_deterministic_algorithms`
    with what that was before, which sets Inductor's `deterministic` to False; and in torch 2.13 an assignment holds in
    the thread that made it, while autograd compiles the backward pass of a GPU in its own. What an environment variable
    forces yields to neither, so the settings are put where such a variable would put them.
    """
    for name, value in settings.items():
        entry = part(config, "_config")[name]
        part(entry, "env_value_force")
        # The assignment makes the compiler's caches forget what they know of the settings.
        setattr(config, name, value)
        entry.env_value_force = value


def start_compile_workers() -> None:
    """Starts the processes in which Inductor compiles; they inherit the signal mask of the calling thread."""
    from torch._inductor.async_compile import AsyncCompile

    part(AsyncCompile, "warm_pool")()


def shared_memory(size: int) -> torch.UntypedStorage:
    """`size` bytes that a process we start can read, too."""
    return part(torch.UntypedStorage, "_new_shared")(size)


def pin(address: int, size: int) -> None:
    """Makes memory that exists already fit for copies from the GPU that nobody waits for."""
    from torch.cuda import _pin_memory_utils

    part(_pin_memory_utils, "pin_memory")(address, size)


def unpin(address: int) -> None:
    """Undoes `pin`."""
    from torch.cuda import _pin_memory_utils

    part(_pin_memory_utils, "unpin_memory")(address)


def flight_records() -> dict[str, bytes]:
    """What torch's flight recorders hold of this rank's collectives: recorder -> JSON, those of no use left out.

    They record as many collectives as `comm.trace_buf_size` says.
    """
    records = {}
    for name in ("nccl", "fr"):
        # Called while the process goes down: a failure must not cost the stacks that are written with these.
        with contextlib.suppress(Exception):
            records[name] = bytes(getattr(torch._C._distributed_c10d, f"_dump_{name}_trace_json")())
    return {name: record for name, record in records.items() if b'"entries":[{' in record}
