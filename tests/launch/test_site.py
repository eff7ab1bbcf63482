"""The site TOML: strict, found where it should be, and the example is right."""

import os
from dataclasses import fields
from pathlib import Path

import pytest

from launch.site import Site, load_site, read_site, seconds_of
from launch.slurm import user
from tests.toy import REPO
from torchtitan_deltaproduct.errors import ConfigError

EXAMPLE = REPO / "launch/site_example.toml"


def test_the_example_shows_every_key():
    site = read_site(EXAMPLE)
    assert (site.partition, site.gpus_per_node, site.env["HF_HUB_OFFLINE"]) == ("gpu", 8, "1")
    text = EXAMPLE.read_text()
    assert all(f"\n{key.name} = " in text or f"\n# {key.name} = " in text or key.name == "env" for key in fields(Site))


@pytest.mark.parametrize(("text", "message"), [
    ('partitions = "gpu"', "site.toml:1: partitions = \"gpu\": no such key; nearest: 'partition'"),
    ('\nqueue = "x"', "site.toml:2: queue = \"x\": no such key; there are: partition, account"),
    ("gpus_per_node = 8.0", "gpus_per_node = 8.0: expected a whole number; write 8"),
    ("gpus_per_node = -1", "must not be negative"),
    ('setup = "module load x"', 'expected a list; write ["module load x"]'),
    ("env = {A = 1}", 'A: expected a string; write A = "1"'),
    ('env = {"A-B" = "1"}', "A-B: not the name of an environment variable"),
    ('env = "A=1"', "expected a table"),
    ('gres = "gpu:8"', "must contain {gpus}"),
    ('time = "a day"', "expected a time as sbatch takes it"),
    ('container = "apptainer \'"', "No closing quotation"),
    ('mem = "1\\n#SBATCH --x"', "must be one line"),
    ("signal_seconds = 0", "must be 1 to 65535"),
    ('extra = ["reservation=x"]', 'expected an option of sbatch, such as "--reservation=name"'),
    ('gres = "gpu:{gpus}\\r#SBATCH"', "must be one line"),
    ('extra = ["--nodes=3"]', "is said elsewhere; use --nodes"),
    ('extra = ["--node 3"]', "is said elsewhere; use --nodes"),
    ('extra = ["-N3"]', "is said elsewhere; use --nodes"),
    ('extra = ["--ntasks=3"]', "is said elsewhere"),
    ('extra = ["--outp=x"]', "is said elsewhere"),
    ('extra = ["--signal=TERM@3"]', "is said elsewhere"),
    ('extra = ["--no-requeue"]', "is said elsewhere"),
    ('extra = ["--exclusive --array=0-9"]', "is said elsewhere"),
    ('extra = ["--exclusive -o x"]', "is said elsewhere"),
    ('extra = ["--partition=x"]', 'use the key "partition"'),
    ('extra = ["--mem=1"]', 'use the key "mem"'),
    ('extra = ["--x=1\\n#SBATCH -N 3"]', "expected an option of sbatch"),
    ("time = ", "site.toml: not valid TOML: Invalid value"),
])  # fmt: skip
def test_what_is_wrong_is_named(tmp_path, text, message):
    (tmp_path / "site.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_site(tmp_path / "site.toml")
    assert message in str(caught.value)


@pytest.mark.parametrize("option", ["-HN4", "-vo/tmp/o", "--gpus=8", "--ntasks-per-gpu=2", "--error=/tmp/e", "-F/x"])
def test_what_the_launcher_says_is_found_in_any_spelling(tmp_path, option):
    (tmp_path / "site.toml").write_text(f"extra = {[option]}")
    with pytest.raises(ConfigError, match="is said elsewhere"):
        read_site(tmp_path / "site.toml")


def test_other_options_of_sbatch_pass(tmp_path):
    options = ["--exclusive", "--mail-type=FAIL", "--mem-per-gpu=4G", "--gres-flags=x", "--time-min=1", "--nodelist=n1",
               "--comment=say --nodes=3", "-w n1", "--export=ALL"]  # fmt: skip
    (tmp_path / "site.toml").write_text(f"extra = {options}")
    assert read_site(tmp_path / "site.toml").extra == options


def test_no_home(tmp_path, monkeypatch):
    """Neither HOME nor an entry of the user in passwd: there is no site TOML then, and no error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("DELTAPRODUCT_SITE", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])
    assert load_site(None) == (Site(), None)
    assert user() == str(os.getuid()) or any(os.environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME"))


def test_all_problems_at_once(tmp_path):
    (tmp_path / "site.toml").write_text('partitio = "x"\nqos = 3\n')
    with pytest.raises(ConfigError, match=r"(?s)2 problems.*site.toml:1: .*site.toml:2: qos = 3"):
        read_site(tmp_path / "site.toml")


def test_where_it_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DELTAPRODUCT_SITE", raising=False)
    assert load_site(None) == (Site(), None)
    places = {
        "home": tmp_path / "home/.config/torchtitan-deltaproduct/site.toml",
        "here": Path("site.toml"),
        "variable": tmp_path / "variable.toml",
        "given": tmp_path / "given.toml",
    }
    for name, path in places.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'partition = "{name}"')
        if name == "variable":
            monkeypatch.setenv("DELTAPRODUCT_SITE", str(path))
        site, file = load_site(str(path) if name == "given" else None)
        assert (site.partition, file) == (name, path)
    with pytest.raises(ConfigError, match="--site nowhere.toml: no such file"):
        load_site("nowhere.toml")
    monkeypatch.setenv("DELTAPRODUCT_SITE", "nowhere.toml")
    with pytest.raises(ConfigError, match="DELTAPRODUCT_SITE=nowhere.toml: no such file"):
        load_site(None)


@pytest.mark.parametrize(("time", "seconds"), [
    ("30", 1800), ("30:15", 1815), ("24:00:00", 86400), ("1-0", 86400), ("2-03:04", 183840), ("1-02:03:04", 93784),
])  # fmt: skip
def test_seconds_of(time, seconds):
    assert seconds_of(time) == seconds
