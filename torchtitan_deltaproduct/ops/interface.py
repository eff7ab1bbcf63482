"""`gated_delta_product`: the public function, its argument checks and its choice of backend.

    o, state = gated_delta_product(q, k, v, g, beta, num_householder=2, output_final_state=True)

`backend="auto"` decides by device and dtype and logs the reason once; one asked for by name runs or raises.
"""

import logging

import torch
from torch import Tensor

from torchtitan_deltaproduct.errors import ConfigError
from torchtitan_deltaproduct.ops import custom_op, fla_backend
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
    """The gated DeltaProduct recurrence (arXiv 2502.10297; layouts of flash-linear-attention).

    Per head, `S <- exp(g_t) S`, then for each micro-step j `S <- S + beta k (v - k^T S)^T`, then `o_t = scale
    S^T q_t`. Differentiable in q, k, v, g, beta and initial_state. beta, g, norms and state are float32
    whatever the dtype of q, k and v (float64 if one of them is), also under autocast.

    Args:
        q: [B, T, H, K] queries, T >= 1.
        k: [B, T*n, H, K] keys; row t*n + j is micro-step j of token t. float32 and float64 keys are taken as
            they are;
            bfloat16 and float16 keys that exceed beta |k|^2 = 2 by rounding alone have beta scaled back to 2.
        v: [B, T*n, H, V] values.
        g: [B, T, H] log decay, <= 0, applied once a token before its micro-steps; or None.
        beta: [B, T*n, H]; in (0, 1), or in (0, 2) for negative eigenvalues.
        num_householder: n, micro-steps a token.
        scale: factor on o; K^-1/2 if None.
        initial_state: [N, H, K, V] (N = B, or the number of documents), zeros if None.
        output_final_state: whether to return the state after each sequence.
        cu_seqlens: [N+1] integer document boundaries in tokens, from 0 to T, with B = 1; the state is reset
            at each.
            Documents may be empty. On a GPU keep it on the CPU: then fla needs no device synchronisation.
            Together with states the chunk backend runs document by document; without, one pass over the
            packed stream.
        use_qk_l2norm: normalise q and k per head, x * rsqrt(sum x^2 + 1e-6), in float32.
        backend: "auto", "recurrent" (slow oracle), "chunk" (PyTorch, any device) or "fla" (CUDA, 16-bit).

    Returns:
        o [B, T, H, V] in v's dtype, and the final state [N, H, K, V], float32 (float64 for float64), or None.

    Raises:
        ValueError: shapes that do not fit together.
        ConfigError: a backend asked for by name that cannot run.
    """
    _check_shapes(q, k, v, g, beta, num_householder, initial_state, cu_seqlens)
    dtypes = tuple(str(x.dtype).removeprefix("torch.") for x in (q, k, v))
    backend = resolve_backend(backend, q.device.type, dtypes, g is not None, q.shape[3])
    scale = float(q.shape[3] ** -0.5 if scale is None else scale)
    if backend == "fla":
        q, k, beta = fla_backend.normalise(q, k, beta, use_qk_l2norm)
        use_qk_l2norm = False
    elif not use_qk_l2norm:
        beta = contractive_beta(k, beta)
    if backend == "recurrent":
        o, state = recurrent_gated_delta_product(
            q,
            k,
            v,
            g,
            beta,
            num_householder,
            scale=scale,
            initial_state=initial_state,
            cu_seqlens=cu_seqlens,
            use_qk_l2norm=use_qk_l2norm,
        )
    else:
        o, state, _, _ = custom_op.FORWARD(
            q,
            k,
            v,
            g,
            beta,
            initial_state,
            cu_seqlens,
            num_householder,
            scale,
            output_final_state,
            use_qk_l2norm,
            backend,
        )
    return o, state if output_final_state else None


# Under torch.compile this runs as plain Python while the graph is traced: it may log and look at the machine.
@torch.compiler.assume_constant_result
def resolve_backend(
    backend: str, device_type: str, dtypes: tuple[str, ...], gated: bool, head_dim: int
) -> str:
    """Turns the request into "recurrent", "chunk" or "fla", and logs each distinct (backend, reason) once.

    Args:
        backend: one of `BACKENDS`.
        device_type: "cpu", "cuda", "meta".
        dtypes: of q, k and v, as `bfloat16`.
        gated: whether g is given.
        head_dim: K.

    Raises:
        ConfigError: an unknown backend, or one asked for by name that cannot run here.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"op backend {backend!r} does not exist; choose one of {', '.join(BACKENDS)}")
    obstacle = None
    if backend in ("auto", "fla"):
        obstacle = fla_backend.obstacle(device_type, dtypes, gated, head_dim)
    if backend == "fla" and obstacle:
        raise ConfigError(
            f'op backend "fla" cannot run: {obstacle}\nuse op_backend = "auto", which chooses "chunk" here'
        )
    if backend != "auto":
        chosen, reason = backend, "asked for by name"
    elif obstacle is None:
        chosen, reason = "fla", "16-bit tensors on CUDA"
    else:
        chosen, reason = (
            "chunk",
            f"fla cannot run: {obstacle}" if device_type == "cuda" else f"device is {device_type}",
        )
    if (chosen, reason) not in _logged:
        _logged.add((chosen, reason))
        logger.info("gated_delta_product runs on backend %s: %s", chosen, reason)
    return chosen


def _check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    n: int,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raises ValueError naming the tensor, its shape and the one expected."""
    if n < 1:
        raise ValueError(f"num_householder is {n}, expected at least 1")
    if q.dim() != 4 or v.dim() != 4:
        raise ValueError(
            f"q and v must be [B, T, H, K] and [B, T*n, H, V], found {list(q.shape)} and {list(v.shape)}"
        )
    batch, length, heads, dim = q.shape
    if length < 1:
        raise ValueError(f"q has no tokens: {list(q.shape)}")
    rows, count = length * n, batch
    if cu_seqlens is not None:
        if batch != 1 or cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point():
            raise ValueError(
                "cu_seqlens must be an integer tensor [N+1] with B = 1 (documents packed in one row), "
                f"found {cu_seqlens.dtype} {list(cu_seqlens.shape)} and B = {batch}"
            )
        count = cu_seqlens.shape[0] - 1
    expected = [("k", k, (batch, rows, heads, dim)), ("v", v, (batch, rows, heads, v.shape[3]))]
    expected += [("beta", beta, (batch, rows, heads)), ("g", g, (batch, length, heads))]
    expected += [("initial_state", initial_state, (count, heads, dim, v.shape[3]))]
    for name, tensor, shape in expected:
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} is {list(tensor.shape)}, expected {list(shape)} for q {list(q.shape)}, "
                f"V = {v.shape[3]} and num_householder = {n}"
            )
