"""docs/own_text.md: its first two commands, what they print to type next, and that the third can start with it."""

import random
import re
import shlex

import pytest

from tests.toy import REPO
from torchtitan_deltaproduct.config import Environment, load_config
from torchtitan_deltaproduct.data.check import check_data
from torchtitan_deltaproduct.data.text.prepare import main as prepare
from torchtitan_deltaproduct.data.text.train_tokenizer import main as train_tokenizer
from torchtitan_deltaproduct.errors import DataError

PAGE = (REPO / "docs/own_text.md").read_text(encoding="utf-8")


def test_the_three_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    (tmp_path / "book.txt").write_text("\n".join(f"line {rng.getrandbits(60):x} of the book" for _ in range(4000)))
    first, second, third = re.search(r"three commands\n\n```bash\n(.*?)```", PAGE, re.S)[1].splitlines()
    for main, line in ((train_tokenizer, first), (prepare, second)):
        words = shlex.split(line)
        assert words[:2] == ["python", "-m"] and words[2] in main.__module__.replace(".text", "")
        assert main(words[3:]) == 0
    printed = capsys.readouterr().out.splitlines()[-1].strip()
    assert printed in PAGE and printed.startswith(third)
    (tmp_path / "train_configs").symlink_to(REPO / "train_configs")
    plain, pasted = (load_config(shlex.split(line)[2:], Environment()) for line in (third, printed))
    assert check_data(plain) == check_data(pasted) and plain.job.dump_folder == pasted.job.dump_folder
    assert plain.data.paths == pasted.data.paths and plain.model.vocab_size == pasted.model.vocab_size == 2048
    # Without a part that is held out, nothing is validated.
    prepare(["data/all", "--input", "book.txt", "--tokenizer", "data/tokenizer"])
    alone = load_config(shlex.split(capsys.readouterr().out.splitlines()[-1])[2:], Environment())
    assert check_data(alone) and not alone.validation.enable and alone.data.paths == ["data/all"]


def test_what_fails_before_it_wrote_leaves_no_folder(toy, tmp_path):
    """Neither prepare nor the tokenizer; a folder that was there stays, and so does what is in one."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").touch()
    (tmp_path / "there").mkdir()
    for out in ("new", "there"):
        with pytest.raises(DataError, match="no text to train a tokenizer on"):
            train_tokenizer([str(tmp_path / "text"), "--out", str(tmp_path / out)])
        with pytest.raises(DataError, match="There is no file or folder"):
            words = ["--input", str(tmp_path / "nope"), "--tokenizer", str(toy.parent / "tokenizer")]
            prepare([str(tmp_path / out), *words])
        with pytest.raises(DataError, match="has no documents"):
            words = ["--input", str(tmp_path / "text"), "--tokenizer", str(toy.parent / "tokenizer"), "--workers", "1"]
            prepare([str(tmp_path / out), *words])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text", "there"]
    assert not list((tmp_path / "there").iterdir())
