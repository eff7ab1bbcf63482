"""Formal languages: answers recomputed from the text by Python itself, shapes, lengths, streams, settings."""

import re

import numpy as np
import pytest
import torch

from torchtitan_deltaproduct.config import Environment, load_config
from torchtitan_deltaproduct.config.job import Data
from torchtitan_deltaproduct.data import build_loader
from torchtitan_deltaproduct.data.generated.languages import LANGUAGES, FormalSource
from torchtitan_deltaproduct.data.held_out import held_out_sequences
from torchtitan_deltaproduct.errors import ConfigError, DataError

NAMES = list(LANGUAGES)
GRAMMAR = {
    "parity": r"[01]+",
    "modular_arithmetic": r"[0-4]([-+*][0-4])*=",
    "modular_arithmetic_brackets": r"[-+*()0-4]+=",
}


def rows(source, first=0, count=500):
    """[(text, position of the label, label)]"""
    inputs, labels = source.batch(np.arange(first, first + count))
    assert inputs["input"].dtype == labels.dtype == torch.int64
    assert inputs["input"].shape == labels.shape == (count, source.seq_len)
    found = []
    for tokens, answers in zip(inputs["input"].numpy(), labels.numpy(), strict=True):
        (position,) = np.flatnonzero(answers != -100)
        text = source.text(tokens)
        assert (tokens[len(text) :] == source.vocab_size - 1).all() and tokens.min() >= 0
        found.append((text, int(position), int(answers[position])))
    return found


def answer(name, text):
    """Python's own arithmetic: the text is an expression of the same meaning."""
    return text.count("1") % 2 if name == "parity" else eval(text.removesuffix("=")) % 5  # noqa: S307


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("low, high", [(3, 40), (40, 256)])
def test_answers(name, low, high):
    lengths = set()
    for text, position, label in rows(FormalSource(name, high + 3, low, high, seed=1)):
        assert re.fullmatch(GRAMMAR[name], text), text
        assert label == answer(name, text), text
        assert position == len(text) - 1
        lengths.add(len(text))
    assert min(lengths) >= low and max(lengths) <= high


@pytest.mark.parametrize("name", NAMES)
def test_all_lengths_are_equally_likely(name):
    source = FormalSource(name, 40, 3, 40)
    texts = [text for text, _, _ in rows(source, count=6000)]
    possible = list(range(4, 41, 2)) if name == "modular_arithmetic" else list(range(3, 41))
    counts = np.bincount([len(text) for text in texts], minlength=41)
    assert np.flatnonzero(counts).tolist() == possible == source.lengths.tolist()
    share = 1 / len(possible)
    assert np.abs(counts[possible] / 6000 - share).max() < 5 * np.sqrt(share / 6000)


@pytest.mark.parametrize("length", range(2, 12))
def test_short_brackets(length):
    """Every way to write the shortest expressions occurs, and they nest as the grammar says."""
    source = FormalSource("modular_arithmetic_brackets", length, length, length)
    shapes = {re.sub(r"\d", "d", re.sub(r"(?<=[\d)])[-+*]", "o", text[:-1])) for text, _, _ in rows(source, count=2000)}
    grammar = {1: {"d"}, 2: {"-d"}, 3: {"(d)"}, 4: {"(-d)"}}
    for size in range(5, length):
        grammar[size] = {f"({a}o{b})" for left in range(1, size - 3) for a in grammar[left]
                         for b in grammar[size - 3 - left]}  # fmt: skip
    assert shapes == grammar[length - 1]


def test_operators_and_digits_are_uniform():
    for name in NAMES[1:]:
        text = "".join(text for text, _, _ in rows(FormalSource(name, 256, 100, 256), count=1000))
        binary = re.findall(r"(?<=[\d)])[-+*]", text)
        for values, kinds in ((binary, "+-*"), (re.findall(r"\d", text), "01234")):
            shares = np.array([values.count(kind) for kind in kinds]) / len(values)
            assert np.abs(shares - 1 / len(kinds)).max() < 5 / np.sqrt(len(values))


