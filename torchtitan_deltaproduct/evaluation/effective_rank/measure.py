"""Effective ranks and transitions of a model on some sequences.

numbers = measure(model, tokens, {"every": 16, "between": False, "reset": False, "segment": 1024}, progress)
numbers.arrays()                                   # for a file; Numbers.of(pieces) puts those of all pieces together
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from torchtitan_deltaproduct.models import DeltaProductLM
from torchtitan_deltaproduct.models.decode import init_cache

from ..pieces import Pieces, Tokens
from .singular_values import effective_rank
from .states import Glimpse, walk
from .transitions import Tally


@dataclass
class Numbers:
    """What is measured; L layers, H heads, N sequences, P positions, n Householders.

    Attributes:
        rank: [L, H, N, P, n or 1] float32, effective rank after each micro-step (or the last) of the chosen tokens.
        starts: [D, 2] int64 (sequence, tokens before the document), the start of each sequence left out.
        tally: counts over all sequences.
    """

    rank: np.ndarray
    starts: np.ndarray
    tally: Tally

    def arrays(self) -> dict[str, np.ndarray]:
        return {"rank": self.rank, "starts": self.starts, **vars(self.tally)}

    @classmethod
    def of(cls, pieces: Pieces) -> "Numbers":
        """All pieces together; DataError if one is damaged."""
        contents = [arrays for _, arrays in pieces]
        tallies = {field.name: sum(arrays[field.name] for arrays in contents) for field in fields(Tally)}
        rank = np.concatenate([arrays["rank"] for arrays in contents], 2)
        return cls(rank, np.concatenate([arrays["starts"] for arrays in contents]), Tally(**tallies))


def measure(
    model: DeltaProductLM, tokens: Tokens, reading: dict[str, Any], progress: Callable[[int], None] | None = None
) -> Numbers:
    """Reads sequences and measures their states.

    Args:
        model: whole on its device.
        tokens: the sequences.
        reading: `every`, a state at each multiple of so many tokens; `between`, after each Householder step of these,
            else after the last; `reset`, an empty state at each document start, for which a sequence is read by itself;
            `segment`, tokens of a sequence read at a time.
        progress: told the number of tokens after each segment.
    """
    args, device, every = model.args, model.tok_embeddings.weight.device, reading["every"]
    micro_steps = args.num_householder if reading["between"] else 1
    shape = (args.num_hidden_layers, args.num_heads, tokens.count, tokens.length // every, micro_steps)
    rank, tally, starts = np.full(shape, np.nan, dtype=np.float32), Tally.empty(args), []
    batches = [slice(row, row + 1) for row in range(tokens.count)] if reading["reset"] else [slice(0, tokens.count)]
    for rows in batches:
        cache = None
        for start in range(0, tokens.length, reading["segment"]):
            segment = tokens.read(start, min(start + reading["segment"], tokens.length), rows)
            begins = _document_starts(segment, start, tokens.eos_id)
            starts.append(begins + [tokens.first + rows.start, start])
            for first, last, fresh in _stretches(segment.shape[1], begins, reading["reset"]):
                position = start + first

                def look(glimpse: Glimpse, rows=rows, position=position) -> None:
                    tally.add(glimpse, 2.0 if args.allow_neg_eigval else 1.0)
                    place = position // every
                    for states in glimpse.states(reading["between"]):
                        # [p, n, B, H] -> [H, B, p, n]
                        block = effective_rank(states).permute(3, 2, 0, 1).float().cpu().numpy()
                        rank[glimpse.layer][:, rows, place : place + block.shape[2]] = block
                        place += block.shape[2]

                if cache is None or fresh:
                    cache = init_cache(model, len(segment))
                stretch = torch.from_numpy(segment[:, first:last]).to(device)
                cache = walk(model, stretch, cache, look, every, position % every)
            if progress:
                progress(segment.size)
    starts = np.concatenate(starts)
    return Numbers(rank, starts[np.lexsort((starts[:, 1], starts[:, 0]))], tally)


def _document_starts(tokens: np.ndarray, start: int, eos_id: int | None) -> np.ndarray:
    """(row, column) of the document starts in [B, T] tokens, those of the sequences left out: [d, 2]."""
    begins = np.argwhere(tokens == eos_id) if eos_id is not None else np.empty((0, 2), dtype=np.int64)
    return begins if start else begins[begins[:, 1] > 0]


def _stretches(length: int, begins: np.ndarray, reset: bool) -> Iterator[tuple[int, int, bool]]:
    """(first, last, empty state) of the stretches of a segment that are read at once."""
    cuts = begins[:, 1].tolist() if reset else []
    for first, last in zip([0, *cuts], [*cuts, length], strict=True):
        if last > first:
            yield first, last, first in cuts
