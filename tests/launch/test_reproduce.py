"""Claims: what is wrong with a TOML, when a claim counts as shown, what is kept, and that the page is made of it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from launch import claims, grid, reproduce
from launch.claims import Expectation, Results, read_claim, read_claims, results_of, verdict
from launch.summary import Result, Summary, cell
from tests.unit.evaluation.words_toy import write_toml
from torchtitan_deltaproduct.errors import ConfigError, DataError
from torchtitan_deltaproduct.evaluation.state_tracking.results import trained_settings

pytestmark = pytest.mark.usefixtures("forked_jobs")

TOML = """
base = "s3.toml"
out = "{folder}/out"
device = "cpu"
[claim]
title = "Two follow"
expectation = '''One does not,
two do.'''
source = "nobody"
budget = "seconds"
readme = ["in [-1, 1] it does ({{n2 | solved}} seeds)"]
[settings]
n1 = {{ "model.num_householder" = 1 }}
n2 = {{ "model.num_householder" = 2 }}
[state_tracking]
words = 20
[[expect]]
settings = ["n1"]
metric = "accuracy at the tested length"
below = 0.7
[[expect]]
settings = ["n2"]
metric = "solved"
at_least = 1
seeds = "most"
"""


@pytest.fixture
def toy_claim(tmp_path, monkeypatch) -> Path:
    """A claim of two runs, in a repository of its own."""
    for name, place in (("CLAIMS", "claims"), ("RESULTS", "results"), ("PAGE", "science.md"), ("README", "README.md")):
        for module in (claims, reproduce):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, tmp_path / place)
    (tmp_path / "claims").mkdir()
    (tmp_path / "README.md").write_text("With two\nin [-1, 1] it does (0 of 1\nseeds), they say.\n")
    write_toml(tmp_path / "claims/s3.toml")
    file = tmp_path / "claims/toy.toml"
    file.write_text(TOML.format(folder=tmp_path))
    monkeypatch.setattr(claims, "read_claims", lambda names: [read_claim(file)])
    monkeypatch.setattr(reproduce, "read_claims", claims.read_claims)
    return file


def judged(claim, solving, others) -> claims.Verdict:
    """The verdict on so many seeds of n2 and n1; by the accuracy of each."""
    metric = "accuracy at the tested length"
    runs = [Result("n2", seed, {"solved": float(a > 0.9), metric: a}) for seed, a in enumerate(solving)]
    runs += [Result("n1", seed, {"solved": float(a > 0.9), metric: a}) for seed, a in enumerate(others)]
    return verdict(claim, Results(Summary(runs, len(solving) + len(others)), []))


@pytest.mark.parametrize(("solving", "others", "word", "line"), [
    ((1.0,), (0.3,), "as expected", ""),
    ((1.0, 1.0, 0.5), (0.3,), "as expected", ""),
    ((1.0, 0.5), (0.3,), "not as expected", "n_h = 2, [-1, 1]: solved at least 1 in more than half of the seeds; not"),
    ((1.0,), (0.3, 0.75), "not as expected", "tested length below 0.7 in all seeds; not in seed 1 (0.7500)"),
    ((), (), "not run yet", ""),
])  # fmt: skip
def test_verdict(toy_claim, solving, others, word, line):
    verdict = judged(read_claim(toy_claim), solving, others)
    assert verdict.word == word and line in "\n".join(verdict.lines) and bool(line) is bool(verdict.lines)


def test_a_claim_that_expects_nothing_is_measured(toy_claim):
    toy_claim.write_text(toy_claim.read_text().partition("[[expect]]")[0])
    assert judged(read_claim(toy_claim), (1.0,), (0.3,)) == claims.Verdict("measured", [])
    assert reproduce.main(["toy", "--training.steps", "1"]) == 0
    toy_claim.write_text(toy_claim.read_text().partition("[state_tracking]")[0])
    with pytest.raises(ConfigError, match=r"nothing to draw: it needs an \[\[expect\]\], or a table of state_tracking"):
        read_claim(toy_claim)


def test_the_horizon_is_a_column_where_it_is_asked_for(toy_claim):
    metrics = {"solved": 1.0, "loss": 0.5, "horizon": 63.0}
    summary = Summary([Result("n2", 1, metrics), Result("n2", 2, metrics | {"horizon": 591.0})], planned=2)
    assert claims.table(read_claim(toy_claim), summary).startswith("| setting | seeds | solved |\n")
    toy_claim.write_text(toy_claim.read_text().replace("[claim]", '[claim]\ncolumns = ["horizon"]'))
    shown = claims.table(read_claim(toy_claim), summary)
    assert shown.startswith("| setting | seeds | horizon |\n") and "| 327.0 (63.0 to 591.0) |" in shown


def test_a_mean_says_which_seeds_it_is_not_of():
    """A horizon that is not known is beyond the tested length; of the best seeds, so the mean is not theirs."""
    assert cell("horizon", [111, None]) == "111.0 (1 of 2 beyond the tested length)"
    assert cell("loss", [1.0, 3.0, None]) == "2.0000 (1.0000 to 3.0000, of 2 of 3 seeds)"
    assert cell("loss", [1.0, 3.0]) == "2.0000 (1.0000 to 3.0000)" and cell("loss", [1.0]) == "1.0000"


def test_labels_say_what_settings_differ_in(toy_claim):
    content = toy_claim.read_text()
    n1, n2 = '{ "model.num_householder" = 1 }', '{ "model.num_householder" = 2 }'
    toy_claim.write_text(content.replace(n1, n2.replace("}", ', "training.steps" = 1, "data.group" = "Z6" }')))
    labels = [read_claim(toy_claim).label(name) for name in ("n1", "n2")]
    assert labels == ["Z6, n_h = 2, [-1, 1], 1 steps", "S3, n_h = 2, [-1, 1], 2 steps"]
    toy_claim.write_text(
        content.replace(n1, n2.replace("}", ', "data.curriculum_start" = 2, "data.curriculum_steps" = 1 }'))
    )
    labels = [read_claim(toy_claim).label(name) for name in ("n1", "n2")]
    assert labels == ["n_h = 2, [-1, 1]", "n_h = 2, [-1, 1], whole words"]
    low = n2.replace("}", ', "training.mixed_precision_param" = "float32" }')
    toy_claim.write_text(content.replace(n1, low))
    labels = [read_claim(toy_claim).label(name) for name in ("n1", "n2")]
    assert labels == ["n_h = 2, [-1, 1], float32", "n_h = 2, [-1, 1]"]
    toy_claim.write_text(content.replace(n1, n2.replace("}", ', "optimizer.lr" = 1e-4 }')))
    assert [read_claim(toy_claim).label(name) for name in ("n1", "n2")] == ["n1", "n2"]


def test_a_picture_has_the_settings_that_are_to_be_drawn(monkeypatch):
    drawn = []
    monkeypatch.setattr(claims, "accuracy_figure", lambda settings, path: drawn.extend(settings))
    (claim,) = claims.read_claims(["A5"])
    results = claims.results_of(claim)
    claims.draw(claim, results, Path("A5.png"))
    settings = {run.label.split("/")[-2] for setting in drawn for run in setting.runs}
    recorded = {result.setting for result in results.summary.results}
    assert settings == recorded & set(claim.drawn) and settings < recorded


def test_a_setting_without_runs_is_no_success(toy_claim):
    claim = read_claim(toy_claim)
    assert judged(claim, (1.0,), ()).word == "not as expected" and "n1" in claim.settings
    summary = Summary([Result("n2", 1, {"solved": 1.0})], planned=2)
    assert verdict(claim, Results(summary, [])).word == "incomplete"


@pytest.mark.parametrize(("old", "new", "message"), [
    ('source = "nobody"\n', "", r"\[claim\]: it needs source"),
    ('"nobody"', "5", r"\[claim\]: source = 5: expected a text"),
    ('"nobody"', '"nobody"\ngpus = "8"', r'\[claim\]: gpus = "8": expected a whole number'),
    ('["in [-1, 1] it does ({n2 | solved} seeds)"]', '"it does"', 'readme = "it does": expected a list of sentences'),
    ('["in [-1, 1] it does ({n2 | solved} seeds)"]', "[true]", r"readme = \[true\]: expected a list of sentences"),
    ("source =", "sorce =", r"\[claim\]: sorce: no such key; nearest: 'source'"),
    ("[claim]", "[[claim]]", r"\[claim\]: expected a table"),
    ('metric = "solved"', "metric = true", "metric = true: expected the name of a number"),
    ('settings = ["n1"]', 'settings = ["n3"]', r"\[\[expect\]\] number 1: no setting \"n3\"; there are: n1, n2"),
    ('"nobody"', '"nobody"\ndrawn = ["n3"]', r"\[claim\]: drawn: no setting \"n3\"; there are: n1, n2"),
    ("below = 0.7", "", "expected one of at_least, below and under, found none"),
    ("below = 0.7", "bellow = 0.7", r"number 1: bellow: no such key; nearest: 'below'"),
    ("below = 0.7", 'below = "x"', 'number 1: below = "x": expected a number'),
    ("below = 0.7", "below = 0.7\nat_least = 1", "found at_least and below"),
    ('settings = ["n1"]', 'settings = "n1"', 'number 1: settings = "n1": expected a list of settings'),
    ('metric = "solved"\n', "", "number 2: it needs metric"),
    ("[[expect]]\nsettings = [\"n1\"]", "[expect]\nsettings = [\"n1\"]", "expect"),
    ('"most"', '"some"', 'seeds = "some": expected "all" or "most"'),
])  # fmt: skip
def test_wrong_claims(toy_claim, old, new, message):
    toy_claim.write_text(toy_claim.read_text().replace(old, new))
    with pytest.raises(ConfigError, match=message):
        read_claim(toy_claim)


@pytest.mark.parametrize(("words", "message"), [
    (["--lst"], "^--lst: no such option; nearest: --list$"),
    (["toy", "--training.stps", "5"], "^command line: --training.stps 5: no such option; nearest: --training.steps"),
    (["--list", "--check"], "^--list takes names of claims and no other option; found besides: --check$"),
    (["--check", "--out", "X"], "^--check takes names .*; found besides: --out$"),
    (["--write", "--training.steps", "5"], "^--write takes names .*; found besides: --training.steps$"),
    (["toy", "--collect", "--slurm"], "^--collect and --slurm: expected one of them$"),
    (["toy", "--time", "1:00"], "^--time: only read with --slurm$"),
    (["toy", "--slurm", "--jobs", "2"], "^--jobs: not read with --slurm"),
])  # fmt: skip
def test_a_wrong_command_line_is_told_as_such(toy_claim, words, message):
    with pytest.raises(ConfigError, match=message):
        reproduce.main(words)


def test_run_keep_check(toy_claim, capsys):
    """The model of two steps solves nothing: the failed expectation is shown as such, everywhere."""
    folder = toy_claim.parents[1]
    assert reproduce.main(["toy", "--jobs", "2"]) == 1
    printed = capsys.readouterr().out
    assert "n_h = 2, [-1, 1]: solved at least 1 in more than half of the seeds; not in seed 1" in printed
    assert "not as expected: One does not, two do." in printed
    content = json.loads((folder / "results/toy.json").read_text())
    assert [(run["setting"], run["seed"]) for run in content["runs"]] == [("n1", 1), ("n2", 1)]
    assert content["origin"]["command"] == "python -m launch.reproduce toy" and content["origin"]["torch"]
    page = (folder / "science.md").read_text()
    assert "| n_h = 2, [-1, 1] | 1 |" in page and "Verdict: **not as expected**:\n- n_h = 2, [-1, 1]: solved" in page
    assert "![Two follow](../results/toy.png)" in page and "loss" not in page
    results = results_of(read_claim(toy_claim))
    assert [len(setting.runs) for setting in results.curves] == [1, 1] and not results.summary.missing
    assert reproduce.main(["--check"]) == 0
    # Another number, picture, page or sentence is found.
    kept = {path: path.read_bytes() for path in folder.glob("*/toy.*")} | {folder / "science.md": page.encode()}
    for path, old, new, message in (
        ("results/toy.json", b'"solved": 0.0', b'"solved": 1.0', "science.md: not what the results make of it"),
        ("README.md", b"(0 of 1", b"(1 of 1", "README.md: does not say: in [-1, 1] it does (0 of 1 seeds)"),
        ("science.md", b"seconds", b"minutes", "science.md: not what"),
        ("claims/toy.toml", b"nobody", b"someone", "science.md: not what"),
    ):
        before = (folder / path).read_bytes()
        (folder / path).write_bytes(before.replace(old, new))
        capsys.readouterr()
        assert reproduce.main(["--check"]) == 1, path
        assert message in capsys.readouterr().out
        (folder / path).write_bytes(before)
    (folder / "results/toy.png").unlink()
    assert reproduce.main(["--check"]) == 1
    # Part of a claim, or a variant, is shown and not kept.
    assert reproduce.main(["toy", "--only", "n1/seed-1", "--collect", "--seeds", "1"]) == 1
    assert "written: " + str(folder / "results") not in capsys.readouterr().out
    assert (folder / "results/toy.json").read_bytes() == kept[folder / "results/toy.json"]
    (folder / "results/toy.json").write_text("{")
    with pytest.raises(DataError, match="(?s)toy.json is damaged.*delete it and run the claim again"):
        reproduce.main(["--list"])


def test_a_claim_on_text(toy_claim, toy, capsys):
    """Losses by position are kept and drawn; one setting is judged by another, seed by seed."""
    text = toy_claim.read_text().partition("[state_tracking]")[0].replace('"s3.toml"', f'"{toy}"')
    text = text.replace("readme =", "# ").replace("[overrides]", '[overrides]\n"training.steps" = 2')
    expect = "[[expect]]\nsettings = ['n2']\nmetric = 'loss beyond text'\nunder = 'n1'\n"
    toy_claim.write_text(
        f"{text}\n[data]\ntext = '{toy.parent}/data/validation'\n[length_extrapolation]\nlength = 128\nsequences = 3\n"
        f"device = 'cpu'\ndtype = 'float32'\n{expect}"
    )
    code = reproduce.main(["toy", "--jobs", "2"])
    printed = capsys.readouterr().out
    content = json.loads((toy_claim.parents[1] / "results/toy.json").read_text())
    one, two = (run["metrics"]["loss beyond text"] for run in content["runs"])
    assert code == (two >= one) and ("under that of n1" in printed) == (two >= one)
    assert [(losses["setting"], losses["data"], losses["trained"]) for losses in content["losses"]] == [
        ("n1", "text", 64), ("n2", "text", 64)
    ]  # fmt: skip
    assert content["losses"][0]["lasts"][-1] == 128 and content["origin"]["data"]
    assert len(content["losses"][0]["loss"]) == len(content["losses"][0]["lasts"]) > 3
    assert (toy_claim.parents[1] / "results/toy.png").stat().st_size > 10_000
    # Of two recorded runs the losses stay when one more is added.
    claim = read_claim(toy_claim)
    again = claims.together(claim, results_of(claim), Results(Summary([], 0), []))
    assert len(again.losses) == 2 and again.summary.planned == 2
    toy_claim.write_text(toy_claim.read_text().replace("under = 'n1'", "under = 'n3'"))
    with pytest.raises(ConfigError, match='no setting "n3"'):
        read_claim(toy_claim)


def test_a_run_without_its_counterpart_is_not_judged(toy_claim):
    """Of a claim that is half run, a seed of which only one setting is there says nothing; the others do."""
    claim = replace(read_claim(toy_claim), expect=[Expectation(["n2"], "loss", under="n1")])

    def judged(n1: dict[int, float], n2: dict[int, float], planned: int = 4) -> claims.Verdict:
        runs = [
            Result(name, seed, {"loss": loss})
            for name, losses in (("n1", n1), ("n2", n2))
            for seed, loss in losses.items()
        ]
        return verdict(claim, Results(Summary(runs, planned), []))

    assert judged({2: 1.0}, {1: 5.0, 2: 0.5}).lines == ["1 of 4 runs are not done."]
    assert judged({2: 1.0}, {1: 5.0, 2: 1.5}).lines[1].endswith("in all seeds; not in seed 2 (1.5000)")
    assert judged({1: 1.0, 2: 1.0}, {1: 0.5, 2: 0.5}).word == "as expected"
    apart = judged({1: 1.0}, {2: 0.5}, planned=2)
    assert apart.word == "not as expected" and apart.lines[0].endswith("no seed to judge it by")


def test_a_misspelled_metric_is_no_failed_expectation(toy_claim):
    claim = read_claim(toy_claim)
    claim = replace(claim, expect=[replace(claim.expect[0], metric="sovled")])
    with pytest.raises(ConfigError, match=r"metric = \"sovled\": no run has a number of that name; nearest: 'solved'"):
        judged(claim, (1.0,), (0.3,))


@pytest.mark.slow
def test_a_run_that_was_stopped_is_evaluated_where_it_ends(toy_claim, capsys):
    """Its evaluation is planned while its newest checkpoint is one of the middle."""
    assert reproduce.main(["toy", "--training.steps", "1", "--lr_scheduler.total_steps", "2"]) == 1
    shutil.rmtree(toy_claim.parents[1] / "out/eval")
    assert reproduce.main(["toy", "--lr_scheduler.total_steps", "2"]) == 1
    printed = capsys.readouterr().out
    assert "failed with" not in printed and "runs are not done" not in printed.rpartition("written")[2]


def test_an_interrupted_claim_keeps_what_is_finished(toy_claim, monkeypatch):
    def interrupted(claim_grid, options, *more):
        options.only = ["n1"]
        grid.run_grid(claim_grid, options, *more)
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduce, "run_grid", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reproduce.main(["toy"])
    assert [run.name for run in read_claim(toy_claim).grid.runs if run.recorded] == ["n1/seed-1"]


def test_two_commands_at_once_record_each_run_once(toy_claim, monkeypatch):
    """The other records a run while this one trains another: both are kept, with the origins of both."""

    def beside_another(claim_grid, options, *more):
        monkeypatch.setattr(reproduce, "run_grid", grid.run_grid)
        reproduce.main(["toy", "--only", "n2"])
        return grid.run_grid(claim_grid, options, *more)

    monkeypatch.setattr(reproduce, "run_grid", beside_another)
    reproduce.main(["toy", "--only", "n1"])
    content = json.loads(read_claim(toy_claim).file.read_text())
    assert [run["setting"] for run in content["runs"]] == ["n1", "n2"] and len(content["earlier"]) == 1
    assert [len(setting["runs"]) for setting in content["state_tracking"]] == [1, 1]
    content["runs"].append(content["runs"][0])
    read_claim(toy_claim).file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"toy.json is damaged \(several results of one run\)"):
        read_claim(toy_claim)


def test_what_is_recorded_is_not_run_again(toy_claim, capsys):
    """A claim is run in parts, on machines that know results/ of each other; another recipe is another run."""
    folder = toy_claim.parents[1]
    toy_claim.write_text(toy_claim.read_text().replace("n2 = {", "n2 = { seeds = [1, 2], "))
    assert reproduce.main(["toy", "--only", "n2/seed-2"]) == 1
    recorded = json.loads((folder / "results/toy.json").read_text())["runs"]
    assert [(run["setting"], run["seed"]) for run in recorded] == [("n2", 2)]
    assert "2 of 3 runs are not done" in capsys.readouterr().out
    shutil.rmtree(folder / "out")
    assert reproduce.main(["toy", "--jobs", "2"]) == 1
    printed = capsys.readouterr().out
    assert "5 jobs, 1 done already" in printed and not (folder / "out/n2/seed-2").exists()
    content = json.loads((folder / "results/toy.json").read_text())
    assert [(run["setting"], run["seed"]) for run in content["runs"]] == [("n1", 1), ("n2", 1), ("n2", 2)]
    assert [origin["command"] for origin in content["earlier"]] == [content["origin"]["command"]]
    written = (folder / "results/toy.json").read_bytes()
    assert reproduce.main(["toy"]) == 1 and (folder / "results/toy.json").read_bytes() == written
    # All is recorded: the table shows it, and nothing is said of missing runs.
    shutil.rmtree(folder / "out")
    capsys.readouterr()
    assert reproduce.main(["toy"]) == 1
    printed = capsys.readouterr().out
    assert "│ n2      │     2 │" in printed and "not done" not in printed and "no run is finished" not in printed
    assert content["runs"][2] == recorded[0] and [len(one["runs"]) for one in content["state_tracking"]] == [1, 2]
    # With another rate the runs are others, with another folder or interval between logs they are not.
    claim = read_claim(toy_claim)
    assert all(run.recorded for run in claim.grid.runs)
    for words, same in ((["--metrics.log_freq", "7"], True), (["--optimizer.lr", "1e-5"], False)):
        other = read_claim(toy_claim, overrides=words).grid.runs
        assert [run.recipe for run in other] == [run.recipe for run in claim.grid.runs] or not same
        assert same or not {run.recipe for run in other} & {run.recipe for run in claim.grid.runs}
    toy_claim.write_text(toy_claim.read_text().replace('"model.num', '"optimizer.lr" = 1e-5, "model.num'))
    assert not results_of(read_claim(toy_claim)).summary.results


def test_the_shipped_claims_are_honest(capsys):
    """Every number and picture of docs/science.md, and README's that come from results, are made again."""
    assert reproduce.main(["--check"]) == 0, capsys.readouterr().out
    shipped = read_claims([])
    assert {"S3", "S4", "A5", "S5", "parity", "formal", "language"} <= {claim.name for claim in shipped}
    assert len(claims.PAGE.read_text().splitlines()) < 250
    for claim in shipped:
        assert claim.source and claim.budget and (claim.expect or claim.name == "A5_designs"), claim.name