@pytest.mark.parametrize("name, chance", [("parity", 0.5), ("modular_arithmetic", 0.2)])
def test_answers_are_at_chance(name, chance):
    source = FormalSource(name, 40, 3, 40)
    labels = [label for _, _, label in rows(source, count=5000)]
    shares = np.bincount(labels, minlength=source.classes) / 5000
    assert source.chance == chance == 1 / source.classes
    assert np.abs(shares - chance).max() < 0.03


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_is_a_function_of_seed_stream_and_index(name):
    expected = rows(FormalSource(name, 60, 10, 60, seed=4), 10**9, 40)
    assert rows(FormalSource(name, 60, 10, 60, seed=4), 10**9 + 7, 9) == expected[7:16]
    # Padding is no part of it.
    assert rows(FormalSource(name, 99, 10, 60, seed=4), 10**9, 40) == expected
    for other in ({"seed": 5}, {"seed": 4, "split": "validation"}, {"seed": 4, "split": "test"}):
        texts = {text for text, _, _ in rows(FormalSource(name, 60, 10, 60, **other), 10**9, 40)}
        assert len(texts & {text for text, _, _ in expected}) <= 1


def loader(**fields):
    data = Data(**{"kind": "formal_language", "language": "modular_arithmetic", "max_length": 30, **fields})
    return build_loader(data, seq_len=32, local_batch_size=4, global_batch_size=8)


def test_loader():
    whole, later = loader(), loader(num_workers=1)
    later.load_state_dict({**whole.state_dict(), "sample": 16})
    inputs, labels = next(iter(later))
    expected = whole.source.batch(np.arange(16, 20))
    assert torch.equal(inputs["input"], expected[0]["input"]) and torch.equal(labels, expected[1])
    assert (whole.source.vocab_size, whole.source.tokenizer_path, max(whole.epochs().values())) == (12, "", 0)
    assert "modular_arithmetic, rows of 4 to 30 tokens padded to 32" in whole.describe()
    with pytest.raises(DataError, match="max_length: was 30, is 31"):
        loader(max_length=31).load_state_dict(whole.state_dict())


def test_validation_at_other_lengths():
    data = Data(kind="formal_language", language="parity", seed=2)
    held_out = held_out_sequences(
        data, seq_len=256, local_batch_size=4, samples=10, split="test", min_length=40, max_length=256
    )
    labels = torch.cat([labels for _, labels in held_out])
    assert labels.shape == (12, 256) and ((labels != -100).sum(dim=1).tolist()) == [1] * 10 + [0] * 2
    assert ((labels != -100).nonzero()[:, 1] >= 39).all()
    assert (held_out.source.classes, held_out.source.chance, held_out.source.vocab_size) == (2, 0.5, 3)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": "dyck"}, "known are parity, modular_arithmetic"),
        ({"max_length": 50}, "rows hold training.seq_len = 40 tokens"),
        ({"min_length": 30, "max_length": 20}, "no row of modular_arithmetic is that long"),
        ({"min_length": 5, "max_length": 5}, "possible are 2, 4, 6, ... tokens"),
        ({"split": "dev"}, "no stream 'dev'"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ConfigError) as error:
        FormalSource(**{"name": "modular_arithmetic", "seq_len": 40, **options})
    assert message in str(error.value)


GROUP = '[data]\nkind = "group_word"\ngroup = "S3"\n'
FORMAL = '[data]\nkind = "formal_language"\nlanguage = "parity"\n'


@pytest.mark.parametrize(
    "text, options, message",
    [
        (GROUP, ["--training.seq_len=64", "--data.curriculum_start=8", "--data.curriculum_steps=9"], ""),
        (FORMAL, ["--training.seq_len=40"], ""),
        ('[data]\nkind = "group_word"\n', [], "group_word needs [data] group"),
        (GROUP, ["--data.curriculum_start=8"], "a curriculum needs both"),
        (GROUP, ["--data.curriculum_start=65", "--data.curriculum_steps=9", "--training.seq_len=64"], "starts above"),
        (GROUP, ["--data.paths=a"], "which group_word does not read"),
        (GROUP, ["--data.dataset=a"], 'only read with kind = "streaming"'),
        (GROUP, ["--data.shuffle=false"], 'only read with kind = "prepared"'),
        (GROUP, ["--data.min_length=4"], 'only read with kind = "formal_language"'),
        (GROUP, ["--validation.paths=a"], "generated data is validated on generated samples"),
        (FORMAL, ["--data.group=S3"], 'only read with kind = "group_word"'),
        (FORMAL, ["--training.seq_len=32"], "max_length = 40 tokens do not fit in training.seq_len = 32"),
        (FORMAL, ["--data.min_length=9", "--data.max_length=8"], "max_length = 8 is below min_length = 9"),
        ('[data]\npaths = ["a"]\n', ["--data.group=S3"], 'only read with kind = "group_word"'),
    ],
)
def test_settings(tmp_path, text, options, message):
    path = tmp_path / "x.toml"
    path.write_text(text)
    try:
        load_config(["--job.config_file", str(path), *options], Environment())
    except ConfigError as error:
        assert message and message in str(error)
    else:
        assert not message
