"""Scores against one full forward a request, in any batches and segments, in float64."""

import random

import pytest
import torch

from tests.unit.models.conftest import small_model
from torchtitan_deltaproduct.evaluation.lm_harness import scoring
from torchtitan_deltaproduct.evaluation.lm_harness.scoring import batches, score

random.seed(1)


def ids(count):
    return [random.randrange(50) for _ in range(count)]


SHARED = [ids(9), ids(30), ids(31)]
REQUESTS = [
    *((context, ids(count)) for context in SHARED for count in (1, 4, 2, 1)),
    *((ids(size), ids(count)) for size, count in ((1, 40), (1, 3), (2, 1), (60, 1), (45, 13), (5, 0), (1, 1))),
    (SHARED[0], ids(90)),
]
random.shuffle(REQUESTS)


@pytest.fixture(scope="module")
def model():
    return small_model(num_householder=2, use_forget_gate=True).requires_grad_(False)


@pytest.fixture(scope="module")
def expected(model):
    return [one_by_one(model, *request) for request in REQUESTS]


def one_by_one(model, context, continuation):
    p = model(torch.tensor([context + continuation]))[0].softmax(1)
    total, greedy = 0.0, True
    for i, token in enumerate(continuation):
        row = p[len(context) + i - 1]
        total += row[token].log().item()
        greedy = greedy and row.argmax().item() == token
    return total, greedy


@pytest.mark.parametrize("segment", [1, 4, 7, 1000])
@pytest.mark.parametrize("rows", [None, 1, 3, 100])
def test_batches_and_segments_change_nothing(model, expected, rows, segment):
    found = score(model, REQUESTS, rows, segment)
    assert [logprob for logprob, _ in found] == pytest.approx([logprob for logprob, _ in expected], abs=1e-9)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_no_short_convolution_and_few_logits_at_a_time(expected, monkeypatch):
    monkeypatch.setattr(scoring, "MAX_LOGITS", 150)
    other = small_model(num_householder=3, use_short_conv=False).requires_grad_(False)
    found = score(other, REQUESTS, 4, 16)
    assert found[0][0] == pytest.approx(one_by_one(other, *REQUESTS[0])[0], abs=1e-9)
    assert sum(logprob for logprob, _ in found) == pytest.approx(
        sum(one_by_one(other, *request)[0] for request in REQUESTS), abs=1e-8
    )


def test_greedy_continuations_are_recognised(model):
    text = [3, 1, 4]
    for _ in range(6):
        text.append(model(torch.tensor([text]))[0, -1].argmax().item())
    wrong = [*text[:-1], (text[-1] + 1) % 50]
    found = score(model, [(text[:3], text[3:]), (text[:5], text[5:]), (wrong[:3], wrong[3:])], segment=4)
    assert [greedy for _, greedy in found] == [True, True, False]


def test_bfloat16_is_scored_in_float32(model):
    narrow = small_model(num_householder=2, use_forget_gate=True).bfloat16().requires_grad_(False)
    (logprob, _), wide = score(narrow, [(SHARED[0], [7] * 20)])[0], score(model, [(SHARED[0], [7] * 20)])[0][0]
    assert logprob == pytest.approx(wide, rel=0.05) and logprob != round(logprob, 1)


def test_each_context_is_read_once(model, monkeypatch):
    read = []

    def counting(model, tokens, cache):
        read.append(tokens.numel())
        return advance(model, tokens, cache)

    advance = scoring.advance
    monkeypatch.setattr(scoring, "advance", counting)
    context = ids(100)
    score(model, [(context, [choice]) for choice in range(8)])
    # 99 tokens of the context, then its last token for each choice.
    assert sum(read) == 99 + 8


def test_batches():
    requests = [([1] * size, [2]) for size in (5, 300, 4, 300, 7)] + [([9] * 4, [2])] * 3
    assert [sorted(batch) for batch in batches(requests, 2, 2048)] == [[1, 3], [0, 4], [2], [5, 6, 7]]
    assert sorted(sum(batches(requests, None, 2048), [])) == list(range(8))
    long = [([place], [2] * 5000) for place in range(20)]
    assert [len(batch) for batch in batches(long, None, 2048)] == [8, 8, 4]
    assert [len(batch) for batch in batches(long, None, 2048, most_rows=3)] == [3] * 6 + [2]
    assert list(batches([], None, 2048)) == [] and score(None, []) == []


def test_progress_tells_each_score_once(model):
    told = {}
    found = score(model, REQUESTS, 3, progress=lambda place, value: told.update({place: value}))
    assert [told[place] for place in range(len(REQUESTS))] == found
