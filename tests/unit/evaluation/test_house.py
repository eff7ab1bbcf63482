"""How the evaluations are housed: importable from anywhere, one entry file each, found by the sweep without a list."""

import ast
import subprocess
import sys

from tests.toy import REPO
from torchtitan_deltaproduct.evaluation.sweep.plan import evals

PACKAGE = REPO / "torchtitan_deltaproduct/evaluation"


def test_imported_outside_the_checkout(tmp_path):
    """By its installed path alone: neither `eval` nor `launch` is needed, and the package itself imports nothing."""
    code = (
        "import sys, torchtitan_deltaproduct.evaluation; assert 'torch' not in sys.modules\n"
        "import torchtitan_deltaproduct.evaluation.sweep.plan as plan; assert plan.evals()\n"
        "import torchtitan_deltaproduct.evaluation.generate\n"
        "assert not {'eval', 'launch', 'tests', 'lm_eval'} & {name.partition('.')[0] for name in sys.modules}"
    )
    (tmp_path / "site").mkdir()
    (tmp_path / "site/torchtitan_deltaproduct").symlink_to(REPO / "torchtitan_deltaproduct")
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_entry_file_for_each():
    """`python -m eval.NAME` is evaluation/NAME; what has metrics is swept, without being named anywhere else."""
    entries = {path.stem for path in (REPO / "eval").glob("*.py")} - {"__init__"}
    assert entries == {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert set(evals()) == entries - {"generate", "sweep"}
    for name in entries:
        assert len((REPO / f"eval/{name}.py").read_text().splitlines()) < 30


def test_nothing_here_imports_the_commands_or_the_launchers():
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.partition(".")[0] in ("eval", "launch") for name in names), path
