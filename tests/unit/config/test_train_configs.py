"""Every training TOML that is shipped loads, on any machine and for the number of ranks its degrees describe."""

import re
from pathlib import Path

import pytest

from torchtitan_deltaproduct.config import Environment, load_config

ROOT = Path(__file__).parents[3]
FILES = sorted(path for path in (ROOT / "train_configs").rglob("*.toml") if path.parent.name != "claims")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_loads(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = load_config(["--job.config_file", str(file)], Environment())
    parallelism = config.parallelism
    ranks = parallelism.data_parallel_replicate_degree * max(1, parallelism.data_parallel_shard_degree)
    load_config(["--job.config_file", str(file)], Environment(world_size=ranks))
    for key, source in config.provenance.items():
        line = re.fullmatch(rf"{re.escape(str(file))}:(\d+)", source)
        if line:
            text = file.read_text().splitlines()[int(line[1]) - 1]
            assert key.rpartition(".")[2] in text, f"{source} is said to set {key}"
