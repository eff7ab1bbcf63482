"""The causal depthwise convolution before q, k and v, with the SiLU that follows it.

Each channel is a weighted sum of its last W values, `y_t = silu(sum_i w_i x_{t - W + 1 + i})`. At the start
of a document the values before it count as zero; when decoding, the last W-1 inputs come from a cache:

    conv = ShortConvolution(channels=512, kernel_size=4)
    y = conv(x)                                     # x, y: [B, T, 512]
    y, cache = conv.extend(x, cache)                # cache: [B, 512, 3]

`sum_of_taps` is the definition, and what runs on the CPU, where it is faster than `F.conv1d`. On CUDA it is one kernel
each way (`ops.short_conv`), which also normalises q and k.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import short_conv


class ShortConvolution(nn.Module):
    """Depthwise causal convolution without bias, then SiLU; the weight is [C, 1, W], as in fla."""

    def __init__(self, channels: int, kernel_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size))

    def forward(self, x: Tensor, positions: Tensor | None = None, halo: Tensor | None = None) -> Tensor:
        """Convolves along the sequence.

        Args:
            x: [B, T, C].
            positions: [B, T] index of each token in its document, None: a row is a document.
            halo: [B, W-1, C], the inputs before x if x is only a part of the row; None: zeros.

        Returns:
            [B, T, C].
        """
        if short_conv.obstacle(x, self.weight.shape[2]) is None:
            return short_conv.short_conv(x, self.weight[:, 0], positions, halo=halo)[0]
        padded = F.pad(x, (0, 0, self.weight.shape[2] - 1, 0)) if halo is None else torch.cat([halo, x], 1)
        return F.silu(sum_of_taps(padded, self.weight, positions)).to(x.dtype)

    def extend(self, x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        """Continues a sequence whose last W-1 inputs are `cache`.

        Args:
            x: [B, T, C], T at least 1.
            cache: [B, C, W-1]; zeros at the start of a sequence.

        Returns:
            y [B, T, C] and the next cache [B, C, W-1], a new tensor.
        """
        if x.shape[1] == 1:
            return self._step(x, cache)
        padded = torch.cat([cache.transpose(1, 2).to(x.dtype), x], 1)
        y = F.silu(sum_of_taps(padded, self.weight)).to(x.dtype)
        return y, padded[:, x.shape[1] :].transpose(1, 2).to(cache.dtype).contiguous()

    def _step(self, x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        """`extend` for one token in a third of the operations: the window is the cache and x."""
        window = torch.cat([cache.to(x.dtype), x.transpose(1, 2)], 2)
        dtype = torch.promote_types(x.dtype, torch.float32)
        y = torch.linalg.vecdot(window.to(dtype), self.weight[:, 0].to(dtype))
        return F.silu(y).to(x.dtype).unsqueeze(1), window[:, :, 1:].to(cache.dtype).contiguous()


def sum_of_taps(padded: Tensor, weight: Tensor, positions: Tensor | None = None) -> Tensor:
    """The convolution by its definition, in float32 or better.

    Args:
        padded: [B, W-1+T, C], the input with the W-1 values before it.
        weight: [C, 1, W].
        positions: [B, T] index of each token in its document, or None; a tap reaching beyond it reads zero.

    Returns:
        [B, T, C], before the activation.
    """
    width = weight.shape[2]
    length = padded.shape[1] - width + 1
    dtype = torch.promote_types(padded.dtype, torch.float32)
    padded, taps = padded.to(dtype), weight[:, 0].to(dtype).unbind(1)
    y = padded[:, width - 1 :] * taps[-1]
    for back in range(1, width):
        tap = taps[-1 - back]
        if positions is not None:
            tap = tap * (positions >= back).unsqueeze(-1)
        start = width - 1 - back
        y = torch.addcmul(y, padded[:, start : start + length], tap)
    return y
