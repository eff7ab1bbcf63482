"""Prefill and steps against the full forward, in float64; the cache's size and type; other sequences in a batch."""

import pytest
import torch

from torchtitan_deltaproduct.models.counts import state_bytes
from torchtitan_deltaproduct.models.decode import init_cache, join, prefill, select, step

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


@pytest.mark.parametrize("use_short_conv", [True, False])
def test_sequences_leave_and_join_a_batch(use_short_conv):
    model = small_model(num_householder=2, use_short_conv=use_short_conv)
    tokens = torch.randint(0, 50, (3, 12))
    _, cache = prefill(model, tokens[:, :8], init_cache(model, batch=3))
    # The last one goes on alone; the first two do not notice, although they share its memory.
    ended, alone = select(cache, slice(2)), select(cache, slice(2, None))
    for t in range(8, 12):
        logits, alone = step(model, tokens[2:, t], alone)
    torch.testing.assert_close(logits, model(tokens[2:])[:, -1], atol=1e-10, rtol=1e-10)
    # A copy of the second, then the first.
    mixed = join([select(ended, torch.tensor([1])), select(ended, slice(1))])
    order = torch.tensor([1, 0])
    logits, _ = step(model, tokens[order, 8], mixed)
    torch.testing.assert_close(logits, model(tokens[order, :9])[:, -1], atol=1e-10, rtol=1e-10)
    again, _ = step(model, tokens[:2, 8], ended)
    torch.testing.assert_close(again, logits[order], atol=1e-10, rtol=1e-10)


def test_a_step_in_bfloat16_is_a_segment_of_one_token():
    model = small_model(torch.float32, num_householder=2).bfloat16()
    conv = model.layers["0"].mixer.k_conv1d
    x, cache = torch.randn(2, 2, 48).bfloat16(), torch.randn(2, 48, 3).bfloat16()
    both, after = conv.extend(x, cache)
    first, cache = conv.extend(x[:, :1], cache)
    second, cache = conv.extend(x[:, 1:], cache)
    torch.testing.assert_close(torch.cat([first, second], 1), both)
    assert torch.equal(cache, after) and cache.dtype == first.dtype == torch.bfloat16
