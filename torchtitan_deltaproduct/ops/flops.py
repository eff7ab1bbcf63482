"""Model FLOPs of the operator: the recurrence as defined, not the chunkwise form's extra work.

    flops_per_token(num_householder=2, heads=8, head_dim=128, head_v_dim=128)

`torch.utils.flop_counter.FlopCounterMode` counts the custom ops by the same formula, on the meta device too.
"""

from typing import Any

from torch.utils.flop_counter import register_flop_formula

from torchtitan_deltaproduct.ops import custom_op, shards


def flops_per_token(num_householder: int, heads: int, head_dim: int, head_v_dim: int, *, backward: bool = False) -> int:
    """FLOPs a token, a multiply-add counted as two.

    A micro-step reads `k^T S` (2KV) and adds `k (beta error)^T` (2KV); a token reads `S^T q` (2KV). Decay,
    beta and norms are elementwise and not counted, as usual for MFU. Backward is twice the forward.

    Args:
        num_householder: n.
        heads: H.
        head_dim: K.
        head_v_dim: V.
        backward: count the backward pass instead.
    """
    forward = heads * head_dim * head_v_dim * (4 * num_householder + 2)
    return 2 * forward if backward else forward


@register_flop_formula([custom_op.FORWARD.overloadpacket, shards.MAP.overloadpacket])
def _forward_flops(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], *_: Any, **__: Any) -> int:
    batch, length, heads, dim = q
    return batch * length * flops_per_token(k[1] // length, heads, dim, v[3])


@register_flop_formula([custom_op.BACKWARD.overloadpacket, shards.BACKWARD.overloadpacket])
def _backward_flops(_do: Any, _dstate: Any, q: tuple, k: tuple, v: tuple, *_: Any, **__: Any) -> int:
    return 2 * _forward_flops(q, k, v)
