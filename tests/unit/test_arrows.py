"""Imports point one way: no circle among modules, no room that knows of one above it.

Read from the source with `ast`, so that imports inside functions and those for type checkers count as well.
"""

import ast
from functools import cache

import pytest

from tests.toy import REPO

PACKAGE = "torchtitan_deltaproduct"
LAYERS = [
    {"agreement", "errors", "files", "history", "events", "arguments", "devices", "flops", "formats", "intervals",
     "jobs", "options", "optimizers", "processes", "progress", "torch_internals"},
    {"ops"},
    {"models"},
    {"config"},
    {"memory", "data", "runs"},
    {"checkpoint", "scaling"},
    {"titan", "evaluation", "plan", "doctor", "status"},
    {"train", "compare"},
    {"report"},
    {"__main__"},
]  # fmt: skip
"""Rooms and top-level modules from the lowest up; each may import those of lower layers, the lowest one another too."""
ROOTS = (PACKAGE, "launch", "eval", "benchmarks")
ONLY_IN = {"torchtitan": {"titan", "config"}, "fla": {"ops", "checkpoint"}}
"""Packages of others that are an affair of some rooms alone; an export is tried out with fla's own class."""


@cache
def imports() -> dict[str, set[str]]:
    """Every module of this repository, and what it imports: modules of ours, and the packages of others."""
    files = {}
    for path in (path for root in ROOTS for path in (REPO / root).rglob("*.py")):
        parts = path.relative_to(REPO).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    found = {}
    for module, path in files.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        found[module] = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
                base = ".".join([*above, *([node.module] if node.module else [])])
                names = [f"{base}.{alias.name}" for alias in node.names]
                names = [name if name in files else base for name in names]
            else:
                continue
            found[module] |= {name if name in files else name.partition(".")[0] for name in names}
    return found


def room(module: str) -> str:
    return module.split(".")[1]


def layer(module: str) -> int:
    found = [index for index, rooms in enumerate(LAYERS) if room(module) in rooms]
    assert found, f"give {room(module)} a place in LAYERS"
    return found[0]


def test_the_reader_of_imports():
    assert {f"{PACKAGE}.models.args", f"{PACKAGE}.ops"} <= imports()[f"{PACKAGE}.models.mixer"]
    assert {"torchtitan", f"{PACKAGE}.titan.validator"} <= imports()[f"{PACKAGE}.titan.spec"]


def test_no_circles():
    """Modules that import nothing unseen are taken away until none is left."""
    left = {module: names & imports().keys() - {module} for module, names in imports().items()}
    while free := {module for module, names in left.items() if not names & left.keys()}:
        left = {module: names for module, names in left.items() if module not in free}
    assert not left, f"these import each other: {sorted(left)}"


@pytest.mark.parametrize("module", sorted(m for m in imports() if m.startswith(f"{PACKAGE}.")))
def test_no_room_knows_of_one_above(module):
    for name in imports()[module]:
        if name.startswith(f"{PACKAGE}.") and room(name) != room(module):
            assert layer(name) < layer(module) or layer(name) == layer(module) == 0, f"{module} must not import {name}"
        assert name.partition(".")[0] not in ROOTS[1:], f"{module} imports {name}, which stands above the package"
        assert room(module) in ONLY_IN.get(name, {room(module)}), f"{module} must not import {name}"
