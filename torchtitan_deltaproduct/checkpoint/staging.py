"""A copy of a state dict in the memory of the host, for a save that goes on while training does.

    stager = Stager(shared=True)
    stager.reserve(states)                 # once, when nobody is in a hurry: allocating and pinning take a second
    staged = stager.stage(states)          # the copy, or on a GPU a future of it, made behind the work that is queued

All tensors lie in one block that is kept for every save. torch's own stager takes a block a tensor, some 1,500 files in
/dev/shm for 24 layers, and up to torch 2.12 takes and pins new ones at every save, which stops the training thread for
a second and more. A process that writes is sent the block and where each tensor lies in it.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map

from ..torch_internals import pin, shared_memory, unpin

ALIGNMENT = 64
"""Bytes: tensors begin at multiples of it."""


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies: its first byte in the block, what it is, and the spec of the DTensor it is a shard of."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype
    spec: Any

    @property
    def end(self) -> int:
        return self.offset + self.shape.numel() * self.dtype.itemsize

    def local(self, block: Tensor) -> Tensor:
        """The tensor itself, or this rank's shard."""
        return block[self.offset : self.end].view(self.dtype).view(self.shape)

    def tensor(self, block: Tensor) -> Tensor:
        local = self.local(block)
        return local if self.spec is None else DTensor(local, self.spec, requires_grad=False)


class Staged(dict):
    """A state dict whose tensors lie in `block`, [bytes] uint8; pickled, it is the block and the plan.

    Args:
        block: the memory.
        plan: the state dict with a `Slot` for each tensor.
    """

    def __init__(self, block: Tensor, plan: dict) -> None:
        super().__init__(tree_map(lambda leaf: leaf.tensor(block) if isinstance(leaf, Slot) else leaf, plan))
        self.block, self.plan = block, plan

    def __reduce__(self):
        return Staged, (self.block, self.plan)


class Stager(AsyncStager):
    """See the module docstring. A copy is valid until the next one is made.

    Args:
        shared: whether other processes can read the block. Where there is a GPU it is pinned, too.
    """

    def __init__(self, shared: bool) -> None:
        self.shared = shared
        self.block = torch.empty(0, dtype=torch.uint8)
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        self.waiter = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-staging")

    def reserve(self, state_dict: dict) -> None:
        """Allocates what a copy of `state_dict` takes, if it is not there yet."""
        self._allocate(lay_out(state_dict)[1])

    def stage(self, state_dict: dict) -> Staged | Future[Staged]:
        """Copies `state_dict`; nothing in it may be written before the future is done."""
        plan, slots, tensors = lay_out(state_dict)
        self._allocate(slots)
        copies = [slot.local(self.block) for slot in slots]
        if self.stream is None:
            torch._foreach_copy_(copies, tensors)
            return Staged(self.block, plan)
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            torch._foreach_copy_(copies, tensors, non_blocking=True)
            copied = self.stream.record_event()
        # The thread holds on to the tensors until they are copied.
        return self.waiter.submit(lambda tensors=tensors: (copied.synchronize(), Staged(self.block, plan))[1])

    def _allocate(self, slots: list[Slot]) -> None:
        size = max((slot.end for slot in slots), default=0)
        if size <= self.block.numel():
            return
        self._unpin()
        storage = shared_memory(size) if self.shared else torch.UntypedStorage(size)
        self.block = torch.empty(0, dtype=torch.uint8).set_(storage)
        if self.stream is not None:
            pin(self.block.data_ptr(), size)

    def _unpin(self) -> None:
        if self.stream is not None and self.block.numel():
            unpin(self.block.data_ptr())

    def synchronize_staging(self) -> None:
        """Part of torch's protocol: a copy is complete when `stage`, or its future, returns."""

    def close(self) -> None:
        """Gives the memory back."""
        self.waiter.shutdown()
        self._unpin()
        self.block = torch.empty(0, dtype=torch.uint8)


def lay_out(state_dict: dict) -> tuple[dict, list[Slot], list[Tensor]]:
    """The state dict with slots for its tensors, one after the other; the slots; the local parts of the tensors."""
    slots, tensors, offset = [], [], 0

    def place(leaf: Any) -> Any:
        nonlocal offset
        if not isinstance(leaf, Tensor):
            return leaf
        local, spec = (leaf.to_local(), leaf._spec) if isinstance(leaf, DTensor) else (leaf, None)
        slot = Slot(offset, local.shape, local.dtype, spec)
        offset = -(-slot.end // ALIGNMENT) * ALIGNMENT
        slots.append(slot)
        tensors.append(local.detach())
        return slot

    return tree_map(place, state_dict), slots, tensors
