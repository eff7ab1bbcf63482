"""The DeltaProduct mixer: the layer that stands where a Transformer has attention.

It maps `[B, T, hidden]` to the same shape through the recurrence of `ops`. Channels of k and v are ordered
`(n h d)` and columns of beta `(n h)`, as in flash-linear-attention, so that row `t*n + j` is micro-step j of
token t:

    mixer = DeltaProductMixer(DeltaProductArgs(hidden_size=256, num_heads=4, head_dim=64))
    y = mixer(x)                                    # rows are one document each
    y, cache = mixer.extend(x, cache)               # continue a sequence: see models.decode
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import SequenceRanks, gated_delta_product, recurrent_step, short_conv
from ..ops.normalize import compute_dtype
from ..ops.ranks import from_previous
from .args import DeltaProductArgs
from .conv import ShortConvolution


class MixerCache(NamedTuple):
    """What a mixer remembers of a sequence; its size does not grow with the sequence."""

    state: Tensor
    """[B, H, K, V] recurrent state, float32 (float64 in a float64 model)."""
    conv: tuple[Tensor, Tensor, Tensor] | None
    """The last conv_size-1 inputs of the q, k and v convolutions, each [B, C, conv_size-1]; None without."""


# q, k, v, g, beta as `DeltaProductMixer.operands` returns them and the state before -> o [B, T, H, V], the state after.
Operator = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor], tuple[Tensor, Tensor]]


class Decay(nn.Module):
    """The two parameters of the forget gate, `g = -exp(A_log) softplus(a + dt_bias)` per head.

    They stay float32 when the model is converted to a narrower type. A module of its own, so that FSDP can
    keep it out of the bfloat16 groups (one group for all layers, and `cast_forward_inputs=False` for the
    blocks): the model calls it outside the compiled and sharded blocks and hands them the result.
    """

    def __init__(self, num_heads: int):
        super().__init__()
        self.A_log = nn.Parameter(torch.empty(num_heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(num_heads, dtype=torch.float32))

    def forward(self) -> Tensor:
        """[2, H] float32: the rate -exp(A_log) and the bias."""
        return torch.stack([-self.A_log.exp(), self.dt_bias])

    def _apply(self, fn, recurse: bool = True):
        def keep_float32(t: Tensor) -> Tensor:
            out = fn(t)
            return t.to(out.device) if out.dtype in (torch.bfloat16, torch.float16) else out

        return super()._apply(keep_float32, recurse)


class DeltaProductMixer(nn.Module):
    """Projections, short convolutions, the operator, per-head norm, output gate and output projection.

    Attributes:
        ranks: who has the other parts of each row, under context parallelism; None: rows are whole.
        keep_states: whether the operator keeps its states for the backward pass, or makes them again.
    """

    def __init__(self, args: DeltaProductArgs):
        super().__init__()
        self.args = args
        self.ranks: SequenceRanks | None = None
        self.keep_states = True
        hidden, n, heads = args.hidden_size, args.num_householder, args.num_heads
        q_dim, v_dim = heads * args.head_dim, heads * args.head_v_dim
        self.q_proj = nn.Linear(hidden, q_dim, bias=False)
        self.k_proj = nn.Linear(hidden, n * q_dim, bias=False)
        self.v_proj = nn.Linear(hidden, n * v_dim, bias=False)
        self.b_proj = nn.Linear(hidden, n * heads, bias=False)
        if args.use_short_conv:
            self.q_conv1d = ShortConvolution(q_dim, args.conv_size)
            self.k_conv1d = ShortConvolution(n * q_dim, args.conv_size)
            self.v_conv1d = ShortConvolution(n * v_dim, args.conv_size)
        if args.use_forget_gate:
            self.a_proj = nn.Linear(hidden, heads, bias=False)
            self.decay = Decay(heads)
        if args.use_output_gate:
            self.g_proj = nn.Linear(hidden, v_dim, bias=False)
        self.o_norm = nn.RMSNorm(args.head_v_dim, args.norm_eps)
        self.o_proj = nn.Linear(v_dim, hidden, bias=False)

    def forward(self, x: Tensor, decay: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        """Mixes along the sequence.

        Args:
            x: [B, T, hidden].
            decay: [2, H] float32, `self.decay()`; None: computed here.
            positions: [B, T] int32, index of each token in its document; None: a row is one document.

        Returns:
            [B, T, hidden].
        """
        args = self.args
        unit_keys = args.use_short_conv and short_conv.obstacle(x, args.conv_size, args.head_dim) is None
        if unit_keys:
            # One kernel each: convolution, SiLU, and for q and k the norm per head.
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
            (q, _), (k, ratio), (v, _) = short_conv.short_convs(
                [
                    (q, self.q_conv1d.weight[:, 0], args.head_dim),
                    (k, self.k_conv1d.weight[:, 0], args.head_dim),
                    (v, self.v_conv1d.weight[:, 0], None),
                ],
                positions,
                self._halos(q, k, v),
            )
            q, k, v, g, beta = self._operands(q, k, v, x, decay)
            beta = beta * ratio.view(beta.shape)
        else:
            q, k, v, g, beta = self.operands(x, decay, positions)
        o, _ = gated_delta_product(
            *(q, k, v, g, beta, args.num_householder),
            positions=positions,
            use_qk_l2norm=not unit_keys,
            unit_keys=unit_keys,
            ranks=self.ranks,
            keep_states=self.keep_states,
            backend=args.op_backend,
        )
        return self._output(o, x)

    def operands(
        self, x: Tensor, decay: Tensor | None = None, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        """What the operator is given for `forward`'s arguments; also for whoever studies a trained model.

        Returns:
            q [B, T, H, K], k [B, T*n, H, K], v [B, T*n, H, V], g [B, T, H] or None, and beta [B, T*n, H] in the
            model's range. q and k are not normalised yet (`ops.normalize.l2norm`).
        """
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.args.use_short_conv:
            before = self._halos(q, k, v) or (None,) * 3
            q = self.q_conv1d(q, positions, before[0])
            k = self.k_conv1d(k, positions, before[1])
            v = self.v_conv1d(v, positions, before[2])
        else:
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        return self._operands(q, k, v, x, decay)

    def _halos(self, *inputs: Tensor) -> list[Tensor] | None:
        """What the convolutions of `inputs` [B, T, C] read of the previous rank, [B, W-1, C] each, in one message."""
        if self.ranks is None:
            return None
        ends = torch.cat([x[:, 1 - self.args.conv_size :] for x in inputs], 2)
        return list(from_previous(ends, self.ranks).split([x.shape[2] for x in inputs], 2))

    def extend(self, x: Tensor, cache: MixerCache, operator: Operator | None = None) -> tuple[Tensor, MixerCache]:
        """Continues a sequence, x [B, T, hidden], and overwrites the state in place when T is 1.

        `operator` runs in the place of the model's own: for whoever looks at the states inside of it.
        """
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.args.use_short_conv:
            q, q_cache = self.q_conv1d.extend(q, cache.conv[0])
            k, k_cache = self.k_conv1d.extend(k, cache.conv[1])
            v, v_cache = self.v_conv1d.extend(v, cache.conv[2])
            conv = (q_cache, k_cache, v_cache)
        else:
            q, k, v, conv = F.silu(q), F.silu(k), F.silu(v), None
        q, k, v, g, beta = self._operands(q, k, v, x, None)
        if operator is not None:
            o, state = operator(q, k, v, g, beta, cache.state)
        elif x.shape[1] == 1:
            g = None if g is None else g.squeeze(1)
            o, state = recurrent_step(q.squeeze(1), k, v, g, beta, cache.state, use_qk_l2norm=True)
            o = o.unsqueeze(1)
        else:
            o, state = gated_delta_product(
                *(q, k, v, g, beta, self.args.num_householder),
                initial_state=cache.state,
                output_final_state=True,
                use_qk_l2norm=True,
                backend=self.args.op_backend,
            )
        return self._output(o, x), MixerCache(state, conv)

    def _operands(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, decay: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
        """q, k, v, g and beta in the operator's layouts."""
        args, batch = self.args, x.shape[0]
        q = q.reshape(batch, -1, args.num_heads, args.head_dim)
        k = k.reshape(batch, -1, args.num_heads, args.head_dim)
        v = v.reshape(batch, -1, args.num_heads, args.head_v_dim)
        beta = narrow_linear(x, self.b_proj.weight)
        beta = beta.to(compute_dtype(beta)).sigmoid()
        if args.allow_neg_eigval:
            beta = beta * 2
        beta = beta.reshape(batch, -1, args.num_heads)
        if not args.use_forget_gate:
            return q, k, v, None, beta
        rate, bias = (self.decay() if decay is None else decay).unbind(0)
        gate = narrow_linear(x, self.a_proj.weight)
        g = rate * F.softplus(gate.to(compute_dtype(gate)) + bias)
        return q, k, v, g.reshape(batch, -1, args.num_heads), beta

    def _output(self, o: Tensor, x: Tensor) -> Tensor:
        """Norm per head, output gate and projection of o [*, *, H, V]; the result has the shape of x."""
        o = self.o_norm(o).reshape(*x.shape[:-1], -1)
        if self.args.use_output_gate:
            o = o * F.silu(self.g_proj(x))
        return self.o_proj(o)


def narrow_linear(x: Tensor, weight: Tensor) -> Tensor:
    """`F.linear` to a few channels: on CUDA with rows of zeros up to a multiple of 16.

    cuBLAS has only slow kernels for rows of 18 numbers, which are not aligned to 16 bytes.
    """
    rows = weight.shape[0]
    if x.device.type != "cuda" or rows % 16 == 0:
        return F.linear(x, weight)
    return F.linear(x, F.pad(weight, (0, 0, 0, -rows % 16)))[..., :rows]
