"""The loss at every position of long sequences, in memory that does not grow with their length.

    for start, loss, correct in score(model, tokens.read, length=1_000_000): ...

A sequence goes through the model in segments: the recurrent and convolution states are carried from one to the next
(`models.decode`), the logits of a segment are computed some tokens at a time, and its losses are handed out before the
next is read.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan_deltaproduct.models import DeltaProductLM
from torchtitan_deltaproduct.models.decode import advance, init_cache
from torchtitan_deltaproduct.ops.normalize import compute_dtype

LOGIT_BYTES = 32 << 20
"""Of the float32 logits that are held at once; the loss needs as much again."""
POSITION = np.dtype([("loss", "<f4"), ("correct", "?")])
"""What is kept of a position: -log p of the token that came next (nats), and whether it was the most probable one."""

# Tokens [start, stop) of each sequence of a batch: [B, stop - start] int64.
Reader = Callable[[int, int], np.ndarray]


def score(
    model: DeltaProductLM, read: Reader, length: int, segment: int = 1024
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Reads `length` tokens of some sequences, and one more to predict, with a model that is whole on its device.

    `read` gives the tokens of [0, length + 1); position t has read t + 1 of them and predicts the next. The number of
    tokens of a segment changes the results by rounding alone.

    Yields:
        The first position of the segment, its losses [B, T] float32 in nats and whether the arg max was right [B, T].
    """
    device, cache = model.tok_embeddings.weight.device, None
    for start in range(0, length, segment):
        stop = min(start + segment, length)
        tokens = torch.from_numpy(read(start, stop + 1)).to(device)
        cache = init_cache(model, len(tokens)) if cache is None else cache
        hidden, cache = advance(model, tokens[:, :-1], cache)
        loss, correct = token_losses(model, hidden, tokens[:, 1:], LOGIT_BYTES)
        yield start, loss.float().cpu().numpy(), correct.cpu().numpy()


@torch.no_grad()
def token_losses(model: DeltaProductLM, hidden: Tensor, labels: Tensor, logit_bytes: int) -> tuple[Tensor, Tensor]:
    """Cross entropy of each token with no more float32 logits at once than `logit_bytes`, but those of one token.

    From hidden [..., hidden] and labels [...] int64 to [...] losses in nats, float32 or wider, and [...] bool: the
    label has the largest logit.
    """
    rows = max(1, logit_bytes // (4 * model.args.vocab_size))
    losses, right = [], []
    for x, y in zip(hidden.flatten(0, -2).split(rows), labels.flatten().split(rows), strict=True):
        logits = model.head(x)
        logits = logits.to(compute_dtype(logits))
        losses.append(F.cross_entropy(logits, y, reduction="none"))
        right.append(logits.argmax(-1) == y)
    return torch.cat(losses).view(labels.shape), torch.cat(right).view(labels.shape)
