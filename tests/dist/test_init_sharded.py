"""Initial weights, and one forward and backward, of a sharded model against an unsharded one."""

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from tests.processes import run_distributed
from torchtitan_deltaproduct.models import DeltaProductArgs, DeltaProductLM
from torchtitan_deltaproduct.models.init import plain_name


def small_args(tied: bool) -> DeltaProductArgs:
    # Odd sizes, so that shards are uneven.
    return DeltaProductArgs(
        vocab_size=51, hidden_size=24, num_hidden_layers=2, num_heads=3, head_dim=8, intermediate_size=33,
        use_forget_gate=True, use_output_gate=True, tie_word_embeddings=tied,
    )  # fmt: skip


def sharded(args: DeltaProductArgs, dtype: torch.dtype = torch.float32, compiled: bool = False):
    """As the trainer does it: on the meta device, checkpoint, compile and shard each block, then allocate."""
    with torch.device("meta"):
        model = DeltaProductLM(args)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    # The embedding's output has the right dtype already; casting a block's inputs would round the decay too.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    full = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
    decays = [block.mixer.decay for block in model.layers.values()]
    for key, block in list(model.layers.items()):
        block = checkpoint_wrapper(block)
        model.layers.register_module(key, torch.compile(block, backend="aot_eager") if compiled else block)
    fully_shard(decays, mesh=mesh, mp_policy=full, reshard_after_forward=False)
    for block in model.layers.values():
        fully_shard(block, mesh=mesh, mp_policy=policy)
    if not args.tie_word_embeddings:
        fully_shard(model.tok_embeddings, mesh=mesh, mp_policy=policy)
        fully_shard([model.norm, model.output], mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    model.to_empty(device="cpu")
    model.init_weights()
    return model


def check(rank: int, tied: bool, compiled: bool) -> None:
    args = small_args(tied)
    one = DeltaProductLM(args)
    one.init_weights()
    many = sharded(args, compiled=compiled)
    names = [plain_name(name) for name, _ in many.named_parameters()]
    assert names == [name for name, _ in one.named_parameters()]
    tokens = torch.randint(0, 51, (2, 16), generator=torch.Generator().manual_seed(0))
    starts = torch.rand(2, 16, generator=torch.Generator().manual_seed(1)) < 0.2
    # Both ranks see the same batch, so FSDP's mean over ranks is the gradient of one.
    for model in (one, many):
        model(tokens, starts).square().mean().backward()
    for name, expected, found in zip(names, one.parameters(), many.parameters(), strict=True):
        assert isinstance(found, DTensor), name
        assert torch.equal(found.full_tensor(), expected), name
        torch.testing.assert_close(found.grad.full_tensor(), expected.grad, atol=1e-6, rtol=1e-4, msg=name)


def check_decay_precision(rank: int, compiled: bool) -> None:
    """Under bfloat16 mixed precision the decay's parameters are gathered in float32, and train."""
    model = sharded(small_args(tied=True), torch.bfloat16, compiled)
    seen = []
    block = model.layers["0"]
    block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    logits = model(torch.randint(0, 51, (2, 16), generator=torch.Generator().manual_seed(rank)))
    assert logits.dtype == torch.bfloat16 and seen[0].dtype == torch.float32
    decay = block.mixer.decay
    logits.float().square().mean().backward()
    exact = torch.stack([-decay.A_log.full_tensor().exp(), decay.dt_bias.full_tensor()])
    assert torch.equal(seen[0], exact)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32 and parameter.grad.full_tensor().abs().max() > 0, name


@pytest.mark.parametrize(("tied", "compiled"), [(True, False), (False, False), (True, True)])
def test_sharded_equals_unsharded(tied, compiled):
    run_distributed(check, 2, (tied, compiled))


@pytest.mark.parametrize("compiled", [False, True])
def test_decay_stays_float32_under_mixed_precision(compiled):
    run_distributed(check_decay_precision, 2, (compiled,))
