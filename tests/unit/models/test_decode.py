"""Prefill and steps against the full forward, in float64; the cache's size and type."""

import torch

from torchtitan_deltaproduct.models.counts import state_bytes
from torchtitan_deltaproduct.models.decode import init_cache, prefill, step

from .conftest import small_model


def test_prefill_and_steps_equal_forward(variant):
    model = small_model(**variant)
    tokens = torch.randint(0, 50, (2, 21))
    expected = model(tokens)
    cache = init_cache(model, batch=2)
    # A prompt, a segment shorter than the convolution, single tokens, and another segment from a used cache.
    first, cache = prefill(model, tokens[:, :9], cache)
    second, cache = prefill(model, tokens[:, 9:11], cache)
    parts = [first, second]
    for t in range(11, 15):
        logits, cache = step(model, tokens[:, t], cache)
        parts.append(logits.unsqueeze(1))
    last, cache = prefill(model, tokens[:, 15:], cache)
    torch.testing.assert_close(torch.cat([*parts, last], 1), expected, atol=1e-10, rtol=1e-10)


def test_decoding_from_the_first_token_and_last_only():
    model = small_model(num_householder=3, use_forget_gate=True)
    tokens = torch.randint(0, 50, (2, 7))
    cache = init_cache(model, batch=2)
    for t in range(7):
        logits, cache = step(model, tokens[:, t], cache)
        torch.testing.assert_close(logits, model(tokens[:, : t + 1])[:, -1], atol=1e-10, rtol=1e-10)
    only, _ = prefill(model, tokens, init_cache(model, batch=2), last_only=True)
    assert only.shape == (2, 1, 50)
    torch.testing.assert_close(only[:, 0], logits, atol=1e-10, rtol=1e-10)


def test_the_cache_has_a_constant_size():
    model = small_model(torch.float32, num_householder=2).bfloat16()
    cache = init_cache(model, batch=1)

    def size() -> int:
        return sum(t.untyped_storage().nbytes() for entry in cache for t in (entry.state, *entry.conv))

    assert size() == state_bytes(model.args)
    assert cache[0].state.dtype == torch.float32 and cache[0].conv[0].dtype == torch.bfloat16
    for tokens in (torch.zeros(1, 30, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)):
        logits, cache = prefill(model, tokens, cache)
        assert logits.dtype == torch.bfloat16 and size() == state_bytes(model.args)
        assert cache[0].state.dtype == torch.float32 and cache[0].conv[0].dtype == torch.bfloat16
