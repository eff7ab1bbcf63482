"""`gated_delta_product`: the one public entry to the operator, its argument checks and its choice of backend."""

import torch
from torch import Tensor

from torchtitan_deltaproduct.ops.chunk import chunk_gated_delta_product
from torchtitan_deltaproduct.ops.normalize import contractive_beta
from torchtitan_deltaproduct.ops.recurrent import recurrent_gated_delta_product


def gated_delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    num_householder: int,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """See DESIGN.md. First version."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not use_qk_l2norm:
        beta = contractive_beta(k, beta)
    fn = recurrent_gated_delta_product if backend == "recurrent" else chunk_gated_delta_product
    o, s = fn(q, k, v, g, beta, num_householder, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens,
              use_qk_l2norm=use_qk_l2norm)
    return o, s if output_final_state else None
