"""Completeness, selection and retention over real DCP folders, and over random sets of folders."""

import json
import os
import shutil
import threading
import warnings
from dataclasses import replace as replace_fields
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import SavePlanner, default_planner
from torch.distributed.checkpoint.api import CheckpointException

from torchtitan_deltaproduct.checkpoint import CheckpointInfo, folders, latest_complete, marker, retention, scan, writer
from torchtitan_deltaproduct.checkpoint.folders import (
    Retention,
    cut_short,
    deletable,
    delete,
    inspect,
    newest_first,
    retire,
    set_aside,
    was_complete,
)
from torchtitan_deltaproduct.checkpoint.marker import (
    FORMAT,
    MARKER,
    SAVING,
    Marker,
    ours,
    read_marker,
    write_marker,
    wrong_checksums,
)
from torchtitan_deltaproduct.checkpoint.safe_dcp import SafeLoadPlanner, SafeReader, read_index
from torchtitan_deltaproduct.checkpoint.writer import About, MarkedWriter, planner_for
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


@pytest.mark.parametrize(("written", "read"), [(2.5, 2.5), (None, None), (float("nan"), None), ("absent", None)])
def test_the_loss_in_a_marker(run, written, read):
    """Markers of older versions have none; NaN is no loss."""
    path = run / "step-10" / MARKER
    body = json.loads(path.read_text())
    body |= {"validation_loss": written}
    if written == "absent":
        del body["validation_loss"]
    path.write_text(json.dumps(body))
    assert read_marker(run / "step-10").validation_loss == read


def test_what_is_complete_is_not_being_saved(run):
    path = run / "step-200"
    (path / SAVING).touch()
    write_marker(path, read_marker(path))
    assert not (path / SAVING).exists()


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
        (lambda p: write_marker(p, Marker(200, 1e300, 1, "interval", {})), "is damaged"),
        (lambda p: data_file(p).unlink(), "is missing"),
        (lambda p: (p / ".metadata").unlink(), ".metadata is missing"),
        (lambda p: data_file(p).write_bytes(data_file(p).read_bytes()[:-1]), "bytes of"),
        (lambda p: data_file(p).write_bytes(data_file(p).read_bytes() + b"x"), "bytes of"),
        (retire, "was cut short"),
        (lambda p: replace(p / MARKER, os.mkdir), "is damaged"),
        (lambda p: replace(p / MARKER, os.mkfifo), "is damaged"),
        (lambda p: replace(p / ".metadata", os.mkfifo), ".metadata is no file"),
        (lambda p: replace(data_file(p), os.mkdir), "__0_0.distcp is no file"),
        (lambda p: write_marker(p, Marker(200, 0.0, 1, "interval", {})), "does not list .metadata"),
        (lambda p: relist(p, "../step-10/.metadata"), "is no file of this folder"),
        (lambda p: relist(p, "/etc/passwd"), "is no file of this folder"),
        (lambda p: (p / MARKER).write_bytes(b'{"format": ' + b"[" * 100_000), "is damaged"),
        (lambda p: (p / MARKER).write_bytes(b"\xff\xfe"), "is damaged"),
    ],
)
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(run, damage, reason):
    damage(run / "step-200")
    newest = scan(run)[-1]
    assert not newest.complete and reason in newest.reason
    assert latest_complete(run).step == 10


def replace(path, make):
    """Puts something else in the place of a file."""
    path.unlink()
    make(path)


def relist(path, name):
    """Has the marker vouch for one more file."""
    marker = read_marker(path)
    write_marker(path, Marker(200, 0.0, 1, "interval", marker.files | {name: (4, "00")}))


@pytest.mark.parametrize("name", [".metadata", MARKER])
def test_a_pipe_is_not_waited_for(run, name):
    replace(run / "step-10" / name, os.mkfifo)
    with pytest.raises(CheckpointError, match="not a regular file"):
        read_index(run / "step-10") if name == ".metadata" else read_marker(run / "step-10")
    assert not ours(run / "step-10") or name != MARKER


