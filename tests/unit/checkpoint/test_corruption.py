"""Every file of a run, of prepared data and of an export, damaged at random: messages, no tracebacks or other values.

bash launch/test.sh -m slow tests/unit/checkpoint/test_corruption.py         CORRUPTIONS=2000 SEED=1 for more
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from launch import requeue
from tests.toy import train
from torchtitan_deltaproduct import status
from torchtitan_deltaproduct.checkpoint import from_hf, load_model, ls, to_hf, verify
from torchtitan_deltaproduct.data import show, show_batch
from torchtitan_deltaproduct.data.shards.shards import TokenStream
from torchtitan_deltaproduct.errors import UserError

pytestmark = pytest.mark.slow
NUMBER, SEED = int(os.environ.get("CORRUPTIONS", "150")), int(os.environ.get("SEED", "0"))
HOSTILE = [None, True, -1, 0, float("inf"), float("nan"), 10**30, "", "x", [], {}, [[]], {"a": 1}, "\ud800", "../x"]
REQUEUE = ("--max", "3", "--code", "1", "--since", "0", "--ended-by-slurm", "no")


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory) -> dict[str, Path]:
    """What is damaged, by kind."""
    folder = tmp_path_factory.mktemp("whole")
    train(toy, folder / "run", "--metrics.no-enable_tensorboard")
    to_hf.export(folder / "run", folder / "export")
    return {"run": folder / "run", "export": folder / "export", "data": toy.parent / "data/validation"}


def damage(root: Path, rng: random.Random) -> str:
    """Damages one file in one way; says which and how."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    file = rng.choice(files)
    content = bytearray(file.read_bytes())
    ways = ["flip", "cut", "zeros", "swap", "folder", "pipe", "gone"] if content else ["folder", "gone"]
    way = rng.choice(ways + 4 * ["value"] * file.name.endswith((".json", ".jsonl")))
    place = rng.randrange(len(content)) if content else 0
    if way in ("folder", "pipe", "gone"):
        file.unlink()
        {"folder": file.mkdir, "pipe": lambda: os.mkfifo(file), "gone": lambda: None}[way]()
        return f"{file.relative_to(root)}: {way}"
    if way == "flip":
        content[place] ^= 1 << rng.randrange(8)
    elif way == "cut":
        del content[place:]
    elif way == "zeros":
        content[place : place + 64] = bytes(len(content[place : place + 64]))
    elif way == "swap":
        content = rng.choice(files).read_bytes()
    else:
        lines = content.decode().splitlines() if file.suffix == ".jsonl" else [content.decode()]
        number = rng.randrange(len(lines))
        lines[number] = another_value(lines[number], rng)
        content = "\n".join(lines).encode()
    file.write_bytes(content)
    return f"{file.relative_to(root)}: {way}"


def another_value(text: str, rng: random.Random) -> str:
    """JSON with one value of another type, or without it."""
    tree = json.loads(text)
    places = []

    def walk(value) -> None:
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            places.append((value, key))
            if isinstance(inner, dict | list):
                walk(inner)

    walk(tree)
    where, key = rng.choice(places)
    if rng.random() < 0.2:
        del where[key]
    else:
        where[key] = rng.choice(HOSTILE)
    return json.dumps(tree if rng.random() < 0.9 else rng.choice(HOSTILE))


def weights(path: Path) -> tuple[int | None, dict[str, bytes]]:
    loaded = load_model(path)
    return loaded.step, {name: tensor.numpy().tobytes() for name, tensor in loaded.model.state_dict().items()}


def tokens(folder: Path) -> bytes:
    stream = TokenStream(folder)
    found = np.empty(stream.tokens, dtype=np.int64)
    stream.read(0, found)
    return found.tobytes()


def ends_well(call: Callable, *given) -> object:
    """The result; None where it was refused with a message. Anything else that is raised is a failure."""
    try:
        return call(*given)
    except UserError as error:
        assert str(error)
        return None


@pytest.mark.timeout(1800)
def test_damage_is_told(whole, tmp_path, caplog, capsys):
    rng = random.Random(SEED)
    steps = {step: weights(whole["run"] / f"checkpoint/step-{step}")[1] for step in (4, 6, 8)}
    export, text = weights(whole["export"])[1], tokens(whole["data"])
    refused = 0
    for _ in range(NUMBER):
        kind = rng.choice(list(whole))
        root = tmp_path / kind
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(whole[kind], root)
        done = damage(root, rng)
        caplog.clear()
        if kind == "data":
            found, right = ends_well(tokens, root), [text]
            commands = [(show, ()), (show, ("--verify",))]
        else:
            step, found = ends_well(weights, root) or (None, None)
            right = [steps.get(step)] if kind == "run" else [export]
            commands = [(status, ()), (ls, ()), (verify, ()), (show_batch, ("--step", "3")), (requeue, REQUEUE)]
            if kind == "export":
                shutil.rmtree(tmp_path / "imported", ignore_errors=True)
                commands = [(ls, ()), (from_hf, (str(tmp_path / "imported"),))]
        refused += found is None
        told = "is not what was written" in caplog.text or done.startswith("training.json")
        assert found is None or found in right or told, f"{kind}/{done}: other values, and no word"
        for module, options in commands:
            try:
                ends_well(module.main, [str(root), *options])
            except Exception as error:
                raise AssertionError(f"{kind}/{done}: {module.__name__} raises {error!r}") from error
        capsys.readouterr()
    assert refused > NUMBER // 10
