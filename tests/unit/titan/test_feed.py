"""Batches one step ahead: the same ones, and a position that does not know of what was only read ahead."""

import pytest
import torch

from torchtitan_deltaproduct.data.loader import Geometry, Loader
from torchtitan_deltaproduct.errors import DataError
from torchtitan_deltaproduct.models.model import document_positions
from torchtitan_deltaproduct.ops import SequenceRanks
from torchtitan_deltaproduct.titan.feed import Feed, own_part


class Counting:
    """Sample i is the number i, whose label is ignored if it is a multiple of 3."""

    vocab_size, tokenizer_path = 1000, ""

    def batch(self, samples):
        tokens = torch.from_numpy(samples)[:, None].expand(-1, 4)
        return {"input": tokens}, torch.where(tokens % 3 == 0, -100, tokens)

    def order(self):
        return {"source": "counting"}

    def epochs(self, sample):
        return {"counting": sample / 100}


def new_feed(source=None, **options) -> Feed:
    return Feed(Loader(source or Counting(), Geometry(4, 2, 12, 1, 2), **options), 3, torch.device("cpu"))


def samples(batches) -> list[int]:
    return [int(row[0]) for inputs, _ in batches for row in inputs["input"]]


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_ahead_changes_neither_batches_nor_positions(workers):
    feed, plain = new_feed(num_workers=workers), Loader(Counting(), Geometry(4, 2, 12, 1, 2))
    batches = iter(plain)
    for ahead in (False, True, True, False, True):
        expected = [next(batches) for _ in range(3)]
        assert samples(feed.take()) == samples(expected)
        assert feed.state_dict() == plain.state_dict() and feed.epochs() == plain.epochs()
        if ahead:
            feed.read_ahead()
            assert feed.state_dict() == plain.state_dict() and feed.epochs() == plain.epochs()
    feed.close()


def test_labels_of_the_batch_read_last():
    feed = new_feed()
    assert samples(feed.take()) == [2, 3, 6, 7, 10, 11] and feed.labels == 4 * 4
    feed.read_ahead()
    assert samples(feed.ahead) == [14, 15, 18, 19, 22, 23] and feed.labels == 4 * 4
    assert feed.seconds > 0


def test_a_saved_position_is_gone_on_from_and_what_was_read_ahead_is_dropped():
    feed, other = new_feed(), new_feed()
    feed.take()
    feed.read_ahead()
    saved = feed.state_dict()
    other.read_ahead()
    other.load_state_dict(saved)
    assert other.state_dict() == saved and samples(other.take()) == samples(feed.take()) == [14, 15, 18, 19, 22, 23]


def test_an_error_waits_for_the_step_it_belongs_to():
    class Damaged(Counting):
        def batch(self, samples):
            if samples[0] > 12:
                raise DataError("shard 3 is damaged")
            return super().batch(samples)

    feed = new_feed(Damaged())
    assert samples(feed.take()) == [2, 3, 6, 7, 10, 11]
    before = feed.state_dict()
    feed.read_ahead()
    assert feed.state_dict() == before and feed.labels == 0
    with pytest.raises(DataError, match="shard 3"):
        feed.take()


def test_parts_of_rows_make_the_rows():
    """Contiguous, in the order of the ranks; positions count from where a document began, on whichever rank."""
    tokens, labels = torch.arange(48).view(2, 2, 12).unbind()
    starts = torch.zeros(2, 12, dtype=torch.bool)
    starts[0, 5] = starts[1, 4] = True
    batch = {"input": tokens, "document_starts": starts}, labels
    parts = [own_part(batch, SequenceRanks("unused", rank, 3)) for rank in range(3)]
    assert torch.equal(torch.cat([inputs["input"] for inputs, _ in parts], 1), tokens)
    assert torch.equal(torch.cat([own for _, own in parts], 1), labels)
    assert torch.equal(torch.cat([inputs["positions"] for inputs, _ in parts], 1), document_positions(starts))
    assert parts[2][0]["positions"].tolist() == [[3, 4, 5, 6], [4, 5, 6, 7]] and "document_starts" in batch[0]
    assert all(inputs.keys() == {"input", "positions"} for inputs, _ in parts)
    assert own_part(batch, None) is batch


def test_labels_are_those_of_the_own_part():
    def feed(ranks=None):
        return Feed(Loader(Counting(), Geometry(4, 2, 12, 1, 2)), 3, torch.device("cpu"), ranks)

    own = [feed(SequenceRanks("unused", rank, 2)) for rank in range(2)]
    for one in own:
        assert samples(one.take()) == [2, 3, 6, 7, 10, 11]
    assert [one.labels for one in own] == [8, 8]
