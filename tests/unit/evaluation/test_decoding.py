"""Continuations against the arg max of repeated full forwards; batches, seeds, ends and segments."""

import pytest
import torch

from torchtitan_deltaproduct.errors import ConfigError
from torchtitan_deltaproduct.evaluation.generate.decoding import Settings, continue_prompts, read_prompts
from torchtitan_deltaproduct.evaluation.generate.sampling import Sampling, distribution
from torchtitan_deltaproduct.models.decode import step

HERE = "torchtitan_deltaproduct.evaluation"

PROMPTS = ["def main():", "", "import os", "x = 日本", "import os", "class A:\n    def " * 20]


@pytest.fixture(scope="module")
def prompts(vocabulary):
    return [vocabulary.encode(text) for text in PROMPTS]


def by_full_forwards(model, prompt, count, end=None):
    ids = list(prompt)
    for _ in range(count):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
        if ids[-1] == end:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("segment", [3, 2048])
def test_greedy_is_the_argmax_of_full_forwards(random_model, vocabulary, prompts, segment):
    found = continue_prompts(random_model, vocabulary, prompts, Settings(24, segment=segment))
    for prompt, text in zip(prompts, found, strict=True):
        start = prompt or [vocabulary.separator]
        assert text.tokens == by_full_forwards(random_model, start, 24, vocabulary.separator)
        said = [token for token in text.tokens if token != vocabulary.separator]
        whole = vocabulary.tokenizer.decode(start[-16:] + said)
        assert text.text == whole[len(vocabulary.tokenizer.decode(start[-16:])) :]
    assert len({token for text in found for token in text.tokens}) > 20


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9), Sampling(1.2, 20, 0.9)])
def test_a_batch_says_what_each_prompt_alone_says(random_model, vocabulary, prompts, sampling):
    settings, seeds = Settings(30, stops=["e", "1"], sampling=sampling), [5, 6, 5, 8, 9, 10]
    together = continue_prompts(random_model, vocabulary, prompts, settings, seeds)
    assert len({len(text.tokens) for text in together}) > 1, "they leave the batch at different times"
    for prompt, seed, text in zip(prompts, seeds, together, strict=True):
        assert continue_prompts(random_model, vocabulary, [prompt], settings, [seed]) == [text]
    if sampling.temperature:
        assert together[2] != together[4], "other seeds say other things"
        assert continue_prompts(random_model, vocabulary, prompts, settings, seeds) == together


def test_the_first_token_has_the_models_distribution(random_model, vocabulary, prompts):
    """Chi squared over the 7 tokens that top-k leaves, 4,000 draws: 22.5 is passed once in a thousand."""
    sampling, draws = Sampling(1.0, top_k=7), 4000
    p = distribution(random_model(torch.tensor([prompts[0]]))[:, -1], sampling)[0]
    found = continue_prompts(
        random_model, vocabulary, [prompts[0]] * draws, Settings(1, sampling=sampling), list(range(draws))
    )
    counts = torch.bincount(torch.tensor([text.tokens[0] for text in found]), minlength=320).double()
    kept = p > 0
    assert kept.sum() == 7 and counts[~kept].sum() == 0
    assert ((counts - draws * p)[kept] ** 2 / (draws * p)[kept]).sum() < 22.5


def test_the_pieces_shown_are_the_text(random_model, vocabulary, prompts):
    pieces = [[] for _ in prompts]
    settings = Settings(60, stops=["ab"], sampling=Sampling(1.5), stop_at_separator=False)
    found = continue_prompts(
        random_model, vocabulary, prompts, settings, list(range(6)), lambda place, text: pieces[place].append(text)
    )
    assert ["".join(part) for part in pieces] == [text.text for text in found]
    assert [len(part) for part in pieces] == [len(text.tokens) for text in found]


class Scripted:
    """A model that says given tokens, whatever it reads."""

    def __init__(self, monkeypatch, vocabulary, tokens):
        rows = iter(torch.nn.functional.one_hot(torch.tensor(tokens), 400).double() * 9)
        monkeypatch.setattr(f"{HERE}.generate.decoding.read_prompts", lambda *_: (next(rows).unsqueeze(0), None))
        monkeypatch.setattr(f"{HERE}.generate.decoding.step", lambda *_: (next(rows).unsqueeze(0), None))


def scripted(monkeypatch, vocabulary, text, more=(), **settings):
    tokens = [*vocabulary.encode(text), *more]
    Scripted(monkeypatch, vocabulary, tokens)
    return tokens, continue_prompts(None, vocabulary, [[1]], Settings(len(tokens), **settings))[0]


def test_how_a_text_ends(monkeypatch, vocabulary):
    end = vocabulary.separator
    tokens, found = scripted(monkeypatch, vocabulary, "a = 1\nb", [end, 5])
    assert (found.text, found.reason, found.tokens) == ("a = 1\nb", "separator", tokens[:-1])
    tokens, found = scripted(monkeypatch, vocabulary, "a", [end, 5], stop_at_separator=False)
    assert found.reason == "length" and found.tokens == tokens and "<|endoftext|>" in found.text
    for stop, text in (("= 1\nb", "a "), ("日本語", "a = 1\nb "), ("\n", "a = 1")):
        _, found = scripted(monkeypatch, vocabulary, "a = 1\nb 日本語 c", stops=[stop])
        assert (found.text, found.reason) == (text, "stop")
    # A stop string that is complete with the very last token, and the beginning of one at the end.
    assert scripted(monkeypatch, vocabulary, "a = 1", stops=["1"])[1].reason == "stop"
    _, found = scripted(monkeypatch, vocabulary, "a = 1", stops=["1\n"])
    assert (found.text, found.reason) == ("a = 1", "length")


def test_ids_without_a_text_are_never_said(monkeypatch, vocabulary):
    """A model's vocabulary may be padded beyond the tokenizer's."""
    logits = torch.zeros(1, 400)
    logits[0, 350], logits[0, 7] = 9, 1
    monkeypatch.setattr(f"{HERE}.generate.decoding.read_prompts", lambda *_: (logits, None))
    assert continue_prompts(None, vocabulary, [[1]], Settings(1))[0].tokens == [7]


def test_reading_prompts_of_many_lengths(random_model, prompts):
    prompts = [prompt or [0] for prompt in prompts] + [[9], [1, 2, 3]]
    logits, cache = read_prompts(random_model, prompts, segment=5)
    after, _ = step(random_model, torch.full((len(prompts),), 4), cache)
    for row, prompt in enumerate(prompts):
        whole = random_model(torch.tensor([[*prompt, 4]]))[0]
        torch.testing.assert_close(logits[row], whole[-2], atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(after[row], whole[-1], atol=1e-9, rtol=1e-9)


def test_settings_out_of_range():
    with pytest.raises(ConfigError, match="tokens 0: must be at least 1"):
        Settings(tokens=0)