def test_new_runs_of_a_shipped_claim_are_of_the_settings_that_are_recorded():
    """As far as both know, but for the precision, which a launch settles."""
    compared = 0
    for claim in read_claims(["S3", "S5", "horizon"]):
        new = {run.setting: trained_settings(run.config.to_dict()) for run in claim.grid.runs}
        for recorded in json.loads(claim.file.read_text())["state_tracking"]:
            name = recorded["runs"][0]["run"].split("/")[-2]
            for key in (new[name].keys() & recorded["settings"].keys()) - {"training.mixed_precision_param"}:
                assert new[name][key] == recorded["settings"][key], (claim.name, name, key)
                compared += 1
    assert compared > 12 * 30


def test_no_such_claim():
    with pytest.raises(ConfigError, match="S6: no such claim; there are: A5, A5_designs, S3"):
        reproduce.main(["S6"])


def test_without_a_name_what_the_machine_can(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert reproduce.main(["--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "S5: left out, needs 1 GPUs and here are 0" in printed and "laptop_S3_n2_pm1/seed-1" in printed


def test_without_a_name_what_tasks_of_a_cluster_can(toy_claim, stand_in, capsys):
    stand_in(sbatch="echo 42")
    toy_claim.write_text(toy_claim.read_text().replace("[claim]", "[claim]\ngpus = 2"))
    assert reproduce.main(["--slurm"]) == 0
    assert "toy: left out, needs 2 GPUs and a task has 0; --gpus N, or name it" in capsys.readouterr().out
    assert reproduce.main(["--slurm", "--gpus", "2", "--seeds", "4"]) == 0
    printed = capsys.readouterr().out
    assert "job 42: 2 tasks" in printed and "when they are done: python -m launch.reproduce toy --seeds 4\n" in printed
