"""Record files of any length: what is read does not grow with them, and is what a reader of the whole would see."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchtitan_deltaproduct import history, status
from torchtitan_deltaproduct.files import open_regular
from torchtitan_deltaproduct.history import blocks_from_the_end, ends, of_a_step, overview, read_jsonl
from torchtitan_deltaproduct.titan.records import restore_history


def write(path, steps, every=1000):
    """A record a step and one a validation, the best of which is in the middle."""
    with open(path, "w") as file:
        for step in range(1, steps + 1):
            record = {
                "step": step,
                "loss": 10 / step,
                "lr": 0.0003,
                "tokens": 4096 * step,
                "seconds": 0.5,
                "time": step,
            }
            print(json.dumps(record), file=file)
            if step % every == 0:
                print(json.dumps({"step": step, "validation_loss": abs(step - steps // 2) + 1.0}), file=file)
    return path


@pytest.fixture
def bytes_read(monkeypatch):
    """Counts what `history` reads."""
    read, original = [], history.os.pread

    def pread(handle, size, start):
        read.append(len(data := original(handle, size, start)))
        return data

    monkeypatch.setattr(history.os, "pread", pread)
    return read


def test_what_is_read_does_not_grow(tmp_path, bytes_read):
    sums = []
    for steps in (40_000, 160_000):
        path = write(tmp_path / "metrics.jsonl", steps, every=steps // 40)
        overview(path, validated_every=steps // 40)
        said = restore_history(path, steps - 10, 1e9)
        assert said.startswith("11 records past step") and ends(path, head=0)[-1]["step"] == steps - 10
        sums.append(sum(bytes_read))
        bytes_read.clear()
    assert sums[1] < 1.2 * sums[0] < 0.8 * path.stat().st_size


def test_every_validation_of_a_long_file_is_found(tmp_path):
    path = write(tmp_path / "metrics.jsonl", 60_000)
    records, whole = overview(path, validated_every=1000)
    every = list(filter(of_a_step, read_jsonl(path)))
    assert not whole and len(records) < 0.3 * len(every)
    assert [r for r in records if "validation_loss" in r] == [r for r in every if "validation_loss" in r]
    assert [r["step"] for r in records] == sorted(r["step"] for r in records) and records[-1] == every[-1]
    assert len({json.dumps(record) for record in records}) == len(records)
    said = status.validation(records, every=1000)
    assert "loss 30001.0000 at step 60,000" in said and "best 1.0000 at step 30,000" in said
    assert status.losses([r for r in records if "loss" in r], whole).endswith(" steps read")


@pytest.mark.parametrize("uneven", [False, True])
def test_a_validation_is_found_in_few_looks(tmp_path, bytes_read, uneven):
    """Also where the lines of the second half are three times as long as the others."""
    path = write(tmp_path / "metrics.jsonl", 60_000, every=500)
    if uneven:
        lines = path.read_text().splitlines()
        longer = [line[:-1] + ', "loss_of_a_long_name": 12345678901234567890' * 3 + "}" for line in lines[60_000:]]
        path.write_text("\n".join(lines[:60_000] + longer) + "\n")
    steps = range(500, 60_001, 500)
    with open_regular(path) as file:
        for step in steps:
            found = history.validations_about(file, step, [(0, 0), (path.stat().st_size, 60_001)])
            assert step in {record["step"] for record in found}
        assert not [r for r in history.validations_about(file, 777, [(0, 0), (path.stat().st_size, 60_001)])
                    if r["step"] == 777]  # fmt: skip
    assert len(bytes_read) / len(steps) < (8 if uneven else 4)


def test_of_very_many_validations_some_are_read(tmp_path):
    path = write(tmp_path / "metrics.jsonl", 30_000, every=100)
    records, _ = overview(path, validated_every=100)
    found = [r for r in records if "validation_loss" in r]
    assert len({r["step"] for r in found}) == len(found)  # also of those that two looks meet
    assert history.VALIDATIONS / 2 < len(found) < 300 and found[-1]["step"] == 30_000
    assert f"best of {len(found)} read" in status.validation(records, every=100)


@settings(deadline=None)
@given(st.lists(st.binary(max_size=40).map(lambda line: line.replace(b"\n", b"")), max_size=12), st.booleans())
def test_blocks_make_up_the_file(tmp_path_factory, lines, ended):
    path = tmp_path_factory.mktemp("file") / "x.jsonl"
    content = b"\n".join(lines) + b"\n" * ended
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch, open_regular(path) as file:
        patch.setattr(history, "BLOCK", 16)
        blocks = list(blocks_from_the_end(file))
    assert b"".join(line for _, block in reversed(blocks) for line in block) == content
    assert all(content[start:].startswith(b"".join(block)) for start, block in blocks)


def test_both_ends_have_each_record_once(tmp_path):
    path = write(tmp_path / "metrics.jsonl", 3000)
    every = read_jsonl(path)
    assert ends(path, head=1 << 30) == every and ends(path, tail=1 << 30) == every
    some = ends(path, head=1000, tail=1000)
    assert some[0] == every[0] and some[-1] == every[-1] and 10 < len(some) < 40
    assert ends(tmp_path / "nowhere") == []
