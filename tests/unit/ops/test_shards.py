"""A sequence cut in shards, all in this process, against the recurrence over the whole: outputs and every gradient."""

import pytest
import torch

from tests.unit.ops.test_parity import make
from tests.unit.ops.triton_cpu import run_interpreted
from torchtitan_deltaproduct.errors import ConfigError
from torchtitan_deltaproduct.ops import SequenceRanks, gated_delta_product, recurrent_gated_delta_product, shards


def random_positions(batch: int, length: int, every: float, seed: int) -> torch.Tensor:
    """[B, T] int32; a document begins at each token with probability 1 / every, and at each row's first."""
    torch.manual_seed(seed)
    starts = torch.rand(batch, length) < 1 / every
    starts[:, 0] = True
    index = torch.arange(length)
    return (index - torch.where(starts, index, 0).cummax(1).values).int()


def by_shards(
    args: dict, do: torch.Tensor, n: int, size: int, positions, backend: str = "chunk", keep_states: bool = True
) -> dict:
    """What `shards._Shard` does on each rank, one rank after another."""
    names = ("q", "k", "v", "g", "beta")
    options = (n, args["q"].shape[3] ** -0.5, backend == "chunk", backend)
    length = args["q"].shape[1] // size
    parts, made = [], []
    for r in range(size):
        cut = {
            name: None if args[name] is None else args[name].detach().chunk(size, 1)[r].contiguous() for name in names
        }
        at = None if positions is None else positions[:, r * length : (r + 1) * length].contiguous()
        parts.append((*cut.values(), at))
        made.append(shards.MAP(*parts[r], *options, True))
    maps = torch.stack([shard for shard, *_ in made])
    outputs, saved, entering = [], [], []
    for r in range(size):
        entering.append(shards.unless_new(shards.ENTERING(maps, r), parts[r][5]))
        o, states = shards.OUTPUT(*parts[r], entering[r], *made[r][1:], *options, keep_states)
        outputs.append(o)
        saved.append((*made[r][1:], states))
    dos = [x.contiguous() for x in do.chunk(size, 1)]
    back = [shards.RESPONSE(dos[r], *parts[r], *saved[r][:3], *options) for r in range(size)]
    own = torch.stack([shards.unless_new(back[r][0], parts[r][5]) for r in range(size)])
    grads = []
    for r in range(size):
        leaving = shards.LEAVING(maps, own, r)
        grads.append(shards.BACKWARD(dos[r], leaving, *parts[r], entering[r], *saved[r], back[r][1], *options))
    found = {"o": torch.cat(outputs, 1)}
    for name, pieces in zip(names, zip(*grads, strict=True), strict=True):
        if args[name] is not None:
            found[f"d{name}"] = torch.cat(pieces, 1)
    return found


def whole(args: dict, do: torch.Tensor, n: int, positions, use_qk_l2norm: bool = True) -> dict:
    o, _ = recurrent_gated_delta_product(**args, num_householder=n, positions=positions, use_qk_l2norm=use_qk_l2norm)
    leaves = {name: x for name, x in args.items() if x is not None}
    grads = torch.autograd.grad((o * do).sum(), tuple(leaves.values()))
    return {"o": o.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def worst(found: dict, expected: dict) -> float:
    assert found.keys() == expected.keys()
    errors = [(found[name] - x).abs().max() / x.abs().max().clamp(min=1e-6) for name, x in expected.items()]
    return torch.stack(errors).max().item()


@pytest.mark.parametrize("top", [1.0, 2.0])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_cuts(n, gated, top):
    args = make(48, n, batch=2, heads=3, gated=gated, top=top, seed=n)
    do = torch.randn(2, 48, 3, 6, dtype=torch.float64)
    expected = whole(args, do, n, None)
    for size in (1, 2, 4, 8):
        assert worst(by_shards(args, do, n, size, None), expected) < 1e-11


@pytest.mark.parametrize("every", [2, 8, 40])
@pytest.mark.parametrize(("n", "gated"), [(1, True), (2, False), (3, True), (4, False)])
def test_documents(n, gated, every):
    """Documents shorter than a chunk to longer than a shard, ending anywhere, with and without one that goes on."""
    args = make(96, n, batch=2, gated=gated, seed=every)
    do = torch.randn(2, 96, 2, 6, dtype=torch.float64)
    for seed in range(3):
        positions = random_positions(2, 96, every, seed)
        expected = whole(args, do, n, positions)
        for size in (2, 4):
            assert worst(by_shards(args, do, n, size, positions), expected) < 1e-11


def test_a_document_begins_with_a_shard():
    """The first row's second shard begins with a document, the second row's goes on; ends just before and after."""
    args = make(64, 2, batch=4, gated=True)
    do = torch.randn(4, 64, 2, 6, dtype=torch.float64)
    starts = torch.zeros(4, 64, dtype=torch.bool)
    starts[:, 0] = True
    for row, at in enumerate((32, 10, 31, 33)):
        starts[row, at] = True
    index = torch.arange(64)
    positions = (index - torch.where(starts, index, 0).cummax(1).values).int()
    assert worst(by_shards(args, do, 2, 2, positions), whole(args, do, 2, positions)) < 1e-11


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(gated, packed):
    args = {name: None if x is None else x.detach() for name, x in make(37, 2, batch=2, gated=gated).items()}
    shard = *(args[name] for name in ("q", "k", "v", "g", "beta")), random_positions(2, 37, 9, 0) if packed else None
    options, do, state = (2, 0.3, True, "chunk"), torch.randn_like(args["q"][..., :6]), torch.randn(2, 2, 8, 6).double()
    made = shards.MAP(*shard, *options, True)
    maps, saved = made[0].expand(3, *made[0].shape).clone(), made[1:]
    for op, given in {
        shards.MAP: (*shard, *options, True),
        shards.ENTERING: (maps, 2),
        shards.OUTPUT: (*shard, state, *saved, *options, True),
        shards.RESPONSE: (do, *shard, *saved, *options),
        shards.LEAVING: (maps, state.expand(3, -1, -1, -1, -1).clone(), 0),
        shards.BACKWARD: (do, state, *shard, state, *saved, torch.empty(0), torch.empty(0), *options),
    }.items():
        torch.library.opcheck(op, given)


def test_backends_that_have_none():
    ranks = SequenceRanks("unused", 0, 2)
    for backend in ("recurrent", "fla"):
        with pytest.raises(ConfigError, match="it has no context parallelism"):
            gated_delta_product(
                *(make(8, 1)[name] for name in ("q", "k", "v", "g", "beta")), 1, ranks=ranks, backend=backend
            )
    with pytest.raises(ValueError, match="neither cu_seqlens nor states"):
        args = make(8, 1, states=1)
        gated_delta_product(**args, num_householder=1, ranks=ranks)


@pytest.mark.slow
def test_our_kernels():
    run_interpreted("tests/unit/ops/interpreted_shards.py")
