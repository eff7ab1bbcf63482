"""The fused short convolution on a CUDA device against float64: pytest -m gpu tests/gpu/test_conv.py."""

import pytest
import torch

from benchmarks.short_conv import definition
from torchtitan_deltaproduct.ops.short_conv import short_conv

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

LENGTH = 1100


def make(dtype, width=4, documents=False, channels=768, length=LENGTH, batch=2):
    """x, a slice of a wider tensor, weight, positions and dy."""
    torch.manual_seed(0)
    wide = torch.randn(batch, length, 3 * channels, device="cuda", dtype=dtype)
    x = wide[..., channels : 2 * channels].requires_grad_()
    weight = torch.randn(channels, width, device="cuda", requires_grad=True)
    dy = torch.randn(batch, length, channels, device="cuda", dtype=dtype)
    if not documents:
        return x, weight, None, dy
    begins = torch.rand(batch, length, device="cuda") < 0.02
    begins[:, [0, 1, 127, 128, 255, 256, 258, LENGTH - 1]] = True
    token = torch.arange(length, device="cuda").expand(batch, length)
    positions = token - torch.where(begins, token, 0).cummax(1).values
    return x, weight, positions.int(), dy


def gradients(x, weight, positions, dy, head_dim):
    y, _ = short_conv(x, weight, positions, head_dim=head_dim)
    return y.detach(), *torch.autograd.grad(y, (x, weight), dy)


def relative(a, b) -> float:
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("head_dim", [None, 32, 64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_against_float64(dtype, head_dim, documents):
    x, weight, positions, dy = make(dtype, documents=documents)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    want = definition(*exact, positions, head_dim)
    wants = want, *torch.autograd.grad(want, exact, dy.double())
    errors = [relative(a, b) for a, b in zip(gradients(x, weight, positions, dy, head_dim), wants, strict=True)]
    print(f"y, dx, dweight: {', '.join(f'{error:.1e}' for error in errors)}")
    # y and dx are rounded once, dweight is float32.
    rounded = {torch.float32: 2e-6, torch.bfloat16: 2.5e-3, torch.float16: 4e-4}[dtype]
    assert errors[0] < rounded and errors[1] < rounded and errors[2] < 5e-6


@pytest.mark.parametrize("width", [2, 3, 5, 8])
def test_widths(width):
    x, weight, positions, dy = make(torch.bfloat16, width, documents=True)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    want = definition(*exact, positions, 128)
    wants = want, *torch.autograd.grad(want, exact, dy.double())
    for a, b in zip(gradients(x, weight, positions, dy, 128), wants, strict=True):
        assert relative(a, b) < 2.5e-3


def test_ratio_restores_the_length_of_rounded_keys():
    x, weight, positions, _ = make(torch.bfloat16, documents=True)
    k, ratio = short_conv(x, weight, positions, head_dim=128)
    squares = k.double().unflatten(2, (-1, 128)).square().sum(-1)
    assert (squares - 1).abs().max() > 1e-3
    assert (squares * ratio - 1).abs().max() < 1e-5


def test_bitwise_and_without_a_sync():
    arguments = make(torch.bfloat16, documents=True)
    want = gradients(*arguments, 128)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            for a, b in zip(gradients(*arguments, 128), want, strict=True):
                torch._assert_async((a == b).all())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


def test_lengths_share_one_compilation():
    from torchtitan_deltaproduct.ops.triton import short_conv as kernels

    def count() -> int:
        device = torch.cuda.current_device()
        return sum(
            len(kernel.device_caches[device][0]) for kernel in (kernels.short_conv_forward, kernels.short_conv_backward)
        )

    gradients(*make(torch.bfloat16, length=1), 128)
    before = count()
    for length in (2, 15, 16, 512, 1000):
        gradients(*make(torch.bfloat16, length=length), 128)
    assert count() == before


def test_compile_fullgraph():
    x, weight, positions, dy = make(torch.bfloat16, documents=True)

    def loss(x, weight):
        k, ratio = short_conv(x * 2, weight, positions, head_dim=128)
        return (k.float() * dy * ratio.repeat_interleave(128, 2)).sum()

    want = torch.autograd.grad(loss(x, weight), (x, weight))
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x, weight), (x, weight))
    for a, b in zip(got, want, strict=True):
        assert relative(a, b.double()) < 1e-2
