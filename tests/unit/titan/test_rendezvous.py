"""Ranks agree on a new name whatever is left in the store, and say whom they miss."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from tests.toy import REPO
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
            print(words[1].split(":")[0])
os._exit(0)
"""


def test_one_process_listens_on_the_loopback_at_most():
    variables = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    done = subprocess.run([sys.executable, "-c", LONE], env=variables, cwd=REPO, capture_output=True, text=True)
    assert done.stdout and set(done.stdout.split()) == {"0100007F"}, (done.stdout, done.stderr[-2000:])
