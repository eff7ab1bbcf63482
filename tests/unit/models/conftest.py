"""Small models whose parameters are far from their initial values, so that no gain of one hides a bug."""

import pytest
import torch

from torchtitan_deltaproduct.models import DeltaProductArgs, DeltaProductLM

SETTINGS = {
    "plain": {},
    "gates": {"use_forget_gate": True, "use_output_gate": True},
    "no_conv": {"use_short_conv": False, "use_forget_gate": True},
    "wide_v_untied": {"expand_v": 1.5, "tie_word_embeddings": False, "use_output_gate": True, "conv_size": 3},
    "positive": {"allow_neg_eigval": False, "intermediate_size": 40},
}
VARIANTS = [pytest.param((name, n), id=f"{name}-n{n}") for name in SETTINGS for n in (1, 2, 3, 4)]


def small_args(**settings) -> DeltaProductArgs:
    base = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "num_heads": 3, "head_dim": 8}
    return DeltaProductArgs(**(base | {"intermediate_size": 32} | settings))


def small_model(dtype: torch.dtype = torch.float64, **settings) -> DeltaProductLM:
    torch.manual_seed(0)
    model = DeltaProductLM(small_args(**settings)).to(dtype)
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.fixture(params=VARIANTS)
def variant(request) -> dict:
    """Keyword arguments of `small_model`: every published setting, n_h from 1 to 4."""
    name, n = request.param
    return SETTINGS[name] | {"num_householder": n}
