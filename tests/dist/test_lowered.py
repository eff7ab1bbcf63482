"""Weights lowered within a step: losses and gradients of FSDP2 on one rank, bit for bit, and the weights after it."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tests.processes import run_distributed
from torchtitan_deltaproduct.models import DeltaProductArgs, DeltaProductLM
from torchtitan_deltaproduct.optimizers import local
from torchtitan_deltaproduct.titan.lowered import LoweredWeights

SHAPE = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 2, "head_dim": 16}


def model_of(**options) -> DeltaProductLM:
    model = DeltaProductLM(DeltaProductArgs(**SHAPE, num_householder=2, intermediate_size=48, **options))
    model.init_weights()
    return model


def backward(model: nn.Module, micro_batch: int) -> torch.Tensor:
    tokens = torch.randint(50, (2, 17), generator=torch.Generator().manual_seed(micro_batch))
    loss = model(tokens[:, :-1], labels=tokens[:, 1:]) / 64
    loss.backward()
    return loss.detach()


def same_as_fsdp(rank: int) -> None:
    for options in ({}, {"use_forget_gate": True, "use_output_gate": True, "tie_word_embeddings": True}):
        ours = model_of(**options)
        theirs = copy.deepcopy(ours)
        decays = [block.mixer.decay for block in ours.layers.values()] if options else []
        mesh = init_device_mesh("cpu", (1,))
        full = MixedPrecisionPolicy(torch.float32, torch.float32, cast_forward_inputs=False)
        lowered = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        if options:
            fully_shard([block.mixer.decay for block in theirs.layers.values()], mesh=mesh, mp_policy=full)
        for block in theirs.layers.values():
            fully_shard(block, mesh=mesh, mp_policy=lowered)
        fully_shard(theirs, mesh=mesh, mp_policy=lowered)
        weights = LoweredWeights(ours, torch.bfloat16, kept=decays)
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
    model = model_of(use_forget_gate=True)
    decays = [block.mixer.decay for block in model.layers.values()]
    before = dict(model.named_parameters())
    weights = LoweredWeights(model, torch.bfloat16, kept=decays)
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
    model = model_of()
    with LoweredWeights(model, torch.float32) as weights:
        backward(model, 0)
        gradients = [weight.grad for weight in model.parameters()]
        weights.collect()
    assert all(weight.grad is gradient for weight, gradient in zip(model.parameters(), gradients, strict=True))
