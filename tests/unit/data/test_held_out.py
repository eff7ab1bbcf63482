"""Validation reads every token once, in the same order each time, in equally many steps on every rank."""

import numpy as np
import pytest
import torch

from torchtitan_deltaproduct.data.held_out import count_tokens, held_out_text
from torchtitan_deltaproduct.data.packing import IGNORE
from torchtitan_deltaproduct.data.shards.shards import TokenStream
from torchtitan_deltaproduct.errors import ConfigError


def labels_of(paths, world, local, **options):
    """Labels of all ranks in global order: [steps, world, local, T]."""
    ranks = [
        held_out_text(paths, seq_len=16, local_batch_size=local, dp_rank=rank, dp_world_size=world, **options)
        for rank in range(world)
    ]
    batches = [[labels for _, labels in one] for one in ranks]
    assert {len(found) for found in batches} == {len(ranks[0])}
    return torch.stack([torch.stack(found) for found in batches], dim=1)


@pytest.mark.parametrize("world, local", [(1, 1), (1, 7), (2, 3), (4, 2), (8, 5)])
def test_every_token_is_counted_once(sets, world, local):
    paths = [sets["a"], sets["b"]]
    expected = []
    for path in paths:
        stream = TokenStream(path)
        out = np.zeros(stream.tokens, dtype=np.int64)
        assert stream.read(0, out) == stream.tokens
        expected += out.tolist()
    labels = labels_of(paths, world, local).flatten()
    assert labels[labels != IGNORE].tolist() == expected


def test_every_pass_is_the_same(sets):
    loader = held_out_text([sets["a"]], seq_len=16, local_batch_size=4, reset_state_at_documents=True)
    first, second = list(loader), list(loader)
    for (one, labels), (two, again) in zip(first, second, strict=True):
        assert all(torch.equal(one[key], two[key]) for key in ("input", "document_starts"))
        assert torch.equal(labels, again)


def test_reset_changes_no_label(sets):
    plain = labels_of([sets["a"]], 2, 4)
    assert torch.equal(plain, labels_of([sets["a"]], 2, 4, reset_state_at_documents=True))


def test_fewer_steps_read_windows_from_every_folder(sets):
    loader = held_out_text([sets["a"], sets["b"]], seq_len=16, local_batch_size=4, steps=5)
    assert len(list(loader)) == len(loader) == 5
    source = loader.source
    windows = np.arange(20) * source.bounds[-1] // source.samples
    assert loader.samples == source.samples == len(set(windows.tolist())) == 20
    assert windows.min() < source.bounds[1] <= windows.max() < source.bounds[2]
    whole = held_out_text([sets["a"], sets["b"]], seq_len=16, local_batch_size=1)
    rows = [labels[0] for number, (_, labels) in enumerate(whole) if number in windows]
    assert torch.equal(torch.cat([labels for _, labels in loader]), torch.stack(rows))
    everything = held_out_text([sets["a"]], seq_len=16, local_batch_size=4, steps=10**6)
    assert len(everything) == len(held_out_text([sets["a"]], seq_len=16, local_batch_size=4))
    # The windows are the same for any number of ranks.
    one, two = (labels_of([sets["a"]], world, 4 // world, steps=3 * world) for world in (1, 2))
    assert torch.equal(one.flatten(), two.flatten())
    with pytest.raises(ConfigError, match="validation.steps is 0"):
        held_out_text([sets["a"]], seq_len=16, local_batch_size=4, steps=0)


def test_padding_is_valid_input(sets):
    loader = held_out_text([sets["b"]], seq_len=16, local_batch_size=50, dp_rank=7, dp_world_size=8)
    ((inputs, labels),) = list(loader)
    assert (labels == IGNORE).all() and (inputs["input"] >= 0).all()
    assert inputs["input"].max() < loader.source.vocab_size == len(loader.source.token_bytes)


def test_the_tokens_of_a_set_have_the_bytes_of_its_text(sets):
    source = held_out_text([sets["a"], sets["b"]], seq_len=16, local_batch_size=4).source
    counts = torch.from_numpy(sum(map(count_tokens, source.streams))).double()
    assert (source.token_bytes @ counts).item() == pytest.approx(2) and source.token_bytes[0] == 0
