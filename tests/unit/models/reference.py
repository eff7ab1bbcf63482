"""The model's forward written the slow, obvious way, from a state dict under flash-linear-attention's names.

It shares no code with the package: loops over layers, heads, tokens and micro-steps on one document at a
time. The tests compare `DeltaProductLM` with it in float64, through the name table.
"""

import torch


def rms_norm(x, weight, eps):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def silu(x):
    return x / (1 + torch.exp(-x))


def short_conv(x, weight):
    """x: [T, C], weight: [C, 1, W]: y[t, c] = sum_i weight[c, 0, i] x[t - W + 1 + i, c]."""
    y = torch.zeros_like(x)
    width = weight.shape[2]
    for t in range(x.shape[0]):
        for i in range(width):
            if t - width + 1 + i >= 0:
                y[t] += weight[:, 0, i] * x[t - width + 1 + i]
    return y


def mixer(x, w, a):
    """x: [T, hidden]; w: the layer's `attn.` weights; a: settings."""
    n, heads, dim_k = a.num_householder, a.num_heads, a.head_dim
    dim_v = int(dim_k * a.expand_v)
    length = x.shape[0]
    q, k, v = (x @ w[f"{c}_proj.weight"].T for c in "qkv")
    if a.use_short_conv:
        q, k, v = (short_conv(y, w[f"{c}_conv1d.weight"]) for c, y in zip("qkv", (q, k, v), strict=True))
    q, k, v = silu(q), silu(k), silu(v)
    q, k, v = q.view(length, heads, dim_k), k.view(length, n, heads, dim_k), v.view(length, n, heads, dim_v)
    q, k = (y / torch.sqrt((y * y).sum(-1, keepdim=True) + 1e-6) for y in (q, k))
    beta = torch.sigmoid(x @ w["b_proj.weight"].T).view(length, n, heads)
    if a.allow_neg_eigval:
        beta = 2 * beta
    out = []
    state = torch.zeros(heads, dim_k, dim_v, dtype=x.dtype)
    for t in range(length):
        rows = []
        for h in range(heads):
            s = state[h]
            if a.use_forget_gate:
                step = torch.log1p(torch.exp(x[t] @ w["a_proj.weight"][h] + w["dt_bias"][h]))
                s = s * torch.exp(-torch.exp(w["A_log"][h]) * step)
            for j in range(n):
                key = k[t, j, h]
                s = s + beta[t, j, h] * torch.outer(key, v[t, j, h] - s.T @ key)
            state[h] = s
            rows.append(s.T @ q[t, h] / dim_k**0.5)
        out.append(torch.stack(rows))
    o = rms_norm(torch.stack(out), w["o_norm.weight"], a.norm_eps)
    if a.use_output_gate:
        o = o * silu((x @ w["g_proj.weight"].T).view(length, heads, dim_v))
    return o.reshape(length, heads * dim_v) @ w["o_proj.weight"].T


@torch.no_grad()
def logits(tokens, state_dict, a):
    """tokens: [T] of one document -> [T, vocab]."""
    w = {name: value.double() for name, value in state_dict.items()}
    x = w["model.embeddings.weight"][tokens]
    for i in range(a.num_hidden_layers):
        prefix = f"model.layers.{i}."
        layer = {name.removeprefix(prefix): value for name, value in w.items() if name.startswith(prefix)}
        attn = {name.removeprefix("attn."): value for name, value in layer.items() if "attn." in name}
        x = x + mixer(rms_norm(x, layer["attn_norm.weight"], a.norm_eps), attn, a)
        y = rms_norm(x, layer["mlp_norm.weight"], a.norm_eps)
        y = silu(y @ layer["mlp.gate_proj.weight"].T) * (y @ layer["mlp.up_proj.weight"].T)
        x = x + y @ layer["mlp.down_proj.weight"].T
    x = rms_norm(x, w["model.norm.weight"], a.norm_eps)
    return x @ w.get("lm_head.weight", w["model.embeddings.weight"]).T
