"""The recurrent states of a model along a sequence, at chosen positions, out of its own recurrence.

    cache = init_cache(model, batch=4)
    cache = walk(model, tokens, cache, look, every=16)          # calls look(glimpse) for each layer
    for states in glimpse.states(): ...                         # [P, 1, B, H, K, V], position after position

Reading token by token would show every state, slowly. Here a segment goes through the chunkwise operator at once,
which has beside the output the error v - k^T S of every micro-step; X = beta (v - k^T S) is what is written. From one
chosen position to the next, `every` tokens later, the state becomes

    S' = e^G S + sum_r e^{G_r} k_r X_r^T          G: log decay of all those tokens, G_r: of those after row r

so that the sums of all positions are one batched product, and a scan adds them up. The states are made in blocks of
bounded size and not kept.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from torchtitan_deltaproduct.models import DeltaProductLM
from torchtitan_deltaproduct.models.mixer import MixerCache
from torchtitan_deltaproduct.ops.chunk import chunk_forward
from torchtitan_deltaproduct.ops.normalize import compute_dtype, full_precision, l2norm
from torchtitan_deltaproduct.ops.segment import MIN_LOG_DECAY, from_chunks

CPU_BLOCK_BYTES, GPU_BLOCK_BYTES = 8 << 20, 512 << 20
"""Of the states that are held at once, of at least one position; what a CPU's cache does not hold takes longer."""


@dataclass(frozen=True)
class Glimpse:
    """What the operator of one layer did with T tokens of each sequence; tensors are in its compute dtype."""

    layer: int
    num_householder: int
    """n."""
    k: Tensor
    """[B, T*n, H, K] keys, normalised."""
    beta: Tensor
    """[B, T*n, H]."""
    g: Tensor | None
    """[B, T, H] log decay."""
    written: Tensor
    """[B, T*n, H, V] X: micro-step r adds k_r X_r^T to the state."""
    before: Tensor
    """[B, H, K, V] the state before."""
    every: int
    """Chosen are the tokens whose number, counted from 1 at the start of the sequence, is a multiple of it."""
    offset: int
    """Tokens before these since the last multiple."""

    @property
    def positions(self) -> int:
        """P, how many tokens are chosen."""
        return (self.offset + self.k.shape[1] // self.num_householder) // self.every

    def chosen_tokens(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [B, P, ...]."""
        return x[:, self.every - self.offset - 1 :: self.every]

    def chosen_rows(self, x: Tensor) -> Tensor:
        """[B, T*n, ...] -> [B, P, n, ...]."""
        return self.chosen_tokens(x.unflatten(1, (-1, self.num_householder)))

    def states(self, between: bool = False, block_bytes: int | None = None) -> Iterator[Tensor]:
        """The states at the chosen tokens, some positions at a time: [p, n or 1, B, H, K, V], P positions in all.

        They are those after each of the n micro-steps (`between`) or after the last, at most `block_bytes` at a time,
        by device if None, but at least one position.
        """
        if not self.positions:
            return
        if block_bytes is None:
            block_bytes = CPU_BLOCK_BYTES if self.k.device.type == "cpu" else GPU_BLOCK_BYTES
        micro = self.num_householder if between else 1
        block = max(1, block_bytes // (micro * self.before.numel() * self.before.element_size()))
        batch, heads = self.before.shape[:2]
        keys, written, decay = self._groups()
        state = self.before.flatten(0, 1)
        for first in range(0, self.positions, block):
            part = slice(first, first + block)
            added = _added(keys[part], written[part], self.num_householder, between)
            for i, step in enumerate(added):
                step += state if decay is None else state * decay[first + i]
                state = step[-1]
            yield added.unflatten(2, (batch, heads))

    def _groups(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows by position: keys, decayed to it, [P, BH, m*n, K], X [P, BH, m*n, V], and e^G [P, BH, 1, 1] or None.

        m is `every`, or where there is one position alone, the tokens before it that are here.
        """
        n, count, g = self.num_householder, self.positions, self.g
        used = count * self.every - self.offset
        size = self.every if count > 1 else used
        keys = _grouped(self.k[:, : used * n], count, size * n)
        written = _grouped(self.written[:, : used * n], count, size * n)
        if g is None:
            return keys, written, None
        g = _grouped(g[:, :used].clamp(min=MIN_LOG_DECAY).unsqueeze(-1), count, size)
        # The decay of the tokens that follow, summed from the end: differences of a running sum would lose digits.
        since = g.flip(-2).cumsum(-2).flip(-2)
        after = F.pad(since[..., 1:, :], (0, 0, 0, 1))
        return keys * after.exp().repeat_interleave(n, -2), written, since[..., :1, :].exp()


def _grouped(x: Tensor, count: int, rows: int) -> Tensor:
    """[B, L, H, D] -> [count, B*H, rows, D], zeros before the first row."""
    x = F.pad(x, (0, 0, 0, 0, count * rows - x.shape[1], 0))
    return x.unflatten(1, (count, rows)).permute(1, 0, 3, 2, 4).flatten(1, 2)


def _added(keys: Tensor, written: Tensor, n: int, between: bool) -> Tensor:
    """What the rows of each position add to a state: [p, BH, R, K], [p, BH, R, V] -> [p, n or 1, BH, K, V]."""
    if not between:
        return (keys.mT @ written).unsqueeze(1)
    # The rows of the last token one by one: between them there is no decay.
    rest = keys.shape[2] - n
    after = [keys[:, :, :rest].mT @ written[:, :, :rest]]
    for row in range(rest, keys.shape[2]):
        after.append(after[-1] + keys[:, :, row, :, None] * written[:, :, row, None, :])
    return torch.stack(after[1:], 1)


@torch.no_grad()
def walk(
    model: DeltaProductLM, tokens: Tensor, cache: list[MixerCache], look: Callable[[Glimpse], None], every: int = 1,
    offset: int = 0,
) -> list[MixerCache]:  # fmt: skip
    """Reads the next tokens [B, T] int64, T at least 1, and shows what each layer does with them.

    From the `cache` of `models.decode.init_cache`, or of an earlier call, to that after the last token; `look` is
    called once a layer, in order; `every` and `offset` are those of `Glimpse`.
    """
    x, after = model.tok_embeddings(tokens), []
    for index, (layer, entry) in enumerate(zip(model.layers.values(), cache, strict=True)):

        def operator(q, k, v, g, beta, state, index=index) -> tuple[Tensor, Tensor]:
            dtype = compute_dtype(q, k, v)
            options = {"scale": q.shape[3] ** -0.5, "use_qk_l2norm": True}
            o, final, _, errors = chunk_forward(q, k, v, g, beta, state, None, **options)
            with full_precision(q.device.type):
                written = v.new_empty(v.shape, dtype=dtype)
                from_chunks(errors, written)
                beta, gate = beta.to(dtype), None if g is None else g.to(dtype)
                written *= beta.unsqueeze(-1)
                keys = l2norm(k.to(dtype))
                n = k.shape[1] // q.shape[1]
                look(Glimpse(index, n, keys, beta, gate, written, state.to(dtype), every, offset))
            return o, final

        x, entry = layer.extend(x, entry, operator)
        after.append(entry)
    return after
