"""`deltaproduct NAME`: the table of commands, names that are wrong, completion, and what a wheel holds."""

import ast
import importlib.util
import os
import resource
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tests.toy import REPO
from torchtitan_deltaproduct import __main__ as command
from torchtitan_deltaproduct import __version__
from torchtitan_deltaproduct.errors import UserError

PYPROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())


def deltaproduct(*words, **options):
    start = [sys.executable, "-m", "torchtitan_deltaproduct"]
    return subprocess.run([*start, *words], cwd=REPO, capture_output=True, text=True, **options)


@pytest.mark.parametrize("name", command.COMMANDS)
def test_the_module_of_a_command_has_a_main(name):
    """And is started by `python -m` with it."""
    module, _ = command.COMMANDS[name]
    file = Path(importlib.util.find_spec(module).origin)
    tree = ast.parse(file.read_text())
    bound = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            bound |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            bound |= {ast.unparse(target) for target in node.targets}
    assert "main" in bound
    starts = ast.parse(file.with_name("__main__.py").read_text()) if file.name == "__init__.py" else tree
    assert name == "completion" or "exit_on_user_error(main)" in ast.unparse(starts.body[-1])


def test_a_wheel_holds_all_of_it():
    packages = {module.partition(".")[0] for module, _ in command.COMMANDS.values()}
    patterns = PYPROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    assert all(any(fnmatchcase(package, pattern) for pattern in patterns) for package in packages)
    assert PYPROJECT["project"]["scripts"] == {"deltaproduct": "torchtitan_deltaproduct.__main__:main"}
    held = PYPROJECT["tool"]["setuptools"]["package-data"]
    for package in (*packages, "torchtitan_deltaproduct"):
        for path in (REPO / package).rglob("*"):
            name = str(path.relative_to(REPO / package))
            if path.is_file() and path.suffix not in (".py", ".pyc"):
                assert any(fnmatchcase(name, pattern) for pattern in held[package]), f"{package}/{name} is left out"


def test_help_and_version_are_quick():
    """In seconds of a processor: those of the clock depend on who else is there."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    helped, version = deltaproduct("--help"), deltaproduct("--version")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used / 2 < 0.3 and version.stdout == f"deltaproduct {__version__}\n"
    assert len(helped.stdout.splitlines()) < 30 and all(name in helped.stdout for name in command.COMMANDS)


@pytest.mark.parametrize("name", command.COMMANDS)
def test_the_help_of_a_command_is_short(name, monkeypatch, capsys):
    """On a terminal of 100 columns."""
    monkeypatch.setattr(sys, "argv", ["deltaproduct", *name.split(), "--help"])
    monkeypatch.setenv("COLUMNS", "100")
    try:
        assert not command.run(sys.argv[1:])
    except SystemExit as ended:
        assert ended.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert 2 < len(lines) < 30
    assert name in ("train", "eval lm-harness") or lines[0].startswith(f"usage: deltaproduct {name} ")


@pytest.mark.parametrize(("words", "said"), [
    ("stats x", "no command stats; nearest: deltaproduct status"),
    ("eval generat", "no command 'eval generat'; nearest: deltaproduct eval generate"),
    ("lm_harness", "nearest: deltaproduct eval lm-harness"),
    ("to_hf", "nearest: deltaproduct to-hf"),
    ("show_batch", "nearest: deltaproduct data show-batch"),
    ("checkpoint --help", "deltaproduct checkpoint: expected one of: ls, verify"),
    ("qqqq", "deltaproduct --help lists them all"),
    ("trace", "deltaproduct --help lists them all"),
    ("completion fish", "deltaproduct completion bash >>"),
])  # fmt: skip
def test_a_wrong_name_is_answered_with_the_nearest(words, said):
    with pytest.raises(UserError) as raised:
        command.run(words.split())
    assert said in str(raised.value)


def test_the_same_function_under_both_names(tmp_path):
    """Exit codes and messages too; usage names what was typed."""
    done = deltaproduct("checkpoint", "ls", str(tmp_path / "no"))
    module = [sys.executable, "-m", "torchtitan_deltaproduct.checkpoint.ls", str(tmp_path / "no")]
    assert (done.returncode, done.stderr) == (
        2,
        subprocess.run(module, cwd=REPO, capture_output=True, text=True).stderr,
    )
    assert deltaproduct("compare", "--help").stdout.startswith("usage: deltaproduct compare ")


def test_a_folder_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(command, "COMMANDS", {"slurm": ("launch.nothing", "")})
    with pytest.raises(ModuleNotFoundError, match="launch.nothing"):
        command.run(["slurm"])
    monkeypatch.setattr(command, "COMMANDS", {"slurm": ("launch", "")})
    monkeypatch.setitem(sys.modules, "launch", None)
    with pytest.raises(UserError, match="the folder launch/ of the repository is not installed"):
        command.run(["slurm"])


@pytest.mark.parametrize(("words", "offered"), [
    (["deltaproduct", "ev"], "eval"), (["deltaproduct", "checkpoint", ""], "ls verify"),
    (["deltaproduct", "data", ""], "show show-batch"),
    (["deltaproduct", "eval", "l"], "length-extrapolation lm-harness"), (["deltaproduct", "train", "eval"], ""),
])  # fmt: skip
def test_completion(capsys, words, offered):
    command.run(["completion", "bash"])
    script = capsys.readouterr().out
    line = " ".join(f"'{word}'" for word in words)
    code = f'{script}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _deltaproduct; echo "${{COMPREPLY[@]}}"'
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"{offered}\n", "")


@pytest.mark.slow
def test_a_wheel_gives_the_command(tmp_path):
    """Built, unpacked, and called from elsewhere, with the dependencies of this environment."""
    # A copy: setuptools leaves folders beside what it builds.
    for name in ("torchtitan_deltaproduct", "launch", "eval"):
        shutil.copytree(REPO / name, tmp_path / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPO / name, tmp_path / "source")
    build = [
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        str(tmp_path / "source"),
    ]
    subprocess.run([sys.executable, *build], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    install = ["-m", "pip", "install", "--no-deps", "--quiet", "--target", str(tmp_path / "site"), str(wheel)]
    subprocess.run([sys.executable, *install], check=True)
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": os.environ["PATH"]}
    for words in (["--version"], ["slurm", "--help"], ["eval", "sweep", "--help"], ["report", "--help"]):
        called = [str(tmp_path / "site/bin/deltaproduct"), *words]
        done = subprocess.run(called, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "site/torchtitan_deltaproduct/report/templates/report.html").exists()
