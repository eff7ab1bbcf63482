"""Progress: a bar on a terminal, nothing or a line every ten seconds elsewhere."""

import contextlib
import os
import pty
import subprocess
import sys

import pytest

from tests.toy import REPO
from torchtitan_deltaproduct import progress
from torchtitan_deltaproduct.progress import Progress

JOB = """
from torchtitan_deltaproduct.progress import Progress
with Progress("[red]read", 2_000_000, "tokens") as progress:
    for _ in range(10):
        progress.advance(100_000)
        print("out")
"""


@pytest.fixture
def clock(monkeypatch):
    """The time, which the test sets."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_where_they_are_asked_for(clock, capsys):
    with Progress("tokenize", 30_100_000, done=100_000, lines=True) as loud, Progress("read", 10, "tokens") as silent:
        clock[0] += 5
        loud.update(10_100_000)
        clock[0] += 5
        loud.update(12_300_000, "1.2 M tokens")
        silent.advance(5)
    said = capsys.readouterr()
    assert said.err == "tokenize  41%  12.3 MB of 30.1 MB, 1.22 MB/s, 0:00:14 left, 1.2 M tokens\n" and not said.out


def test_rates_of_tokens(clock):
    job = Progress("read", 5_000_000, "tokens")
    assert job.numbers("") == "0 of 5 M tokens, 0 tokens/s, time left unknown"
    clock[0] += 400
    job.advance(1_000_000)
    job.advance(280_000)
    assert job.numbers("") == "1.28 M of 5 M tokens, 3,200 tokens/s, 0:19:22 left" and job.seconds == 400


def test_a_bar_on_a_terminal_leaves_standard_output_alone():
    """The title is no markup, and what a program prints does not go to standard error."""
    terminal, other_end = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    done = subprocess.run([sys.executable, "-c", JOB], stdout=subprocess.PIPE, stderr=other_end, env=environment,
                          cwd=REPO, check=True)  # fmt: skip
    os.close(other_end)
    shown = b""
    # A terminal hands over what it holds in parts, and after the last one an error.
    with contextlib.suppress(OSError), open(terminal, "rb", buffering=0) as file:
        while part := file.read(1 << 16):
            shown += part
    shown = shown.decode()
    assert done.stdout == b"out\n" * 10
    assert "[red]read" in shown and "━" in shown and "1 M of 2 M tokens" in shown
