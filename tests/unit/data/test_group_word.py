"""Group words as training data: labels, streams, curriculum, and the same batches on any number of ranks."""

import numpy as np
import pytest
import torch

from torchtitan_deltaproduct.config.job import Data
from torchtitan_deltaproduct.data import build_loader
from torchtitan_deltaproduct.data.counter import below, draws, stream_key
from torchtitan_deltaproduct.data.generated.group_words import Curriculum, GroupWordSource
from torchtitan_deltaproduct.data.generated.groups import parse_group
from torchtitan_deltaproduct.data.held_out import held_out_sequences
from torchtitan_deltaproduct.errors import ConfigError, DataError

T, GLOBAL = 24, 16


def loader(local=4, rank=0, world=1, **fields):
    data = Data(**{"kind": "group_word", "group": "S3", "seed": 5, **fields})
    return build_loader(data, seq_len=T, local_batch_size=local, global_batch_size=GLOBAL, dp_rank=rank,
                        dp_world_size=world)  # fmt: skip


def take(source, count):
    """The next `count` micro-batches: [count, LB, T, 2], tokens and labels."""
    batches = iter(source)
    found = [next(batches) for _ in range(count)]
    return torch.stack([torch.stack([inputs["input"], labels], dim=-1) for inputs, labels in found])


def rows(source, first=0, count=64):
    inputs, labels = source.batch(np.arange(first, first + count))
    assert inputs["input"].dtype == labels.dtype == torch.int64
    assert inputs["input"].shape == labels.shape == (count, source.seq_len)
    return inputs["input"].numpy(), labels.numpy()


@pytest.mark.parametrize("name", ["S3", "D4", "A4_x_Z5", "S5", "S5_limit_to_3", "S5_only_swaps", "S6"])
def test_labels_are_prefix_products(name):
    problem = parse_group(name)
    perms = [tuple(p) for p in problem.group.permutations.tolist()]
    tokens, labels = rows(GroupWordSource(name, 50), count=16)
    assert set(np.unique(tokens)) <= set(problem.alphabet.tolist())
    for word, answers in zip(tokens.tolist(), labels.tolist(), strict=True):
        state = perms[0]
        for element, answer in zip(word, answers, strict=True):
            state = tuple(state[point] for point in perms[element])
            assert perms[answer] == state


def test_elements_are_uniform_and_independent_of_each_other():
    tokens, labels = rows(GroupWordSource("S3", 40), count=5000)
    for values in (tokens, labels[:, -1]):
        counts = np.bincount(values.ravel(), minlength=6)
        assert np.abs(counts / values.size - 1 / 6).max() < 5 * np.sqrt(1 / 6 / values.size)
    pairs = np.bincount((tokens[:, 1:] * 6 + tokens[:, :-1]).ravel(), minlength=36) / (5000 * 39)
    assert np.abs(pairs - 1 / 36).max() < 5 * np.sqrt(1 / 36 / (5000 * 39))
    swaps, _ = rows(GroupWordSource("S5_only_swaps", 40), count=1000)
    assert (np.bincount(swaps.ravel(), minlength=120) > 0).sum() == 11


def test_known_words():
    """The generator must not change between releases: checkpoints name their samples by index."""
    tokens, labels = rows(GroupWordSource("S3", 12, seed=1), first=10**9, count=1)
    assert tokens.tolist() == [[4, 4, 2, 1, 1, 1, 4, 4, 2, 1, 2, 5]]
    assert labels.tolist() == [[4, 3, 5, 4, 5, 4, 3, 0, 2, 3, 5, 0]]


def test_a_sample_is_a_function_of_seed_stream_and_index():
    source = GroupWordSource("S5", 32, seed=1)
    tokens, labels = rows(source, 100, 50)
    again, same = rows(GroupWordSource("S5", 32, seed=1), 120, 5)
    assert (tokens[20:25] == again).all() and (labels[20:25] == same).all()
    shuffled, _ = source.batch(np.array([149, 10**9, 100]))
    assert (shuffled["input"][[0, 2]].numpy() == tokens[[49, 0]]).all()
    longer, _ = rows(GroupWordSource("S5", 200, seed=1), 100, 50)
    assert (longer[:, :32] == tokens).all()
    others = [rows(GroupWordSource("S5", 32, **k), 100, 50)[0] for k in ({"seed": 2}, {"seed": 1, "split": "test"})]
    assert all(np.mean(other == tokens) < 0.05 for other in others)


def test_streams_share_no_word():
    words = {}
    for split in ("train", "validation", "test"):
        tokens, _ = rows(GroupWordSource("S3", 24, seed=1, split=split), count=20_000)
        words[split] = {row.tobytes() for row in tokens}
        assert len(words[split]) == 20_000
    assert len(set.union(*words.values())) == 60_000
    with pytest.raises(ConfigError, match="no stream 'dev'"):
        GroupWordSource("S3", 24, split="dev")


