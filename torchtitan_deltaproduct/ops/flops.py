"""The custom ops' FLOPs for `torch.utils.flop_counter.FlopCounterMode`, by the formula of `flops`; on meta too."""

from typing import Any

from torch.utils.flop_counter import register_flop_formula

from torchtitan_deltaproduct.flops import flops_per_token
from torchtitan_deltaproduct.ops import custom_op, shards


@register_flop_formula([custom_op.FORWARD.overloadpacket, shards.MAP.overloadpacket])
def _forward_flops(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], *_: Any, **__: Any) -> int:
    batch, length, heads, dim = q
    return batch * length * flops_per_token(k[1] // length, heads, dim, v[3])


@register_flop_formula([custom_op.BACKWARD.overloadpacket, shards.BACKWARD.overloadpacket])
def _backward_flops(do: tuple, _dstate: Any, q: tuple, k: tuple, *_: Any, **__: Any) -> int:
    # Of v, which may be None, `do` has the width.
    return 2 * _forward_flops(q, k, do)
