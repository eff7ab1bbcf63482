"""What `status` says of runs in every state, from their files alone."""

import json
import re

import pytest
from rich.console import Console

from torchtitan_deltaproduct import status
from torchtitan_deltaproduct.errors import UserError

NOW = 1_795_600_000.0


def write(run, records=(), events=(), beat=None, steps=100):
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records) + '{"step": 9, "lo')
    (run / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (run / "config.json").write_text(json.dumps({"config": {"training": {"steps": steps}}}))
    if beat is not None:
        (run / "heartbeat.json").write_text(json.dumps(beat))
    return run


def show(run) -> str:
    console = Console(width=200, highlight=False, record=True)
    console.print(status.report(run, NOW))
    return console.export_text()


def step(number, loss=3.0, **more):
    return {"step": number, "loss": loss, "tokens": 1000 * number, "tokens_per_second": 500.0, "seconds": 2.0} | more


LAUNCH = {"event": "launch", "time": NOW - 7200, "step": 0, "ranks": 8, "host": "n1", "slurm_job": "17"}
AGAIN = {"event": "launch", "time": NOW - 600, "step": 40, "ranks": 16, "host": "n2", "slurm_job": None}
SAVE = {"event": "save", "time": NOW - 300, "step": 40, "seconds": 3.21, "reason": "interval"}
SKIP = {"event": "skipped_step", "time": NOW - 400, "step": 31, "samples": [1, 2]}
BEAT = {"time": NOW - 3, "step": 50, "after": "step", "host": "n2", "pid": 1}


def stop(reason, detail="", saved=True, **more):
    return {"event": "stop", "time": NOW - 660, "step": 40, "reason": reason, "detail": detail, "saved": saved} | more


def test_a_running_run(tmp_path):
    records = [step(n, 10 / n, mfu=0.25) for n in range(1, 51)]
    records.insert(20, {"step": 20, "validation_loss": 0.7, "validation_perplexity": 2.0})
    records.append({"step": 50, "validation_loss": 0.9, "validation_perplexity": 2.46})
    events = [LAUNCH, SKIP, SAVE, stop("signal", "SIGUSR1"), AGAIN, {"event": "save_failed", "step": 45}, SAVE]
    said = show(write(tmp_path / "run", records, events, BEAT))
    for text in ("running, heartbeat 3 s ago on n2 after the step", "50 of 100 (50.0%), 50,000 tokens", "█",
                 "lowest 0.2000", "loss 0.9000 at step 50, perplexity 2.46; best 0.7000 at step 20",
                 "500 tokens/s, 2 s a step, MFU 25.0%, 1 min to go",
                 "1 x skipped step (last at step 31); 1 x save failed (last at step 45)",
                 "step 40, complete with checksums 5 min ago, took 3.2 s (interval)",
                 "from step 0 on 8 ranks of n1, SLURM job 17, SIGUSR1 at step 40",
                 "from step 40 on 16 ranks of n2"):  # fmt: skip
        assert text in said, (text, said)


@pytest.mark.parametrize(("events", "beat", "said"), [
    ([LAUNCH, stop("finished")], None, "finished 11 min ago"),
    ([LAUNCH, stop("signal", "SIGTERM")], None, "stopped on SIGTERM 11 min ago, everything saved"),
    ([LAUNCH, stop("walltime", saved=False)], None, "stopped at its walltime 11 min ago, not saved"),
    ([LAUNCH, stop("failed", "OSError: [x] no")], None, "failed 11 min ago: OSError: [x] no"),
    ([LAUNCH, stop("hung", "no sign of life for 9 s")], BEAT, "hung 11 min ago: no sign"),
    ([LAUNCH], BEAT | {"time": NOW - 4000}, "silent: no heartbeat for 1 h 6 min, and no word of a stop"),
    ([LAUNCH], None, "silent: no heartbeat yet"),
    ([LAUNCH, AGAIN], BEAT, "8 ranks of n1, SLURM job 17, killed"),
])  # fmt: skip
def test_states(tmp_path, events, beat, said):
    assert said in show(write(tmp_path / "run", [step(1)], events, beat))


def test_odd_files(tmp_path):
    assert "silent" in show(write(tmp_path / "run", [], [LAUNCH]))
    (tmp_path / "run/config.json").write_text("{")
    (tmp_path / "run/heartbeat.json").write_text("")
    assert "none yet" in show(tmp_path / "run")
    assert "nan" not in show(write(tmp_path / "run", [step(1, None), step(2, None)], [LAUNCH]))
    broken = {"validation_loss": None, "validation_perplexity": None}
    said = show(write(tmp_path / "run", [step(1), {"step": 1, **broken}, {"step": 2, **broken}], [LAUNCH]))
    assert "loss not finite at step 2" in said and "best" not in said
    records = [step(1), {"step": 1, "validation_loss": 0.5}, {"step": 2, **broken}]
    assert "not finite at step 2; best 0.5000" in show(write(tmp_path / "run", records, [LAUNCH]))
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match="dump_folder of a run"):
            status.report(path, NOW)