def test_counter_draws():
    key = stream_key("a", 1)
    bits = draws(key, np.arange(2000), 500)
    assert len(np.unique(bits)) == bits.size
    assert (draws(key, np.array([7]), 9) == bits[7, :9]).all()
    ones = np.unpackbits(bits.view(np.uint8)).mean()
    assert abs(ones - 0.5) < 1e-3
    # Neighbouring samples and positions differ in half of their bits.
    for left, right in ((bits[1:], bits[:-1]), (bits[:, 1:], bits[:, :-1])):
        assert abs(np.unpackbits((left ^ right).view(np.uint8)).mean() - 0.5) < 1e-3
    assert below(np.array([0, 2**32 - 1], dtype=np.uint32), 7).tolist() == [0, 6]
    assert below(np.array([2**32 - 1, 2**64 - 1], dtype=np.uint64), 7).tolist() == [0, 6]


def spelled(name, length=11):
    tokens, labels = rows(GroupWordSource(name, length, seed=2), count=1)
    return tokens[0].tolist(), labels[0].tolist()


def test_spellings():
    a, b, c, d = GroupWordSource("S5_3_tokens", 11, seed=2).words(np.array([0]), 4)[0].tolist()
    w, x, y = parse_group("S5").group.products(np.array([[a, b, c]]))[0].tolist()
    f = 120
    repeated, filled = [a, a, a, b, b, b, c, c, c, d, d], [a, f, f, b, f, f, c, f, f, d, f]
    everywhere = [0, 0, w, w, w, x, x, x, y, y, y]
    last = [-100, -100, w, -100, -100, x, -100, -100, y, -100, -100]
    assert spelled("S5_3_tokens") == (repeated, everywhere)
    assert spelled("S5_3_tokens_last") == (repeated, last)
    assert spelled("S5_3_tokens_s_token") == (filled, last)
    assert spelled("S5_3_tokens_s_token_only_input") == (filled, everywhere)
    assert spelled("S5_3_tokens", 2) == ([a, a], [0, 0])


def test_curriculum():
    curriculum = Curriculum(start=4, stop=24, steps=10, global_batch_size=GLOBAL)
    assert curriculum.lengths(np.array([0, 15, 16, 80, 159, 160, 10**9])).tolist() == [4, 4, 6, 14, 22, 24, 24]
    full, growing = loader(), loader(curriculum_start=4, curriculum_steps=10)
    expected, found = take(full, 48).reshape(-1, T, 2), take(growing, 48).reshape(-1, T, 2)
    for sample, (row, whole) in enumerate(zip(found, expected, strict=True)):
        length = min(24, 4 + 2 * (sample // GLOBAL))
        assert torch.equal(row[:length], whole[:length])
        assert (row[length:, 0] == 0).all() and (row[length:, 1] == -100).all()
    assert growing.state_dict()["order"] != full.state_dict()["order"]
    assert "from 4 tokens on over 10 steps" in growing.describe()
    with pytest.raises(ConfigError, match="curriculum_start = 25"):
        loader(curriculum_start=25, curriculum_steps=10)


@pytest.mark.parametrize("local, world", [(16, 1), (1, 4), (2, 8)])
def test_global_batches_do_not_depend_on_ranks(local, world):
    options = {"curriculum_start": 4, "curriculum_steps": 3}
    expected = take(loader(16, **options), 5)
    ranks = [take(loader(local, rank, world, **options), 5 * GLOBAL // (local * world)) for rank in range(world)]
    assert torch.equal(torch.stack(ranks, dim=1).reshape(expected.shape), expected)


def test_resume_on_other_ranks_and_workers():
    first = loader()
    take(first, 8)
    state = first.state_dict()
    assert state["sample"] == 32
    expected = take(loader(16), 4)[2:]
    for other in (loader(16), loader(16, num_workers=1)):
        other.load_state_dict(state)
        assert torch.equal(take(other, 2), expected)
    with pytest.raises(DataError, match="group: was S3, is S4"):
        loader(group="S4").load_state_dict(state)


def test_what_the_trainer_asks():
    one = loader(group="A4_x_Z5")
    source = one.source
    assert (source.vocab_size, source.tokenizer_path, source.classes, source.chance) == (60, "", 60, 1 / 60)
    assert max(one.epochs().values()) == 0
    assert one.describe() == "group words: A4_x_Z5: 60 elements; 24 tokens, seed 5; steps of 16 x 24 = 384 tokens"


def validation(**options):
    data = Data(kind="group_word", group="S5", seed=5, curriculum_start=4, curriculum_steps=9)
    return held_out_sequences(data, **{"seq_len": 64, "local_batch_size": 4, "samples": 21, **options})


def test_validation_streams_and_errors():
    held_out = validation()
    source = held_out.source
    assert (source.vocab_size, source.classes, source.chance) == (120, 120, 1 / 120)
    assert source.order() != validation(split="test").source.order()
    # 21 samples in batches of 4, whatever the curriculum of training; the rest of the last batch has no label.
    labels = torch.cat([answers for _, answers in held_out])
    assert labels[:21].tolist() == rows(GroupWordSource("S5", 64, seed=5, split="validation"), count=21)[1].tolist()
    assert labels.shape == (24, 64) and (labels[21:] == -100).all()
    assert "test data: 21 samples in 6 steps; group words: S5" in validation(split="test").describe()
    with pytest.raises(ConfigError, match="what the model learns from"):
        validation(split="train")
    with pytest.raises(ConfigError, match="at least 1"):
        validation(samples=0)
    with pytest.raises(ConfigError, match="'prepared'"):
        held_out_sequences(Data(), seq_len=8, local_batch_size=1, samples=1)
