"""Effective ranks and transitions of a model on some sequences.

arrays = measure(model, tokens, {"every": 16, "between": False, "reset": False, "segment": 1024}, progress)
arrays["rank"], arrays["starts"], arrays["beta"], ...
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from torchtitan_deltaproduct.models import DeltaProductLM
from torchtitan_deltaproduct.models.decode import init_cache

from ..pieces import Tokens
from .singular_values import effective_rank
from .states import Glimpse, walk
from .transitions import Tally


def measure(
    model: DeltaProductLM, tokens: Tokens, reading: dict[str, Any], progress: Callable[[int], None]
) -> dict[str, np.ndarray]:
    """Reads sequences and measures their states; L layers, H heads, N sequences, P positions, n Householders.

    Args:
        model: whole on its device.
        tokens: the sequences.
        reading: `every`, a state at each multiple of so many tokens; `between`, after each Householder step of these,
            else after the last; `reset`, an empty state at each document start, for which a sequence is read by itself;
            `segment`, tokens of a sequence read at a time.
        progress: told the number of tokens after each segment.

    Returns:
        rank [L, H, N, P, n or 1] float32, after each micro-step (or the last) of the chosen tokens; starts [D, 2] int64
        (sequence, tokens before the document), the start of each sequence left out; and the fields of `Tally`.
    """
    args, device, every = model.args, model.tok_embeddings.weight.device, reading["every"]
    micro_steps = args.num_householder if reading["between"] else 1
    shape = (args.num_hidden_layers, args.num_heads, tokens.count, tokens.length // every, micro_steps)
    rank, tally, starts = np.full(shape, np.nan, dtype=np.float32), Tally.empty(args), []
    batches = [slice(row, row + 1) for row in range(tokens.count)] if reading["reset"] else [slice(0, tokens.count)]
    for rows in batches:
        cache = init_cache(model, rows.stop - rows.start)
        for start in range(0, tokens.length, reading["segment"]):
            segment = tokens.read(start, min(start + reading["segment"], tokens.length), rows)
            begins = np.argwhere(segment == tokens.eos_id) if tokens.eos_id is not None else np.empty((0, 2), np.int64)
            begins = begins[begins[:, 1] + start > 0]
            starts.append(begins + [tokens.first + rows.start, start])
            cuts = begins[:, 1].tolist() if reading["reset"] else []
            for first, last in zip([0, *cuts], [*cuts, segment.shape[1]], strict=True):
                position = start + first

                def look(glimpse: Glimpse, rows=rows, position=position) -> None:
                    tally.add(glimpse, 2.0 if args.allow_neg_eigval else 1.0)
                    place = position // every
                    for states in glimpse.states(reading["between"]):
                        # [p, n, B, H] -> [H, B, p, n]
                        block = effective_rank(states).permute(3, 2, 0, 1).float().cpu().numpy()
                        rank[glimpse.layer][:, rows, place : place + block.shape[2]] = block
                        place += block.shape[2]

                if first in cuts:
                    cache = init_cache(model, len(segment))
                if last > first:
                    stretch = torch.from_numpy(segment[:, first:last]).to(device)
                    cache = walk(model, stretch, cache, look, every, position % every)
            progress(segment.size)
    starts = np.concatenate(starts)
    return {"rank": rank, "starts": starts[np.lexsort((starts[:, 1], starts[:, 0]))], **vars(tally)}
