"""Strict types, one value at a time."""

from typing import Literal

import pytest

from torchtitan_deltaproduct.config.values import conform, parse_text, show
from torchtitan_deltaproduct.errors import nearest


@pytest.mark.parametrize(
    ("value", "hint", "result"),
    [
        (3, int, 3),
        (3, float, 3.0),
        (3, float | int, 3.0),
        (True, bool, True),
        ("x", str, "x"),
        ("x", str | None, "x"),
        (None, int | None, None),
        ("a", Literal["a", "b"], "a"),
        ([1, 2.5], list[float], [1.0, 2.5]),
        ([["a"], []], list[list[str]] | None, [["a"], []]),
        ("a", list[str] | str, "a"),
    ],
)
def test_accepted(value, hint, result):
    found = conform(value, hint)
    assert found == result and type(found) is type(result)


@pytest.mark.parametrize(
    ("value", "hint", "reason"),
    [
        (True, int, "expected a whole number"),
        (True, float, "expected a number"),
        (1, bool, "expected true or false; write true"),
        ("off", bool, "expected true or false; write false"),
        ("maybe", bool, "expected true or false"),
        (10.5, int, "expected a whole number"),
        (1e3, int, "expected a whole number; write 1000"),
        ("10", int, "expected a whole number; write 10 without quotes"),
        ("1e-3", float, "expected a number; write 0.001 without quotes"),
        (float("nan"), float, "expected a finite number"),
        (float("-inf"), float | int, "expected a finite number"),
        (10**400, float, "expected a finite number"),
        (2**63, int, "does not fit in 64 bits"),
        (3, str, 'expected a string; write "3"'),
        (True, str, "expected a string"),
        ("none", int | None, "TOML has no None; to leave it unset, delete the line"),
        ("Fulll", Literal["full", "none"], 'expected one of "full", "none"; nearest: "full"'),
        (1, Literal["full", "none"], 'expected one of "full", "none"'),
        ("x", Literal["only"], 'expected "only"'),
        ("a", list[str], 'expected a list; write ["a"]'),
        (["a", 1], list[str], 'element 2, 1: expected a string; write "1"'),
        ([True], list[float], "element 1, true: expected a number"),
    ],
)
def test_refused(value, hint, reason):
    with pytest.raises(ValueError) as error:
        conform(value, hint)
    assert str(error.value) == reason


def test_text_of_the_command_line():
    assert parse_text("-3", int) == -3
    assert parse_text("1e3", int) == 1000.0
    assert parse_text("3", float | int) == 3
    assert parse_text("TRUE", bool) is True
    assert parse_text("None", int | None) is None
    assert parse_text("none", str) == "none"
    assert parse_text("a, b", list[str]) == ["a", "b"]
    assert parse_text("[1, 2]", list[float]) == [1, 2]


def test_show_writes_toml():
    assert show(["a", 1.5, True, None]) == '["a", 1.5, true, (unset)]'
    assert show({"a": "é"}) == '{a = "é"}'


def test_nearest():
    assert nearest("stepz", ["steps", "seq_len"]) == "steps"
    assert nearest("warmup", ["warmup_steps", "seed"]) == "warmup_steps"
    for far, name in (("quack", "steps"), ("kitten", "kind"), ("friend", "freq"), ("sdg", "AdamW")):
        assert nearest(far, [name]) is None
