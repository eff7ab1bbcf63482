"""Ranks agree on a new name whatever is left in the store, and say whom they miss."""

import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from time import sleep

import pytest
import torch.distributed as dist

from tests.toy import REPO
from torchtitan_deltaproduct.agreement import from_rank_0
from torchtitan_deltaproduct.errors import ConfigError
from torchtitan_deltaproduct.titan import rendezvous
from torchtitan_deltaproduct.titan.rendezvous import agree

SECONDS = timedelta(seconds=30)


def start(store, ranks):
    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(lambda rank: agree(store, rank, ranks, SECONDS), range(ranks)))


def test_each_start_has_its_own_name():
    store = dist.HashStore()
    names = [start(store, 4) for _ in range(3)]
    assert all(len(set(of_ranks)) == 1 for of_ranks in names)
    assert len({of_ranks[0] for of_ranks in names}) == 3


def test_a_start_that_died_half_way_is_forgotten():
    store = dist.HashStore()
    store.set("hello/1", "dead")
    store.set("answer/1", "dead:grave")
    first, second = start(store, 2)
    assert first == second != "grave"


def test_who_is_missing():
    with pytest.raises(TimeoutError, match="rank 0 waited 0 s for rank 1, 2 to start"):
        agree(dist.HashStore(), 0, 3, timedelta(seconds=0.1))
    with pytest.raises(TimeoutError, match="rank 2 waited 0 s for rank 0"):
        agree(dist.HashStore(), 2, 3, timedelta(seconds=0.1))


LONE = """
import os, pathlib
from torchtitan_deltaproduct.titan.run import single_process_defaults
from torchtitan_deltaproduct.titan.rendezvous import own_store
import torch.distributed as dist
single_process_defaults()
with own_store():
    dist.init_process_group("cpu:gloo")
own = {os.readlink(handle) for handle in pathlib.Path("/proc/self/fd").iterdir() if handle.exists()}
for name in ("/proc/net/tcp", "/proc/net/tcp6"):
    for words in map(str.split, pathlib.Path(name).read_text().splitlines()[1:]):
        if words[3] == "0A" and f"socket:[{words[9]}]" in own:
            print(words[1].split(":")[0], flush=True)
os._exit(0)
"""


def test_one_process_listens_on_the_loopback_at_most():
    variables = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    done = subprocess.run([sys.executable, "-c", LONE], env=variables, cwd=REPO, capture_output=True, text=True)
    assert done.stdout and set(done.stdout.split()) == {"0100007F"}, (done.stdout, done.stderr[-2000:])


def refuse():
    raise ConfigError("no such thing")


def lose_the_file():
    raise OSError(errno.ESTALE, "Stale file handle")


@pytest.mark.parametrize("look", [lambda: {"step": 7}, refuse, lambda: 1 / 0, lose_the_file])
def test_rank_0_looks_for_all(monkeypatch, look):
    """What it found or refused is the answer on every rank; the others do not look."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    store, seen = dist.HashStore(), []

    def ask(rank):
        monkeypatch.setenv("RANK", str(rank))
        try:
            return from_rank_0(lambda: seen.append(rank) or look(), store)
        except (ConfigError, RuntimeError, OSError) as error:
            return type(error), str(error)

    answers = [ask(rank) for rank in range(3)]
    assert seen == [0] and answers == [answers[0]] * 3
    assert answers[0] in ({"step": 7}, (ConfigError, "no such thing"),
                          (RuntimeError, "on rank 0: ZeroDivisionError: division by zero"),
                          (OSError, f"[Errno {errno.ESTALE}] Stale file handle"))  # fmt: skip


def test_waiting_ranks_look_less_and_less(monkeypatch):
    pauses = []
    monkeypatch.setattr(rendezvous.time, "sleep", lambda seconds: pauses.append(seconds) or sleep(min(seconds, 0.01)))
    with pytest.raises(TimeoutError):
        agree(dist.HashStore(), 1, 2, timedelta(seconds=0.3))
    assert pauses[0] == rendezvous.FIRST_POLL and pauses[-1] == rendezvous.LAST_POLL and len(pauses) > 9


def test_one_process_of_a_node_speaks(monkeypatch):
    monkeypatch.setattr(rendezvous, "_store", dist.HashStore())
    monkeypatch.setenv("WORLD_SIZE", "4")
    spoke = []
    for node, rank in ((0, 1), (0, 0), (1, 1), (1, 0)):
        monkeypatch.setenv("GROUP_RANK", str(node))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        spoke.append(rendezvous.first_of_node())
    assert spoke == [True, False, True, False]
    # Where the store is gone with its node.
    monkeypatch.setattr(rendezvous, "_store", None)
    for rank, speaks in ((0, True), (1, False)):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert rendezvous.first_of_node() is speaks
