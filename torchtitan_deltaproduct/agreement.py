"""What rank 0 looks up or does for all ranks.

newest = from_rank_0(lambda: find_checkpoint(folder))      # the same on all ranks, or the same error
"""

import os
import pickle
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from .errors import UserError

T = TypeVar("T")
LONGEST_LOOK = timedelta(minutes=30)
"""What rank 0 may take before there is a process group, which has a patience of its own."""


def from_rank_0(function: Callable[[], T], store: dist.Store | None = None) -> T:
    """What `function` returns on rank 0, on all ranks; a `UserError` that it raises there is raised on all.

    Args:
        function: without collectives; what it returns or raises is pickled.
        store: of this start, before there is a process group. None: the group; without one every rank calls `function`.
    """
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1 or (store is None and not dist.is_initialized()):
        return function()
    answers = [_answer(function) if rank == 0 else None]
    if store is None:
        dist.broadcast_object_list(answers, src=0)
    elif rank == 0:
        store.set("from rank 0", pickle.dumps(answers))
    else:
        store.wait(["from rank 0"], LONGEST_LOOK)
        answers = pickle.loads(store.get("from rank 0"))
    value, error = answers[0]
    if error is not None:
        raise error
    return value


def _answer(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What a function returns, or what it raises: a `UserError` and an `OSError` as they are, any other as its text."""
    try:
        return function(), None
    except (UserError, OSError) as error:
        return None, error
    except Exception as error:
        return None, RuntimeError(f"on rank 0: {type(error).__name__}: {error}")
