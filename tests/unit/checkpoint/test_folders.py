"""Completeness, selection and retention over real DCP folders, and over random sets of folders."""

import os
import pickle
import shutil
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException

from torchtitan_deltaproduct.checkpoint import CheckpointInfo, latest_complete, retention, scan
from torchtitan_deltaproduct.checkpoint.folders import deletable, delete, retire
from torchtitan_deltaproduct.checkpoint.marker import FORMAT, MARKER, SAVING, Marker, ours, read_marker, wrong_checksums
from torchtitan_deltaproduct.checkpoint.safe_dcp import SafeLoadPlanner, SafeReader, read_index
from torchtitan_deltaproduct.checkpoint.writer import About, MarkedWriter
from torchtitan_deltaproduct.errors import CheckpointError


def state(value: float) -> dict:
    return {"weight": torch.full((4, 3), value, dtype=torch.bfloat16), "train_state": {"step": 7, "betas": (0.9, 0.95)}}


def save(folder, step: int, value: float = 1.0):
    path = folder / f"step-{step}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = MarkedWriter(path, About(step, 1, "interval"), {"config": {"x": 1}})
        dcp.save(state(value), storage_writer=writer, no_dist=True)
    return path


@pytest.fixture
def run(tmp_path):
    for step in (5, 10, 200):
        save(tmp_path, step)
    return tmp_path


def test_scan_orders_by_number_and_ignores_foreign_names(run):
    (run / "step-300-bad").mkdir()
    (run / "best").mkdir()
    assert [(i.step, i.complete) for i in scan(run)] == [(5, True), (10, True), (200, True)]
    assert latest_complete(run).step == 200
    assert scan(run / "nowhere") == []


def test_marker_lists_every_file(run):
    folder = run / "step-10"
    marker = read_marker(folder)
    on_disk = {path.name for path in folder.iterdir()} - {MARKER}
    assert set(marker.files) == on_disk == {".metadata", "__0_0.distcp", "config.json"}
    assert (marker.step, marker.ranks, marker.reason) == (10, 1, "interval")
    assert wrong_checksums(folder, marker) == []


def data_file(path):
    return next(path.glob("*.distcp"))


def flip(path, at=-4):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "config.json"])
def test_a_flipped_bit_is_found(run, name):
    flip(run / "step-10" / name)
    info = next(i for i in scan(run) if i.step == 10)
    assert info.complete and wrong_checksums(info.path, info.marker) == [
        f"{name} is not what was written (its checksum differs)"
    ]
    shares = [wrong_checksums(info.path, info.marker, share, 2) for share in (0, 1)]
    assert sorted(map(len, shares)) == [0, 1]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda p: (p / MARKER).unlink(), "its save never finished"),
        (lambda p: (p / MARKER).write_text((p / MARKER).read_text()[:-20]), "is damaged"),
        (lambda p: (p / MARKER).write_text("[]"), "is damaged"),
        (lambda p: (p / MARKER).write_text((p / MARKER).read_text().replace(": 1,", ": 9,")), "version 9"),
        (lambda p: data_file(p).unlink(), "is missing"),
        (lambda p: (p / ".metadata").unlink(), ".metadata is missing"),
        (lambda p: data_file(p).write_bytes(data_file(p).read_bytes()[:-1]), "bytes of"),
        (retire, "was cut short"),
    ],
)
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(run, damage, reason):
    damage(run / "step-200")
    newest = scan(run)[-1]
    assert not newest.complete and reason in newest.reason
    assert latest_complete(run).step == 10


def test_a_renamed_folder_is_not_another_step(run):
    (run / "step-5").rename(run / "step-400")
    assert "marker says step 5" in scan(run)[-1].reason and latest_complete(run).step == 200


@pytest.mark.parametrize("content", ['{"done": true}', "", f'{{"format": "{FORMAT}", "version": 2}}'])
def test_retention_spares_a_marker_that_does_not_read(run, content):
    """It may be another program's, a later release's, or readable again tomorrow."""
    (run / "step-5" / MARKER).write_text(content)
    assert [info.step for info in deletable(scan(run), 1)] == [10]
    assert ours(run / "step-5") is ("version" in content)


