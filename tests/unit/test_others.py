"""What we rely on inside other people's packages: that it is there, and the versions we admit."""

import subprocess
import sys
import tomllib
from importlib.metadata import version

import pytest
import torch
from packaging.requirements import Requirement
from torchtitan.distributed import utils

from tests.toy import REPO
from torchtitan_deltaproduct import torch_internals
from torchtitan_deltaproduct.ops import fla_backend
from torchtitan_deltaproduct.titan import patches

DEPENDENCIES = [
    Requirement(text) for text in tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["dependencies"]
]


@pytest.mark.parametrize("wanted", DEPENDENCIES, ids=lambda wanted: wanted.name)
def test_a_dependency_has_an_upper_bound_and_admits_what_is_tested(wanted):
    assert {spec.operator for spec in wanted.specifier} & {"<", "=="}
    pinned = (Requirement(line) for line in (REPO / "constraints.txt").read_text().splitlines() if "==" in line)
    tested = {p.name: next(iter(p.specifier)).version for p in pinned}.get(wanted.name) or version(wanted.name)
    assert wanted.specifier.contains(tested)


def test_the_lock_of_uv_is_of_these_dependencies():
    """If not: `uv lock` (https://docs.astral.sh/uv; `uv sync` installs from it)."""
    locked = {package["name"]: package for package in tomllib.loads((REPO / "uv.lock").read_text())["package"]}
    ours = locked["torchtitan-deltaproduct"]["metadata"]
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    extras = [Requirement(text) for texts in project["optional-dependencies"].values() for text in texts]
    wanted = {text.name.lower().replace("_", "-"): text.specifier for text in DEPENDENCIES + extras}
    assert {text["name"]: Requirement(f"x{text['specifier']}").specifier for text in ours["requires-dist"]} == wanted
    assert all(specifier.contains(locked[name]["version"]) for name, specifier in wanted.items())


def test_the_versions_named_in_the_files_are_those_of_pyproject():
    bounds = {wanted.name: wanted.specifier for wanted in DEPENDENCIES}
    low, _, high = torch_internals.WRITTEN_FOR.removeprefix("torch ").partition(" to ")
    major, minor = map(int, high.split("."))
    assert bounds["torch"] == Requirement(f"torch>={low},<{major}.{minor + 1}").specifier
    assert bounds["torchtitan"] == Requirement(f"torchtitan=={patches.WRITTEN_FOR}").specifier
    assert bounds["flash-linear-attention"].contains(f"{fla_backend.WRITTEN_FOR}.0")


def test_the_private_parts_of_torch_are_there():
    from torch.cuda import _pin_memory_utils

    assert len(torch_internals.shared_memory(64)) == 64
    torch_internals.forget_checkpoint_process(terminate=True)
    for name in ("pin_memory", "unpin_memory"):
        torch_internals.part(_pin_memory_utils, name)
    with pytest.raises(RuntimeError, match=r"has no torch\.cuda\.nothing; torch_internals.py was written for"):
        torch_internals.part(torch.cuda, "nothing")


def test_a_constant_result_is_marked_as_torch_marks_it():
    ours, theirs = torch_internals.constant_result(lambda: 1), torch.compiler.assume_constant_result(lambda: 1)
    assert vars(ours) == vars(theirs)


def test_what_nobody_asked_for_is_not_imported():
    """Seconds of every start: torch's compiler, and what torchtitan imports for float8, attention and its own data."""
    code = """
import sys
from torchtitan_deltaproduct.config.load import load_config
print([name for name in ("torch._dynamo", "torch.distributed.tensor", "datasets") if name in sys.modules])
from torchtitan_deltaproduct.config.stand_ins import MODULES, stand_ins
with stand_ins():
    import torchtitan_deltaproduct.titan.trainer
print([name for name in ("torch._inductor.compile_fx", "datasets", *MODULES) if name in sys.modules])
from torchtitan.models.attention import FlexAttentionWrapper
from torchtitan.components.quantization.float8 import Float8LinearConverter
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert (ended.returncode, ended.stdout.splitlines()) == (0, ["[]", "[]"]), ended.stderr


def test_a_torchtitan_without_a_patched_part_is_named(monkeypatch):
    monkeypatch.delattr(utils, "device_type")
    with pytest.raises(RuntimeError, match=r"torchtitan 0\.2\.2 has no torchtitan.distributed.utils.device_type"):
        patches.bind_device("cpu", torch.cpu, lambda name: 0.0)


def test_autocast_and_checkpointing_come_back():
    from torchtitan_deltaproduct.config import JobConfig

    config, before = JobConfig(), utils.maybe_enable_amp
    config.checkpoint.enable = True
    with pytest.raises(ZeroDivisionError), patches.without_checkpoints_and_autocast(config):
        assert not config.checkpoint.enable and utils.maybe_enable_amp is not before
        raise ZeroDivisionError
    assert config.checkpoint.enable and utils.maybe_enable_amp is before


@pytest.mark.parametrize("wrong", ["fewer", "shape", "gates"])
def test_tensors_that_fla_saves_elsewhere_are_named(wrong):
    solved, gates = fla_backend.saved_shapes(torch.empty(1, 8, 2, 4), torch.empty(1, 4, 2), False)
    saved = [torch.empty(3)] * 11
    saved[7], saved[5] = torch.empty(solved), torch.empty(gates)
    assert fla_backend._solved_and_gates(tuple(saved), solved, gates) == (saved[7], saved[5])
    if wrong == "fewer":
        saved.pop()
    else:
        saved[{"shape": 7, "gates": 5}[wrong]] = torch.empty(2, 2)
    with pytest.raises(RuntimeError, match=r"was written for 0\.6"):
        fla_backend._solved_and_gates(tuple(saved), solved, gates)
