"""Cross-entropy of a linear head by chunks of tokens: the logits of only one chunk ever exist.

    loss = linear_cross_entropy(x, head.weight, labels)        # [B, T, hidden], [vocab, hidden], [B, T] -> sum
    (loss / tokens).backward()

The forward pass of a chunk makes its logits, turns them into the gradient of the logits in place, and adds what they
contribute to the gradients of x and of the weight at once; the backward pass multiplies both by the incoming number.
Kept for it are the two gradients; while it is made, the logits of a chunk exist beside them, in eager mode a second
time in float32, compiled a second time in their own dtype (`peak_bytes`). Of 8 x 4,096 tokens, 32,000 words and 1,024
channels in bfloat16 that is 67 MB + 131 MB, and 262 MB + 524 MB: 985 MB, or 722 MB compiled. The logits of all tokens,
their log-softmax and its gradient take 10.5 GB. The products are taken in the dtype of x, the softmax and the sum over
chunks of the weight's gradient in float32 (float64 stays float64). No atomics: equal inputs give equal bits.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.normalize import compute_dtype

IGNORE_INDEX = -100
CHUNK_TOKENS = 4096
"""A chunk of the usual vocabularies: adding to the weight's gradient costs little beside products of that size."""
CHUNK_BYTES = {"cuda": 1 << 29, "cpu": 1 << 25}
"""Logits of a chunk at most, in the dtype of x; smaller ones would add to the weight's gradient too often."""


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, backend: str | None = None) -> Tensor:
    """Sum over tokens of `F.cross_entropy(F.linear(x, weight), labels)`.

    Args:
        x: [..., hidden].
        weight: [vocab, hidden], in the dtype of x; under autocast both are lowered to its dtype, as by `F.linear`.
        labels: [...] int64; a token whose label is `IGNORE_INDEX` adds nothing.
        backend: of torch.compile for what lies between the matrix products; None runs it in eager mode.

    Returns:
        [] float32, or float64 for float64 inputs. Its backward pass can run once: it gives the kept gradients away.
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return linear_cross_entropy(x.to(dtype), weight.to(dtype), labels, backend)
    x, labels = x.flatten(0, -2), labels.flatten()[:, None]
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(x, weight, labels, backend)
    return _by_chunks(x, weight, labels, backend)


def chunk_rows(vocab: int, width: int, device_type: str) -> int:
    """Tokens of a chunk, for logits of `vocab` numbers of `width` bytes a token."""
    limit = CHUNK_BYTES.get(device_type, CHUNK_BYTES["cuda"])
    return max(1, min(CHUNK_TOKENS, limit // (vocab * width)))


def peak_bytes(tokens: int, vocab: int, hidden: int, width: int, compiled: bool = False) -> int:
    """Bytes that a loss with gradients adds at its peak on a GPU, x and weight (`width` bytes a number) not counted."""
    logits = min(tokens, chunk_rows(vocab, width, "cuda")) * vocab
    second = width * logits if compiled else 0 if width >= 4 else 4 * logits
    return width * logits + second + width * tokens * hidden + max(4, width) * vocab * hidden


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, labels: Tensor, backend: str | None):
        dx = torch.empty_like(x)
        dweight = torch.zeros_like(weight, dtype=compute_dtype(weight)) if weight.requires_grad else None
        ctx.gradients, ctx.weight_dtype = (dx, dweight), weight.dtype
        return _by_chunks(x, weight, labels, backend, dx, dweight)

    @staticmethod
    @once_differentiable
    def backward(ctx, factor: Tensor):
        if ctx.gradients is None:
            raise RuntimeError("the backward pass of linear_cross_entropy ran before, and can run only once")
        (dx, dweight), ctx.gradients = ctx.gradients, None
        if dweight is not None:
            # In one kernel, and in place where the weight has the dtype of its sum.
            same = dweight.dtype == ctx.weight_dtype
            out = dweight if same else torch.empty_like(dweight, dtype=ctx.weight_dtype)
            dweight = torch.mul(dweight, factor, out=out)
        return dx.mul_(factor), dweight, None, None


def _by_chunks(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    backend: str | None,
    dx: Tensor | None = None,
    dweight: Tensor | None = None,
) -> Tensor:
    """The loss; fills `dx` and adds to `dweight` if they are given. x: [N, hidden], labels: [N, 1]."""
    softmax = compiled_softmax(backend) if backend else softmax_of_chunk
    loss = torch.zeros((), dtype=compute_dtype(x), device=x.device)
    # Chunks of nearly equal size: the last one is as good a matrix product as the others.
    chunks = -(-len(x) // chunk_rows(weight.shape[0], x.element_size(), x.device.type))
    for i in range(chunks):
        rows = slice(len(x) * i // chunks, len(x) * (i + 1) // chunks)
        logits = x[rows] @ weight.T
        kept = labels[rows] != IGNORE_INDEX
        targets = torch.where(kept, labels[rows], 0)
        of_chunk, at_target = softmax(logits, targets, kept, dx is not None)
        loss += of_chunk
        if dx is not None:
            logits.scatter_(1, targets, at_target)
            torch.mm(logits, weight, out=dx[rows])
        if dweight is not None:
            _add_product(dweight, logits.T, x[rows])
    return loss


def softmax_of_chunk(logits: Tensor, targets: Tensor, kept: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """The elementwise part of a chunk: the loss, and in place of the logits its gradient but at the targets.

    Args:
        logits: [C, vocab]; overwritten.
        targets: [C, 1].
        kept: [C, 1], False in rows without a loss, whose gradient is 0.
        gradient: whether the gradient is wanted.

    Returns:
        The summed loss, [], and what the gradient is at each target, [C, 1] in the dtype of the logits: it differs from
        the softmax by 1, and 1 taken from a softmax rounded to 16 bits would leave nothing of a confident prediction.
    """
    scores = logits.to(compute_dtype(logits))
    largest = scores.amax(1, keepdim=True)
    of_target = scores.gather(1, targets) - largest
    scores.sub_(largest).exp_()
    total = scores.sum(1, keepdim=True)
    loss = torch.where(kept, total.log() - of_target, 0).sum()
    if gradient:
        logits.copy_(scores.mul_(torch.where(kept, 1 / total, 0)))
    at_target = torch.where(kept, of_target.exp() / total - 1, 0)
    return loss, at_target.to(logits.dtype)


@functools.cache
def compiled_softmax(backend: str) -> Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]:
    """`softmax_of_chunk` compiled: the logits are read twice and written once.

    A size of chunks has a graph of its own: one for all sizes is tuned for the first that it meets, and a process that
    begins with another would add in another order.
    """
    return torch.compile(softmax_of_chunk, backend=backend, fullgraph=True)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, the sum in the dtype of `total`: [M, N] float32, [M, K] and [K, N] of 16 bits, say."""
    if a.dtype != total.dtype and a.device.type != "cpu":
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), out=total)
