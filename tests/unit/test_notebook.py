"""The notebook of docs/ runs from its first cell to its last, on a model that has hardly been trained."""

import json
import subprocess

import matplotlib
import matplotlib.pyplot as plt

from tests.processes import start
from tests.toy import REPO


def test_every_cell_runs(tmp_path, monkeypatch, capsys):
    cells = json.loads((REPO / "docs/inside_a_model.ipynb").read_text())["cells"]
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    for long, short in (("STEPS = 1200", "STEPS = 3"), ('"outputs/inside_S3"', repr(str(tmp_path / "run")))):
        assert code.count(long) == 1
        code = code.replace(long, short)
    shown = []

    def train(command, check, capture_output):
        assert start(command[1:], tmp_path / "log").wait() == 0, (tmp_path / "log").read_text()

    monkeypatch.chdir(REPO / "docs")
    monkeypatch.setattr(subprocess, "run", train)
    monkeypatch.setattr(plt, "show", lambda: shown.append(plt.gcf()))
    backend = matplotlib.get_backend()
    plt.switch_backend("agg")
    try:
        exec(compile(code, "inside_a_model.ipynb", "exec"), {"__name__": "__main__"})
    finally:
        plt.close("all")
        plt.switch_backend(backend)
    said = capsys.readouterr().out
    assert len(shown) == 3 and "step 3 - 83920 parameters, 8 heads" in said
    assert said.count("(0 1 2)") == 8 and "state of a sequence: 2048 numbers" in said
