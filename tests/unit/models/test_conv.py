"""The convolution: its definition against F.conv1d, documents, the cache."""

import pytest
import torch
import torch.nn.functional as F

from torchtitan_deltaproduct.models.conv import ShortConvolution, sum_of_taps
from torchtitan_deltaproduct.models.model import document_positions


def make_conv(width: int, channels: int = 5) -> ShortConvolution:
    torch.manual_seed(0)
    conv = ShortConvolution(channels, width).double()
    torch.nn.init.normal_(conv.weight)
    return conv


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 2, 11])
@pytest.mark.parametrize("with_halo", [False, True])
def test_convolution_equals_a_loop_over_tokens(width, length, with_halo):
    conv = make_conv(width)
    x = torch.randn(3, length, 5, dtype=torch.float64)
    halo = torch.randn(3, width - 1, 5, dtype=torch.float64) if with_halo else torch.zeros(3, width - 1, 5)
    positions = document_positions(torch.rand(3, length) < 0.4)
    if with_halo:
        positions[0] = torch.arange(length) + 7
    y, line = conv(x, positions, halo.double() if with_halo else None), torch.cat([halo.double(), x], 1)
    for row in range(3):
        for token in range(length):
            taps = [back for back in range(width) if back <= positions[row, token]]
            total = sum(line[row, width - 1 + token - back] * conv.weight[:, 0, width - 1 - back] for back in taps)
            torch.testing.assert_close(y[row, token], F.silu(total), atol=1e-12, rtol=0)


def test_taps_equal_conv1d():
    conv = make_conv(4)
    x = torch.randn(3, 11, 5, dtype=torch.float64)
    ours = sum_of_taps(F.pad(x, (0, 0, 3, 0)), conv.weight)
    theirs = F.conv1d(F.pad(x.transpose(1, 2), (3, 0)), conv.weight, groups=5).transpose(1, 2)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_convolution_resets_at_documents():
    conv = make_conv(4)
    x = torch.randn(1, 12, 5, dtype=torch.float64)
    starts = torch.zeros(1, 12, dtype=torch.bool)
    starts[0, [2, 3, 7]] = True
    packed = conv(x, document_positions(starts))
    for first, last in ((0, 2), (2, 3), (3, 7), (7, 12)):
        torch.testing.assert_close(packed[:, first:last], conv(x[:, first:last]), atol=1e-12, rtol=0)


@pytest.mark.parametrize("width", [1, 4])
def test_convolution_continues_from_its_cache(width):
    conv = make_conv(width)
    x = torch.randn(2, 13, 5, dtype=torch.float64)
    cache, parts = x.new_zeros(2, 5, width - 1), []
    for first, last in ((0, 1), (1, 3), (3, 4), (4, 13)):
        y, cache = conv.extend(x[:, first:last], cache)
        parts.append(y)
        assert cache.shape == (2, 5, width - 1)
    torch.testing.assert_close(torch.cat(parts, 1), conv(x), atol=1e-12, rtol=0)


def test_low_precision_convolution_accumulates_in_float32():
    conv = make_conv(4, channels=64)
    x = torch.randn(2, 32, 64).bfloat16()
    conv.bfloat16()
    exact = conv.double()(x.double())
    rounded = conv.bfloat16()(x)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded, exact.bfloat16(), atol=1e-6, rtol=2**-7)
