"""Groups: axioms, known orders, the documented order of elements, names; products composed one point at a time."""

import time

import numpy as np
import pytest

from torchtitan_deltaproduct.data.generated.groups import MAX_ORDER, parse_group
from torchtitan_deltaproduct.errors import ConfigError

ORDERS = {
    "S2": 2, "S3": 6, "S4": 24, "S5": 120, "S6": 720, "A3": 3, "A4": 12, "A5": 60, "A6": 360, "Z2": 2, "Z60": 60,
    "D3": 6, "D4": 8, "D5": 10, "A4_x_Z5": 60, "S3_x_Z2": 12, "Z2_x_Z2_x_Z3": 12, "D4_x_S3_x_Z2": 96,
}  # fmt: skip


def compose(a, b):
    """The permutation a b: b acts first."""
    return tuple(a[point] for point in b)


@pytest.mark.parametrize("name", ORDERS)
def test_axioms(name):
    group = parse_group(name).group
    n, table = group.order, group.table.astype(np.int64)
    assert (group.name, n, len(group.names), len(set(group.names))) == (name, ORDERS[name], n, n)
    everyone = np.arange(n)
    # A Latin square, with element 0 as the identity.
    assert (np.sort(table, axis=0) == everyone[:, None]).all() and (np.sort(table, axis=1) == everyone).all()
    assert (table[0] == everyone).all() and (table[:, 0] == everyone).all()
    inverse = table.argmin(axis=1)
    assert (table[everyone, inverse] == 0).all() and (table[inverse, everyone] == 0).all()
    rng = np.random.default_rng(0)
    a, b, c = rng.integers(n, size=(3, 20_000)) if n > 24 else np.indices((n, n, n)).reshape(3, -1)
    assert (table[table[a, b], c] == table[a, table[b, c]]).all()


@pytest.mark.parametrize("name", ORDERS)
def test_table_is_the_composition_of_the_permutations(name):
    group = parse_group(name).group
    perms = [tuple(p) for p in group.permutations.tolist()]
    assert len(set(perms)) == group.order
    assert perms[0] == tuple(range(len(perms[0])))
    rng = np.random.default_rng(1)
    for a, b in rng.integers(group.order, size=(300, 2)).tolist():
        assert perms[group.table[a, b]] == compose(perms[a], perms[b])


def test_order_of_elements():
    s3 = parse_group("S3").group
    assert s3.permutations.tolist() == [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]
    assert s3.names == ("e", "(1 2)", "(0 1)", "(0 1 2)", "(0 2 1)", "(0 2)")
    a4 = parse_group("A4").group.permutations.tolist()
    assert a4 == sorted(a4) and a4[:3] == [[0, 1, 2, 3], [0, 2, 3, 1], [0, 3, 1, 2]]
    assert parse_group("Z5").group.table.tolist()[3] == [3, 4, 0, 1, 2]
    d4 = parse_group("D4").group
    assert d4.names == ("r0", "r1", "r2", "r3", "r0s", "r1s", "r2s", "r3s")
    assert d4.permutations[1].tolist() == [1, 2, 3, 0] and d4.permutations[4].tolist() == [0, 3, 2, 1]
    assert parse_group("A4_x_Z5").group.names[7] == f"{parse_group('A4').group.names[1]},2"


def test_s3_by_hand():
    """(0 1)(1 2) is 2 -> 1 -> 0, 1 -> 2, 0 -> 1: the cycle (0 1 2); the other way round it is (0 2 1)."""
    group = parse_group("S3").group
    index = {name: k for k, name in enumerate(group.names)}
    assert group.table[index["(0 1)"], index["(1 2)"]] == index["(0 1 2)"]
    assert group.table[index["(1 2)"], index["(0 1)"]] == index["(0 2 1)"]


def test_d4_by_hand():
    """s r = r^-1 s; a reflection squared is the identity."""
    group = parse_group("D4").group
    r, s = 1, 4
    assert group.table[r, s] == 5 and group.table[s, r] == 7
    assert [group.table[k, k] for k in range(4, 8)] == [0] * 4
    word = np.array([[r, r, s, r, s, s]])
    assert group.products(word).tolist() == [[1, 2, 6, 5, 1, 5]]


