"""fla's own model class on a CPU: its Python forward as it is, its Triton kernels replaced by what they compute.

    replace_kernels(monkeypatch)
    found = logits(AutoModelForCausalLM.from_pretrained(folder), tokens)

The operator becomes fla's own `naive_recurrent_gated_delta_product`; norms, convolution and SwiGLU a line of torch.
"""

import torch
import torch.nn.functional as F
from fla.layers import gated_deltaproduct as layer
from fla.modules import FusedRMSNormGated, RMSNorm, ShortConvolution, mlp
from fla.ops.gated_delta_product.naive import naive_recurrent_gated_delta_product


def rms_norm(self, x, residual=None, prenorm=False, residual_in_fp32=False):
    x = x if residual is None else x + residual
    y = F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)
    return (y, x) if prenorm else y


def gated_norm(self, x, g, **_):
    return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps) * F.silu(g)


def convolution(self, x, cache=None, output_final_state=False, **_):
    padded = F.pad(x.transpose(1, 2), (self.weight.shape[-1] - 1, 0))
    return F.silu(F.conv1d(padded, self.weight, groups=self.weight.shape[0])).transpose(1, 2), None


def operator(q, k, v, g, beta, num_householder, use_qk_l2norm_in_kernel, output_final_state, **_):
    assert use_qk_l2norm_in_kernel
    q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (q, k))
    return naive_recurrent_gated_delta_product(
        q, k, v, g, beta, scale=q.shape[-1] ** -0.5, num_householder=num_householder
    )


def replace_kernels(monkeypatch) -> None:
    """Until the test is over."""
    monkeypatch.setattr(RMSNorm, "forward", rms_norm)
    monkeypatch.setattr(FusedRMSNormGated, "forward", gated_norm)
    monkeypatch.setattr(ShortConvolution, "forward", convolution)
    monkeypatch.setattr(layer, "chunk_gated_delta_product", operator)
    monkeypatch.setattr(mlp, "swiglu_linear", lambda gate, y, weight, bias: F.linear(F.silu(gate) * y, weight, bias))


def logits(model, tokens: torch.Tensor) -> torch.Tensor:
    """tokens [B, T] -> [B, T, vocab]. Gradients stay enabled: that is when fla's layer takes its chunk mode."""
    return model.eval()(tokens, use_cache=False).logits.detach()
