"""Clipping, Adam and Muon on parts are torch's: on one rank and more, over shards, replicas and plain tensors."""

import copy
import importlib
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from tests.processes import run_distributed
from torchtitan_deltaproduct import optimizers
from torchtitan_deltaproduct.optimizers import clip_gradients, local

# torch.optim deletes the names of its modules.
adam_module = importlib.import_module("torch.optim.adam")


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded(meshes: list) -> tuple[nn.Module, nn.Module]:
    """A model whose i-th layer is sharded over the i-th mesh (None: not at all), and the same model on one rank."""
    torch.manual_seed(0)
    # Some of these rows cannot be divided among ranks: the last ones hold nothing of them.
    whole = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 8), nn.Linear(8, 1))
    model = copy.deepcopy(whole)
    for layer, mesh in zip(model, meshes, strict=True):
        if mesh is not None:
            fully_shard(layer, mesh=mesh)
    return model, whole


def backward(model: nn.Module, seed: int) -> None:
    model.zero_grad()
    model(torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))).square().sum().backward()


def same_clipping(meshes: list) -> None:
    for max_norm in (0.5, 1e9):
        model, whole = sharded(meshes)
        backward(model, 1)
        backward(whole, 1)
        expected = nn.utils.clip_grad_norm_(whole.parameters(), max_norm)
        norm = clip_gradients(model.parameters(), max_norm)
        assert type(norm) is torch.Tensor and norm.dtype == torch.float32
        torch.testing.assert_close(norm, expected)
        for found, true in zip(model.parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(full(found.grad), true.grad)


def same_updates(mesh) -> None:
    for name in (name for name, kind in optimizers.OPTIMIZERS.items() if kind.hidden is None):
        for implementation in ({"fused": True}, {"foreach": True}, {"foreach": False}):
            runs = []
            for module in (optimizers, torch.optim):
                model, _ = sharded([mesh] * 3)
                optimizer = getattr(module, name)(model.parameters(), lr=0.1, weight_decay=0.1, **implementation)
                with mock.patch.object(adam_module, "adam", wraps=adam_module.adam) as update:
                    for step in range(3):
                        backward(model, step)
                        optimizer.step()
                sharded_ones = [isinstance(t, DTensor) for tensors in update.call_args.args for t in tensors]
                assert any(sharded_ones) == (module is torch.optim) and len(sharded_ones) == 5 * 6
                tensors = [v for p in model.parameters() for v in (p, *optimizer.state[p].values())]
                runs.append(tensors)
            for ours, theirs in zip(*runs, strict=True):
                assert type(ours) is type(theirs) and torch.equal(local(ours), local(theirs)), (name, implementation)


def same_muon(mesh) -> None:
    """Bit for bit torch's Muon of whole matrices, two of which are stacked in one parameter here."""
    torch.manual_seed(0)
    # Of five rows on four ranks one has none.
    shapes, settings = [(5, 6), (9, 2), (12, 7), (1, 8)], {"lr": 0.1, "weight_decay": 0.5}
    modules = nn.Sequential(*(nn.Linear(columns, rows, bias=False) for rows, columns in shapes))
    whole = [nn.Parameter(w.detach().clone()) for m in modules for w in m.weight.chunk(2 if m is modules[2] else 1)]
    fully_shard(modules, mesh=mesh)
    weights = [module.weight for module in modules]
    groups = [{"params": [weights[0], weights[1], weights[3]]}, {"params": [weights[2]], "stacked": 2}]
    ours = optimizers.Muon(groups, adjust_lr_fn="match_rms_adamw", **settings)
    theirs = torch.optim.Muon(whole, adjust_lr_fn="match_rms_adamw", **settings)
    for step in range(4):
        gradients = [torch.randn(shape, generator=torch.Generator().manual_seed(step)) for shape in shapes]
        skipped = step == 2
        for weight, gradient in zip(weights, gradients, strict=True):
            given = gradient * float("nan") if skipped else gradient
            weight.grad = distribute_tensor(given, weight.device_mesh, weight.placements, src_data_rank=None)
        ours.found_inf = torch.tensor(float(skipped))
        ours.step()
        if not skipped:
            split = [part for i, gradient in enumerate(gradients) for part in gradient.chunk(2 if i == 2 else 1)]
            for parameter, gradient in zip(whole, split, strict=True):
                parameter.grad = gradient.clone()
            theirs.step()
        found = [part for i, w in enumerate(weights) for part in full(w).chunk(2 if i == 2 else 1)]
        momenta = [ours.state[w]["momentum_buffer"] for w in weights]
        assert all(m.placements == w.placements for m, w in zip(momenta, weights, strict=True))
        kept = [part for i, m in enumerate(momenta) for part in full(m).chunk(2 if i == 2 else 1)]
        for parameter, weight, momentum in zip(whole, found, kept, strict=True):
            assert torch.equal(weight, parameter), (step, parameter.shape)
            assert torch.equal(momentum, theirs.state[parameter]["momentum_buffer"])


def check(rank: int, ranks: int) -> None:
    flat = init_device_mesh("cpu", (ranks,))
    shape = (min(2, ranks), max(1, ranks // 2))
    replicas = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    for meshes in ([None] * 3, [flat] * 3, [replicas] * 3, [flat, replicas, None]):
        same_clipping(meshes)
    for mesh in (flat, replicas):
        same_updates(mesh)
        same_muon(mesh)


@pytest.mark.parametrize("ranks", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
def test_same_as_torch(ranks):
    run_distributed(check, ranks, (ranks,))