@pytest.mark.parametrize(("seconds", "said"), [
    (42, "42 s"), (200, "3 min"), (19200, "5 h 20 min"), (183600, "2 d 3 h"),
])  # fmt: skip
def test_ago(seconds, said):
    assert status.ago(seconds) == said


def test_any_flipped_bit_leaves_a_report(tmp_path):
    """Whatever a line has become, it is left out or shown: 1 bit of each byte of the four files."""
    records = [step(1, memory_gib=1.5), {"step": 1, "validation_loss": 0.7}, step(2, lost_records=1)]
    run = write(tmp_path / "run", records, [LAUNCH, SKIP, SAVE, stop("failed", "[x] fault"), AGAIN, SAVE], BEAT)
    for name in ("metrics.jsonl", "events.jsonl", "config.json", "heartbeat.json"):
        content = (run / name).read_bytes()
        for at in range(len(content)):
            (run / name).write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
            status.report(run, NOW)
        (run / name).write_bytes(content)
    assert "1 records lost" in show(run)


def test_folders_that_are_no_runs_are_left_out(tmp_path, capsys):
    """As in `status outputs/*`, where evaluations lie beside the runs."""
    run = write(tmp_path / "run", [step(1)], [LAUNCH, stop("finished")])
    (tmp_path / "evals").mkdir()
    status.main([str(tmp_path / "evals"), str(run)])
    said = capsys.readouterr()
    assert "finished" in said.out and f"left out: {tmp_path}/evals has neither metrics.jsonl nor" in said.err
    with pytest.raises(UserError, match="has neither"):
        status.main([str(tmp_path / "evals")])


def table(*runs, width=200) -> list[list[str]]:
    """The cells of each line; those left empty are missing."""
    console = Console(width=width, highlight=False, record=True)
    console.print(status.reports(list(runs), NOW, width)[0])
    return [re.split(" {2,}", line.strip()) for line in console.export_text().splitlines()]


def test_of_several_runs_a_line_each(tmp_path):
    records = [step(n, 10 / n) for n in range(1, 51)] + [{"step": 50, "validation_loss": 0.9}]
    records.insert(20, {"step": 20, "validation_loss": 0.7})
    going = write(tmp_path / "a[b]", records, [LAUNCH], BEAT)
    done = write(tmp_path / "done", [step(100)], [LAUNCH, stop("signal", "SIGTERM: x")])
    new = write(tmp_path / "new", [], [LAUNCH])
    mean = sum(10 / n for n in range(31, 51)) / 20
    header, *rows = table(going, done, new)
    assert header == ["run", *status.ROW]
    assert [row[:1] + row[1:2] for row in rows] == [
        ["a[b]", "running"],
        ["done", "stopped on SIGTERM"],
        ["new", "silent"],
    ]
    assert rows[0][2:] == ["50/100", f"█▃▂▂▁▁▁▁▁▁▁▁ {mean:.4f}", "0.9000", "0.7000", "500", "1 min"]
    assert rows[1][2:] == ["100/100", "▁ 3.0000", "500"]
    header, *rows = table(going, done, width=80)
    assert header == ["run", "state", "step", "loss", "validation", "to go"]
    assert rows[0] == ["a[b]", "running", "50/100", f"{mean:.4f}", "0.9000", "1 min"]


@pytest.mark.parametrize(("value", "said"), [("1e999", "inf"), ("NaN", "nan"), ("-Infinity", "-inf")])
def test_numbers_that_are_not_finite(tmp_path, value, said):
    """As another program or an older version may have written them."""
    good = write(tmp_path / "good", [step(1)], [LAUNCH])
    bad = write(tmp_path / "bad", [step(1), {"step": 1, "validation_loss": 0.5}], [LAUNCH])
    line = '{"step": 2, "loss": X, "seconds": X, "tokens_per_second": X, "tokens": X, "goodput": X}\n'
    newest = '{"step": 2, "validation_loss": X, "validation_perplexity": X}\n'
    (bad / "metrics.jsonl").write_text((bad / "metrics.jsonl").read_text().partition('{"step": 9')[0]
                                       + (line + newest).replace("X", value))  # fmt: skip
    _, first, second = table(good, bad)
    assert first[:4] == ["good", "silent", "1/100", "▁ 3.0000"]
    assert second[:6] == ["bad", "silent", "2/100", f"▁ {said}", said, "0.5000"]
    text = show(bad)
    assert f"{said} over the last 2 steps, lowest 3.0000" in text and f"loss {said} at step 2" in text
    assert "best 0.5000 at step 1" in text and "500 tokens/s" in text


def test_watch_looks_again_until_it_is_ended(tmp_path, capsys, monkeypatch):
    run, waits = write(tmp_path / "run", [step(1)], [LAUNCH]), []

    def sleep(seconds):
        waits.append(seconds)
        write(run, [step(1), step(2)], [LAUNCH])
        if len(waits) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(status.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        status.main([str(run), "--watch", "2.5"])
    said = capsys.readouterr().out
    assert waits == [2.5, 2.5] and "1 of 100" in said and "2 of 100" in said and "\x1b" not in said
    for wrong in ("0", "nan", "often"):
        with pytest.raises(UserError, match="expected seconds, from 1"):
            status.main([str(run), "--watch", wrong])
