"""`compare`: many runs in one table and one picture, from their files alone."""

import json
import math
import subprocess
import sys

import matplotlib
import pytest
from scipy.stats import t

from tests.unit.test_status import LAUNCH, NOW, stop
from torchtitan_deltaproduct import compare
from torchtitan_deltaproduct.compare import figures, groups
from torchtitan_deltaproduct.errors import ConfigError, UserError
from torchtitan_deltaproduct.models.args import DeltaProductArgs
from torchtitan_deltaproduct.models.counts import training_flops_per_token
from torchtitan_deltaproduct.runs import read_run

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2, "head_dim": 16}


def make(folder, n_h=2, seed=1, loss=2.0, steps=20, validated=True, **tables):
    """A run of `steps` steps of 100 tokens and 2 seconds, with a pause of an hour after the first half."""
    folder.mkdir(parents=True)
    config = {"job": {"dump_folder": str(folder)}, "model": SMALL | {"num_householder": n_h}, "debug": {"seed": seed},
              "training": {"steps": steps}, "validation": {"freq": 5}} | tables  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"config": config, "derived": {"world_size": 8}}))
    records, events, now = [], [LAUNCH | {"time": NOW}], NOW
    for step in range(1, steps + 1):
        now += 2
        records.append({"step": step, "loss": loss + 1 / step, "tokens": 100 * step, "tokens_per_second": 50.0,
                        "seconds": 2.0, "goodput": 0.5, "time": now})  # fmt: skip
        if validated and step % 5 == 0:
            value = loss + abs(step - 10) / 10
            records.append({"step": step, "validation_loss": value, "validation_bits_per_byte": value / 2, "time": now})
        if step == steps // 2:
            events.append(stop("signal", "SIGUSR1", time=now, step=step))
            now += 3600
            events.append(LAUNCH | {"time": now, "step": step})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return folder


def as_json(capsys, *words) -> dict:
    compare.main([*map(str, words), "--json"])
    return json.loads(capsys.readouterr().out)


def test_the_numbers_of_a_run(tmp_path, capsys):
    (run,) = as_json(capsys, make(tmp_path / "a"))["runs"]
    flops = 2000 * training_flops_per_token(DeltaProductArgs(**SMALL, num_householder=2))
    expected = {
        "run": "a", "step": 20, "steps": 20, "validation_loss": 3.0, "validation_step": 20, "best_validation_loss": 2.0,
        "best_step": 10, "bits_per_byte": 1.5, "tokens": 2000, "tokens_per_second": 50.0, "goodput": 0.5, "seconds": 40,
        "flops": flops, "problems": [], "settings": {},
    }  # fmt: skip
    assert {name: run[name] for name in expected} == expected
    assert run["train_loss"] == pytest.approx(2 + sum(1 / n for n in range(1, 21)) / 20)


def test_groups_over_seeds(tmp_path, capsys):
    losses = {1: 2.0, 2: 2.1, 3: 2.3}
    for seed, loss in losses.items():
        make(tmp_path / f"one-{seed}", n_h=1, seed=seed, loss=loss, checkpoint={"interval": seed})
        make(tmp_path / f"two-{seed}", n_h=2, seed=seed, loss=loss - 1) if seed < 3 else None
    found = as_json(capsys, *sorted(tmp_path.iterdir()))
    assert found["runs"][0]["settings"] == {"model.num_householder": 1, "debug.seed": 1}
    best, other = found["groups"]
    assert (best["name"], best["seeds"], best["best_validation_loss"][1]) == ("num_householder 2", 2, None)
    assert other["runs"] == ["one-1", "one-2", "one-3"] and other["seeds"] == 3
    mean, half = other["best_validation_loss"]
    deviation = math.sqrt(sum((x - mean) ** 2 for x in losses.values()) / 2)
    assert mean == pytest.approx(6.4 / 3) and half == pytest.approx(
        t.ppf(0.975, 2) * deviation / math.sqrt(3), rel=1e-3
    )


def test_a_copy_is_no_other_seed(tmp_path, capsys):
    runs = [make(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 2), ("copy", 1))]
    (group,) = as_json(capsys, *runs)["groups"]
    assert (group["seeds"], group["best_validation_loss"], len(group["runs"])) == (2, [2.0, None], 3)
    read = list(map(read_run, runs))
    said = [figures.group_label(groups.Group("x", part, [])) for part in (read, read[::2], read[:2])]
    assert said == ["x (3 runs of 2 seeds, no interval)", "x (2 runs of 1 seed, no interval)",
                    "x (2 seeds, no interval)"]  # fmt: skip


