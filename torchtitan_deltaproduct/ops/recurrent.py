"""The gated DeltaProduct recurrence as it is defined: the oracle of every other backend; and the decode step.

Slow on purpose: one Python iteration a micro-step, plain autograd, any floating dtype. Per head, with state S
[K, V]:

    S <- exp(g_t) S
    S <- S + beta_{t,j} k_{t,j} (v_{t,j} - k_{t,j}^T S)^T        j = 0 .. n-1
    o_t = scale * S^T q_t

Example, one token of generation (the state is updated in place):

    o, state = recurrent_step(q, k, v, g, beta, state)           # q [B, H, K], k [B, n, H, K] -> o [B, H, V]
"""

import torch
from torch import Tensor

from torchtitan_deltaproduct.ops.documents import check_boundaries
from torchtitan_deltaproduct.ops.normalize import compute_dtype, full_precision, l2norm


def recurrent_gated_delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    num_householder: int,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    positions: Tensor | None = None,
    use_qk_l2norm: bool = False,
) -> tuple[Tensor, Tensor]:
    """Runs the recurrence token by token; differentiable by autograd.

    Args and shapes as in `gated_delta_product`.

    Returns:
        `o` [B, T, H, V] in v's dtype and the final state [N, H, K, V] (float64 for float64 inputs, else
        float32).
    """
    dtype = compute_dtype(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with full_precision(q.device.type):
        qc, kc, vc, bc = (x.to(dtype) for x in (q, k, v, beta))
        if use_qk_l2norm:
            qc, kc = l2norm(qc), l2norm(kc)
        decay = None if g is None else g.to(dtype).exp()
        state = initial_state
        if state is None:
            documents = q.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
            state = qc.new_zeros(documents, q.shape[2], q.shape[3], v.shape[3])
        state = state.to(dtype)
        if cu_seqlens is None:
            o, state = _scan(qc * scale, kc, vc, decay, bc, num_householder, state, positions)
            return o.to(v.dtype), state
        outputs, states = [vc[:, :0]], [state[:0]]
        check_boundaries(cu_seqlens, q.shape[1])
        bounds = cu_seqlens.tolist()
        for i, (start, stop) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            tokens, rows = slice(start, stop), slice(start * num_householder, stop * num_householder)
            gate = None if decay is None else decay[:, tokens]
            o, s = _scan(
                qc[:, tokens] * scale,
                kc[:, rows],
                vc[:, rows],
                gate,
                bc[:, rows],
                num_householder,
                state[i : i + 1],
            )
            outputs.append(o)
            states.append(s)
        return torch.cat(outputs, 1).to(v.dtype), torch.cat(states)


def _scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor | None,
    beta: Tensor,
    n: int,
    state: Tensor,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The loop itself, all in one dtype, q already scaled; returns o [B, T, H, V] and the last state."""
    queries, keys, values, betas = q.unbind(1), k.unbind(1), v.unbind(1), beta.unsqueeze(-1).unbind(1)
    decays = None if decay is None else decay[..., None, None].unbind(1)
    outputs = []
    for t, query in enumerate(queries):
        if positions is not None and t > 0:
            state = torch.where((positions[:, t] == 0)[:, None, None, None], 0.0, state)
        if decays is not None:
            state = state * decays[t]
        for row in range(t * n, (t + 1) * n):
            key = keys[row]
            error = values[row] - (key.unsqueeze(-2) @ state).squeeze(-2)
            state = state + key.unsqueeze(-1) * (betas[row] * error).unsqueeze(-2)
        outputs.append((query.unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(outputs, 1) if outputs else v[:, :0], state


@torch.no_grad()
def recurrent_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
    use_qk_l2norm: bool = False,
) -> tuple[Tensor, Tensor]:
    """Advances the state by one token, in place: the decode step.

    Args:
        q: [B, H, K] query of the token.
        k: [B, n, H, K] keys of its n micro-steps.
        v: [B, n, H, V] values.
        g: [B, H] log decay, or None.
        beta: [B, n, H].
        state: [B, H, K, V], float32 (or float64), contiguous; overwritten.
        scale: factor on the output; K^-1/2 if None.
        use_qk_l2norm: normalise q and k per head, in the state's dtype.

    Returns:
        `o` [B, H, V] in v's dtype, and `state` itself.
    """
    dtype, (batch, heads, dim_k, dim_v) = state.dtype, state.shape
    scale = dim_k**-0.5 if scale is None else scale
    with full_precision(q.device.type):
        qc, kc = q.to(dtype), k.to(dtype)
        if use_qk_l2norm:
            qc, kc = l2norm(qc), l2norm(kc)
        if g is not None:
            state.mul_(g.to(dtype).exp()[..., None, None])
        flat = state.view(batch * heads, dim_k, dim_v)
        vc, bc = v.to(dtype), beta.to(dtype)
        for j in range(k.shape[1]):
            key = kc[:, j].reshape(batch * heads, 1, dim_k)
            error = torch.baddbmm(vc[:, j].reshape(batch * heads, 1, dim_v), key, flat, alpha=-1.0)
            flat.baddbmm_(key.transpose(1, 2), error.mul_(bc[:, j].reshape(batch * heads, 1, 1)))
        o = torch.bmm(qc.reshape(batch * heads, 1, dim_k), flat).mul_(scale)
        return o.view(batch, heads, dim_v).to(v.dtype), state
