"""The corpus of installed packages: what is taken, what is held out, and the commands it ends with."""

import json
import sys
import sysconfig

import pytest

from launch import python_corpus
from torchtitan_deltaproduct.errors import ConfigError, DataError


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A library and forty small packages, one of them large."""
    library, site = tmp_path / "lib", tmp_path / "site-packages"
    (library / "test").mkdir(parents=True)
    (library / "ast.py").write_text("import sys\n" * 200)
    (library / "test/left_out.py").write_text("nothing")
    for number in range(40):
        package = site / f"p{number}"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(f"number = {number}\n" * (500 if number == 7 else 5))
        (package / "LICENSE.md").write_text("the same in all")
        (package / "data.bin").write_bytes(b"\0")
    (site / "p1/latin.py").write_bytes(b"caf\xe9")
    (site / "p1/table.py").write_text("x" * (python_corpus.LARGEST + 1))
    (site / "p1-1.0.dist-info").mkdir()
    (site / "p1-1.0.dist-info/README.md").write_text("not of the package")
    (site / "single.py").write_text("x = 1")
    monkeypatch.setattr(sys, "path", [str(site), str(tmp_path / "elsewhere")])
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    return site


def test_what_is_taken(installed, tmp_path, monkeypatch, capsys):
    called = []
    monkeypatch.setattr(python_corpus, "call", lambda *words: called.append([str(word) for word in words]))
    out = tmp_path / "corpus"
    assert python_corpus.main([str(out)]) == 0
    record = json.loads((out / "text/corpus.json").read_text())
    packages = {package["name"]: package for package in record["packages"]}
    assert packages.keys() == {"python", "single", *(f"p{number}" for number in range(40))}
    assert packages["p0"]["files"] == 2 and packages["p1"]["files"] == 1 and packages["python"]["files"] == 1
    lines = (out / "text/train/python.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"text": "import sys\n" * 200, "path": "ast.py"}
    # Those held out are three percent, none of them large, and nothing is in both.
    held = {name: package["bytes"] for name, package in packages.items() if package["held_out"]}
    size = sum(package["bytes"] for package in packages.values())
    assert 0.03 * size <= sum(held.values()) < 0.06 * size and not {"python", "p7"} & held.keys()
    files = {place: {file.stem for file in (out / "text" / place).iterdir()} for place in ("train", "validation")}
    assert files["validation"] == held.keys() and files["train"] == packages.keys() - held.keys()
    assert [words[2] for words in called] == [
        "torchtitan_deltaproduct.data.train_tokenizer", "torchtitan_deltaproduct.data.prepare"
    ]  # fmt: skip
    assert f"held out: {len(held)} packages" in capsys.readouterr().out
    # Made once; another file makes another checksum.
    (installed / "p2/more.py").write_text("y = 2")
    assert python_corpus.collect(out / "text") == record
    assert python_corpus.collect(tmp_path / "again")["sha256"] != record["sha256"]


def test_what_it_did_not_make_is_left_alone(installed, tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own/a.txt").touch()
    with pytest.raises(DataError, match="own was not made by this command"):
        python_corpus.main([str(tmp_path / "own")])
    with pytest.raises(ConfigError, match="--vocab-size is 0"):
        python_corpus.main([str(tmp_path / "new"), "--vocab-size", "0"])
    assert not (tmp_path / "new").exists() and len(list((tmp_path / "own").iterdir())) == 1


def test_too_few_packages(installed, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(DataError, match="1 packages are installed here, too few"):
        python_corpus.collect(tmp_path / "text")
    assert not (tmp_path / "text").exists()
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="a file is in the way; choose another folder"):
        python_corpus.main([str(tmp_path / "file")])
