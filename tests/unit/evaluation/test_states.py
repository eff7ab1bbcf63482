"""States at chosen positions against the recurrence token by token and micro-step by micro-step."""

import pytest
import torch

from tests.unit.models.conftest import small_model
from torchtitan_deltaproduct.evaluation.effective_rank.states import walk
from torchtitan_deltaproduct.models.decode import init_cache, step
from torchtitan_deltaproduct.ops.normalize import l2norm

LENGTH = 23
SETTINGS = {
    "plain": {},
    "gates": {"use_forget_gate": True, "use_output_gate": True},
    "wide_v": {"use_forget_gate": True, "expand_v": 1.5, "conv_size": 3},
    "narrow_v": {"expand_v": 0.5, "allow_neg_eigval": False},
    "no_conv": {"use_short_conv": False},
}


def by_definition(model, tokens):
    """[L, T, n, B, H, K, V]: every state after every micro-step, one token and one row at a time."""
    seen = []

    def operator(q, k, v, g, beta, state):
        keys = l2norm(k)
        if g is not None:
            state = state * g[:, 0].exp()[..., None, None]
        after = []
        for j in range(k.shape[1]):
            read = torch.einsum("bhk,bhkv->bhv", keys[:, j], state)
            write = beta[:, j, :, None] * (v[:, j] - read)
            state = state + torch.einsum("bhk,bhv->bhkv", keys[:, j], write)
            after.append(state)
        seen.append(torch.stack(after))
        o = torch.einsum("bhk,bhkv->bhv", l2norm(q[:, 0]), state) * q.shape[-1] ** -0.5
        return o.unsqueeze(1), state

    cache = init_cache(model, len(tokens))
    with torch.no_grad():
        for t in range(tokens.shape[1]):
            x = model.tok_embeddings(tokens[:, t : t + 1])
            for index, layer in enumerate(model.layers.values()):
                x, cache[index] = layer.extend(x, cache[index], operator)
    layers = len(model.layers)
    return torch.stack([torch.stack(seen[index::layers]) for index in range(layers)])


def by_walking(model, tokens, every, segments, between, block_bytes=None):
    """[L, P, n or 1, B, H, K, V]."""
    found, start = [[] for _ in model.layers], 0
    cache = init_cache(model, len(tokens))

    def look(glimpse):
        blocks = list(glimpse.states(between, block_bytes))
        assert sum(map(len, blocks)) == glimpse.positions
        found[glimpse.layer] += blocks

    for size in segments:
        cache = walk(model, tokens[:, start : start + size], cache, look, every, start % every)
        start += size
    return torch.stack([torch.cat(blocks) for blocks in found]), cache


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_states_are_those_of_the_recurrence(setting, n):
    model = small_model(num_householder=n, **SETTINGS[setting])
    tokens = torch.randint(0, 50, (2, LENGTH))
    exact = by_definition(model, tokens)
    whole, uneven, single = [LENGTH], [6, 1, 9, 7], [1] * LENGTH
    for every, ways in ((1, [whole, uneven]), (5, [uneven, single]), (11, [whole]), (LENGTH, [uneven])):
        chosen = exact[:, every - 1 :: every]
        for segments in ways:
            found, cache = by_walking(model, tokens, every, segments, True, block_bytes=6000)
            torch.testing.assert_close(found, chosen, rtol=1e-11, atol=1e-12)
            last, _ = by_walking(model, tokens, every, segments, False)
            torch.testing.assert_close(last[:, :, 0], chosen[:, :, -1], rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(torch.stack([entry.state for entry in cache]), exact[:, -1, -1])


def test_float32_and_the_decode_step():
    """In float32 the states are those that generation would hold in its cache, to rounding."""
    model = small_model(torch.float32, num_householder=2, use_forget_gate=True)
    tokens = torch.randint(0, 50, (3, 120))
    cache, held = init_cache(model, 3), []
    for t in range(120):
        _, cache = step(model, tokens[:, t], cache)
        held.append(torch.stack([entry.state.clone() for entry in cache]))
    held = torch.stack(held, 1)[:, 7::8]
    found, _ = by_walking(model, tokens, 8, [50, 70], False)
    assert (found[:, :, 0] - held).abs().max() < 2e-5 * held.abs().max()


def test_long_distances_with_strong_decay():
    """One position after thousands of tokens whose decay underflows: no digit is lost to sums of log decays."""
    model = small_model(num_householder=2, use_forget_gate=True)
    with torch.no_grad():
        for layer in model.layers.values():
            layer.mixer.decay.A_log.fill_(3.0)
    tokens = torch.randint(0, 50, (1, 900))
    exact = by_definition(model, tokens)[:, -1, -1]
    found, _ = by_walking(model, tokens, 900, [400, 500], False)
    torch.testing.assert_close(found[:, 0, 0], exact, rtol=1e-10, atol=1e-12)


def test_chosen_rows_and_tokens():
    model = small_model(num_householder=3, use_forget_gate=True)
    tokens = torch.randint(0, 50, (2, 17))
    seen = []
    walk(model, tokens[:, :10], init_cache(model, 2), seen.append, every=4)
    walk(model, tokens[:, 10:], init_cache(model, 2), seen.append, every=4, offset=2)
    first, second = seen[0], seen[2]
    assert (first.positions, second.positions) == (2, 2)
    assert torch.equal(first.chosen_rows(first.k)[:, 1], first.k[:, 21:24])
    assert torch.equal(second.chosen_rows(second.beta)[:, 0], second.beta[:, 3:6])
    assert torch.equal(second.chosen_tokens(second.g)[:, 1], second.g[:, 5])
    norms = first.k.square().sum(-1)
    assert (norms - 1).abs().max() < 1e-3 and first.written.shape == (2, 30, 3, 8)