def test_a_folder_that_lost_its_marker_was_a_checkpoint(run):
    (run / "step-5" / MARKER).unlink()
    retire(run / "step-10")
    assert [was_complete(run / f"step-{step}") for step in (5, 10, 200)] == [True, False, True]


def test_a_folder_that_may_not_be_looked_into(run, monkeypatch):
    """It gives way to the step before; alone, it is not trained over; and it is not deleted."""
    gone = run / "step-200"

    def refuse(original):
        def call(path, *given, **more):
            if isinstance(path, str | Path) and gone in Path(path).parents:
                raise PermissionError(13, "Permission denied", str(path))
            return original(path, *given, **more)

        return call

    for name in ("open", "stat", "lstat", "scandir"):
        monkeypatch.setattr(os, name, refuse(getattr(os, name)))
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != gone)
    newest = scan(run)[-1]
    assert (newest.step, newest.complete) == (200, False) and "Permission denied" in newest.reason
    assert latest_complete(run).step == 10
    assert was_complete(gone) and not ours(gone) and not cut_short(gone)
    assert gone not in [info.path for info in deletable(scan(run), 2)]


def test_a_link_is_left_alone(run, tmp_path_factory):
    """Someone moved a checkpoint to another disk: retention and a new save never delete what a link leads to."""
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "step-5"
    (run / "step-5").rename(elsewhere)
    (run / "step-5").symlink_to(elsewhere)
    before = sorted(path.name for path in elsewhere.iterdir())
    assert [(info.step, info.complete) for info in scan(run)] == [(5, True), (10, True), (200, True)]
    assert [info.step for info in deletable(scan(run), 1)] == [10]
    delete(run / "step-5")
    assert not (run / "step-5").exists() and sorted(path.name for path in elsewhere.iterdir()) == before


def test_files_are_hashed_side_by_side(tmp_path, monkeypatch):
    """Four threads meet in four files: one after the other they would wait for ever."""
    meeting = threading.Barrier(4, timeout=20)
    monkeypatch.setattr(marker, "cores", lambda: 8)
    monkeypatch.setattr(marker, "checksum", lambda *_: meeting.wait() and (1, "") or (1, ""))
    listed = Marker(1, 0.0, 1, "interval", {f"{number}.distcp": (1, "") for number in range(4)})
    assert wrong_checksums(tmp_path, listed) == []
    listed.files["3.distcp"] = (1, "00")
    assert wrong_checksums(tmp_path, listed) == ["3.distcp is not what was written (its checksum differs)"]


def test_a_plan_is_made_once(tmp_path, monkeypatch):
    """The second save of the same tensors has the first one's plan, with its own values; other tensors another plan."""
    made, original = [], default_planner.create_default_global_save_plan
    monkeypatch.setattr(
        default_planner, "create_default_global_save_plan", lambda plans: made.append(1) or original(plans)
    )
    states = [state(1.0), state(2.0), state(3.0) | {"more": torch.ones(5)}, state(4.0)]
    for step, saved in enumerate(states):
        writer = MarkedWriter(tmp_path / f"step-{step}", About(step, 1, "interval"))
        dcp.save(saved, storage_writer=writer, planner=planner_for("state"), no_dist=True)
    assert len(made) == 3
    for step, saved in enumerate(states):
        target = {name: torch.zeros_like(v) if isinstance(v, torch.Tensor) else None for name, v in saved.items()}
        target["train_state"] = {"step": 0, "betas": None}
        reader = SafeReader(str(tmp_path / f"step-{step}"))
        dcp.load(target, storage_reader=reader, planner=SafeLoadPlanner(), no_dist=True)
        assert all(torch.equal(target[name], v) for name, v in saved.items() if isinstance(v, torch.Tensor))
        assert read_index(tmp_path / f"step-{step}").state_dict_metadata.keys() >= {"weight", "train_state.step"}
    dcp.save(states[0], storage_writer=writer, planner=planner_for("state, 1 failed"), no_dist=True)
    assert len(made) == 4
    assert set(SavePlanner._cached_save_plan) == set(SavePlanner._cached_metadata) == {"state, 1 failed"}


