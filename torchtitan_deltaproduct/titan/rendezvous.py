"""A key-value store of its own for every start of the ranks.

torchrun (2.11 to 2.13) keeps one store over its restarts, with the keys of the ranks that died in it. A restarted rank
that is quicker than its peers reads the dead one's address there ("Gloo connectFullMesh failed: connection refused"),
or a dead NCCL identifier, and the restart is lost. So ranks first agree on a name that no earlier start knew, and the
process group lives under it.

    with own_store() as store:
        settings = from_rank_0(look_at_the_run_folder, store)          # agreement.py
        torch.distributed.init_process_group("gloo")
"""

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

import torch.distributed as dist

from ..torch_internals import process_group_in

FIRST_POLL, LAST_POLL = 0.02, 0.5
"""Seconds between looks at the store, at first and in the end: a thousand ranks that wait must not keep it busy."""
_store: dist.Store | None = None
"""Of this start, once ranks have agreed on it."""


@contextmanager
def own_store(timeout: timedelta = timedelta(minutes=5)) -> Iterator[dist.Store | None]:
    """Within it, `init_process_group` without a store gets the one given, which holds nothing of an earlier start.

    Does nothing where torchrun lets every start have a store of its own. One process without torchrun keeps its store
    to itself: by default it would listen on every interface.

    Args:
        timeout: for all ranks to appear.
    """
    global _store
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    within_another = isinstance(dist.init_process_group, partial)
    if dist.is_initialized() or within_another or (ranks > 1 and not with_torchrun):
        yield None
        return
    if with_torchrun:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(*address, ranks, is_master=False, timeout=timeout)
        named = dist.PrefixStore(agree(dist.PrefixStore("agree", store), rank, ranks, timeout), store)
    else:
        named = dist.HashStore()
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    _store = named
    with process_group_in(named, rank, ranks):
        yield named


def first_of_node() -> bool:
    """Whether no other process of this node and start has asked this; where that is not known, local rank 0.

    The store may be gone with the node that held it: a look at it takes some seconds at most.
    """
    if os.environ["WORLD_SIZE"] == "1":
        return True
    try:
        if _store is None:
            raise RuntimeError("without torchrun there is no store that outlives a rank")
        _store.set_timeout(timedelta(seconds=5))
        return _store.add(f"first/{os.environ.get('GROUP_RANK', '0')}", 1) == 1
    except RuntimeError:
        return os.environ.get("LOCAL_RANK", "0") == "0"


def agree(store: dist.Store, rank: int, ranks: int, timeout: timedelta) -> str:
    """A name that rank 0 makes up, the same on all ranks of this start; whatever an earlier start left in the store.

    Rank r says hello with a random token; rank 0 answers with that token and the name; rank r, who alone knows whether
    the token is its own, confirms under the name. Answers to the dead are overwritten or ignored.

    Raises:
        TimeoutError: not all ranks appeared.
    """
    end, pause = time.monotonic() + timeout.total_seconds(), FIRST_POLL
    own = secrets.token_hex(8)
    waiting = set(range(1, ranks)) if rank == 0 else {0}
    if rank != 0:
        store.set(f"hello/{rank}", own)
    while waiting:
        for other in sorted(waiting):
            if rank == 0:
                if store.check([f"hello/{other}"]):
                    store.set(f"answer/{other}", f"{store.get(f'hello/{other}').decode()}:{own}")
                if store.check([f"{own}/{other}"]):
                    waiting.remove(other)
            elif store.check([f"answer/{rank}"]):
                token, _, name = store.get(f"answer/{rank}").decode().partition(":")
                if token == own:
                    store.set(f"{name}/{rank}", "here")
                    return name
        if time.monotonic() > end:
            who = ", ".join(map(str, sorted(waiting)[:8]))
            raise TimeoutError(f"rank {rank} waited {timeout.total_seconds():.0f} s for rank {who} to start")
        time.sleep(pause if waiting else 0)
        pause = min(1.5 * pause, LAST_POLL)
    return own
