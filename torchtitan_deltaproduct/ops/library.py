"""Functions as ops of the library `deltaproduct`: opaque to torch.compile, with known output shapes.

    @operator("double")
    def double(x: Tensor) -> Tensor: ...          # torch.ops.deltaproduct.double.default

    fake(double)(lambda x: x.new_empty(x.shape))
    gradient(double, backward, setup_context)

What `torch.library.custom_op` does, without what it costs the host at each call: a look whether an output shares memory
with an argument, for which `opcheck` is there in tests, and a guard against being traced.
"""

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("deltaproduct", "DEF")


def operator(name: str) -> Callable[[Callable], Callable]:
    """Registers a function without side effects, whose outputs share no memory with its arguments, for all devices."""

    def register(function: Callable) -> Callable:
        schema = torch.library.infer_schema(function, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        return getattr(torch.ops.deltaproduct, name).default

    return register


def fake(op: Callable) -> Callable[[Callable], Callable]:
    """Registers what makes outputs without values."""
    return torch.library.register_fake(op, lib=_LIBRARY)


def no_gradient(op: Callable) -> None:
    """Registers that an op, itself a derivative, has none: torch would warn, leave its part out and go on."""

    def refuse(_ctx, *_grads):
        raise RuntimeError('our kernels have no second derivative; op_backend = "recurrent" on the CPU has one')

    torch.library.register_autograd(op, refuse, lib=_LIBRARY)


def gradient(op: Callable, backward: Callable, setup_context: Callable) -> None:
    """Registers the derivative, as `torch.library.register_autograd` takes it."""
    torch.library.register_autograd(op, backward, setup_context=setup_context, lib=_LIBRARY)
