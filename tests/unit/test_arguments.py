"""Words of a command line, and what a command finds around it: no home, a locale that cannot write a name."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

from tests.toy import REPO
from torchtitan_deltaproduct.arguments import path, shown, text
from torchtitan_deltaproduct.errors import ConfigError


def test_paths_and_text(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert [path(word) for word in ("~/a", "a/~", "wikitext:103")] == ["/home/me/a", "a/~", "wikitext:103"]
    assert text("naïve 日本") == shown("naïve 日本") == "naïve 日本" and shown(os.fsdecode(b"caf\xe9")) == r"caf\xe9"
    with pytest.raises(ConfigError, match=r"'caf\\udce9' is not UTF-8 text"):
        text(os.fsdecode(b"caf\xe9"))


def run(code, **environment):
    start = ["import os, pwd", "from torchtitan_deltaproduct.errors import exit_on_user_error"]
    command = [sys.executable, "-c", "\n".join([*start, *code, "exit_on_user_error(main)"])]
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    return subprocess.run(command, cwd=REPO, env=kept | environment, capture_output=True)


def test_without_home_and_passwd_entry(tmp_path):
    """Caches go to a folder that ends with the process, not to one that is called ~."""
    done = run([
        "def none(uid): raise KeyError(uid)",
        "pwd.getpwuid = none",
        "def main(): print(os.path.expanduser('~'), os.path.isdir(os.path.expanduser('~')))",
    ], TMPDIR=str(tmp_path))  # fmt: skip
    home, there = done.stdout.decode().split()
    assert home.startswith(f"{tmp_path}/torchtitan_deltaproduct-") and there == "True" and not list(tmp_path.iterdir())


def test_what_the_locale_cannot_write_is_escaped():
    done = run(["def main(): print('日'); print(os.fsdecode(b'\\xe9'))"], PYTHONIOENCODING="latin-1", HOME="/")
    assert done.returncode == 0 and done.stdout == b"\\u65e5\n\\udce9\n"


@pytest.mark.parametrize(("rank", "waited", "first"), [("0", 0, "error: wrong"), ("3", 5, "error on rank 3: wrong")])
def test_a_rank_with_an_error_of_its_own_says_so_after_rank_0(rank, waited, first):
    done = run(["import time", "from torchtitan_deltaproduct.errors import ConfigError", "time.sleep = print",
                "def main(): raise ConfigError('wrong')"], RANK=rank, HOME="/")  # fmt: skip
    assert done.returncode == 2 and done.stderr.decode() == f"{first}\n"
    assert done.stdout.decode() == (f"{waited}\n" if waited else "")


@pytest.mark.parametrize("charmap", ["", "GBK", "ISO-8859-1"])
def test_libraries_open_their_files_as_utf8(tmp_path, charmap):
    """torch's own sources, read by the encoding of the locale, ended `plan` and training under GBK."""
    variables = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    if charmap:
        make = ["localedef", "-i", "zh_CN" if charmap == "GBK" else "de_DE", "-f", charmap, str(tmp_path / "here")]
        if not shutil.which("localedef") or subprocess.run(make, capture_output=True).returncode:
            pytest.skip("no locale of that encoding can be made here")
        variables = {"LOCPATH": str(tmp_path), "LC_ALL": "here"}
    said = ["import locale, sys", "before = locale.getencoding()",
            "from torchtitan_deltaproduct.errors import begin_command", "begin_command()",
            "def main(): print(before, open('/dev/null').encoding, sys.getfilesystemencoding())"]  # fmt: skip
    before, now, names = run(said, HOME="/", **variables).stdout.decode().split()
    assert now == "UTF-8" and before == (charmap or "ANSI_X3.4-1968") and names != "utf-8"


@pytest.mark.parametrize("module", ["torchtitan_deltaproduct.plan", "torchtitan_deltaproduct.checkpoint.to_hf",
                                    "eval.generate", "eval.effective_rank"])  # fmt: skip
def test_ctrl_c_while_torch_is_imported_leaves_no_traceback(tmp_path, module):
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n")
    done = subprocess.run(
        [sys.executable, "-m", module, "x", "y"], cwd=REPO, env=os.environ | {"PYTHONPATH": str(tmp_path)},
        # A suite in the background of a shell ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode in (-signal.SIGINT, 130) and "Traceback" not in done.stderr, done.stderr


def test_ctrl_c_later_is_said():
    done = run(["import signal", "signal.signal(signal.SIGINT, signal.SIG_DFL)",
                "def main(): os.kill(os.getpid(), signal.SIGINT)"], HOME="/")  # fmt: skip
    assert (done.returncode, done.stderr) == (130, b"interrupted\n")


@pytest.mark.parametrize(("lines", "told"), [
    (["def main(): open('/nowhere/x')"], b"error: /nowhere/x: No such file or directory\n"),
    (["def main(): open('/')"], b"error: /: Is a directory\n"),
    (["def main(): raise FileNotFoundError('no such task')"], b"error: no such task\n"),
    (["def main():", "    os.dup2(os.open('/dev/full', os.O_WRONLY), 1)", "    print('x' * 99999)"],
     b"error: standard output: No space left on device\n"),
    (["def main():", "    read, write = os.pipe()", "    os.close(read)", "    os.dup2(write, 1); print('x')"], b""),
])  # fmt: skip
def test_files_that_cannot_be_used_leave_no_traceback(lines, told):
    done = run(lines, HOME="/")
    assert (done.returncode, done.stderr) == (1, told)
    if b"/nowhere" in told:
        assert b"Traceback" in run(lines, HOME="/", RANK="0").stderr
