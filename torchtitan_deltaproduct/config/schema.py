"""Every option of `JobConfig`, flat: its dotted key, type, default, record and doc string; and which one was meant.

The record is in the metadata of the field, or in `config.inherited` for a field of torchtitan's; the doc string is the
string literal below the field, read from the class's source:

    >>> schema()["training.steps"].summary
    'How many train steps to run'
    >>> suggest_key("training", "batch_size")
    ['training.local_batch_size']
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

from ..errors import nearest
from ..options import Option, Refusal, value_of
from .inherited import WORDS, record_of
from .job import JobConfig
from .problems import quoted

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
    record: Option
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
        """The field's own doc string on one line, or ours for it; of the nearest base class that has one; or ""."""
        if self.key in WORDS:
            return WORDS[self.key]
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
    names: dict[str, list[str]] = {}
    for field in schema().values():
        parts = field.table.split(".")
        for depth in range(1, len(parts) + 1):
            names.setdefault(".".join(parts[:depth]), [])
        names[field.table].append(field.name)
    return {table: tuple(own) for table, own in names.items()}


@cache
def supported_keys() -> tuple[str, ...]:
    """Every key a user may set, in schema order."""
    return tuple(key for key in schema() if refusal(key) is None)


def refusal(key: str) -> Refusal | None:
    """Why a key is refused, or None."""
    return schema()[key].record.refused


def set_value(config: Any, key: str, value: Any) -> None:
    table, _, name = key.rpartition(".")
    setattr(value_of(config, table), name, value)


def first_sentence(doc: str) -> str:
    """Up to the first full stop that ends a sentence, at most 120 characters."""
    sentence = re.split(r"\.(?=\s+[A-Z`'(]|\s*$)|:\s+-\s|\s+-\s", doc, maxsplit=1)[0].strip()
    return sentence if len(sentence) <= 120 else sentence[:117].rsplit(" ", 1)[0] + " ..."


@cache
def aliases() -> dict[str, str]:
    """What other trainers and model configs call an option -> its key."""
    return {alias: key for key, option in schema().items() for alias in option.record.aliases}


def suggest_key(table: str, name: str) -> list[str]:
    """The options somebody who wrote `[table] name` may have meant: none, one, or a few of equal standing."""
    name = name.lower().replace("-", "_")
    supported = supported_keys()
    here = {field: f"{table}.{field}" for field in tables().get(table, ()) if f"{table}.{field}" in supported}
    if name in here:
        return [here[name]]
    if guess := aliases().get(name):
        return [here.get(schema()[guess].name, guess)]
    elsewhere = [key for key in supported if schema()[key].name == name]
    if 0 < len(elsewhere) <= 3:
        return elsewhere
    if guess := nearest(name, here):
        return [here[guess]]
    by_name = {schema()[key].name: key for key in reversed(supported)}
    if guess := nearest(name, [*by_name, *aliases()], cutoff=0.75):
        return [by_name.get(guess) or aliases()[guess]]
    return []


def describe_key(table: str, name: str) -> str:
    """`nearest: 'steps' (How many train steps to run)`, or what the table holds."""
    guesses = suggest_key(table, name)
    if not guesses:
        known = [field for field in tables().get(table, ()) if f"{table}.{field}" in supported_keys()]
        return f"[{table}] has: {', '.join(known)}" if known else "see --help"
    spelled = []
    for guess in guesses:
        field = schema()[guess]
        spelled.append(f"'{field.name}'" + ("" if field.table == table else f" in [{field.table}]"))
    return f"nearest: {' or '.join(spelled)}{quoted(schema()[guesses[0]].summary)}"


def describe_table(name: str) -> str:
    """`nearest: [training]`, or the tables there are."""
    above = name.rpartition(".")[0]
    if above not in tables():
        above = ""
    siblings = [table for table in tables() if table.rpartition(".")[0] == above]
    if guess := nearest(name.lower(), siblings):
        return f"nearest: [{guess}]"
    if not siblings:
        return f"[{above}] holds no tables"
    return "tables are: " + ", ".join(siblings)


def describe_option(option: str) -> str:
    """For the command line: `nearest: --training.steps (How many train steps to run)`."""
    table, _, name = option.rpartition(".")
    guesses = suggest_key(table, name)
    # A table that both have in common would make any two options alike.
    if not guesses and table not in tables() and (guess := nearest(option, supported_keys())):
        guesses = [guess]
    if not guesses:
        return f"--help {table} lists those of [{table}]" if table in tables() else "see --help"
    spelled = " or ".join(f"--{guess}" for guess in guesses)
    return f"nearest: {spelled}{quoted(schema()[guesses[0]].summary)}"


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
        key = f"{prefix}{field.name}"
        record = field.metadata.get("option") or record_of(key)
        assert record, f"{key} of torchtitan has no record: honour or refuse it in config/inherited.py"
        yield Field(key, hint, default, record, owner, cls)


@cache
def _docs_of_module(module: str) -> dict[tuple[str, str], str]:
    if module == "builtins":
        return {}
    docs = {}
    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, doc in zip(node.body, node.body[1:], strict=False):
            is_field = isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
            is_doc = isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)
            if is_field and is_doc and isinstance(doc.value.value, str):
                docs[node.name, field.target.id] = " ".join(doc.value.value.split())
    return docs
