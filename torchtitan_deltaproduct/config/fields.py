"""Every option of `JobConfig`, flat: its dotted key, type, default, doc string and owner.

The doc string of a field is the string literal below it, read from the class's source, torchtitan's classes
included:

    >>> schema()["training.steps"].summary
    'How many train steps to run'
"""

import ast
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from typing import Any

from .job import JobConfig

_OURS = __name__.partition(".")[0]


@dataclass(frozen=True)
class Field:
    """One option."""

    key: str
    """Dotted path, for example `training.dataloader.num_workers`."""
    hint: Any
    """Resolved type annotation."""
    default: Any
    """Value of a config that nobody touched."""
    owner: type
    """Class whose body declares the field last: a torchtitan dataclass or one of ours."""
    table_class: type
    """Dataclass of the table the field is in; `owner` is one of its bases."""

    @property
    def table(self) -> str:
        return self.key.rpartition(".")[0]

    @property
    def name(self) -> str:
        return self.key.rpartition(".")[2]

    @property
    def ours(self) -> bool:
        """Whether this toolkit declares the field or changes its default."""
        return self.owner.__module__.startswith(_OURS)

    @property
    def doc(self) -> str:
        """The field's own doc string on one line; of the nearest base class that has one; or ""."""
        for cls in self.table_class.__mro__:
            if text := _docs_of_module(cls.__module__).get((cls.__qualname__, self.name)):
                return text
        return ""

    @property
    def summary(self) -> str:
        """The first sentence of `doc`, without its full stop."""
        return first_sentence(self.doc)


@cache
def schema() -> dict[str, Field]:
    """All options by dotted key, in the order of the classes."""
    return {field.key: field for field in _walk(JobConfig, "")}


@cache
def tables() -> dict[str, tuple[str, ...]]:
    """Every table by dotted name (`training`, `training.dataloader`), with the names of its options."""
    found: dict[str, list[str]] = {}
    for field in schema().values():
        parts = field.table.split(".")
        for depth in range(1, len(parts) + 1):
            found.setdefault(".".join(parts[:depth]), [])
        found[field.table].append(field.name)
    return {table: tuple(names) for table, names in found.items()}


def get_value(config: Any, key: str) -> Any:
    """`config.training.steps` for the key "training.steps"."""
    for part in key.split("."):
        config = getattr(config, part)
    return config


def set_value(config: Any, key: str, value: Any) -> None:
    table, _, name = key.rpartition(".")
    setattr(get_value(config, table), name, value)


def first_sentence(doc: str) -> str:
    """Up to the first full stop that ends a sentence, at most 120 characters."""
    sentence = re.split(r"\.(?=\s+[A-Z`'(]|\s*$)|:\s+-\s|\s+-\s", doc, maxsplit=1)[0].strip()
    return sentence if len(sentence) <= 120 else sentence[:117].rsplit(" ", 1)[0] + " ..."


def type_name(hint: Any) -> str:
    """How `--help` spells a type: `int`, `list of str`, `"a" | "b"`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " | ".join(f'"{choice}"' for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        names = [type_name(a) for a in arguments if a is not type(None)]
        return "float" if set(names) == {"int", "float"} else " | ".join(names)
    if origin is list:
        return f"list of {type_name(arguments[0])}"
    return hint.__name__


def _walk(cls: type, prefix: str) -> Iterator[Field]:
    hints = typing.get_type_hints(cls)
    for field in fields(cls):
        hint = hints[field.name]
        if is_dataclass(hint):
            yield from _walk(hint, f"{prefix}{field.name}.")
            continue
        owner = next(base for base in cls.__mro__ if field.name in base.__dict__.get("__annotations__", {}))
        default = field.default if field.default_factory is MISSING else field.default_factory()
        yield Field(f"{prefix}{field.name}", hint, default, owner, cls)


@cache
def _docs_of_module(module: str) -> dict[tuple[str, str], str]:
    if module == "builtins":
        return {}
    found = {}
    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, doc in zip(node.body, node.body[1:], strict=False):
            is_field = isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            is_doc = isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)
            if is_field and is_doc and isinstance(doc.value.value, str):
                found[node.name, field.target.id] = " ".join(doc.value.value.split())
    return found
