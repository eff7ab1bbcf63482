"""Model FLOPs of the operator: the recurrence as defined, not the chunkwise form's extra work.

    flops_per_token(num_householder=2, heads=8, head_dim=128, head_v_dim=128)

Apart from `ops`, which imports torch: what counts a run's FLOPs from its files (`compare`) starts without it.
"""


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
