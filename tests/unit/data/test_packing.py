"""Windows over shards against a list of all tokens."""

import pickle

import numpy as np
import pytest

from torchtitan_deltaproduct.data.packing import IGNORE, read_window
from torchtitan_deltaproduct.data.shards.shards import TokenStream

from .conftest import make_set


def window_by_hand(documents: list[list[int]], window: int, seq_len: int):
    """The slow twin: everything in lists."""
    stream = [0] + [token for document in documents for token in document]
    opens = [n == 0 for document in documents for n in range(len(document))]
    first = window * seq_len
    inputs, labels = stream[first : first + seq_len], stream[first + 1 : first + 1 + seq_len]
    starts = [index == 0 or opened for index, opened in enumerate(opens[first : first + seq_len])]
    inputs = inputs[: len(labels)]
    return inputs, labels, starts


@pytest.mark.parametrize("seq_len", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize("shards", [[[5, 1, 9], [3], [40, 2, 2, 17]], [[1], [1], [1, 1]], [[128, 128, 64]]])
def test_windows_equal_the_slow_twin(tmp_path, tokenizer, seq_len, shards):
    documents = make_set(tmp_path, tokenizer, shards)
    stream = TokenStream(tmp_path)
    assert stream.tokens == sum(map(len, documents))
    counted = 0
    for window in range(-(-stream.tokens // seq_len)):
        inputs, labels = np.full(seq_len, -7), np.full(seq_len, -7)
        starts = np.ones(seq_len, dtype=bool)
        read_window(stream, window, inputs, labels, starts)
        expected = window_by_hand(documents, window, seq_len)
        n = len(expected[1])
        assert n == seq_len or window == stream.tokens // seq_len
        assert inputs[:n].tolist() == expected[0]
        assert labels[:n].tolist() == expected[1]
        assert starts[:n].tolist() == expected[2]
        assert (labels[n:] == IGNORE).all() and (inputs >= 0).all() and not starts[max(n, 1) :].any()
        counted += n
    assert counted == stream.tokens


def test_the_separator_opens_the_next_document(tmp_path, tokenizer):
    """A state reset at `document_starts` reads `<separator> d d d` and predicts `d d d <separator>`."""
    one, two, three = make_set(tmp_path, tokenizer, [[4, 3], [5]])
    inputs, labels, starts = np.zeros(12, int), np.zeros(12, int), np.zeros(12, bool)
    read_window(TokenStream(tmp_path), 0, inputs, labels, starts)
    bounds = [*np.flatnonzero(starts).tolist(), 12]
    assert bounds == [0, 4, 7, 12]
    for document, begin, end in zip((one, two, three), bounds, bounds[1:], strict=False):
        assert inputs[begin:end].tolist() == [0, *document[:-1]]
        assert labels[begin:end].tolist() == document


def test_more_shards_than_open_maps(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("torchtitan_deltaproduct.data.shards.shards.most_descriptors", lambda: 2)
    documents = make_set(tmp_path, tokenizer, [[3]] * 9)
    stream, out = TokenStream(tmp_path), np.zeros(28, int)
    for _ in range(3):
        assert stream.read(-1, out) == 28
        assert out.tolist() == [0] + [token for document in documents for token in document]
    assert len(stream._files) == 2


@pytest.mark.parametrize("block", [1, 2, 7, 512])
def test_beginnings_of_documents_are_found_by_search(tmp_path, tokenizer, monkeypatch, block):
    """Equal lengths, random ones, and one long document at either end, where guessing by position is always wrong."""
    monkeypatch.setattr("torchtitan_deltaproduct.data.shards.shards.INDEX_BLOCK", block)
    rng = np.random.default_rng(0)
    lengths = [[3] * 40, rng.integers(1, 30, 60).tolist(), [1] * 50 + [900], [900] + [1] * 50, [5]]
    make_set(tmp_path, tokenizer, lengths)
    ends = np.cumsum([length for shard in lengths for length in shard])
    starts = np.concatenate([[0], ends[:-1]])
    stream, total = pickle.loads(pickle.dumps(TokenStream(tmp_path))), int(ends[-1])
    for first in range(0, total, 13):
        for last in {first, first + 1, first + 20, total, total + 9}:
            expected = starts[(starts >= first) & (starts < last)]
            assert stream.document_starts(first, last).tolist() == expected.tolist(), (first, last)


def test_a_search_reads_few_blocks(tmp_path, tokenizer, monkeypatch):
    """Of 4,000 documents: two or so for random lengths, and for the worst as many as halving needs, twice."""
    monkeypatch.setattr("torchtitan_deltaproduct.data.shards.shards.INDEX_BLOCK", 8)
    rng = np.random.default_rng(0)
    make_set(tmp_path, tokenizer, [rng.integers(1, 30, 4000).tolist(), [1] * 3999 + [40_000]])
    stream, reads = TokenStream(tmp_path), []
    read = stream._read
    monkeypatch.setattr(stream, "_read", lambda *place: reads.append(place) or read(*place))
    places = np.linspace(0, stream.tokens - 1, 200).astype(int).tolist()
    for place in places:
        stream.document_starts(place, place + 1)
    counts = [sum(1 for shard, *_ in reads if shard == number) for number in (0, 1)]
    assert counts[0] < 8 * 200 and max(counts) < 2 * 10 * 200
