"""The prepared loader: one sequence of global batches, however it is cut, stopped and continued."""

import json
import shutil

import numpy as np
import pytest
import torch

from torchtitan_deltaproduct.config.job import Data
from torchtitan_deltaproduct.data import build_loader
from torchtitan_deltaproduct.data.shards.prepared import PreparedSource, open_streams
from torchtitan_deltaproduct.errors import ConfigError, DataError

T, GLOBAL = 16, 16


def loader(config, local=2, rank=0, world=1, seq_len=T, global_batch=GLOBAL, **options):
    return build_loader(
        config,
        seq_len=seq_len,
        local_batch_size=local,
        global_batch_size=global_batch,
        dp_rank=rank,
        dp_world_size=world,
        **options,
    )


def take(source, count):
    """The next `count` micro-batches as one tensor: [count, LB, T, 2 or 3]."""
    found = []
    for batch, labels in source:
        found.append(torch.stack([*(value.long() for value in batch.values()), labels], dim=-1))
        if len(found) == count:
            return torch.stack(found)


def global_batches(config, local, world, steps, state=None):
    """[steps, GLOBAL, T, fields], put together from the micro-batches of all ranks."""
    ranks = []
    for rank in range(world):
        one = loader(config, local, rank, world)
        if state:
            one.load_state_dict(state)
        ranks.append(take(one, steps * GLOBAL // (local * world)))
    merged = torch.stack(ranks, dim=1)
    return merged.reshape(steps, GLOBAL, T, -1)


@pytest.fixture
def mixture(sets):
    return Data(paths=[sets["a"], sets["b"]], weights=[0.7, 0.3], seed=3, reset_state_at_documents=True)


@pytest.mark.parametrize("local, world", [(16, 1), (1, 1), (4, 2), (2, 4), (1, 8), (2, 8), (1, 16)])
def test_global_batches_do_not_depend_on_ranks_or_accumulation(mixture, local, world):
    expected = global_batches(mixture, 4, 1, steps=20)
    assert torch.equal(global_batches(mixture, local, world, steps=20), expected)


def test_batches_are_the_windows_of_the_order(sets):
    config = Data(paths=[sets["a"], sets["b"]], shuffle=True, seed=1)
    source = PreparedSource(open_streams(config.paths, ""), [], T, 1, True, False)
    assert sum(source.bounds[1:] - source.bounds[:-1]) == source.bounds[-1]
    _, windows = source.sequence(np.arange(GLOBAL))
    inputs, labels = next(iter(loader(config, local=GLOBAL)))
    everything = [source.streams[k] for k in (0, 1)]
    for row, window in enumerate(windows.tolist()):
        k = int(window >= source.bounds[1])
        expected = np.zeros(T + 1, dtype=np.int64)
        everything[k].read((window - int(source.bounds[k])) * T - 1, expected)
        assert torch.equal(inputs["input"][row], torch.from_numpy(expected[:-1]))
        assert torch.equal(labels[row], torch.from_numpy(expected[1:]))


def test_types_and_shapes(mixture):
    inputs, labels = next(iter(loader(mixture)))
    assert isinstance(inputs, dict) and list(inputs) == ["input", "document_starts"]
    assert inputs["input"].dtype == labels.dtype == torch.int64 and inputs["document_starts"].dtype == torch.bool
    assert inputs["input"].shape == inputs["document_starts"].shape == labels.shape == (2, T)
    assert inputs["input"].is_contiguous() and labels.is_contiguous()


@pytest.mark.parametrize("stop", [1, 8, 40, 72])
def test_resume_is_exact_within_and_across_epochs(mixture, stop):
    """96 steps of 16 samples are several epochs of both sets."""
    micro = GLOBAL // 2
    uninterrupted = take(loader(mixture), 96 * micro)
    first = loader(mixture)
    before = take(first, stop * micro)
    assert max(first.epochs().values()) > 1 or stop < 40
    second = loader(mixture)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    after = take(second, (96 - stop) * micro)
    assert torch.equal(torch.cat([before, after]), uninterrupted)
    assert second.state_dict()["sample"] == 96 * GLOBAL


@pytest.mark.parametrize("local, world", [(16, 1), (4, 2), (2, 8)])
def test_resume_on_another_number_of_ranks(mixture, local, world):
    first = loader(mixture, local=4, rank=1, world=2)
    take(first, 10 * GLOBAL // 8)
    expected = global_batches(mixture, 4, 1, steps=30)[10:]
    assert torch.equal(global_batches(mixture, local, world, 20, first.state_dict()), expected)


def test_state_is_the_same_on_all_ranks(mixture):
    loaders = [loader(mixture, 2, rank, 4) for rank in range(4)]
    for one in loaders:
        take(one, 6)
    assert all(one.state_dict() == loaders[0].state_dict() for one in loaders)
    assert loaders[0].state_dict()["sample"] == 6 * 2 * 4


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_batches_or_state(mixture, workers):
    with_workers = Data(**{**vars(mixture), "num_workers": workers, "prefetch_factor": 3})
    plain, parallel = loader(mixture), loader(with_workers)
    assert torch.equal(take(plain, 25), take(parallel, 25))
    assert parallel.state_dict() == plain.state_dict()
    resumed = loader(with_workers)
    resumed.load_state_dict(parallel.state_dict())
    assert torch.equal(take(resumed, 10), take(plain, 10))


def test_loading_draws_nothing_from_the_global_generator(mixture):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    take(loader(mixture), 3)
    assert torch.equal(torch.rand(3), expected)


def test_mixture_shares_are_exact(sets):
    config = Data(paths=[sets["a"], sets["b"]], weights=[3, 1])
    one = loader(config, local=GLOBAL)
    take(one, 50)
    sizes = [PreparedSource(open_streams([path], ""), [], T, 0, True, False).bounds[-1] for path in config.paths]
    assert [epochs * size for epochs, size in zip(one.epochs().values(), sizes, strict=True)] == [600, 200]


def test_without_weights_every_window_comes_once_an_epoch(sets):
    config = Data(paths=[sets["a"], sets["b"]])
    windows = int(PreparedSource(open_streams(config.paths, ""), [], T, 0, True, False).bounds[-1])
    rows = take(loader(config, local=1, global_batch=1), windows)[:, 0, :, 0]
    in_order = Data(paths=config.paths, shuffle=False)
    expected = take(loader(in_order, local=1, global_batch=1), windows)[:, 0, :, 0]
    assert sorted(rows.tolist()) == sorted(expected.tolist()) and rows.tolist() != expected.tolist()


def test_fingerprint_and_position_notice_what_changes_the_samples(sets, tmp_path):
    base = Data(paths=[sets["a"]])
    state, prints = loader(base).state_dict(), {loader(base).state_dict()["order"]}
    changes = {"seed": 1, "shuffle": False, "reset_state_at_documents": True, "paths": [sets["b"]], "weights": [1.0]}
    for key, value in changes.items():
        changed = loader(Data(**{**vars(base), key: value}))
        prints.add(changed.state_dict()["order"])
        if key != "weights":
            with pytest.raises(DataError, match=key if key != "paths" else "data"):
                changed.load_state_dict(state)
    prints.add(loader(base, seq_len=8).state_dict()["order"])
    assert len(prints) == 7
    # What only cuts the sequence differently, or where the folder lies, is the same data.
    moved = shutil.copytree(sets["a"], tmp_path / "moved")
    same = loader(Data(paths=[str(moved)], num_workers=1), local=8, rank=1, world=2)
    assert same.state_dict()["order"] == loader(base).state_dict()["order"]
    same.load_state_dict(state)


def test_user_errors(sets, tokenizer, tmp_path):
    a = sets["a"]
    with pytest.raises(ConfigError, match="data.paths is empty"):
        loader(Data())
    with pytest.raises(ConfigError, match="2 entries and data.paths 1"):
        loader(Data(paths=[a], weights=[1, 2]))
    with pytest.raises(ConfigError, match="global_batch_size = 16 is not a multiple .* 3 x 2 = 6"):
        loader(Data(paths=[a]), local=3, world=2)
    with pytest.raises(ConfigError, match="known kinds: prepared, streaming"):
        loader(Data(kind="prepare"))
    with pytest.raises(DataError, match="less than one window of seq_len = 100,000"):
        loader(Data(paths=[a]), seq_len=100_000)
    with pytest.raises(DataError, match="There is no folder"):
        loader(Data(paths=[str(tmp_path / "nothing")]))
    with pytest.raises(DataError, match="version 7"):
        loader(Data(paths=[a])).load_state_dict({"version": 7})
    loader(Data(paths=[a]), tokenizer_path=tokenizer)
