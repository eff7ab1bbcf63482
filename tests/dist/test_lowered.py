"""Weights lowered within a step: losses and gradients of FSDP2 on one rank, bit for bit, and the weights after it."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from tests.processes import run_distributed
from torchtitan_deltaproduct.config import JobConfig, load_config
from torchtitan_deltaproduct.models import DeltaProductLM
from torchtitan_deltaproduct.optimizers import local
from torchtitan_deltaproduct.titan import device
from torchtitan_deltaproduct.titan.lowered import LoweredWeights
from torchtitan_deltaproduct.titan.parallelize import lowered_weights, shard

TOML = "train_configs/state_tracking/S5_n4.toml"
SMALL = ("hidden_size=32", "num_heads=2", "head_dim=16", "num_hidden_layers=2", "num_householder=2", "vocab_size=50")
RICH = ("use_forget_gate=true", "use_output_gate=true", "tie_word_embeddings=true")


def built(*options: str) -> tuple[DeltaProductLM, JobConfig]:
    words = [f"--model.{option}" for option in (*SMALL, *options)]
    config = load_config(["--job.config_file", TOML, "--training.mixed_precision_param=bfloat16", *words])
    model = DeltaProductLM(config.model)
    model.init_weights()
    return model, config


def backward(model: nn.Module, micro_batch: int) -> torch.Tensor:
    tokens = torch.randint(50, (2, 17), generator=torch.Generator().manual_seed(micro_batch))
    loss = model(tokens[:, :-1], labels=tokens[:, 1:]) / 64
    loss.backward()
    return loss.detach()


def same_as_fsdp(rank: int) -> None:
    device.install("cpu")
    for options in ((), RICH):
        ours, config = built(*options)
        theirs = copy.deepcopy(ours)
        shard(theirs, init_device_mesh("cpu", (1,), mesh_dim_names=("fsdp",)), config)
        weights = lowered_weights(ours, config)
        assert not lowered_weights(theirs, config)._copies
        for step in range(2):
            for micro_batch in range(2):
                theirs.set_requires_gradient_sync(micro_batch == 1)
                expected = backward(theirs, 2 * step + micro_batch)
                with weights:
                    assert torch.equal(backward(ours, 2 * step + micro_batch), expected)
                    weights.collect()
            for (name, found), true in zip(ours.named_parameters(), theirs.parameters(), strict=True):
                assert found.grad.dtype == torch.float32 and torch.equal(found.grad, local(true.grad)), name
            for model in (ours, theirs):
                torch.optim.SGD(model.parameters(), lr=1.0).step()
                model.zero_grad()


def test_as_fsdp_on_one_rank():
    run_distributed(same_as_fsdp, 1)


def test_the_weights_are_there_again():
    """Also after an error; what is kept stays itself, and nobody else's gradients are touched."""
    model, config = built(*RICH)
    before = dict(model.named_parameters())
    weights = lowered_weights(model, config)
    with pytest.raises(ZeroDivisionError), weights:
        within = dict(model.named_parameters())
        kept = {name for name, weight in within.items() if weight is before[name]}
        assert kept == {f"layers.{i}.mixer.decay.{name}" for i in range(2) for name in ("A_log", "dt_bias")}
        assert {weight.dtype for name, weight in within.items() if name not in kept} == {torch.bfloat16}
        assert 1 / 0
    assert all(weight is before[name] for name, weight in model.named_parameters())
    weights.collect()
    assert all(weight.grad is None for weight in before.values())


def test_nothing_to_lower():
    model, _ = built()
    with LoweredWeights(model, torch.float32) as weights:
        backward(model, 0)
        gradients = [weight.grad for weight in model.parameters()]
        weights.collect()
    assert all(weight.grad is gradient for weight, gradient in zip(model.parameters(), gradients, strict=True))
