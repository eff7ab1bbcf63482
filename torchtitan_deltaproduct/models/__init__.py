"""DeltaProduct language models in plain PyTorch: no trainer, no torchtitan, no flash-linear-attention.

    from torchtitan_deltaproduct.models import DeltaProductArgs, DeltaProductLM
    model = DeltaProductLM(DeltaProductArgs(hidden_size=256, num_hidden_layers=4, num_heads=4, head_dim=64))
    model.init_weights()
    logits = model(tokens)

Names are imported on first use: `models.args` stays free of torch, which takes seconds to import.
"""

from importlib import import_module
from typing import Any

_HOMES = {"Block": "block", "DeltaProductArgs": "args", "DeltaProductLM": "model", "DeltaProductMixer": "mixer"}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
