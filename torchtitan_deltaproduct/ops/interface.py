"""`gated_delta_product`: the public function, its argument checks and its choice of backend.

    o, state = gated_delta_product(q, k, v, g, beta, num_householder=2, output_final_state=True)

`backend="auto"` decides by device and dtype and logs the reason once; one asked for by name runs or raises.
"""

import logging

import torch
from torch import Tensor

from torchtitan_deltaproduct.errors import ConfigError
from torchtitan_deltaproduct.ops import custom_op, documents, fla_backend, shards, triton_backend
from torchtitan_deltaproduct.ops.normalize import contractive_beta, normalise
from torchtitan_deltaproduct.ops.ranks import SequenceRanks
from torchtitan_deltaproduct.ops.recurrent import recurrent_gated_delta_product
from torchtitan_deltaproduct.torch_internals import constant_result

BACKENDS = ("auto", "recurrent", "chunk", "fla", "triton")

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
    positions: Tensor | None = None,
    use_qk_l2norm: bool = False,
    unit_keys: bool = False,
    ranks: SequenceRanks | None = None,
    keep_states: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The gated DeltaProduct recurrence (arXiv 2502.10297; layouts of flash-linear-attention).

    Per head, `S <- exp(g_t) S`, then for each micro-step j `S <- S + beta k (v - k^T S)^T`, then `o_t = scale
    S^T q_t`. Differentiable in q, k, v, g, beta and initial_state. beta, g, norms and state are float32
    whatever the dtype of q, k and v (float64 if one of them is), also under autocast.

    Args:
        q: [B, T, H, K] queries, B and T >= 1.
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
        cu_seqlens: [N+1] integer document boundaries in tokens, from 0 to T, with B = 1; the state is reset at each.
            Documents may be empty. With states, one for each document, the documents run one after another; without,
            all in one pass.
        positions: [B, T] integer, index of each token in its document: another way to pack documents, in rows. The
            state is reset where it is 0, except at a row's first token: a row's first document takes the initial
            state [B, H, K, V], its last one leaves the final state. Needs no device synchronisation.
        use_qk_l2norm: normalise q and k per head, x * rsqrt(sum x^2 + 1e-6), in float32.
        unit_keys: q and k have unit length already and beta fits the rounded keys, as `ops.short_conv` makes them:
            nothing is normalised or checked.
        ranks: who has the other parts of each row, which is cut among them; all of them call this. Documents are then
            given by positions that count from the document's start, on whichever rank it is, and the row has no states
            of its own. None: rows are whole.
        keep_states: whether "triton" keeps the state before each chunk for the backward pass. If not, it keeps v, which
            may be smaller or be there anyway, and runs the scan again: (K + 64) V numbers less for 64 keys.
        backend: "auto", "recurrent" (slow oracle), "chunk" (PyTorch, any device), "triton" (our kernels, CUDA) or
            "fla" (CUDA, 16-bit).

    Returns:
        o [B, T, H, V] in v's dtype, and the final state [N, H, K, V], float32 (float64 for float64), or None.

    Raises:
        ValueError: shapes that do not fit together.
        ConfigError: a backend asked for by name that cannot run.
    """
    _check_shapes(q, k, v, g, beta, num_householder, initial_state, cu_seqlens, positions)
    states = initial_state is not None or output_final_state
    if ranks is not None and (states or cu_seqlens is not None):
        raise ValueError("a row that is cut among ranks takes positions, and neither cu_seqlens nor states")
    dtypes = tuple(str(x.dtype).removeprefix("torch.") for x in (q, k, v))
    packed_states = positions is not None and states
    backend = resolve_backend(
        *(backend, q.device.type, dtypes, g is not None, q.shape[3], v.shape[3], num_householder),
        packed_states=packed_states,
        over_ranks=ranks is not None,
    )
    scale = float(q.shape[3] ** -0.5 if scale is None else scale)
    if unit_keys:
        use_qk_l2norm = False
    elif backend in ("fla", "triton"):
        q, k, beta = normalise(q, k, beta, use_qk_l2norm)
        use_qk_l2norm = False
    elif not use_qk_l2norm:
        beta = contractive_beta(k, beta)

    def run(q, k, v, g, beta, initial_state, positions=None):
        arguments = (q, k, v, g, beta, initial_state, positions)
        if backend == "recurrent":
            return recurrent_gated_delta_product(
                *arguments[:5], num_householder, scale=scale, initial_state=initial_state, positions=positions,
                use_qk_l2norm=use_qk_l2norm,
            )  # fmt: skip
        save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments[:6])
        keep = ("all" if keep_states else "chunks") if save else "nothing"
        if ranks is not None:
            options = {"n": num_householder, "scale": scale, "use_qk_l2norm": use_qk_l2norm}
            return shards.run(q, k, v, g, beta, positions, ranks, **options, keep=keep, backend=backend), None
        options = (num_householder, scale, output_final_state, use_qk_l2norm, keep, backend)
        return custom_op.FORWARD(*arguments, *options)[:2]

    if cu_seqlens is not None and states:
        o, state = documents.one_by_one(run, q, k, v, g, beta, initial_state, cu_seqlens, num_householder)
    else:
        if cu_seqlens is not None:
            positions = documents.document_positions(cu_seqlens, q)
        o, state = run(q, k, v, g, beta, initial_state, positions)
    return o, state if output_final_state else None


# Under torch.compile this runs as plain Python while the graph is traced: it may log and look at the machine.
@constant_result
def resolve_backend(
    backend: str,
    device_type: str,
    dtypes: tuple[str, ...],
    gated: bool,
    head_dim: int,
    head_v_dim: int,
    num_householder: int,
    packed_states: bool = False,
    over_ranks: bool = False,
) -> str:
    """Turns the request into "recurrent", "chunk", "fla" or "triton", and logs each distinct (backend, reason) once.

    Args:
        backend: one of `BACKENDS`.
        device_type: "cpu", "cuda", "meta".
        dtypes: of q, k and v, as `bfloat16`.
        gated: whether g is given.
        head_dim: K.
        head_v_dim: V.
        num_householder: n.
        packed_states: whether rows of several documents come with states.
        over_ranks: whether rows are cut among ranks.

    Raises:
        ConfigError: an unknown backend, or one asked for by name that cannot run here.
    """
    if backend not in BACKENDS:
        raise ConfigError(f"op backend {backend!r} does not exist; choose one of {', '.join(BACKENDS)}")
    obstacles = {
        "triton": lambda: triton_backend.obstacle(device_type, dtypes, head_dim, head_v_dim, num_householder),
        "fla": lambda: fla_backend.obstacle(device_type, dtypes, gated, max(head_dim, head_v_dim), packed_states),
    }
    if over_ranks:
        obstacles |= dict.fromkeys(("fla", "recurrent"), lambda: "it has no context parallelism")
    if backend in obstacles and (obstacle := obstacles[backend]()):
        raise ConfigError(
            f'op backend "{backend}" cannot run: {obstacle}\nuse op_backend = "auto", which chooses what can run here'
        )
    if backend != "auto":
        chosen, reason = backend, "asked for by name"
    elif device_type != "cuda":
        chosen, reason = "chunk", f"device is {device_type}"
    elif dtypes[0] == "float32" and (slow := triton_backend.slow_in_float32(head_dim, head_v_dim, num_householder)):
        chosen, reason = "chunk", f"float32 tensors, {slow}"
    else:
        chosen, reason = "chunk", ""
        names = ("triton", "fla") if triton_backend.measured_here() else ("fla", "triton")
        for name in names:
            obstacle = obstacles[name]()
            if obstacle is None:
                chosen, reason = name, f"{dtypes[0]} tensors on CUDA" + (f"; {reason}" if reason else "")
                break
            reason = "; ".join(filter(None, (reason, f"{name} cannot run: {obstacle}")))
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
    positions: Tensor | None,
) -> None:
    """Raises ValueError naming the tensor, its shape and the one expected."""
    if n < 1:
        raise ValueError(f"num_householder is {n}, expected at least 1")
    if q.dim() != 4 or v.dim() != 4:
        raise ValueError(f"q and v must be [B, T, H, K] and [B, T*n, H, V], found {list(q.shape)} and {list(v.shape)}")
    batch, length, heads, dim = q.shape
    if batch < 1 or length < 1:
        raise ValueError(f"q has no tokens: {list(q.shape)}")
    rows, count = length * n, batch
    if cu_seqlens is not None and positions is not None:
        raise ValueError("documents are given by cu_seqlens or by positions, not by both")
    if cu_seqlens is not None:
        if batch != 1 or cu_seqlens.dim() != 1 or not len(cu_seqlens) or cu_seqlens.is_floating_point():
            raise ValueError(
                "cu_seqlens must be an integer tensor [N+1] with B = 1 (documents packed in one row), "
                f"found {cu_seqlens.dtype} {list(cu_seqlens.shape)} and B = {batch}"
            )
        count = cu_seqlens.shape[0] - 1
    expected = [("k", k, (batch, rows, heads, dim)), ("v", v, (batch, rows, heads, v.shape[3]))]
    expected += [("beta", beta, (batch, rows, heads)), ("g", g, (batch, length, heads))]
    expected += [("positions", positions, (batch, length))]
    expected += [("initial_state", initial_state, (count, heads, dim, v.shape[3]))]
    for name, tensor, shape in expected:
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} is {list(tensor.shape)}, expected {list(shape)} for q {list(q.shape)}, "
                f"V = {v.shape[3]} and num_householder = {n}"
            )
