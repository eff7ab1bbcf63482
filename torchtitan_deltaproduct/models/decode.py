"""Running a model along a sequence from a cache: generation, and texts longer than memory.

The cache holds, per layer, the recurrent state and the last inputs of the convolutions; its size does not
grow with the sequence. A prompt goes through `prefill`, each further token through `step`:

    cache = init_cache(model, batch=1)
    logits, cache = prefill(model, prompt, cache, last_only=True)     # prompt [1, T] -> [1, 1, vocab]
    for _ in range(100):
        logits, cache = step(model, logits.flatten(0, -2).argmax(-1), cache)      # [1] -> [1, vocab]

`prefill` with a cache in use continues the sequence, so a long text goes through in segments. Every call may
overwrite the cache it is given: use the one it returns. `select` and `join` change which sequences are in the
batch. The model must be whole on its device (not sharded).
"""

import torch
from torch import Tensor

from ..ops.normalize import compute_dtype
from .mixer import MixerCache
from .model import DeltaProductLM


def init_cache(model: DeltaProductLM, batch: int) -> list[MixerCache]:
    """An empty cache for `batch` sequences, one entry per layer, on the model's device.

    Convolution inputs are in the model's dtype; the state is float32, or float64 if that is.
    """
    weight, args = model.tok_embeddings.weight, model.args
    device, dtype = weight.device, weight.dtype
    state_dtype = compute_dtype(weight)
    q_dim, v_dim = args.num_heads * args.head_dim, args.num_heads * args.head_v_dim
    channels = (q_dim, args.num_householder * q_dim, args.num_householder * v_dim)

    def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(batch, *shape, device=device, dtype=dtype)

    def layer() -> MixerCache:
        state = zeros(args.num_heads, args.head_dim, args.head_v_dim, dtype=state_dtype)
        if not args.use_short_conv:
            return MixerCache(state, None)
        return MixerCache(state, tuple(zeros(c, args.conv_size - 1, dtype=dtype) for c in channels))

    return [layer() for _ in range(args.num_hidden_layers)]


@torch.no_grad()
def advance(model: DeltaProductLM, tokens: Tensor, cache: list[MixerCache]) -> tuple[Tensor, list[MixerCache]]:
    """Reads the next tokens up to the head: what `prefill` does, for those who need no logits, or few at a time.

    Args:
        model: the model.
        tokens: [B, T] int64, T at least 1.
        cache: from `init_cache`, or what an earlier call returned.

    Returns:
        The hidden states [B, T, hidden] that `model.head` takes, and the cache after the last token.
    """
    x, after = model.tok_embeddings(tokens), []
    for layer, entry in zip(model.layers.values(), cache, strict=True):
        x, entry = layer.extend(x, entry)
        after.append(entry)
    return x, after


@torch.no_grad()
def prefill(
    model: DeltaProductLM, tokens: Tensor, cache: list[MixerCache], last_only: bool = False
) -> tuple[Tensor, list[MixerCache]]:
    """Reads a prompt, or the next segment of a long text.

    Args:
        model: the model.
        tokens: [B, T] int64, T at least 1.
        cache: from `init_cache`, or what an earlier call returned.
        last_only: compute the logits of the last token alone.

    Returns:
        Logits [B, T, vocab] ([B, 1, vocab] with `last_only`) and the cache after the last token.
    """
    x, cache = advance(model, tokens, cache)
    return model.head(x[:, -1:] if last_only else x), cache


def step(model: DeltaProductLM, token: Tensor, cache: list[MixerCache]) -> tuple[Tensor, list[MixerCache]]:
    """Reads one token of each sequence: token [B] int64 -> logits [B, vocab] and the next cache."""
    logits, cache = prefill(model, token.unsqueeze(1), cache)
    return logits.squeeze(1), cache


def select(cache: list[MixerCache], rows: slice | Tensor) -> list[MixerCache]:
    """The cache of some of the sequences.

    Args:
        cache: of B sequences.
        rows: a slice of the batch without a step, which shares memory with `cache`; or [N] int64 indices, repeats
            allowed, which copies.
    """
    return [
        MixerCache(entry.state[rows], None if entry.conv is None else tuple(part[rows] for part in entry.conv))
        for entry in cache
    ]


def join(caches: list[list[MixerCache]]) -> list[MixerCache]:
    """One cache of the sequences of several, in their order: a copy, or the one itself."""
    if len(caches) == 1:
        return caches[0]

    def entry(parts: tuple[MixerCache, ...]) -> MixerCache:
        state = torch.cat([part.state for part in parts])
        if parts[0].conv is None:
            return MixerCache(state, None)
        return MixerCache(state, tuple(torch.cat(x) for x in zip(*(part.conv for part in parts), strict=True)))

    return [entry(parts) for parts in zip(*caches, strict=True)]
