"""`ls` says what there is and why it is kept; `verify` reads it back."""

from dataclasses import replace

import pytest

from tests.unit.checkpoint.test_folders import flip, save
from torchtitan_deltaproduct.checkpoint import ls, verify
from torchtitan_deltaproduct.checkpoint.marker import read_marker, write_marker
from torchtitan_deltaproduct.config.snapshots import read_snapshot, write_snapshot
from torchtitan_deltaproduct.errors import CheckpointError


@pytest.fixture
def run(tmp_path):
    """Steps 10 to 50, the newest torn, 5 left over from a save that was killed; 2 kept, and every 20th."""
    for step in (10, 20, 30, 40, 50):
        save(tmp_path / "checkpoint", step)
    (tmp_path / "checkpoint/step-50/complete.json").write_text("{")
    (tmp_path / "checkpoint/step-5").mkdir()
    (tmp_path / "checkpoint/step-5/.saving").touch()
    for step, loss in ((10, 2.5), (30, 2.25)):
        folder = tmp_path / f"checkpoint/step-{step}"
        write_marker(folder, replace(read_marker(folder), validation_loss=loss))
    settings = {"folder": "checkpoint", "keep_latest_k": 2, "keep_every": 20}
    write_snapshot(tmp_path / "config.json", {"config": {"checkpoint": settings}})
    return tmp_path


def test_ls(run, capsys):
    ls.main([str(run)])
    rows = {int(cells[1]): line for line in capsys.readouterr().out.splitlines() if (cells := line.split("│"))[1:]
            and cells[1].strip().isdigit()}  # fmt: skip
    assert set(rows) == {5, 10, 20, 30, 40, 50}
    for step, said in {
        5: "nothing: goes with the next save", 10: "nothing: goes with the next save", 20: "milestone, every 20 steps",
        30: "one of the newest 2", 40: "the newest", 50: "not by retention",
    }.items():  # fmt: skip
        assert said in rows[step], rows[step]
    assert "not usable: complete.json is damaged" in rows[50] and "has no complete.json" in rows[5]


def test_ls_marks_the_best(run, capsys):
    settings = read_snapshot(run / "config.json")["config"]["checkpoint"] | {"keep_best": 2}
    write_snapshot(run / "config.json", {"config": {"checkpoint": settings}})
    ls.main([str(run)])
    rows = {int(cells[1]): cells for line in capsys.readouterr().out.splitlines() if (cells := line.split("│"))[1:]
            and cells[1].strip().isdigit()}  # fmt: skip
    assert rows[10][-2].strip() == "the best by validation" and rows[10][5].strip() == "2.5000"
    assert rows[30][-2].strip().startswith("one of the newest 2; the best")
    assert rows[20][5].strip() == "" and "validation" not in rows[20][-2]


def test_verify(run, capsys):
    assert verify.main([str(run), "--step", "40"]) == 0
    said = capsys.readouterr()
    assert "step 40: 3 files as they were written" in said.out and not said.err
    flip(run / "checkpoint/step-30/__0_0.distcp")
    assert verify.main([str(run)]) == 1
    said = capsys.readouterr().out
    assert "step 30: NOT USABLE: __0_0.distcp is not what was written" in said
    assert "step 50: NOT USABLE" in said and "step 20: 3 files" in said
    assert verify.main([str(run / "checkpoint/step-20")]) == 0
    with pytest.raises(CheckpointError, match="step-20 is step 20, and step 40 was asked for"):
        verify.main([str(run / "checkpoint/step-20"), "--step", "40"])


def test_verify_shows_its_progress_on_a_terminal(run, monkeypatch):
    """A bar over the bytes of all complete steps: each is told of once."""
    totals, shown = set(), []

    class Bar(verify.Progress):
        def __init__(self, title, total, done):
            totals.add(total)
            super().__init__(title, total, done=done)

        def update(self, done, note=""):
            shown.append(done)

    monkeypatch.setattr(verify, "Progress", Bar)
    assert verify.main([str(run)]) == 1
    files = [file for step in (10, 20, 30, 40) for file in (run / f"checkpoint/step-{step}").iterdir()]
    total = sum(file.stat().st_size for file in files if file.name != "complete.json")
    assert totals == {total} and shown[-1] == total and shown == sorted(shown) and len(shown) >= len(files) - 4


def test_wrong_paths(run, tmp_path):
    for path, said in [(tmp_path / "nowhere", "does not exist"), (run / "config.json", "is not a folder")]:
        with pytest.raises(CheckpointError, match=said):
            ls.main([str(path)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no step-N"):
        ls.main([str(tmp_path / "empty")])
    with pytest.raises(CheckpointError, match="no step-7; steps there: 5, 10"):
        verify.main([str(run), "--step", "7"])
