"""Copies of a state dict in one block: equal, independent of the original, kept memory, cheap to hand on."""

import itertools
import os
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.processes import free_port
from torchtitan_deltaproduct.checkpoint.staging import ALIGNMENT, Slot, Stager, lay_out


@pytest.fixture
def mesh():
    """Of this process alone."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{free_port()}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def states(mesh) -> dict:
    generator = torch.Generator().manual_seed(0)
    return {
        "weight": distribute_tensor(torch.randn(5, 3, generator=generator), mesh, [Shard(0)]),
        "half": torch.randn(7, generator=generator).bfloat16(),
        "turned": torch.randn(4, 6, generator=generator, dtype=torch.float64).T,
        "none": torch.empty(0, 3),
        "optimizer": {"step": torch.tensor(3.0), "groups": [{"lr": 0.1, "names": ["weight"]}]},
        "train_state": {"step": 8, "why": None},
    }


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            assert_equal(found[name], value)
        elif isinstance(value, DTensor):
            assert found[name].placements == value.placements and found[name].shape == value.shape
            assert torch.equal(found[name].to_local(), value.to_local())
        elif isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype and torch.equal(found[name], value)
        else:
            assert found[name] == value


@pytest.mark.parametrize("shared", [False, True])
def test_a_copy_is_equal_and_stays_so(mesh, shared):
    stager, original = Stager(shared), states(mesh)
    staged = stager.stage(original)
    assert_equal(staged, states(mesh))
    original["weight"].to_local().zero_()
    original["optimizer"]["step"].zero_()
    original["optimizer"]["groups"][0]["lr"] = 0.0
    assert_equal(staged, states(mesh))
    assert stager.block.is_shared() == shared
    stager.close()
    assert_equal(staged, states(mesh))


def test_memory_is_taken_once_and_held_over_saves(mesh):
    stager = Stager(shared=True)
    stager.reserve(states(mesh))
    block = stager.block
    for _ in range(3):
        assert stager.stage(states(mesh)).block is block
    larger = states(mesh) | {"more": torch.ones(1000)}
    assert_equal(stager.stage(larger), larger)
    assert stager.block.numel() > block.numel()


def test_tensors_lie_beside_each_other(mesh):
    plan, slots, tensors = lay_out(states(mesh))
    assert isinstance(plan["optimizer"]["step"], Slot) and plan["train_state"] == {"step": 8, "why": None}
    assert len(slots) == len(tensors) == 5 and all(slot.offset % ALIGNMENT == 0 for slot in slots)
    for before, after in itertools.pairwise(slots):
        assert before.end <= after.offset < before.end + ALIGNMENT


def receive(connection, expected: bytes) -> None:
    os.environ.update(RANK="0", WORLD_SIZE="1")
    found = connection.recv()
    plain = pickle.loads(expected)
    connection.send(all(torch.equal(found[name].to_local() if name == "weight" else found[name], plain[name])
                        for name in plain))  # fmt: skip
    connection.recv()


def test_another_process_reads_the_block(mesh):
    stager, context = Stager(shared=True), mp.get_context("spawn")
    ours, theirs = context.Pipe()
    original = states(mesh)
    plain = {name: original[name] for name in ("half", "turned")} | {"weight": original["weight"].to_local()}
    process = context.Process(target=receive, args=(theirs, pickle.dumps(plain)), daemon=True)
    process.start()
    ours.send(stager.stage(original))
    assert ours.recv() is True
    ours.send("end")
    process.join()
