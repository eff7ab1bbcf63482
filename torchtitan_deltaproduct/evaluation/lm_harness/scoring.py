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
    model: DeltaProductLM, requests: list[Request], rows: int | None = None, segment: int = SEGMENT,
    progress: Callable[[int, Score], object] = lambda place, result: None, most_rows: int | None = None,
) -> list[Score]:  # fmt: skip
    """One score a request, in any order; of an empty continuation (0, True).

    In a batch are `rows` requests (None: as many as `MAX_TOKENS` allow, and `most_rows`), of each of which `segment`
    tokens are read at a time; neither changes anything beyond rounding. `progress` is called with the place of each
    request and its score as they are known.
    """
    scores: list[Score] = [(0.0, True)] * len(requests)
    for batch in batches(requests, rows, segment, most_rows):
        for place, result in _score_batch(model, requests, batch, rows or most_rows or len(batch), segment):
            scores[place] = result
            progress(place, result)
    return scores


def batches(
    requests: list[Request], rows: int | None, segment: int, most_rows: int | None = None
) -> Iterator[list[int]]:
    """Places of the requests that are read together: whole groups of one context, long contexts first.

    A group larger than a batch is a batch of its own.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, (context, _) in enumerate(requests):
        groups.setdefault(tuple(context), []).append(place)
    lengths = {own: len(own) + max(len(requests[place][1]) for place in group) for own, group in groups.items()}
    batch: list[int] = []
    longest = 0
    for context in sorted(groups, key=lambda context: (-len(context), -lengths[context])):
        group, length = groups[context], min(lengths[context], segment)
        longest = max(longest, length)
        most = rows or min(most_rows or MAX_TOKENS, max(1, MAX_TOKENS // longest))
        if batch and len(batch) + len(group) > most:
            yield batch
            batch, longest = [], length
        batch = batch + group
    if batch:
        yield batch


@torch.no_grad()
def _score_batch(
    model: DeltaProductLM, requests: list[Request], batch: list[int], rows: int, segment: int
) -> Iterator[tuple[int, Score]]:
    """Yields (place, score) of the requests at the places of a batch."""
    device = model.tok_embeddings.weight.device
    of_place = {place: tuple(requests[place][0]) for place in batch}
    contexts = {context: index for index, context in enumerate(dict.fromkeys(of_place.values()))}
    # The last token of a context is left for later: what follows it is scored.
    shared = min(map(len, contexts)) - 1
    cache = init_cache(model, len(contexts))
    for first in range(0, shared, segment):
        tokens = torch.tensor([context[first : min(first + segment, shared)] for context in contexts], device=device)
        _, cache = advance(model, tokens, cache)
    # Longest first: those that are still being read are always the first rows.
    order = sorted(batch, key=lambda place: -sum(map(len, requests[place])))
    for first in range(0, len(order), rows):
        reading = order[first : first + rows]
        owner = torch.tensor([contexts[of_place[place]] for place in reading], device=device)
        rest = [requests[place][0][shared:] + requests[place][1] for place in reading]
        scored = [len(requests[place][1]) for place in reading]
        yield from zip(reading, _read(model, select(cache, owner), rest, scored, segment), strict=True)


def _read(
    model: DeltaProductLM, cache: list[MixerCache], texts: list[list[int]], scored: list[int], segment: int
) -> list[Score]:
    """Scores the last `scored[i]` tokens of each text, longest text first, from a cache."""
    device = model.tok_embeddings.weight.device
    ends = torch.tensor([len(text) for text in texts], device=device).unsqueeze(1)
    begins = ends - torch.tensor(scored, device=device).unsqueeze(1)
    logprob = torch.zeros(len(texts), dtype=torch.float64, device=device)
    wrong = torch.zeros(len(texts), dtype=torch.int64, device=device)
    for first in range(0, len(texts[0]) - 1, segment):
        active = sum(len(text) - 1 > first for text in texts)
        cache = select(cache, slice(active))
        pieces = [text[first : first + segment + 1] for text in texts[:active]]
        width = max(map(len, pieces))
        tokens = torch.tensor([piece + [0] * (width - len(piece)) for piece in pieces], device=device)
        column = torch.arange(first + 1, first + width, device=device)
        chosen = (column >= begins[:active]) & (column < ends[:active])
        hidden, cache = advance(model, tokens[:, :-1], cache)
        losses, right = token_losses(model, hidden[chosen], tokens[:, 1:][chosen], 4 * MAX_LOGITS)
        row = chosen.nonzero()[:, 0]
        logprob.index_add_(0, row, -losses.double())
        wrong.index_add_(0, row, (~right).long())
    return list(zip(logprob.tolist(), (wrong == 0).tolist(), strict=True))
