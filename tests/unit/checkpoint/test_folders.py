"""Completeness, selection and retention over real DCP folders."""

import pickle
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.api import CheckpointException

from torchtitan_deltaproduct.checkpoint import latest_complete, scan, stale_steps
from torchtitan_deltaproduct.checkpoint.folders import delete, retire
from torchtitan_deltaproduct.checkpoint.safe_dcp import SafeLoadPlanner, SafeReader, read_index
from torchtitan_deltaproduct.errors import CheckpointError


def state(value: float) -> dict:
    return {"weight": torch.full((4, 3), value, dtype=torch.bfloat16), "train_state": {"step": 7, "betas": (0.9, 0.95)}}


def save(folder, step: int, value: float = 1.0):
    path = folder / f"step-{step}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state(value), checkpoint_id=str(path), no_dist=True)
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


def data_file(path):
    return next(path.glob("*.distcp"))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda p: (p / ".metadata").unlink(), "has no .metadata"),
        (lambda p: (p / ".metadata").write_bytes((p / ".metadata").read_bytes()[:-20]), "cannot be read"),
        (lambda p: data_file(p).unlink(), "is missing"),
        (lambda p: data_file(p).write_bytes(data_file(p).read_bytes()[:-1]), "bytes of"),
        (retire, "has no .metadata"),
    ],
)
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(run, damage, reason):
    damage(run / "step-200")
    newest = scan(run)[-1]
    assert not newest.complete and reason in newest.reason
    assert latest_complete(run).step == 10


def test_delete_leaves_nothing(run):
    delete(run / "step-10")
    assert [i.step for i in scan(run)] == [5, 200]


@given(st.sets(st.integers(0, 10_000)), st.integers(0, 5))
def test_retention_keeps_the_newest(steps, keep):
    gone = stale_steps(steps, keep)
    kept = steps - set(gone)
    assert len(kept) == (min(keep, len(steps)) if keep else len(steps))
    assert not gone or not kept or max(gone) < min(kept)


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