def test_delete_leaves_nothing(run):
    delete(run / "step-10")
    assert [i.step for i in scan(run)] == [5, 200] and not (run / "step-10").exists()
    delete(run / "step-10")


def test_a_folder_that_vanishes_while_it_is_looked_at(run, monkeypatch):
    """As when retention is still deleting what the next save looks at."""
    original, gone = os.stat, run / "step-10"

    def stat(path, **given):
        if gone.name in str(path) and str(path).endswith(".distcp"):
            shutil.rmtree(gone, ignore_errors=True)
        return original(path, **given)

    monkeypatch.setattr(os, "stat", stat)
    assert [i.step for i in scan(run) if i.complete] == [5, 200]
    assert not gone.exists()


STEPS = st.sets(st.integers(0, 400).map(lambda k: 5 * k))


@given(STEPS, st.integers(0, 5), st.sampled_from([0, 10, 50, 500]))
def test_retention(steps, keep, every):
    kept = retention(steps, keep, every)
    newest = sorted(steps)[-keep:] if keep else sorted(steps)
    milestones = {step for step in steps if every and step and step % every == 0}
    assert set(kept) == set(newest) | (milestones if keep else set())
    assert not steps or kept[max(steps)] == "the newest"
    assert all(kept.values())


FOLDERS = st.dictionaries(
    st.integers(0, 30), st.sampled_from(["complete", "torn", "saving", "foreign"]), max_size=12
)


@given(FOLDERS, st.integers(2, 4), st.sampled_from([0, 6]))
def test_deletable_over_random_folders(tmp_path_factory, folders, keep, every):
    """Never a foreign folder, never the last complete one, never a torn one that someone may want to look at."""
    root = tmp_path_factory.mktemp("run")
    found = []
    for step, kind in folders.items():
        path = root / f"step-{step}"
        path.mkdir()
        if kind in ("complete", "torn"):
            (path / MARKER).touch()
        if kind == "saving":
            (path / SAVING).touch()
        marker = Marker(step, 0.0, 1, "interval", {}) if kind in ("complete", "torn") else None
        found.append(CheckpointInfo(step, path, kind == "complete", "", 0, marker))
    gone = {info.step for info in deletable(found, keep, every)}
    complete = {step for step, kind in folders.items() if kind == "complete"}
    assert complete - gone == set(retention(complete, keep, every))
    assert max(complete, default=None) not in gone
    assert not any(folders[step] in ("foreign", "torn") for step in gone)
    newest = max(complete, default=-1)
    assert {s for s, kind in folders.items() if kind == "saving"} & gone == {
        s for s, kind in folders.items() if kind == "saving" and s < newest
    }


def test_safe_loading_round_trip(run):
    target = {"weight": torch.zeros(4, 3, dtype=torch.bfloat16), "train_state": {"step": 0, "betas": None}}
    dcp.load(target, storage_reader=SafeReader(str(run / "step-5")), planner=SafeLoadPlanner(), no_dist=True)
    assert target["train_state"] == {"step": 7, "betas": (0.9, 0.95)}
    assert torch.equal(target["weight"], state(1.0)["weight"])


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_a_hostile_index_is_refused(run, capsys):
    (run / "step-5" / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="builtins.print does not belong"):
        read_index(run / "step-5")
    assert "code ran" not in capsys.readouterr().out


def test_a_hostile_value_is_refused(tmp_path, capsys):
    path = tmp_path / "step-1"
    dcp.save({"x": Evil()}, checkpoint_id=str(path), no_dist=True)
    with pytest.raises(CheckpointException, match="Weights only load failed"):
        dcp.load({"x": None}, storage_reader=SafeReader(str(path)), planner=SafeLoadPlanner(), no_dist=True)
    assert "code ran" not in capsys.readouterr().out
