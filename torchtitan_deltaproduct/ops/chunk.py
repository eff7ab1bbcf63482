"""Chunkwise form in plain PyTorch (first version, by autograd)."""

import torch
from torch import Tensor

from torchtitan_deltaproduct.ops.normalize import compute_dtype, full_precision, l2norm


def chunk_gated_delta_product(q, k, v, g, beta, n, *, scale, initial_state, cu_seqlens, use_qk_l2norm):
    dtype = compute_dtype(q, k, v)
    with full_precision(q.device.type):
        qc, kc, vc, bc = (x.to(dtype) for x in (q, k, v, beta))
        if use_qk_l2norm:
            qc, kc = l2norm(qc), l2norm(kc)
        gc = None if g is None else g.to(dtype)
        if cu_seqlens is None:
            bounds = None
        else:
            bounds = cu_seqlens.tolist()
        N = q.shape[0] if bounds is None else len(bounds) - 1
        state = qc.new_zeros(N, q.shape[2], q.shape[3], v.shape[3]) if initial_state is None else initial_state.to(dtype)
        if bounds is None:
            o, s = _dense(qc * scale, kc, vc, gc, bc, n, state)
            return o.to(v.dtype), s
        os, ss = [vc[:, :0]], [state[:0]]
        for i, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True)):
            gi = None if gc is None else gc[:, a:b]
            o, s = _dense(qc[:, a:b] * scale, kc[:, a * n : b * n], vc[:, a * n : b * n], gi, bc[:, a * n : b * n], n,
                          state[i : i + 1])
            os.append(o)
            ss.append(s)
        return torch.cat(os, 1).to(v.dtype), torch.cat(ss)


def _dense(q, k, v, g, beta, n, state) -> tuple[Tensor, Tensor]:
    B, T, H, K = q.shape
    V = v.shape[-1]
    if T == 0:
        return v[:, :0], state
    if g is None:
        g = q.new_zeros(B, T, H)
    C = max(1, 32 // n)
    outs = []
    for t in range(0, T, C):
        e = min(T, t + C)
        qq = q[:, t:e].transpose(1, 2)
        kk, vv = (x[:, t * n : e * n].transpose(1, 2) for x in (k, v))
        bb = beta[:, t * n : e * n].transpose(1, 2)
        Gt = g[:, t:e].transpose(1, 2).cumsum(-1)
        G = Gt.repeat_interleave(n, -1)
        R = G.shape[-1]
        low = torch.ones(R, R, dtype=torch.bool, device=q.device).tril(-1)
        D = (G[..., :, None] - G[..., None, :]).masked_fill(~low, -torch.inf).exp()
        A = bb[..., None] * (kk @ kk.mT) * D
        rhs = torch.cat([(bb * G.exp())[..., None] * kk, bb[..., None] * vv], -1)
        WU = torch.linalg.solve_triangular(A + torch.eye(R, dtype=q.dtype, device=q.device), rhs, upper=False,
                                           unitriangular=True)
        X = WU[..., K:] - WU[..., :K] @ state
        tok = torch.arange(e - t, device=q.device)
        causal = tok[:, None] >= tok.repeat_interleave(n)[None, :]
        Dq = (Gt[..., :, None] - G[..., None, :]).masked_fill(~causal, -torch.inf).exp()
        o = Gt.exp()[..., None] * (qq @ state) + ((qq @ kk.mT) * Dq) @ X
        state = G[..., -1, None, None].exp() * state + (kk * (G[..., -1:] - G).exp()[..., None]).mT @ X
        outs.append(o.transpose(1, 2))
    return torch.cat(outs, 1), state