def test_means_are_of_steps_that_all_seeds_have_made(tmp_path, capsys):
    """Beside an unfinished seed the losses of the others are those of then, and it is told."""
    runs = [make(tmp_path / "1", seed=1), make(tmp_path / "2", seed=2, steps=10, training={"steps": 20})]
    (group,) = as_json(capsys, *runs)["groups"]
    assert group["step"] == 10 and group["validation_loss"] == [2.0, None]
    assert group["train_loss"][0] == pytest.approx(2 + sum(1 / n for n in range(1, 11)) / 10)
    compare.main([*map(str, runs), "--out", str(tmp_path / "x.png")])
    said = capsys.readouterr().out
    assert "10 * │" in said and "* some of its runs are farther" in said
    part = groups.Group("x", list(map(read_run, runs)), [])
    assert figures.group_label(part) == "x (2 seeds, no interval, to step 10)"
    # Of a history that was not read whole there are but samples, far apart.
    part.runs[0].whole = False
    assert part.spread()["train_loss"] == part.spread()["validation_loss"] == (None, None)
    assert max(figures.mean_curve([figures.curve(run, True, 1) for run in part.equal_runs()], 0, 2))[0] == 10


def test_groups_are_told_apart_in_a_picture(tmp_path):
    """Also where all that differs is long and begins alike: by what is each one's own."""
    settings = [(1, "one", 0.001), (2, "two", 0.001), (1, "one", 0.002)]
    folders = [make(tmp_path / f"{lr}-{n_h}-{seed}", n_h, seed, data={"paths": [f"a/long/path/to/{name}"]},
                    optimizer={"lr": lr}) for n_h, name, lr in settings for seed in (1, 2)]  # fmt: skip
    runs = list(map(read_run, folders))
    grouped = groups.grouped(runs, [run.path.name for run in runs], groups.differences(runs))
    assert len(grouped[0].name) > 44
    assert [figures.group_label(group).partition(" (")[0] for group in grouped] == [
        "num_householder 1, lr 0.001", "num_householder 2, lr 0.001", "num_householder 1, lr 0.002",
    ]  # fmt: skip


def test_the_range_of_losses():
    """Of two validations both are seen, and intervals are in it; of many the beginning is not."""
    assert figures.loss_range([[(1, 5.0, None), (20, 2.0, None)]]) == (2.0 - 0.18, 5.0 + 0.18)
    low, high = figures.loss_range([[(1, 3.0, 1.0), (2, 3.0, 1.0), (3, 3.0, 1.0)]])
    assert low < 2 and high > 4
    many = [(1, 9.0, None), *((step, 2.0, None) for step in range(10, 50))]
    assert figures.loss_range([many])[1] < 3


def test_table_and_picture(tmp_path, capsys):
    for seed in (1, 2, 3):
        make(tmp_path / f"runs/{seed}", seed=seed)
    make(tmp_path / "runs/x$y$", n_h=4, validated=False)
    compare.main([*map(str, (tmp_path / "runs").iterdir()), "--out", str(tmp_path / "x.png")])
    said = capsys.readouterr()
    for text in ("num_householder 2, seed 3", "2.0000 (10)", "50.0%", "40 s", "3 │"):
        assert text in said.out, said.out
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG") and "picture: " in said.err


@pytest.mark.parametrize(("out", "said"), [
    ("x.foo", r"ends in one of: .*\.pdf, .*\.png"), ("x", "ends in one of"),
    ("no/x.png", "there is no folder .*/no; make"), ("folder.png", "is a folder"),
])  # fmt: skip
def test_a_picture_that_cannot_be_written_is_refused_first(tmp_path, capsys, out, said):
    run = make(tmp_path / "a")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ConfigError, match=said) as raised:
        compare.main([str(run), "--out", str(tmp_path / out)])
    assert not capsys.readouterr().out and len(str(raised.value).splitlines()) == 1


def test_names_of_settings_that_differ(tmp_path):
    """What is no difference, and keys that say nothing without their table or are in several."""

    def settings(name, **more):
        own = {"optimizer": {"name": name, "lr": 1e-3}, "data": {"paths": [name], "seq": 1},
               "validation": {"enable": name == "a", "freq": len(name), "prompts": [name], "sample_tokens": len(name),
                              "seq": len(name)}}  # fmt: skip
        return read_run(make(tmp_path / name, n_h=len(name), **own))

    changed = groups.differences([settings("a"), settings("bc")])
    assert changed == {"model.num_householder": "num_householder", "optimizer.name": "optimizer.name",
                       "data.paths": "data.paths", "validation.seq": "validation.seq"}  # fmt: skip


def test_runs_that_are_not_drawn_are_named(tmp_path):
    """In a title; and a run with a long list of settings by its own name."""
    long = make(tmp_path / "long", model=SMALL | {f"option_{i}": i for i in range(9)})
    other = make(tmp_path / "other", model=SMALL | {f"option_{i}": -i for i in range(9)})
    blind = make(tmp_path / "blind", validated=False)
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        compare.main([*map(str, (long, other, blind)), "--out", str(tmp_path / "x.svg")])
    text = (tmp_path / "x.svg").read_text()
    assert "not drawn, without validations: blind" in text and ">long<" in text and ">other<" in text


