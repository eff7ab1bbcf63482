"""The S3 demonstration with runs of two steps: trained, tested, told, reused; and when its claim counts as shown."""

import re
import signal
import subprocess

import pytest

from launch import state_tracking
from tests.unit.evaluation.words_toy import PARITY, flat, write_toml
from torchtitan_deltaproduct.errors import ConfigError, UserError
from torchtitan_deltaproduct.evaluation.state_tracking.results import Criterion, by_setting


@pytest.fixture(scope="module")
def demonstration(tmp_path_factory):
    """Arguments for two settings, n_h = 2 in [-1, 1] and n_h = 1 in [0, 1]."""
    folder = tmp_path_factory.mktemp("demonstration")
    configs = [write_toml(folder / "S3_n2.toml"), write_toml(folder / "S3_n1.toml", n=1, negative=False)]
    return ["--out", str(folder / "out"), "--words", "20", "--configs", *map(str, configs)]


def test_trains_tells_and_reuses(demonstration, capsys, tmp_path):
    assert state_tracking.main(demonstration) == 1
    said = capsys.readouterr().out
    assert "0 finished already, 2 to train" in said and "S3_n1 seed 1: done" in said
    assert re.search(r"\b2 *│ not solved, 0 of 1 seeds", said), said
    assert "should solve S3 but did not: n_h = 2, [-1, 1], seed 1" in said and "not shown" in said
    assert "@ 32" in said
    assert state_tracking.main(demonstration) == 1
    assert "2 finished already, 0 to train" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="other settings: optimizer.lr: 0.0003 -> 0.1"):
        state_tracking.main([*demonstration, "--optimizer.lr", "0.1"])
    with pytest.raises(ConfigError, match="another model"):
        state_tracking.main([*demonstration, "--model.head_dim", "4"])


def test_what_is_wrong_is_said_before_training(demonstration, tmp_path):
    parity = write_toml(tmp_path / "parity.toml", PARITY, vocab=3)
    with pytest.raises(ConfigError, match="S3"):
        state_tracking.main(["--configs", str(parity), "--out", str(tmp_path / "out")])
    with pytest.raises(ConfigError, match="num_householders"):
        state_tracking.main([*demonstration, "--model.num_householders", "2"])
    assert not (tmp_path / "out").exists()


def test_a_failed_run_shows_its_log_and_ends_the_others(tmp_path, monkeypatch):
    """Processes that end as they should not; the trainer itself is in the test above."""
    config = write_toml(tmp_path / "s3.toml")
    children = []

    def start(run):
        run.folder.mkdir(parents=True)
        command = "echo boom >&2; exit 3" if not children else "sleep 100"
        with run.log.open("w") as log:
            run.process = subprocess.Popen(["sh", "-c", command], stderr=log)
        children.append(run.process)
        return run

    monkeypatch.setattr(state_tracking, "start", start)
    arguments = ["--seeds", "1", "2", "3", "--jobs", "2", "--configs", str(config), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="s3 seed 1 ended with code 3; .*ends:\nboom"):
        state_tracking.main(arguments)
    assert [child.returncode for child in children] == [3, -signal.SIGTERM]


def four(solving=(1.0,), others=(0.3, 0.3, 0.3)):
    runs = [flat(accuracy, seed=seed) for seed, accuracy in enumerate(solving)]
    return by_setting([*runs, flat(others[0], n=1), flat(others[1], n=1, negative=False),
                       flat(others[2], negative=False)])  # fmt: skip


@pytest.mark.parametrize(("settings", "shown", "said"), [
    (four(), True, "shown"),
    (four((1.0, 1.0, 0.5)), True, "should solve S3 but did not"),
    (four((1.0, 0.5)), False, "not shown"),
    (four((0.95,)), False, "95.0% at 128 tokens"),
    (four(others=(1.0, 0.3, 0.3)), False, "should fail but did not clearly"),
    (four(others=(0.3, 0.3, 0.75)), False, "[0, 1], seed 1: 75.0%"),
    (by_setting([flat(1.0)]), False, "nothing is shown"),
])  # fmt: skip
def test_verdict(settings, shown, said):
    found, lines = state_tracking.verdict(settings, Criterion())
    assert found is shown and said in "\n".join(lines)
