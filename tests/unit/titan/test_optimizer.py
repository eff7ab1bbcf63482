"""Which parameters decay, what a skipped step changes (nothing), and what a checkpoint brings back."""

import pytest
import torch

from torchtitan_deltaproduct.config.job import LRScheduler, Optimizer
from torchtitan_deltaproduct.config.schedule import Schedule
from torchtitan_deltaproduct.models import DeltaProductArgs, DeltaProductLM
from torchtitan_deltaproduct.models.counts import hidden_matrices
from torchtitan_deltaproduct.titan import device
from torchtitan_deltaproduct.titan.optimizer import GroupedOptimizers, Schedules

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_heads": 2, "head_dim": 8}

UPDATE, SKIP = torch.tensor(False), torch.tensor(True)


def build(lr=1e-2, **options):
    device.install("cpu")
    args = DeltaProductArgs(**SMALL, use_forget_gate=True, use_output_gate=True, tie_word_embeddings=False)
    model = DeltaProductLM(args)
    model.init_weights()
    optimizers = GroupedOptimizers([model], Optimizer(lr=lr, **options))
    return model, optimizers, Schedules(optimizers, LRScheduler(warmup_steps=2, decay_type="cosine"), 10)


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


@pytest.mark.parametrize(
    ("name", "implementation"),
    [("AdamW", "fused"), ("AdamW", "foreach"), ("AdamW", "for-loop"), ("Muon", "fused"), ("Muon", "foreach")],
)
def test_a_skipped_step_leaves_no_trace(name, implementation):
    """Bit for bit, in the weights, the moments and their step; the update after it is as without it."""
    runs = []
    for steps in ([(1.0, UPDATE), (float("nan"), SKIP), (2.0, UPDATE)], [(1.0, UPDATE), (2.0, UPDATE)]):
        torch.manual_seed(0)
        model, optimizers, _ = build(weight_decay=0.1, name=name, implementation=implementation)
        for gradient, skip in steps:
            before = tensors_of(model, optimizers)
            for p in model.parameters():
                p.grad = torch.full_like(p, gradient)
            optimizers.step(skip)
            unchanged = [torch.equal(a, b) for a, b in zip(before, tensors_of(model, optimizers), strict=False)]
            assert all(unchanged) if skip else not any(unchanged)
        runs.append(tensors_of(model, optimizers))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    others = len(list(model.parameters())) - 8 * (name == "Muon")
    assert [state["step"] for state in optimizers.optimizers[0].state.values()] == [2] * others


def test_muon_has_the_hidden_matrices():
    """One a micro-step of k and v; their sizes are those that `plan` counts; gates and the head stay with AdamW."""
    model, optimizers, schedules = build(name="Muon", weight_decay=0.1, momentum=0.8, lr=0.5)
    names = {id(p): n for n, p in model.named_parameters()}
    adamw, muon = optimizers.optimizers
    groups = [{names[id(p)] for p in group["params"]} for group in muon.param_groups]
    assert [group["stacked"] for group in muon.param_groups] == [1, 2]
    assert groups[1] == {"layers.0.mixer.k_proj.weight", "layers.0.mixer.v_proj.weight"}
    assert groups[0] == {f"layers.0.mixer.{p}_proj.weight" for p in "qgo"} | {
        f"layers.0.mlp.{p}_proj.weight" for p in ("gate", "up", "down")
    }
    assert {(g["momentum"], g["weight_decay"], g["adjust_lr_fn"]) for g in muon.param_groups} == {
        (0.8, 0.1, "match_rms_adamw")
    }
    decayed = {names[id(p)] for p in adamw.param_groups[0]["params"]}
    assert decayed == {"layers.0.mixer.a_proj.weight", "layers.0.mixer.b_proj.weight", "output.weight"}
    assert sum(len(g["params"]) for g in adamw.param_groups + muon.param_groups) == len(names)
    # One schedule and one rate for all.
    assert [g["lr"] for o in optimizers for g in o.param_groups] == [0.25] * 4
    schedules.step()
    assert [g["lr"] for o in optimizers for g in o.param_groups] == [0.5] * 4
    sizes = {name: p.shape for name, p in model.named_parameters()}
    for name, (count, rows, columns) in hidden_matrices(model.args).items():
        assert sizes[f"layers.0.{name}.weight"] == (count * rows, columns)


def tensors_of(model, optimizers) -> list[torch.Tensor]:
    """Copies of the weights, and of the moments and their step."""
    states = [value for of in optimizers for state in of.state.values() for value in state.values()]
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
        shape = {"decay_steps": 8, "decay_type": "cosine", "min_lr_factor": 0.0}
        rate = 1e-3 * Schedule(warmup_steps=2, total_steps=10, **shape)(3)
        assert [g["lr"] for g in groups] == [rate, rate] == other_schedules.schedulers[0].get_last_lr()
        assert [(g["weight_decay"], g["betas"], g["foreach"]) for g in groups] == [
            (0.5, (0.9, 0.9), False), (0.0, (0.9, 0.9), False)
        ]  # fmt: skip
    state = next(iter(other.optimizers[0].state.values()))
    assert state["step"] == 3 and torch.allclose(state["exp_avg"], torch.tensor(1 - 0.9**3))
