"""A folder with one small valid TOML, and a loader that knows nothing of the machine."""

import pytest

from torchtitan_deltaproduct.config import Environment, load_config
from torchtitan_deltaproduct.errors import ConfigError

MINIMAL = '[data]\npaths = ["data/a"]\n'


@pytest.fixture
def load(tmp_path, monkeypatch):
    """`load(text, *options)` writes x.toml in an empty working folder and loads it."""
    monkeypatch.chdir(tmp_path)

    def run(text=MINIMAL, *options, environment=None):
        (tmp_path / "x.toml").write_bytes(text.encode())
        return load_config(["--job.config_file", "x.toml", *options], environment or Environment())

    return run


@pytest.fixture
def problems(load):
    """`problems(text, *options)` is the message of the ConfigError, or "" if there is none."""

    def run(text=MINIMAL, *options, environment=None):
        try:
            load(text, *options, environment=environment)
        except ConfigError as error:
            return str(error)
        return ""

    return run
