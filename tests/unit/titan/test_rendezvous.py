"""Ranks agree on a new name whatever is left in the store, and say whom they miss."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

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
