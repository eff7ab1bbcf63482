"""How probable texts are after other texts: sums of log-probabilities, in batches, of any length.

    requests = [([0], [5, 6, 7]), ([0, 5], [6, 7])]           # (context, continuation), ids
    for logprob, greedy in score(model, requests): ...

1.  requests of one context (the choices of a question) make a group; groups are sorted by the length of the context
    and put in batches
2.  the contexts of a batch are read side by side up to the end of the shortest, each once, without padding
3.  the state is copied to the requests of each context, and the rest is read with padding at the right: what comes
    later changes nothing in a causal model
Long texts go through in segments from the state, so that nothing is cut off and memory does not grow with them; the
head is computed only where a token is scored.
"""

from collections.abc import Callable, Iterator
from itertools import groupby

import torch

from torchtitan_deltaproduct.models import DeltaProductLM
from torchtitan_deltaproduct.models.decode import advance, init_cache, select
from torchtitan_deltaproduct.models.mixer import MixerCache

from ..length_extrapolation.loss import token_losses

Request = tuple[list[int], list[int]]
"""Ids of a context, at least one, and of the continuation that is scored."""
Score = tuple[float, bool]
"""Log-probability of the continuation in nats, and whether each of its tokens is the most probable one."""

SEGMENT = 2048
"""Tokens of a text read at a time."""
MAX_TOKENS = 16_384
"""Tokens of a batch read at a time, where the number of rows is not given."""
MAX_LOGITS = 2**25
"""Logits held at a time (128 MiB in float32)."""


def score(
    model: DeltaProductLM,
    requests: list[Request],
    rows: int | None = None,
    segment: int = SEGMENT,
    progress: Callable[[int, Score], None] | None = None,
    most_rows: int | None = None,
) -> list[Score]:
    """Scores continuations; batching and segments change nothing beyond rounding.

    Args:
        model: the model.
        requests: what to score, in any order.
        rows: requests in a batch; None: as many as `MAX_TOKENS` allow.
        segment: tokens of a text read at a time.
        progress: called with the place of each request and its score as they are known.
        most_rows: no more than this with `rows` None.

    Returns:
        One score a request. An empty continuation has (0, True).
    """
    scores: list[Score] = [(0.0, True)] * len(requests)
    for batch in batches(requests, rows, segment, most_rows):
        most = rows or most_rows or len(batch)
        for part in _score_batch(model, [requests[i] for i in batch], most, segment):
            for place, result in part:
                scores[batch[place]] = result
                if progress:
                    progress(batch[place], result)
    return scores


def batches(
    requests: list[Request], rows: int | None, segment: int, most_rows: int | None = None
) -> Iterator[list[int]]:
    """Places of the requests that are read together: whole groups of one context, long contexts first.

    A group larger than a batch is a batch of its own.
    """

    def key(place: int) -> tuple[int, list[int]]:
        context = requests[place][0]
        return -len(context), context

    groups = [list(group) for _, group in groupby(sorted(range(len(requests)), key=key), key)]
    batch: list[int] = []
    longest = 0
    for group in sorted(groups, key=lambda group: (-len(requests[group[0]][0]), -_longest(requests, group))):
        longest = max(longest, min(_longest(requests, group), segment))
        most = rows or min(most_rows or MAX_TOKENS, max(1, MAX_TOKENS // longest))
        if batch and len(batch) + len(group) > most:
            yield batch
            batch, longest = [], min(_longest(requests, group), segment)
        batch += group
    if batch:
        yield batch


def _longest(requests: list[Request], places: list[int]) -> int:
    return max(len(requests[place][0]) + len(requests[place][1]) for place in places)


@torch.no_grad()
def _score_batch(
    model: DeltaProductLM, requests: list[Request], rows: int, segment: int
) -> Iterator[list[tuple[int, Score]]]:
    """Yields (place, score) for some of the requests at a time."""
    device = model.tok_embeddings.weight.device
    places: dict[tuple[int, ...], list[int]] = {}
    for place, (context, _) in enumerate(requests):
        places.setdefault(tuple(context), []).append(place)
    contexts = list(places)
    # The last token of a context is left for later: what follows it is scored.
    shared = min(map(len, contexts)) - 1
    cache = init_cache(model, len(contexts))
    for first in range(0, shared, segment):
        tokens = torch.tensor([context[first : min(first + segment, shared)] for context in contexts], device=device)
        _, cache = advance(model, tokens, cache)
    owner = [(index, place) for index, context in enumerate(contexts) for place in places[context]]
    # Longest first: those that are still being read are always the first rows.
    owner.sort(key=lambda pair: -sum(map(len, requests[pair[1]])))
    for first in range(0, len(owner), rows):
        reading = owner[first : first + rows]
        index = torch.tensor([index for index, _ in reading], device=device)
        rest = [requests[place][0][shared:] + requests[place][1] for _, place in reading]
        scored = [len(requests[place][1]) for _, place in reading]
        scores = _read(model, select(cache, index), rest, scored, segment)
        yield [(place, score) for (_, place), score in zip(reading, scores, strict=True)]


def _read(
    model: DeltaProductLM, cache: list[MixerCache], texts: list[list[int]], scored: list[int], segment: int
) -> list[Score]:
    """Scores the last `scored[i]` tokens of each text, longest text first, from a cache."""
    device = model.tok_embeddings.weight.device
    logprob, greedy = [0.0] * len(texts), [True] * len(texts)
    for first in range(0, len(texts[0]) - 1, segment):
        active = sum(len(text) - 1 > first for text in texts)
        cache = select(cache, slice(active))
        pieces = [text[first : first + segment + 1] for text in texts[:active]]
        width = max(map(len, pieces))
        tokens = torch.tensor([piece + [0] * (width - len(piece)) for piece in pieces], device=device)
        column = torch.arange(first + 1, first + width, device=device)
        ends = torch.tensor([len(text) for text in texts[:active]], device=device).unsqueeze(1)
        counts = torch.tensor(scored[:active], device=device).unsqueeze(1)
        chosen = (column >= ends - counts) & (column < ends)
        hidden, cache = advance(model, tokens[:, :-1], cache)
        losses, right = token_losses(model, hidden[chosen], tokens[:, 1:][chosen], 4 * MAX_LOGITS)
        row = chosen.nonzero()[:, 0]
        sums = torch.zeros(active, dtype=torch.float64, device=device).index_add_(0, row, -losses.double())
        wrong = torch.zeros(active, dtype=torch.int64, device=device).index_add_(0, row, (~right).long())
        for i, (value, misses) in enumerate(zip(sums.tolist(), wrong.tolist(), strict=True)):
            logprob[i] += value
            greedy[i] &= misses == 0
    return list(zip(logprob, greedy, strict=True))