def test_places_on_the_axes(tmp_path):
    """A validation stands at the tokens, seconds and FLOPs of its step; the pause between launches is left out."""
    run = read_run(make(tmp_path / "a"))
    points = figures.curve(run, validated=True, width=1)
    flops = run.flops_per_token
    assert points[10] == (2.0, (10, 1000, 20, 1000 * flops)) and points[15] == (2.5, (15, 1500, 30, 1500 * flops))
    assert figures.mean_curve([points, points], axis=1, seeds=2)[1] == (1000, 2.0, None)
    assert len(figures.curve(run, validated=False, width=10)) == 3


def test_the_time_before_a_refused_launch_is_not_of_running(tmp_path):
    """It records a stop at no step, without a launch; one that fails while it starts has a launch before its stop."""
    run = make(tmp_path / "a")
    end = NOW + 3640
    events = [stop("failed", time=end + day * 86400, step=None) for day in (1, 2)]
    events += [LAUNCH | {"time": end + 259200}, stop("failed", time=end + 259207, step=None)]
    with (run / "events.jsonl").open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)
    assert max(read_run(run).seconds.values()) == 47


@pytest.mark.parametrize(("name", "content", "said"), [
    ("config.json", None, "config.json: not there"),
    ("config.json", b"{", "config.json: is not a config snapshot"),
    ("config.json", b'{"config": {"model": {"hidden_size": "x", "vocab_size": 1e999}, "training": 3}}', ""),
    ("metrics.jsonl", None, "metrics.jsonl: not there"),
    ("metrics.jsonl", b"", "metrics.jsonl: empty"),
    ("metrics.jsonl", b'{"step": 1, "loss": 2.5}\n\xff\n{"st', "metrics.jsonl: 1 of 2 lines damaged, left out"),
    ("metrics.jsonl", b'{"step": 1, "loss": NaN, "tokens": Infinity, "time": 1e999}\n', ""),
    ("metrics.jsonl", b'{"step": 0, "loss": 1, "tokens": 5, "time": -1}\n' + b'{"step": -4, "loss": 1}\n', ""),
    ("events.jsonl", None, "events.jsonl: not there"),
    ("events.jsonl", b"[1]\n", "events.jsonl: 1 of 1 lines damaged, left out"),
])  # fmt: skip
def test_damage_is_named(tmp_path, capsys, name, content, said):
    good, bad = make(tmp_path / "good", n_h=1), make(tmp_path / "bad")
    (bad / name).unlink()
    if content is not None:
        (bad / name).write_bytes(content)
    compare.main([str(bad), str(good), str(tmp_path / "nowhere"), "--out", str(tmp_path / "x.png")])
    errors = capsys.readouterr().err
    assert f"left out: {tmp_path}/nowhere is not a folder" in errors and "picture: " in errors
    assert f"bad: {said}" in errors if said else "bad:" not in errors, errors


def test_nothing_to_compare(tmp_path, capsys):
    with pytest.raises(UserError, match="is not a folder"):
        compare.main([str(tmp_path / "nowhere")])
    run = make(tmp_path / "a", steps=0)
    compare.main([str(run), str(run), "--out", str(tmp_path / "x.png")])
    said = capsys.readouterr()
    assert "no run has a loss yet" in said.err and not (tmp_path / "x.png").exists() and said.out.count("│ a *") == 1


def test_of_long_histories_a_part_is_read(tmp_path):
    run = make(tmp_path / "a", steps=20_000, validated=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20000, "validation_loss": 1.5, "time": 1}\n')
    part, more = read_run(run, compare.LIMIT), read_run(run)
    assert not part.whole and not part.problems and len(part.records) < len(more.records) / 2 < 10_000
    assert part.best["step"] == 20_000 and {point // 400 for point in (r["step"] for r in part.steps)} == set(range(51))


def test_the_best_of_some_validations_is_marked(tmp_path, capsys):
    few, many = (make(tmp_path / name, steps=steps) for name, steps in (("few", 400), ("many", 20_000)))
    compare.main([str(few), str(many), "--out", str(tmp_path / "x.png")])
    said = capsys.readouterr().out
    assert said.count("~") == 2 and "~ the best of 128 validations all over the run" in said
    (marked,) = (line for line in said.splitlines() if "~" in line and "│" in line)
    assert "many" in marked


def test_no_torch_is_imported(tmp_path):
    lines = ["import sys", "from torchtitan_deltaproduct import compare", "compare.main(sys.argv[1:])"]
    code = "\n".join([*lines, "print('torch' in sys.modules)"])
    words = [str(make(tmp_path / "a")), "--out", str(tmp_path / "x.png")]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
