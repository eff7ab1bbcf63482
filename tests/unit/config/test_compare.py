"""Which changes a resumed run may have, and the snapshot they are read from."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.toy import TOML
from torchtitan_deltaproduct.config.compare import (
    compare_configs,
    keep_warmup,
    rate_rises,
    refuse_breaking,
    same_rates,
)
from torchtitan_deltaproduct.config.job import LRScheduler
from torchtitan_deltaproduct.config.schema import schema
from torchtitan_deltaproduct.config.snapshots import read_snapshot, snapshot, write_snapshot
from torchtitan_deltaproduct.errors import CheckpointError, ConfigError

DATA = '[data]\npaths = ["a", "b"]\n'


def changes(load, *options, old_extra=None, new_extra=None, base=()):
    old = snapshot(load(DATA, *base), {"world_size": 1, **(old_extra or {})})
    new = snapshot(load(DATA, *options), {"world_size": 1, **(new_extra or {})})
    comparison = compare_configs(old, new)
    return {kind: [c.key for c in getattr(comparison, kind)] for kind in ("breaking", "notable", "harmless")}


@pytest.mark.parametrize(
    ("option", "value", "kind"),
    [
        ("model.num_householder", "3", "breaking"),
        ("data.seed", "1", "breaking"),
        ("data.paths", "b,a", "breaking"),
        ("training.seq_len", "16", "breaking"),
        ("optimizer.name", "Adam", "breaking"),
        ("optimizer.name", "Muon", "breaking"),
        ("optimizer.lr", "1", "notable"),
        ("lr_scheduler.warmup_steps", "1", "notable"),
        ("training.steps", "99999", "notable"),
        ("compile.enable", "true", "notable"),
        ("job.dump_folder", "x", "harmless"),
        ("metrics.log_freq", "3", "harmless"),
        ("checkpoint.interval", "3", "harmless"),
    ],
)
def test_one_change(load, option, value, kind):
    wanted = {"breaking": [], "notable": [], "harmless": []} | {kind: [option]}
    assert changes(load, f"--{option}", value) == wanted


WSD = ("--lr_scheduler.schedule=wsd", "--lr_scheduler.warmup_steps=10", "--lr_scheduler.decay_steps=21",
       "--training.steps=100")  # fmt: skip


@pytest.mark.parametrize(
    ("step", "options", "words"),
    [
        (80, ["--training.steps=200"], ""),
        (81, ["--training.steps=200"], "step 81 was saved in its decay, at 95% of the peak rate, and goes on at 100%; "
         "to extend the stable phase, go back to a step up to 80 with checkpoint.load_step"),
        (90, [], ""),
        (84, ["--lr_scheduler.decay_type=cosine"], "at 81% of the peak rate, and goes on at 87%"),
        (50, ["--training.steps=60"], ""),
        (100, [], ""),
        (100, ["--training.steps=200"], "at 5% of the peak rate, and goes on at 100%; to extend the stable phase, go"),
    ],
)  # fmt: skip
def test_a_rate_that_rises_again_is_told(load, step, options, words):
    """A stable phase may end anywhere, and be extended from any checkpoint of it; out of the decay that is told."""
    saved = snapshot(load(DATA, *WSD))
    current = load(DATA, *WSD, *options)
    assert compare_configs(saved, snapshot(current)).breaking == []
    note = rate_rises(saved, current, step)
    assert (words in note) if words else note == ""
    stretched = snapshot(load(DATA, "--training.steps=100", "--lr_scheduler.warmup_steps=10"))
    longer = load(DATA, "--training.steps=1000", "--lr_scheduler.warmup_steps=10")
    assert rate_rises(stretched, longer, 50).endswith("a larger training.steps stretches the decay")
    assert rate_rises({"config": {}}, longer, 50) == ""


CUT = DATA + "[training]\nsteps = 300\n[lr_scheduler]\nwarmup_steps = 30\n"


@pytest.mark.parametrize(("text", "options", "step", "warmup"), [
    (CUT, ["--training.steps=40"], 20, 2),
    (CUT, [], 20, 2),
    # Shortened as well, and the file's run ended with its own: both as the run so far, or nothing to keep.
    (CUT, ["--training.steps=25"], 20, 2),
    (CUT, ["--training.steps=40"], 1, 30),
    # Asked for: in the file, or on the command line.
    (CUT.replace("steps = 30\n", "steps = 35\n"), ["--training.steps=40"], 20, 35),
    (CUT, ["--training.steps=40", "--lr_scheduler.warmup_steps=30"], 20, 30),
])  # fmt: skip
def test_a_warm_up_that_is_over_is_not_run_again(load, text, options, step, warmup):
    """A run of a file of 300 steps that was cut to 20, its warm-up from 30 to 2, goes on to another end, twice."""
    cut = load(CUT, "--training.steps=20")
    saved = snapshot(cut, {"warmup_in_file": cut.warmup_in_file})
    assert saved["config"]["lr_scheduler"]["warmup_steps"] == 2
    for _ in range(2):
        config = load(text, *options)
        current = snapshot(config, {"warmup_in_file": config.warmup_in_file})
        keep_warmup(saved, config, current, step)
        table, note = config.lr_scheduler, config.provenance["lr_scheduler.warmup_steps"]
        assert table.warmup_steps == current["config"]["lr_scheduler"]["warmup_steps"] == warmup
        kept = "stays 2, not 30: the warm-up of this run is over"
        assert (note == kept) == (warmup == 2 and config.training.steps > 30)
        saved = current


def test_nothing_changed(load):
    assert changes(load) == {"breaking": [], "notable": [], "harmless": []}


def test_the_effective_batch_decides(load):
    same = changes(load, "--training.local_batch_size=4", "--training.global_batch_size=8")
    assert same["breaking"] == []
    assert same["notable"] == ["training.local_batch_size", "training.global_batch_size"]
    assert changes(load, "--training.local_batch_size=4")["breaking"] == ["derived.global_batch_size"]
    more_ranks = changes(load, new_extra={"world_size": 2})
    assert more_ranks["breaking"] == ["derived.global_batch_size"]
    kept = changes(load, "--training.global_batch_size=16", base=["--training.global_batch_size=16"],
                   new_extra={"world_size": 2})  # fmt: skip
    assert kept == {"breaking": [], "notable": ["derived.world_size"], "harmless": []}


def test_the_mlp_width_decides(load):
    assert changes(load, "--model.intermediate_size=2048") == {
        "breaking": [],
        "notable": [],
        "harmless": ["model.intermediate_size"],
    }
    assert changes(load, "--model.hidden_ratio=8")["breaking"] == ["derived.mlp_size"]


def test_moved_data_is_the_same_data(load):
    same = {"old_extra": {"data_identity": "abc"}, "new_extra": {"data_identity": "abc"}}
    assert changes(load, "--data.paths=/x/a,/x/b", **same)["notable"] == ["data.paths"]
    other = {"old_extra": {"data_identity": "abc"}, "new_extra": {"data_identity": "def"}}
    assert changes(load, **other)["breaking"] == ["extra.data_identity"]


def test_the_tokenizer_of_a_stream_decides_the_tokens(load):
    stream = ["--data.kind=streaming", "--data.paths=", "--data.dataset=x", "--model.hf_assets_path"]
    old, new = (snapshot(load(DATA, *stream, folder)) for folder in ("a", "b"))
    assert [change.key for change in compare_configs(old, new).breaking] == ["model.hf_assets_path"]
    assert changes(load, "--model.hf_assets_path=b")["notable"] == ["model.hf_assets_path"]


def test_options_only_one_version_has(load):
    old = snapshot(load(DATA))
    new = json.loads(json.dumps(old))
    del old["config"]["model"]["num_heads"], old["config"]["job"]["description"]
    new["config"]["data"]["brand_new"] = 1
    comparison = compare_configs(old, new)
    assert comparison.breaking == []
    assert {change.key for change in comparison.notable} == {"model.num_heads", "data.brand_new"}
    assert [change.key for change in comparison.harmless] == ["job.description"]


def test_a_run_of_an_earlier_version_goes_on(load):
    """With the config.json that revision 54fb8ae wrote, before options had records."""
    saved = read_snapshot(Path(__file__).with_name("config_of_54fb8ae.json"))
    config = load(TOML.format(folder="/new"))
    same_data = {"world_size": 1, "data_identity": saved["extra"]["data_identity"]}
    comparison = compare_configs(saved, snapshot(config, same_data))
    assert comparison.breaking == []
    changed = {change.key for change in comparison.notable if not change.key.startswith("versions.")}
    changed = {key for key in changed if key in dict(flat(saved["config"]))}
    assert changed == {"data.paths", "validation.paths", "training.mixed_precision_param"}
    assert dict(flat(saved["config"])).keys() <= schema().keys()


def flat(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def test_an_unclassified_change_is_breaking(load):
    old = snapshot(load(DATA))
    new = json.loads(json.dumps(old))
    old["config"]["model"]["brand_new"], new["config"]["model"]["brand_new"] = 1, 2
    assert [change.key for change in compare_configs(old, new).breaking] == ["model.brand_new"]


def test_refusal_names_values_places_and_the_way_out(load):
    config = load(DATA, "--model.num_heads", "9")
    old, new = snapshot(load(DATA), {"world_size": 1}), snapshot(config, {"world_size": 2})
    comparison = compare_configs(old, new)
    assert list(map(str, comparison.notable)) == ["world_size: 1 -> 2 (results agree to rounding)"]
    with pytest.raises(ConfigError) as error:
        refuse_breaking(comparison, "out/checkpoint/step-100", config.provenance)
    assert str(error.value) == (
        "out/checkpoint/step-100 belongs to another run:\n"
        "  model.num_heads was 6, is 9 (command line): another model\n"
        "  global_batch_size was 8, is 16: another number of samples a step\n"
        "put the old values back to continue it, or train the other model in another job.dump_folder"
    )
    refuse_breaking(compare_configs(old, old), "out")


def test_other_data_may_start_from_the_weights(load):
    old, new = snapshot(load(DATA)), snapshot(load(DATA, "--data.seed", "9"))
    with pytest.raises(ConfigError, match=r"(?s)data.seed was 0, is 9.*\n  --job.dump_folder NEW_FOLDER "):
        refuse_breaking(compare_configs(old, new), "out/checkpoint/step-100")


def test_before_the_first_sample_only_the_model_counts(load):
    """A seed checkpoint, made by one process, serves any number of ranks."""
    old = snapshot(load(DATA), {"world_size": 1})
    new = snapshot(load(DATA, "--data.seed", "9", "--model.num_heads", "9"), {"world_size": 2})
    comparison = compare_configs(old, new, consumed=False)
    assert [change.key for change in comparison.breaking] == ["model.num_heads"]
    notable = {change.key for change in comparison.notable}
    assert notable == {"data.seed", "derived.global_batch_size", "derived.world_size"}


def test_snapshot_round_trip(load, tmp_path):
    content = snapshot(load(DATA), {"note": (1, 2)})
    assert content["config"]["model"]["num_heads"] == 6
    assert content["extra"] == {"note": [1, 2]}
    assert {"python", "torch", "torchtitan", "torchtitan-deltaproduct"} <= set(content["versions"])
    path = tmp_path / "run" / "config.json"
    assert read_snapshot(path) is None
    write_snapshot(path, content)
    assert read_snapshot(path) == content
    assert [file.name for file in path.parent.iterdir()] == ["config.json"]
    path.write_text(path.read_text()[:50])
    with pytest.raises(CheckpointError, match="not a config snapshot"):
        read_snapshot(path)


def test_a_longer_run_may_begin_with_a_shorter_one_of_the_same_rates():
    def of(steps: int, **table) -> SimpleNamespace:
        return SimpleNamespace(lr_scheduler=LRScheduler(warmup_steps=2, **table), training=SimpleNamespace(steps=steps))

    def saved(config: SimpleNamespace) -> dict:
        tables = {"lr_scheduler": asdict(config.lr_scheduler), "training": {"steps": config.training.steps}}
        return {"config": tables}

    assert same_rates(saved(of(10)), of(20), 2) and not same_rates(saved(of(10)), of(20), 4)
    assert same_rates(saved(of(10, total_steps=20)), of(20), 10)
    assert same_rates(saved(of(10, schedule="wsd")), of(20, schedule="wsd"), 9)
    unknown = saved(of(10))
    unknown["config"]["lr_scheduler"]["decay_type"] = "of a later version"
    assert not same_rates({}, of(20), 2) and not same_rates(unknown, of(20), 2)
