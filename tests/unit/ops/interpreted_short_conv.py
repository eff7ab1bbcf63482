"""The fused short convolution under TRITON_INTERPRET=1 against its definition; run by test_short_conv.py."""

import pytest
import torch

from benchmarks.short_conv import definition
from torchtitan_deltaproduct.errors import ConfigError
from torchtitan_deltaproduct.ops.normalize import L2NORM_EPS
from torchtitan_deltaproduct.ops.short_conv import FORWARD, short_conv, short_convs
from torchtitan_deltaproduct.ops.triton import short_conv as kernels

STARTS = (1, 3, 7, 8, 9, 17, 30, 33, 36, 44)


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """Tensors are NaN until they are written."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def short_pieces(monkeypatch):
    """Pieces of 8 tokens, so that a short sequence has many."""
    monkeypatch.setitem(kernels.FORWARD, "STEPS", 8)
    monkeypatch.setitem(kernels.BACKWARD, "STEPS", 8)


def make(batch, length, channels, width, documents=False, strided=False, dtype=torch.float32):
    """x [B, T, C], weight, positions, dy; with `strided` x is a slice of a wider tensor."""
    torch.manual_seed(0)
    x = torch.randn(batch, length, channels + 24, dtype=dtype)
    x = x[..., 8 : 8 + channels] if strided else x[..., :channels].contiguous()
    x.requires_grad_()
    positions = None
    if documents:
        positions = torch.arange(length).expand(batch, length).clone()
        for start in STARTS:
            positions[1:, start:] = torch.arange(max(0, length - start))
        positions[0, length // 2 :] -= length // 2
        positions = positions.int()
    return x, torch.randn(channels, width, requires_grad=True), positions, torch.randn(batch, length, channels)


def check(x, weight, positions, dy, head_dim):
    y, ratio = short_conv(x, weight, positions, head_dim=head_dim)
    grads = torch.autograd.grad(y, (x, weight), dy)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    want = definition(*exact, positions, head_dim)
    wants = torch.autograd.grad(want, exact, dy.double())
    for a, b in zip((y, *grads), (want, *wants), strict=True):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()
    if head_dim is None:
        assert ratio is None
    else:
        assert not ratio.requires_grad and ratio.shape == (*x.shape[:2], x.shape[2] // head_dim)
        assert (ratio - 1).abs().max() < 1e-6


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize(("head_dim", "documents", "strided"), [
    (None, False, True), (None, True, False), (32, True, True), (64, False, False), (128, True, False),
])  # fmt: skip
def test_parity(head_dim, documents, strided):
    check(*make(2, 45, 2 * (head_dim or 64), 4, documents, strided), head_dim)


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize(("width", "documents"), [(2, True), (3, False), (5, True), (8, True)])
def test_widths(width, documents):
    check(*make(2, 37, 64, width, documents), 32)


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize(("length", "head_dim"), [(1, 96), (2, None), (3, 96), (8, None), (31, None), (33, 96)])
def test_lengths_and_odd_channels(length, head_dim):
    """Shorter than the width, at the ends of pieces; a head that is no power of two, channels beyond a block."""
    check(*make(2, length, 288, 4, documents=length > 3, strided=True), head_dim)


def test_shipped_pieces():
    check(*make(1, 261, 64, 4, documents=True, strided=True), 64)


@pytest.mark.usefixtures("short_pieces")
def test_gradient_of_a_sum():
    """dy has strides of zero; positions of 64 bits."""
    x, weight, positions, _ = make(2, 9, 64, 4, documents=True)
    positions = positions.long()
    y, _ = short_conv(x, weight, positions)
    (dx,) = torch.autograd.grad(y.sum(), x)
    want = torch.autograd.grad(definition(x, weight, positions, None).sum(), x)[0]
    assert (dx - want).abs().max() < 1e-5


@pytest.mark.usefixtures("short_pieces")
def test_ratio_restores_the_length_of_rounded_keys():
    x, weight, positions, _ = make(2, 45, 128, 4, documents=True, dtype=torch.bfloat16)
    with torch.no_grad():
        x[:, 30:40] = 0
        y, ratio = short_conv(x, weight, positions, head_dim=64)
        plain = definition(x.double(), weight.double(), positions, None).unflatten(2, (-1, 64))
    squares = y.double().unflatten(2, (-1, 64)).square().sum(-1)
    exact = plain.square().sum(-1)
    zero = exact == 0
    assert y.dtype == torch.bfloat16 and (ratio[zero] == 1).all() and zero.sum() > 10
    assert (squares[~zero] - 1).abs().max() > 1e-3
    assert (squares * ratio - exact / (exact + L2NORM_EPS)).abs().max() < 1e-5
    want = plain * (exact + L2NORM_EPS).rsqrt().unsqueeze(-1)
    # The interpreter cuts off where a GPU rounds.
    assert ((y.double() - want.flatten(2)).abs() <= 2**-7 * want.flatten(2).abs() + 1e-6).all()


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize(("head_dim", "halo"), [(None, False), (32, True)])
def test_custom_op(head_dim, halo):
    x, weight, positions, dy = make(2, 9, 64, 4, documents=True)
    halos = [torch.randn(2, 3, 64, requires_grad=True)] if halo else []
    torch.library.opcheck(FORWARD, ([x], [weight], positions, [head_dim or 0], halos))

    def loss(x, weight):
        y, ratio = short_conv(x * 2, weight, positions, head_dim=head_dim)
        return (y * dy).sum() + (0 if ratio is None else ratio.sum())

    want = torch.autograd.grad(loss(x, weight), (x, weight))
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(x, weight), (x, weight))
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() < 1e-5


def test_obstacles_are_named():
    x, weight, _, _ = make(1, 5, 64, 4)
    for arguments, options, message in (
        ((x.double(), weight), {}, "float64"),
        ((x, torch.randn(64, 9)), {}, "2 to 8, found 9"),
        ((x, weight), {"head_dim": 512}, "at most 256"),
    ):
        with pytest.raises(ConfigError, match=message):
            short_conv(*arguments, **options)


@pytest.mark.usefixtures("short_pieces")
def test_several_at_once_are_each_alone():
    """Also where one of them is not part of the loss."""
    parts = [make(2, 9, channels, 4) for channels in (32, 64, 48)]
    positions = make(2, 9, 32, 4, documents=True)[2]
    dims = (16, None, 16)
    together = short_convs([(p[0], p[1], d) for p, d in zip(parts, dims, strict=True)], positions)
    for i, ((x, weight, _, dy), head_dim) in enumerate(zip(parts, dims, strict=True)):
        y, ratio = short_conv(x, weight, positions, head_dim=head_dim)
        assert torch.equal(y, together[i][0]) and (ratio is None or torch.equal(ratio, together[i][1]))
        alone = torch.autograd.grad(y, (x, weight), dy)
        found = torch.autograd.grad(together[i][0], (x, weight), dy, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(alone, found, strict=True))


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize(("width", "head_dim", "cut", "documents"), [
    (4, None, 21, True), (4, 32, 3, False), (2, 96, 16, True), (8, 64, 7, True),
])  # fmt: skip
def test_halo(width, head_dim, cut, documents):
    """A sequence in two parts, the second given what the first ends with, is the sequence: gradients, too."""
    x, weight, positions, dy = make(2, 37, 2 * (head_dim or 64), width, documents)
    parts = x[:, :cut], x[:, cut:]
    places = (None, None) if positions is None else (positions[:, :cut], positions[:, cut:])
    halos = torch.zeros_like(x[:, : width - 1]), x[:, cut - width + 1 : cut]
    each = [
        short_conv(part, weight, place, head_dim=head_dim, halo=halo)
        for part, place, halo in zip(parts, places, halos, strict=True)
    ]
    found = torch.cat([y for y, _ in each], 1)
    want = short_conv(x, weight, positions, head_dim=head_dim)[0]
    for a, b in zip(
        (found, *torch.autograd.grad(found, (x, weight), dy)),
        (want, *torch.autograd.grad(want, (x, weight), dy)),
        strict=True,
    ):
        assert (a - b).abs().max() < 1e-5 * b.abs().max()