def test_the_marker_is_written_last(tmp_path, monkeypatch):
    """What fails in `finish`, after the data, leaves no checkpoint: index and settings come before the marker."""

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "write_json", fail)
    with pytest.raises(CheckpointException, match="No space left"):
        save(tmp_path, 5)
    assert {path.name for path in (tmp_path / "step-5").iterdir()} == {".metadata", "__0_0.distcp"}
    assert not scan(tmp_path)[0].complete


def test_the_marker_is_deleted_first(run, monkeypatch):
    original, gone = Path.unlink, []

    def unlink(path, **given):
        if len(gone) == 1:
            raise OSError(5, "Input/output error")
        gone.append(path.name)
        original(path, **given)

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(OSError, match="Input/output error"):
        delete(run / "step-200")
    assert gone == [MARKER] and data_file(run / "step-200").exists()
    assert latest_complete(run).step == 10 and cut_short(run / "step-200")


def test_files_are_as_the_umask_says(tmp_path):
    previous = os.umask(0o022)
    try:
        folder = save(tmp_path, 5)
    finally:
        os.umask(previous)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == dict.fromkeys(
        (".metadata", "__0_0.distcp", "config.json", MARKER), "0o644"
    )


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


@given(STEPS, st.integers(0, 5), st.sampled_from([0, 10, 50, 500]), st.integers(0, 3))
def test_retention(steps, keep, every, count):
    best = sorted(steps, key=lambda step: step % 7)[:count]
    kept = retention(steps, keep, every, best)
    newest = sorted(steps)[-keep:] if keep else sorted(steps)
    milestones = {step for step in steps if every and step and step % every == 0}
    assert set(kept) == set(newest) | (milestones if keep else set()) | set(best)
    assert not steps or kept[max(steps)].startswith("the newest")
    assert all(reason.endswith("the best by validation") == (step in best) for step, reason in kept.items())


FOLDERS = st.dictionaries(st.integers(0, 30), st.sampled_from(["complete", "torn", "saving", "foreign"]), max_size=12)


LOSSES = st.lists(st.sampled_from([None, 2.0, 2.5, 3.0, 3.5]), min_size=31, max_size=31)
"""Of each step."""


@given(FOLDERS, st.integers(2, 4), st.sampled_from([0, 6]), st.integers(0, 2), LOSSES)
def test_deletable_over_random_folders(tmp_path_factory, kinds, keep, every, count, losses):
    """Never a foreign folder, never the last complete one, never a torn one that someone may want to look at."""
    root = tmp_path_factory.mktemp("run")
    found = []
    for step, kind in kinds.items():
        path = root / f"step-{step}"
        path.mkdir()
        if kind in ("complete", "torn"):
            (path / MARKER).touch()
        if kind == "saving":
            (path / SAVING).touch()
        marker = Marker(step, 0.0, 1, "interval", {}, losses[step]) if kind in ("complete", "torn") else None
        found.append(CheckpointInfo(step, path, kind == "complete", "", marker))
    gone = {info.step for info in deletable(found, keep, every, count)}
    complete = {step for step, kind in kinds.items() if kind == "complete"}
    validated = [step for step in complete if losses[step] is not None]
    best = sorted(validated, key=lambda step: (losses[step], step))[:count]
    assert complete - gone == set(retention(complete, keep, every)) | set(best)
    assert max(complete, default=None) not in gone
    assert not any(kinds[step] in ("foreign", "torn") for step in gone)
    newest = max(complete, default=-1)
    assert {s for s, kind in kinds.items() if kind == "saving"} & gone == {
        s for s, kind in kinds.items() if kind == "saving" and s < newest
    }