def test_a4_x_z5_by_hand():
    group, a4 = parse_group("A4_x_Z5").group, parse_group("A4").group
    rng = np.random.default_rng(2)
    for a, b in rng.integers(60, size=(200, 2)).tolist():
        expected = a4.table[a // 5, b // 5] * 5 + (a + b) % 5
        assert group.table[a, b] == expected


@pytest.mark.parametrize("name, length", [("S3", 1), ("S5", 128), ("D4", 7), ("A4_x_Z5", 33), ("S6", 17), ("Z60", 100)])
def test_products_of_random_words(name, length):
    group = parse_group(name).group
    perms = [tuple(p) for p in group.permutations.tolist()]
    words = np.random.default_rng(3).integers(group.order, size=(20, length))
    found = group.products(words)
    for word, products in zip(words.tolist(), found.tolist(), strict=True):
        state = perms[0]
        for element, product in zip(word, products, strict=True):
            state = compose(state, perms[element])
            assert perms[product] == state


@pytest.mark.parametrize(
    "name, count, moved",
    [("S5_only_swaps", 11, 2), ("S5_limit_to_2", 11, 2), ("S5_limit_to_3", 31, 3), ("S5_limit_to_5", 120, 5),
     ("S4_limit_to_3", 15, 3), ("A5_limit_to_3", 21, 3)],
)  # fmt: skip
def test_alphabets(name, count, moved):
    problem = parse_group(name)
    assert len(problem.alphabet) == count and problem.alphabet[0] == 0
    assert problem.group.moved[problem.alphabet].max() == moved
    assert problem.vocab_size == problem.classes == problem.group.order


def test_spellings():
    found = {}
    for end in ("", "_last", "_s_token", "_s_token_only_input"):
        problem = parse_group(f"S5_limit_to_3_4_tokens{end}")
        found[end] = (problem.filler, problem.score_last, problem.vocab_size)
        assert problem.tokens_per_element == 4 and len(problem.alphabet) == 31 and problem.classes == 120
    assert found == {
        "": (False, False, 120),
        "_last": (False, True, 120),
        "_s_token": (True, True, 121),
        "_s_token_only_input": (True, False, 121),
    }
    assert parse_group("S5_4_tokens").tokens_per_element == 4


def test_large_groups_are_fast():
    start = time.process_time()
    for name in ("S6", "A6"):
        parse_group.__wrapped__(name)
    assert time.process_time() - start < 3


@pytest.mark.parametrize(
    "name, message",
    [
        ("S5_only_swap", "nearest: 'S5_only_swaps'"),
        ("A4xZ5", "nearest: 'A4_x_Z5'"),
        ("a4_X_z5", "nearest: 'A4_x_Z5'"),
        ("s5", "nearest: 'S5'"),
        ("s5_Only_Swaps", "nearest: 'S5_only_swaps'"),
        ("Z_60", "nearest: 'Z60'"),
        ("M11", "is not the name of a group\n"),
        ("S", "is not the name of a group\n"),
        ("Q8", "is not the name of a group\n"),
        ("", "is not the name of a group"),
        ("S5_only_swaps_hard", "is not the name of a group"),
        ("S5\n", "is not the name of a group"),
        ("S8", f"more than {MAX_ORDER:,} elements"),
        ("S999999", f"more than {MAX_ORDER:,} elements"),
        ("A5_x_A5_x_A5", f"more than {MAX_ORDER:,} elements"),
        ("D2", "D2 is Z2_x_Z2"),
        ("S1", "at least S2"),
        ("S5_limit_to_6", "move 2 to 5 points, not 6"),
        ("A5_limit_to_2", "move 3 to 5 points, not 2"),
        ("Z5_only_swaps", "goes with one S<n>"),
        ("S3_x_S3_limit_to_2", "goes with one S<n> or A<n>"),
        ("S5_1_tokens", "at least 2 tokens"),
    ],
)
def test_names_that_are_none(name, message):
    with pytest.raises(ConfigError, match="data.group = ") as error:
        parse_group(name)
    assert message in str(error.value)
