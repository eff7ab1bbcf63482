"""The checks find what is wrong, and name the fix."""

import importlib.metadata
import subprocess
import sys

import pytest

from tests.toy import REPO
from torchtitan_deltaproduct import doctor


def test_this_machine(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "torchtitan_deltaproduct.doctor", "--out", str(tmp_path)],
        cwd=REPO, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line[:4].strip() in (doctor.GOOD, doctor.NOTE)]
    assert len(lines) == 10 and "nothing stands in the way" in done.stdout
    assert "said hello" in done.stdout and "output and gradients beside float64" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "version", "status", "said"), [
    ("torchtitan", "0.3.0", doctor.BAD, "tested: 0.2.2 to 0.2.2"),
    ("torch", "2.10.1", doctor.NOTE, "torch 2.10.1 (tested: 2.11 to 2.13)"),
    ("torch", "2.11.0+cu130", doctor.GOOD, "torch 2.11.0+cu130"),
    ("datasets", "6.0", doctor.NOTE, "datasets 6.0"),
])  # fmt: skip
def test_versions(monkeypatch, name, version, status, said):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda other: version if other == name else real(other))
    finding = doctor.versions()
    assert finding.status == status and said in finding.text


def test_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert doctor.compiler().status == doctor.BAD and "apt-get install gcc" in doctor.compiler().fix
    assert doctor.slurm().status == doctor.NOTE
    (tmp_path / "file").touch()
    assert doctor.output(tmp_path / "file").status == doctor.BAD
    monkeypatch.setattr(doctor, "ROOM", 1e18)
    assert doctor.output(tmp_path).status == doctor.NOTE
    assert doctor.output(tmp_path / "a/b/c").status == doctor.NOTE and not (tmp_path / "a").exists()


def test_a_wrong_operator_is_found(monkeypatch):
    from torchtitan_deltaproduct import ops

    right = ops.gated_delta_product
    monkeypatch.setattr(ops, "gated_delta_product", lambda *given, **named: [1.01 * right(*given, **named)[0], None])
    assert doctor.operator().status == doctor.BAD


def test_wrong_gradients_of_a_compiled_operator_are_found(monkeypatch):
    """As torch 2.11 made them in float32 of a function whose output went through a cast that changes nothing."""
    import torch

    def without_gradients(function, **_options):
        return lambda q, k, v, beta: function(q.detach(), k, v, beta) + 0 * q.sum()

    assert doctor.compiler().status == doctor.GOOD
    monkeypatch.setattr(torch, "compile", without_gradients)
    finding = doctor.compiler()
    assert finding.status == doctor.BAD and "off by 1.0e+00, at most 1e-04" in finding.text and "torch" in finding.fix


def test_a_check_that_breaks_is_a_finding():
    def check():
        raise RuntimeError("libcuda.so\nnot found")

    finding = doctor.guarded(check)
    assert (finding.status, finding.name, finding.text) == (doctor.BAD, "check", "RuntimeError: libcuda.so")
