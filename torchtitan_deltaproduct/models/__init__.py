"""DeltaProduct language models in plain PyTorch: no trainer, no torchtitan, no flash-linear-attention.

    from torchtitan_deltaproduct.models import DeltaProductArgs, DeltaProductLM
    model = DeltaProductLM(DeltaProductArgs(hidden_size=256, num_hidden_layers=4, num_heads=4, head_dim=64))
    model.init_weights()
    logits = model(tokens)
"""

from ..config.architecture import DeltaProductArgs
from .block import Block
from .mixer import DeltaProductMixer
from .model import DeltaProductLM

__all__ = ["Block", "DeltaProductArgs", "DeltaProductLM", "DeltaProductMixer"]