@settings(deadline=None)
@given(FOLDERS, st.integers(0, 4), st.sampled_from([0, 6]), st.integers(0, 2), LOSSES)
def test_retention_of_a_launch_is_that_of_a_scan(tmp_path_factory, kinds, keep, every, count, losses):
    root = tmp_path_factory.mktemp("run")
    for step, kind in kinds.items():
        path = root / f"step-{step}"
        path.mkdir()
        (path / ".metadata").write_bytes(b"index")
        if kind in ("complete", "torn"):
            size = 5 if kind == "complete" else 6
            write_marker(path, Marker(step, 0.0, 1, "interval", {".metadata": (size, "00")}, losses[step]))
        if kind == "saving":
            (path / SAVING).touch()
    of_launch = Retention(root, keep, every, count)
    for _ in range(2):
        assert {i.step for i in of_launch.surplus()} == {i.step for i in deletable(scan(root), keep, every, count)}


def test_a_milestone_can_be_the_best(tmp_path):
    """Then no other step is kept for its loss; milestones are looked into for that."""
    for step, loss in ((10, 2.0), (15, 2.5), (20, 3.0), (25, 4.0), (30, 4.0)):
        path = save(tmp_path, step)
        write_marker(path, replace_fields(read_marker(path), validation_loss=loss))
    assert [i.step for i in Retention(tmp_path, keep_latest_k=2, keep_every=10, keep_best=1).surplus()] == [15]
    assert [i.step for i in Retention(tmp_path, keep_latest_k=2, keep_every=10, keep_best=2).surplus()] == []


def test_a_folder_is_looked_through_once(tmp_path, monkeypatch):
    """Milestones are kept by their names, and what one save has seen the next does not look at again."""
    for step in range(10, 210, 10):
        save(tmp_path, step)
    seen = []
    monkeypatch.setattr(folders, "inspect", lambda path, step=None: seen.append(step) or inspect(path, step))
    of_launch = Retention(tmp_path, keep_latest_k=2, keep_every=10)
    assert of_launch.surplus() == [] and seen == [200, 190]
    save(tmp_path, 215)
    assert of_launch.surplus() == [] and seen == [200, 190, 215]
    assert next(newest_first(tmp_path)).step == 215 and seen == [200, 190, 215, 215]
    # Without its marker it no longer counts, and the one before takes its place.
    retire(tmp_path / "step-215")
    assert of_launch.surplus() == []
    assert [i.step for i in Retention(tmp_path, keep_latest_k=18).surplus()] == [20, 10]


def test_safe_loading_round_trip(run):
    target = {"weight": torch.zeros(4, 3, dtype=torch.bfloat16), "train_state": {"step": 0, "betas": None}}
    dcp.load(target, storage_reader=SafeReader(str(run / "step-5")), planner=SafeLoadPlanner(), no_dist=True)
    assert target["train_state"] == {"step": 7, "betas": (0.9, 0.95)}
    assert torch.equal(target["weight"], state(1.0)["weight"])


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_a_hostile_value_is_refused(tmp_path, capsys):
    path = tmp_path / "step-1"
    dcp.save({"x": Evil()}, checkpoint_id=str(path), no_dist=True)
    with pytest.raises(CheckpointException, match="Weights only load failed"):
        dcp.load({"x": None}, storage_reader=SafeReader(str(path)), planner=SafeLoadPlanner(), no_dist=True)
    assert "code ran" not in capsys.readouterr().out


def test_folders_set_aside_within_a_second_have_names_of_their_own(tmp_path):
    names = []
    for _ in range(3):
        (tmp_path / "step-8").mkdir()
        names.append(set_aside(tmp_path / "step-8", "rewound").name)
    assert names == ["step-8.rewound-1", "step-8.rewound-2", "step-8.rewound-3"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
