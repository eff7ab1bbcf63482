"""docs/architecture.md and docs/contributing.md: what they name is there, and the registries hold what they say."""

import ast
import re
import typing

import pytest

from tests.toy import REPO
from torchtitan_deltaproduct.config.job import Data
from torchtitan_deltaproduct.data import GENERATED, KINDS
from torchtitan_deltaproduct.evaluation.sweep.plan import evals
from torchtitan_deltaproduct.models.args import DeltaProductArgs
from torchtitan_deltaproduct.models.hf_names import LAYER_TABLE, OPTIONAL, OWN_FIELDS
from torchtitan_deltaproduct.optimizers import OPTIMIZERS

PAGES = {name: (REPO / f"docs/{name}.md").read_text(encoding="utf-8") for name in ("architecture", "contributing")}
CODE = {name: re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.S)) for name, text in PAGES.items()}
PATH = re.compile(r"[\w.]+(?:/[\w.]+)+/?|[\w.]+/|\w+\.py")
ROOTS = (REPO, REPO / "torchtitan_deltaproduct")
MADE_BY_A_RUN = {"manifest.json", "metrics.jsonl"}


def defined() -> set[str]:
    """Names of the program: classes, functions, variables and fields."""
    names = set()
    for root in ("torchtitan_deltaproduct", "launch", "eval", "tests"):
        for path in (REPO / root).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef | ast.FunctionDef):
                    names.add(node.name)
                elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    names.add(node.id)
    return names


@pytest.mark.parametrize("page", PAGES)
def test_every_path_is_there(page):
    paths = [word for word in CODE[page] if PATH.fullmatch(word)]
    assert len(paths) > 20
    missing = [path for path in paths if not any((root / path).exists() for root in ROOTS)]
    assert not missing


@pytest.mark.parametrize("page", PAGES)
def test_every_name_is_defined(page):
    names = defined() | {*KINDS, *evals(), "ruff"}
    words = [word for word in CODE[page] if re.fullmatch(r"[A-Za-z_]\w+(\.[A-Za-z_]\w+)?", word)]
    words = [word for word in words if not PATH.fullmatch(word) and word not in MADE_BY_A_RUN]
    assert len(words) > 5
    assert [word for word in words if not set(word.split(".")) <= names] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", PAGES[page])
    assert links and not [link for link in links if not (REPO / "docs" / link).exists()]


@pytest.mark.parametrize("registry, held", [("OPTIMIZERS", OPTIMIZERS), ("KINDS", KINDS), ("sweep finds", evals())])
def test_a_registry_holds_what_the_page_says(registry, held):
    (line,) = re.findall(rf"^In `.*{registry}[`:]* (`.*)\.$", PAGES["contributing"], flags=re.M)
    assert set(re.findall(r"`(\w+)`", line)) == set(held)


def test_the_choices_of_data_kind_are_the_kinds():
    assert set(typing.get_args(typing.get_type_hints(Data)["kind"])) == set(KINDS) and set(GENERATED) <= set(KINDS)


def test_what_the_checklist_of_the_mixer_says_of_the_tables():
    fields = set(DeltaProductArgs.__dataclass_fields__)
    assert fields > OWN_FIELDS and set(OPTIONAL.values()) < fields
    assert all(any(part in name for name in LAYER_TABLE) for part in OPTIONAL)


def test_the_commands_are_those_of_the_project():
    """Each line of the block of commands starts something that exists."""
    (block,) = re.findall(r"```bash\n(.*?)```", PAGES["contributing"], flags=re.S)
    for line in block.splitlines():
        words = line.split()
        targets = [word for word in words if "/" in word and not word.startswith("-")]
        assert all((REPO / target).exists() for target in targets), line
        if words[:2] == ["python", "-m"] and words[2] != "pytest":
            assert (REPO / words[2].replace(".", "/")).with_suffix(".py").exists(), line


def test_every_room_and_top_level_module_is_on_the_map():
    package = REPO / "torchtitan_deltaproduct"
    rooms = [path.parent.name + "/" for path in package.glob("*/__init__.py")]
    assert [room for room in rooms if room not in PAGES["architecture"]] == []
