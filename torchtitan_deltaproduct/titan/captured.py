"""Forward and backward of a micro-batch as one CUDA graph: the host launches it whole instead of kernel by kernel.

    step = CapturedStep(function, model.parameters())    # function(x=x, labels=labels) -> loss, adds to the gradients
    step.zero_grad()                                     # once a step; gradients keep their place in memory
    loss = step(x=x, labels=labels)                      # captured at the first call; the loss is valid until the next

A small model's kernels take microseconds, and the host, which needs longer to launch each, is what its training waits
for. The kernels are the same ones in the same order, so the numbers are the same to the bit. A graph keeps its memory
for itself and cannot wait for the host or for other ranks: `obstacle` says where that stands in the way.
"""

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..config.check import Environment, graph_obstacle
from ..config.job import JobConfig
from ..memory import rank_memory
from ..models import counts

SHARE = 0.05
"""Of the card's memory that activations may take for `compile.cuda_graph = "auto"`: the work of a larger micro-batch
takes longer than its launches, and validation cannot use the memory that a graph keeps."""


class CapturedStep:
    """See the module docstring.

    Args:
        function: of tensors and dicts of tensors by name, with the same names and shapes in every call; adds to the
            gradients, in place where there are some, and returns a tensor.
        parameters: whose gradients it adds to.
    """

    def __init__(self, function: Callable[..., Tensor], parameters: Iterable[nn.Parameter]) -> None:
        self._function, self._parameters = function, [p for p in parameters if p.requires_grad]
        self._gradients = [torch.zeros_like(p) for p in self._parameters]
        self._graph: torch.cuda.CUDAGraph | None = None

    def zero_grad(self) -> None:
        torch._foreach_zero_(self._gradients)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def __call__(self, **given: Tensor | dict[str, Tensor]) -> Tensor:
        if self._graph is None:
            self._capture(given)
        for held, new in zip(_tensors(self._given), _tensors(given), strict=True):
            held.copy_(new, non_blocking=True)
        self._graph.replay()
        return self._loss

    def _capture(self, given: dict[str, Tensor | dict[str, Tensor]]) -> None:
        self._given = copy.deepcopy(given)
        # What is compiled, loaded or allocated once is so before the capture, in which the host cannot wait.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._function(**self._given)
        torch.cuda.current_stream().wait_stream(stream)
        self.zero_grad()
        self._graph = torch.cuda.CUDAGraph()
        # Other threads (a checkpoint's, NCCL's watchdog) may do what a capturing one may not.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            self._loss = self._function(**self._given)


def _tensors(given: dict[str, Tensor | dict[str, Tensor]]) -> list[Tensor]:
    return [tensor for part in given.values() for tensor in (part.values() if isinstance(part, dict) else (part,))]


def obstacle(config: JobConfig, device: torch.device, world_size: int, card: int) -> str | None:
    """Why micro-batches are not to be captured, or None; `card`: bytes of the device's memory."""
    wanted = config.compile.cuda_graph
    if wanted == "never":
        return "as set"
    reason = graph_obstacle(config, Environment(world_size, device.type == "cuda"))
    if reason or wanted == "always":
        return reason
    if not config.compile.enable:
        return "nothing is compiled"
    memory = rank_memory(config, 1, counts.parameters_by_part(config.model))
    share = (memory["activations"] + memory["loss"]) / card
    return None if share <= SHARE else f"activations take {share:.0%} of the memory, more than {SHARE:.0%}"
