"""A kernel is bound by Triton once for each kind of arguments, and launched as it was compiled after that."""

import pytest
import torch

from torchtitan_deltaproduct.ops import launch as module
from torchtitan_deltaproduct.ops.launch import launch


class Compiled:
    def __init__(self):
        self.launched = []

    def __getitem__(self, grid):
        return lambda *arguments: self.launched.append((grid, arguments))


class Kernel:
    """What `launch` asks of a `triton.jit` function."""

    arg_names = ("x", "y", "size", "BLOCK", "WIDTH")

    def __init__(self):
        self.bound = []

    def __getitem__(self, grid):
        return lambda *arguments, **options: (
            self.bound.append((grid, arguments, options, Compiled())) or self.bound[-1][3]
        )


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(module, "_compiled", {})
    return Kernel()


def test_the_second_launch_is_of_the_compiled_kernel_with_its_constants_in_order(kernel):
    x, other = torch.zeros(8), torch.ones(8)
    for tensor in (x, other):
        launch(kernel, (3, 2), tensor, None, 5, WIDTH=7, BLOCK=16, num_warps=4)
    ((grid, arguments, options, compiled),) = kernel.bound
    assert (grid, options) == ((3, 2), {"WIDTH": 7, "BLOCK": 16, "num_warps": 4}) and arguments[0] is x
    ((again, (first, *rest)),) = compiled.launched
    assert again[:3] == (3, 2, 1) and first is other and rest == [None, 5, 16, 7]


@pytest.mark.parametrize(
    "other",
    {
        "another dtype": (torch.zeros(8, dtype=torch.int32), None, 5, {}),
        "an address that is not a multiple of 16": (torch.zeros(9)[1:], None, 5, {}),
        "a tensor for none": (torch.zeros(8), torch.zeros(8), 5, {}),
        "another number": (torch.zeros(8), None, 1, {}),
        "another constant": (torch.zeros(8), None, 5, {"BLOCK": 32}),
        "other options": (torch.zeros(8), None, 5, {"num_warps": 8}),
    }.items(),
    ids=lambda case: case[0],
)
def test_what_a_compiled_kernel_depends_on_is_bound_anew(kernel, other):
    x, y, size, options = other[1]
    launch(kernel, (1,), torch.zeros(8), None, 5, BLOCK=16, WIDTH=7, num_warps=4)
    launch(kernel, (1,), x, y, size, **{"BLOCK": 16, "WIDTH": 7, "num_warps": 4} | options)
    assert len(kernel.bound) == 2


def test_both_launches_are_on_the_device_of_the_first_tensor(kernel, monkeypatch):
    entered, x = [], torch.zeros(8)

    class DeviceOf:
        def __init__(self, tensor):
            assert tensor is x

        def __enter__(self):
            entered.append(len(kernel.bound))

        def __exit__(self, *_):
            entered.append(len(kernel.bound))

    monkeypatch.setattr(torch.cuda, "device_of", DeviceOf)
    for _ in range(2):
        launch(kernel, (1,), x, None, 5, BLOCK=16, WIDTH=7)
    assert entered == [0, 1, 1, 1]


def test_kernels_do_not_share(kernel):
    for each in (kernel, Kernel()):
        launch(each, (1,), torch.zeros(8), None, 5, BLOCK=16, WIDTH=7)
        assert len(each.bound) == 1
