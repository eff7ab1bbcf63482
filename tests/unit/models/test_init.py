"""Initial weights: determinism, coverage from the meta device, distributions."""

import math

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from torchtitan_deltaproduct.models import DeltaProductArgs, DeltaProductLM

from .conftest import small_args


def built(args: DeltaProductArgs, seed: int = 42) -> DeltaProductLM:
    """From the meta device, with the new memory poisoned so that a forgotten parameter shows."""
    with torch.device("meta"):
        model = DeltaProductLM(args, seed=seed)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    model.init_weights()
    return model


ALL = {"use_forget_gate": True, "use_output_gate": True, "tie_word_embeddings": False, "num_householder": 2}


@pytest.mark.parametrize("scheme", ["normal", "paper"])
def test_every_parameter_is_drawn_and_only_the_seed_matters(scheme):
    args = small_args(**ALL, init_scheme=scheme)
    torch.manual_seed(1)
    first = built(args).state_dict()
    torch.manual_seed(2)
    again, other = built(args).state_dict(), built(args, seed=43).state_dict()
    for name, value in first.items():
        assert value.isfinite().all(), name
        assert torch.equal(value, again[name]), name
        assert torch.equal(value, other[name]) == name.endswith("norm.weight"), name


def test_a_parameter_does_not_depend_on_the_others():
    few, many = built(small_args()).state_dict(), built(small_args(**ALL, num_hidden_layers=3)).state_dict()
    for name in ("tok_embeddings.weight", "layers.1.mixer.q_proj.weight", "layers.0.mlp.up_proj.weight"):
        assert torch.equal(few[name], many[name])


def test_wrappers_do_not_change_the_draw():
    plain = built(small_args())
    wrapped = DeltaProductLM(small_args())
    for key, block in list(wrapped.layers.items()):
        wrapped.layers.register_module(key, torch.compile(checkpoint_wrapper(block), backend="eager"))
    assert any("_orig_mod" in name for name, _ in wrapped.named_parameters())
    wrapped.init_weights()
    for ours, theirs in zip(wrapped.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


GOLDEN = {"embedding": [-0.012074735, -0.019135742, -0.017859301], "A_log": [1.803993, 2.472791, 2.512668]}


def test_golden_values():
    """A checkpoint-free restart depends on these numbers: they may not move with torch or the machine."""
    model = built(small_args(use_forget_gate=True))
    assert model.tok_embeddings.weight[0, :3].tolist() == pytest.approx(GOLDEN["embedding"], abs=1e-9)
    assert model.layers["0"].mixer.decay.A_log.tolist() == pytest.approx(GOLDEN["A_log"], abs=1e-6)


def test_normal_scheme():
    model = built(small_args(hidden_size=256, num_heads=64, use_forget_gate=True))
    for name, value in model.named_parameters():
        if name.endswith("norm.weight"):
            assert torch.equal(value, torch.ones_like(value)), name
        elif ".decay." not in name:
            assert value.std().item() == pytest.approx(0.02, rel=0.05), name
            assert abs(value.mean().item()) < 0.002, name
    decay = model.layers["0"].mixer.decay
    rate, step = decay.A_log.exp(), torch.nn.functional.softplus(decay.dt_bias)
    assert rate.min() > 0 and 12 < rate.max() <= 16
    assert step.min() >= 0.999e-3 and step.max() <= 0.1001
    assert step.log().mean().item() == pytest.approx(-4.6, abs=0.5)


def test_paper_scheme():
    args = DeltaProductArgs(
        hidden_size=256, num_hidden_layers=1, num_heads=4, head_dim=64, num_householder=3,
        init_scheme="paper", initializer_range=0.006,
    )  # fmt: skip
    model = built(args)
    # Every projection of the paper's code is [256, 256] here, but beta's, [4, 256], one per micro-step.
    mixer = model.layers["0"].mixer
    for name, rows in (("q_proj", 256), ("k_proj", 256), ("v_proj", 256), ("o_proj", 256), ("b_proj", 4)):
        bound = 2**-2.5 * math.sqrt(6 / (256 + rows))
        weight = getattr(mixer, name).weight
        assert weight.abs().max() <= bound, name
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05), name
    for weight in (mixer.k_conv1d.weight, model.layers["0"].mlp.up_proj.weight, model.tok_embeddings.weight):
        assert weight.std().item() == pytest.approx(0.006, rel=0.05)


def test_meta_parameters_are_refused():
    with torch.device("meta"):
        model = DeltaProductLM(small_args())
    with pytest.raises(ValueError, match="tok_embeddings.weight is on the meta device"):
        model.init_weights()
