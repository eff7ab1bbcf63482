"""Folders of others, refused before anything is allocated or waited for; and what a killed export leaves."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests import processes
from tests.unit.models.conftest import small_model
from torchtitan_deltaproduct.checkpoint import hf, load_model, ls, to_hf, verify
from torchtitan_deltaproduct.checkpoint.from_hf import import_hf
from torchtitan_deltaproduct.checkpoint.hf import make_unfinished, put_in_place, write_hf
from torchtitan_deltaproduct.checkpoint.load import architecture
from torchtitan_deltaproduct.data.shards.manifest import read_manifest
from torchtitan_deltaproduct.data.text import plan
from torchtitan_deltaproduct.data.text.plan import Settings, make_plan
from torchtitan_deltaproduct.errors import CheckpointError, ConfigError, DataError
from torchtitan_deltaproduct.evaluation.files import read_results
from torchtitan_deltaproduct.files import read_object
from torchtitan_deltaproduct.titan.lock import RunLock


@pytest.fixture
def folder(tmp_path):
    model = small_model(torch.float32)
    (tmp_path / "hf").mkdir()
    write_hf(tmp_path / "hf", model.state_dict(), model.args, training={})
    return tmp_path / "hf"


def change(folder: Path, name: str = "config.json", **values) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def replace(path: Path, make) -> None:
    path.unlink(missing_ok=True)
    make(path)


@pytest.mark.parametrize(("values", "told"), [
    ({"num_hidden_layers": 10**9}, r"describes [\d,]+ parameters, and the weights beside it have [\d,]+ bytes"),
    ({"vocab_size": 10**12}, "describes .* parameters"),
    ({"hidden_size": 10**9}, "describes .* parameters"),
    ({"intermediate_size": 10**15}, "describes .* parameters"),
    ({"num_hidden_layers": 60, "hidden_size": 1, "num_heads": 1, "head_dim": 1, "intermediate_size": 1},
     "describes 60 layers, and the weights beside it have .* tensors"),
    ({"expand_v": float("inf")}, "expand_v = inf"), ({"expand_v": float("nan")}, "expand_v"),
    ({"expand_v": 1e300}, "expand_v = 1e"), ({"vocab_size": 10**4000}, "vocab_size has 3322 hexadecimal digits"),
    ({"expand_v": 0.37}, "head_dim \\* expand_v must be a whole number"),
    ({"hidden_ratio": float("inf"), "intermediate_size": None}, "hidden_ratio = inf: must be a finite number"),
    ({"norm_eps": float("inf")}, "norm_eps = inf"), ({"head_dim": 10**6}, "head_dim = 1000000: must lie between"),
    ({"num_householder": 9}, "num_householder = 9"), ({"conv_size": 1}, "conv_size = 1"),
])  # fmt: skip
def test_absurd_numbers_are_refused_before_a_model_is_built(folder, monkeypatch, values, told):
    change(folder, **values)
    monkeypatch.setattr(hf, "DeltaProductLM", lambda args: pytest.fail("a model was built"))
    begin = time.monotonic()
    with pytest.raises(CheckpointError, match=told):
        load_model(folder)
    assert time.monotonic() - begin < 2


@pytest.mark.parametrize("name", ["config.json", "training.json"])
@pytest.mark.parametrize("content", [b"[" * 200_000, b'{"a":' * 200_000, b"\xff\xfe\x00", b"7", b""])
def test_damaged_json_is_one_message(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match="is not valid JSON|is not a JSON object"):
        load_model(folder)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "", "..", "a/b"])
def test_a_weight_map_stays_in_its_folder(folder, name):
    (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(CheckpointError, match="which is no file of it"):
        load_model(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "training.json", "tokenizer.json", "merges.txt"])
@pytest.mark.parametrize("kind", ["link", "pipe", "device"])
def test_links_elsewhere_pipes_and_devices_are_refused(folder, name, kind):
    secret = folder.parent / "secret"
    secret.write_text("{}")
    target = {"link": secret, "device": "/dev/zero"}.get(kind)
    replace(folder / name, (lambda path: path.symlink_to(target)) if target else os.mkfifo)
    with pytest.raises(CheckpointError, match="outside of its folder|is no file"):
        load_model(folder)
    with pytest.raises(CheckpointError, match="outside of its folder|is no file"):
        import_hf(folder, folder.parent / "run")
    assert not (folder.parent / "run").exists()


def test_the_hubs_cache_may_link_to_its_own_files(folder, tmp_path):
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0f", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(folder.iterdir()):
        path.rename(blobs / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert load_model(snapshot).model.args.num_hidden_layers > 0


def test_an_export_takes_no_file_from_elsewhere(toy_run, tmp_path):
    run = shutil.copytree(toy_run, tmp_path / "run")
    (tmp_path / "secret").write_text("{}")
    (run / "tokenizer").mkdir(exist_ok=True)
    replace(run / "tokenizer/tokenizer.json", lambda path: path.symlink_to(tmp_path / "secret"))
    with pytest.raises(CheckpointError, match="outside of its folder"):
        to_hf.export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_absurd_snapshot_of_a_run_is_refused():
    good = {"model": {"hidden_size": 64, "expand_v": 1, "flavor": "x"}}
    assert architecture(good).hidden_size == 64
    for table, told in [({"hidden_size": "64"}, "expected a whole number"), ({"expand_v": float("inf")}, "finite"),
                        ({"head_dim": 9999}, "head_dim = 9999")]:  # fmt: skip
        with pytest.raises(CheckpointError, match=told):
            architecture({"model": table})


def test_an_export_is_as_the_umask_says(toy_run, tmp_path):
    previous = os.umask(0o022)
    try:
        to_hf.export(toy_run, tmp_path / "out")
    finally:
        os.umask(previous)
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "out").iterdir()} == {"0o644"}


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "hf"
    folder.mkdir()
    model = small_model(torch.float32)
    write_hf(folder, model.state_dict(), model.args, training={})
    import_hf(folder, folder.parent / "run")
    return folder.parent / "run"


@pytest.mark.parametrize(("system", "moment"), [("local", 1), ("local", 2), ("nfs", 1), ("nfs", 2), ("nfs", 3)])
def test_a_kill_while_a_model_is_replaced(tmp_path, tmp_path_factory, system, moment):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").touch()
    words = ["-m", "tests.unit.checkpoint.killed_replacement", str(out), str(moment), system]
    code = processes.start(words, tmp_path_factory.mktemp("log") / "log").wait()
    assert code == (0 if (system, moment) in (("local", 2), ("nfs", 3)) else -signal.SIGKILL)
    if not out.exists():
        assert system == "nfs"
        make_unfinished(out).rmdir()
    assert [path.name for path in out.iterdir()] in (["old"], ["new"])
    # What a killed one left goes with the next.
    unfinished = make_unfinished(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([out.name, unfinished.name])


def test_a_link_to_another_disk_stays(tmp_path):
    (tmp_path / "disk/model").mkdir(parents=True)
    (tmp_path / "disk/model/old").touch()
    (tmp_path / "out").symlink_to("disk/model")
    unfinished = make_unfinished(tmp_path / "out")
    (unfinished / "new").touch()
    put_in_place(unfinished, tmp_path / "out")
    assert (tmp_path / "out").is_symlink() and [path.name for path in (tmp_path / "disk/model").iterdir()] == ["new"]


@pytest.mark.parametrize(
    ("name", "values"), [("training.json", {"step": "a"}), ("config.json", {"max_position_embeddings": "x"})]
)
def test_numbers_of_another_type_are_named(folder, name, values):
    (folder / "training.json").write_text("{}")
    load_model(folder)
    change(folder, name, **values)
    with pytest.raises(CheckpointError, match="expected a whole number"):
        load_model(folder)


def test_ls_and_verify_of_an_export(folder):
    """They do not advise to delete its config.json."""
    for command in (ls, verify):
        with pytest.raises(CheckpointError, match="a model in the Hugging Face layout, which has no steps"):
            command.main([str(folder)])


def test_home_is_expanded(toy_run, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(toy_run.parent))
    assert load_model("~/run").run == toy_run
    to_hf.main(["~/run", "~/exported"])
    assert (toy_run.parent / "exported/config.json").exists()
    ls.main(["~/run"])
    assert verify.main(["~/run"]) == 0


def test_check_shapes_builds_nothing_for_a_folder_that_is_too_small(monkeypatch):
    model = small_model(torch.float32)
    monkeypatch.setattr(hf, "DeltaProductLM", lambda args: pytest.fail("a model was built"))
    found = {name: tensor.shape for name, tensor in model.state_dict().items()}
    model.args.num_hidden_layers = 10**9
    with pytest.raises(CheckpointError, match="1,000,000,000 layers"):
        hf.check_shapes("here", found, model.args)


NAMES = ["a" * 300, "loop", "file/x"]
"""Too long for a file system, a link to itself, and below a file."""


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name[:6])
def test_names_that_no_folder_can_have_are_refused(folder, tmp_path, monkeypatch, name):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError):
        read_manifest(name)
    monkeypatch.setattr(plan, "load_tokenizer", lambda folder: SimpleNamespace(vocab_size=9))
    with pytest.raises((DataError, OSError), match=name[:9]):
        make_plan(Settings(name, "tokenizer", [name]))
    with pytest.raises(ConfigError, match="the run folder .* cannot be written"):
        RunLock(name).__enter__()
    with pytest.raises((CheckpointError, OSError), match=name[:9]):
        put_in_place(make_unfinished(Path(name)), Path(name))


def test_pipes_in_the_place_of_notes_are_not_waited_for(tmp_path):
    for name in ("manifest.json", "x.json"):
        os.mkfifo(tmp_path / name)
    assert read_object(tmp_path / "x.json") == {}
    with pytest.raises(DataError, match="not a regular file"):
        read_results(tmp_path / "x.json")
    with pytest.raises(DataError, match="cannot be read as a folder of tokens"):
        read_manifest(tmp_path)


def test_deep_json_is_damage(tmp_path):
    for name in ("manifest.json", "x.json"):
        (tmp_path / name).write_text("[" * 200_000)
    assert read_object(tmp_path / "x.json") == {}
    for read in (read_manifest, lambda folder: read_results(folder / "x.json")):
        with pytest.raises(DataError, match="damaged|cannot be read"):
            read(tmp_path)


def test_a_flipped_bit_of_an_export_is_noticed(folder, caplog):
    """A weight that is another, but finite, fits every shape: the folder may have been edited, so it is said."""
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for place in (len(whole) - 2, len(whole) - 4000):
        weights.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        caplog.clear()
        load_model(folder)
        assert "model.safetensors is not what was written" in caplog.text
    weights.write_bytes(whole)
    caplog.clear()
    load_model(folder)
    assert not caplog.records
    change(folder, norm_eps=2e-6)
    assert load_model(folder).model.args.norm_eps == 2e-6 and "config.json is not what was written" in caplog.text
    change(folder, "training.json", sha256=3)
    with pytest.raises(CheckpointError, match="sha256 is no table"):
        load_model(folder)
