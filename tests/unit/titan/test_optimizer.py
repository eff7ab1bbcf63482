"""Which parameters decay, what a skipped step changes (nothing), and what a checkpoint brings back."""

import pytest
import torch
from torchtitan.config import LRScheduler

from torchtitan_deltaproduct.config.job import Optimizer
from torchtitan_deltaproduct.config.schedule import Schedule
from torchtitan_deltaproduct.models import DeltaProductArgs, DeltaProductLM
from torchtitan_deltaproduct.titan import device
from torchtitan_deltaproduct.titan.optimizer import build_lr_schedulers, build_optimizers

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2, "head_dim": 8}

UPDATE, SKIP = torch.tensor(False), torch.tensor(True)


def build(lr=1e-2, **options):
    device.install("cpu")
    args = DeltaProductArgs(**SMALL, use_forget_gate=True, use_output_gate=True, tie_word_embeddings=False)
    model = DeltaProductLM(args)
    model.init_weights()
    optimizers = build_optimizers([model], Optimizer(lr=lr, **options), None)
    return model, optimizers, build_lr_schedulers(optimizers, LRScheduler(warmup_steps=2, decay_type="cosine"), 10)


def test_only_matrices_decay():
    model, optimizers, _ = build(weight_decay=0.1)
    groups = optimizers.optimizers[0].param_groups
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, free = ({names[id(p)] for p in group["params"]} for group in groups)
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    mixer = {f"layers.0.mixer.{p}_proj.weight" for p in "qkvboag"}
    assert decayed == mixer | {f"layers.0.mlp.{p}_proj.weight" for p in ("gate", "up", "down")} | {"output.weight"}
    assert {"tok_embeddings.weight", "norm.weight", "layers.0.mixer.decay.A_log", "layers.0.mixer.decay.dt_bias",
            "layers.0.mixer.k_conv1d.weight", "layers.0.mixer.o_norm.weight"} <= free  # fmt: skip
    assert len(decayed) + len(free) == len(list(model.parameters()))


@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
def test_a_skipped_step_leaves_no_trace(implementation):
    """Bit for bit, in the weights, the moments and their step; the update after it is as without it."""
    runs = []
    for steps in ([(1.0, UPDATE), (float("nan"), SKIP), (2.0, UPDATE)], [(1.0, UPDATE), (2.0, UPDATE)]):
        torch.manual_seed(0)
        model, optimizers, _ = build(weight_decay=0.1, implementation=implementation)
        for gradient, skip in steps:
            before = tensors_of(model, optimizers)
            for p in model.parameters():
                p.grad = torch.full_like(p, gradient)
            optimizers.step(skip)
            unchanged = [torch.equal(a, b) for a, b in zip(before, tensors_of(model, optimizers), strict=False)]
            assert all(unchanged) if skip else not any(unchanged)
        runs.append(tensors_of(model, optimizers))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert [state["step"] for state in optimizers.optimizers[0].state.values()] == [2] * len(list(model.parameters()))


def tensors_of(model, optimizers) -> list[torch.Tensor]:
    """Copies of the weights, and of the moments and their step."""
    states = [value for state in optimizers.optimizers[0].state.values() for value in state.values()]
    return [tensor.detach().clone() for tensor in (*model.parameters(), *states)]


def test_a_restart_brings_back_moments_and_step_but_not_settings():
    model, optimizers, schedules = build(lr=1e-2, weight_decay=0.1, implementation="foreach")
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizers.step(UPDATE)
        schedules.step()
    saved = optimizers.state_dict(), schedules.state_dict()
    _, other, other_schedules = build(lr=1e-3, weight_decay=0.5, beta2=0.9, implementation="for-loop")
    # In either order, as DCP loads by name.
    for first, second in ((0, 1), (1, 0)):
        containers = (other, other_schedules)
        containers[first].load_state_dict(saved[first])
        containers[second].load_state_dict(saved[second])
        groups = other.optimizers[0].param_groups
        shape = {"decay_ratio": None, "decay_type": "cosine", "min_lr_factor": 0.0}
        rate = 1e-3 * Schedule(warmup_steps=2, total_steps=10, **shape)(3)
        assert [g["lr"] for g in groups] == [rate, rate] == other_schedules.schedulers[0].get_last_lr()
        assert [(g["weight_decay"], g["betas"], g["foreach"]) for g in groups] == [
            (0.5, (0.9, 0.9), False), (0.0, (0.9, 0.9), False)
        ]  # fmt: skip
    state = next(iter(other.optimizers[0].state.values()))
    assert state["step"] == 3 and torch.allclose(state["exp_avg"], torch.tensor(1 - 0.9**3))
