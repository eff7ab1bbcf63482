"""Text is UTF-8 wherever a file or a process is read or written: the locale of a machine changes no run."""

import ast
import os
import sysconfig
from pathlib import Path

import pytest

from tests.toy import REPO, train
from torchtitan_deltaproduct.checkpoint import load_model
from torchtitan_deltaproduct.checkpoint.from_hf import import_hf
from torchtitan_deltaproduct.checkpoint.to_hf import export
from torchtitan_deltaproduct.data import train_tokenizer
from torchtitan_deltaproduct.files import utf8_path

FOLDERS = ("torchtitan_deltaproduct", "launch", "eval")
PROGRAM = [path for name in FOLDERS for path in sorted((REPO / name).rglob("*.py"))]
TEXT = {"read_text", "write_text"}


def unspecified(tree: ast.AST) -> list[int]:
    """Lines that open text without saying in which encoding."""
    lines = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        method = call.func.attr if isinstance(call.func, ast.Attribute) else None
        if method in TEXT and "encoding" not in given or given.keys() & {"text", "universal_newlines"}:
            lines.append(call.lineno)
        is_open = isinstance(call.func, ast.Name) and call.func.id == "open"
        if is_open and "encoding" not in given:
            mode = call.args[1] if len(call.args) > 1 else given.get("mode", ast.Constant("r"))
            if isinstance(mode, ast.Constant) and "b" not in mode.value:
                lines.append(call.lineno)
    return lines


def test_every_text_has_an_encoding():
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in PROGRAM}
    found = {str(path.relative_to(REPO)): lines for path, tree in trees.items() if (lines := unspecified(tree))}
    assert found == {} and len(trees) > 100


LINES = ["open('x')", "p.read_text()", "run(c, text=True)", "open('x', 'w')", "p.write_text('')"]


@pytest.mark.parametrize("line", LINES)
def test_the_test_sees_it(line):
    assert unspecified(ast.parse(line)) == [1]


def test_a_folder_whose_name_is_not_utf8(toy, tmp_path):
    """Libraries that write every path in UTF-8 (TensorBoard, safetensors, tokenizers) get there all the same."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    train(toy, folder / "run", "--training.steps", "2")
    assert list((folder / "run/tb").iterdir())
    assert export(folder / "run", folder / "hf").logit_difference == 0
    import_hf(folder / "hf", folder / "imported")
    assert load_model(folder / "imported").step == 0
    corpus = str(Path(sysconfig.get_paths()["stdlib"], "json"))
    assert not train_tokenizer.main([corpus, "--out", str(folder / "tokenizer"), "--vocab-size", "300"])
    with utf8_path(folder) as name:
        assert name.isascii() and Path(name, "hf/config.json").exists()
    with utf8_path(tmp_path) as name:
        assert name == str(tmp_path)
