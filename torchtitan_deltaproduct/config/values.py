"""Strict types: does a TOML value fit a field, and what does the text of a command-line option mean?

A boolean is no int, "yes" is no boolean, 10.5 and 1e3 are no ints; a whole number is welcome where a float is
expected. The reason of a refusal says what to write instead:

    >>> conform(1e3, int)
    Traceback (most recent call last):
    ValueError: expected a whole number; write 1000
"""

import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from typing import Any

from ..errors import nearest

_YES, _NO = {"yes", "true", "on", "1", "y"}, {"no", "false", "off", "0", "n"}
_NONE = {"none", "null", "nil"}
DEPTH = 8
"""Tables within tables of a config; deeper ones are no settings."""


def conform(value: Any, hint: Any) -> Any:
    """Returns `value` as the field holds it, or raises ValueError with the reason and the remedy."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _conform_union(value, arguments)
    if origin is typing.Literal:
        return _conform_choice(value, arguments)
    if origin is list:
        return _conform_list(value, arguments[0])
    return {bool: _conform_bool, int: _conform_int, float: _conform_float, str: _conform_str}[hint](value)


def parse_text(text: str, hint: Any) -> Any:
    """What a command-line argument says, for `conform` to judge; None unsets an optional field."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if type(None) in arguments and text.lower() == "none":
            return None
        return parse_text(text, arguments[0])
    if origin is list:
        return _parse_list(text, arguments[0])
    if hint is bool:
        return {"true": True, "false": False}.get(text.lower(), text)
    if hint in (int, float):
        for number in (int, float):
            try:
                return number(text)
            except ValueError:
                continue
    return text


def show(value: Any) -> str:
    """A value as TOML writes it."""
    if value is None:
        return "(unset)"
    if isinstance(value, list):
        return "[" + ", ".join(map(show, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {show(item)}" for key, item in value.items()) + "}"
    if isinstance(value, bool | str):
        return json.dumps(value, ensure_ascii=False)
    return str(value)


def shorten(text: str, width: int = 60) -> str:
    """Cuts a long text."""
    return text if len(text) <= width else text[: width - 4] + " ..."


def _conform_union(value: Any, arms: tuple[Any, ...]) -> Any:
    optional = type(None) in arms
    if optional and value is None:
        return None
    if optional and isinstance(value, str) and value.lower() in _NONE:
        raise ValueError("TOML has no None; to leave it unset, delete the line")
    reasons = []
    for arm in arms:
        if arm is not type(None):
            try:
                return conform(value, arm)
            except ValueError as reason:
                reasons.append(reason)
    raise reasons[0]


def _conform_choice(value: Any, choices: tuple[Any, ...]) -> Any:
    if value in choices and type(value) is type(choices[choices.index(value)]):
        return value
    listed = ", ".join(f'"{choice}"' for choice in choices)
    guess = nearest(str(value).lower(), choices)
    remedy = f'; nearest: "{guess}"' if guess and len(choices) > 1 else ""
    raise ValueError(f"expected {'one of ' if len(choices) > 1 else ''}{listed}{remedy}")


def _conform_list(value: Any, element: Any) -> list[Any]:
    if not isinstance(value, list):
        example = show([value]) if isinstance(value, str | int | float) else "[...]"
        raise ValueError(f"expected a list; write {example}")
    result = []
    for index, item in enumerate(value):
        try:
            result.append(conform(item, element))
        except ValueError as reason:
            raise ValueError(f"element {index + 1}, {show(item)}: {reason}") from None
    return result


def _conform_bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).lower()
    remedy = "; write true" if word in _YES else "; write false" if word in _NO else ""
    raise ValueError(f"expected true or false{remedy}")


def _conform_int(value: Any) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        if abs(value) >= 2**63:
            raise ValueError("does not fit in 64 bits")
        return value
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**63:
        raise ValueError(f"expected a whole number; write {int(value)}")
    raise ValueError(f"expected a whole number{_unquoted(value, int)}")


def _conform_float(value: Any) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        if isinstance(value, int) and abs(value) > 2**1000 or not math.isfinite(value):
            raise ValueError("expected a finite number")
        return float(value)
    raise ValueError(f"expected a number{_unquoted(value, float)}")


def _conform_str(value: Any) -> str:
    if isinstance(value, str):
        if "\0" in value:
            raise ValueError("must not hold a NUL character")
        return value
    remedy = f'; write "{value}"' if isinstance(value, int | float) and not isinstance(value, bool) else ""
    raise ValueError(f"expected a string{remedy}")


def _unquoted(value: Any, kind: type) -> str:
    """A remedy for a number in quotes."""
    try:
        return f"; write {kind(value)} without quotes" if isinstance(value, str) else ""
    except ValueError:
        return ""


def _parse_list(text: str, element: Any) -> Any:
    """`[1, 2]` as TOML writes it, or `1,2`; the empty text is the empty list."""
    if text.lstrip().startswith("["):
        try:
            return tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            return text
    return [parse_text(item.strip(), element) for item in text.split(",")] if text.strip() else []


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"model": {"head_dim": 64}}` -> `{"model.head_dim": 64}`."""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        deeper = isinstance(value, Mapping) and prefix.count(".") < DEPTH
        flat |= flatten(value, f"{prefix}{name}.") if deeper else {f"{prefix}{name}": value}
    return flat
