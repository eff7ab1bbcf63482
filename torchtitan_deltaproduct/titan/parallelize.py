"""Activation checkpointing, torch.compile and data parallelism over a model on the meta device.

The order is torchtitan's: checkpoint each block, compile each block, then shard. Data parallelism always goes through
`fully_shard`: FSDP on a 1-D mesh, HSDP on a 2-D mesh, DDP as HSDP with shards of one rank. So every layout has one
mixed-precision policy and one gradient reduction, a plain sum: the trainer divides the loss by the global number of
tokens, and a mean over ranks (DDP's and FSDP's default) would divide a second time. One process shards nothing, and
has the same precision of `LoweredWeights`.

Context parallelism changes no weight and no module: blocks are told who has the other parts of a sequence, and weights
are sharded over those ranks, too. Tensor and pipeline parallelism have their place between the steps of `parallelize`.
"""

import itertools
import logging

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy
from torchtitan.config import TORCH_DTYPE_MAP, ActivationCheckpoint
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.activation_checkpoint import apply_ac
from torchtitan.tools import utils

from ..config.job import JobConfig
from ..memory import reshard_after_forward
from ..ops import SAVE_FOR_SELECTIVE_AC, SequenceRanks
from ..torch_internals import checkpointed, force_compiler_settings, start_compile_workers
from .lowered import LoweredWeights
from .stopping import deaf_children

logger = logging.getLogger(__name__)

# Selective checkpointing "op" and "products" keep these outputs and compute the rest again: matrix products (with "op"
# every other one, by torchtitan's policy), the operator without its states, and what arrives over the network.
OPS_TO_SAVE = {
    torch.ops.aten.mm.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch._higher_order_ops.inductor_compiled_code,
    *SAVE_FOR_SELECTIVE_AC,
}


def parallelize(model: nn.Module, parallel_dims: ParallelDims, job_config: JobConfig) -> nn.Module:
    """Applies what `job_config` asks for to `model` (on the meta device) and returns it."""
    compile_model = job_config.compile.enable and "model" in job_config.compile.components
    if ranks := sequence_ranks(parallel_dims):
        model.spread_over(ranks)
        logger.info("context parallelism: %d ranks to a sequence", ranks.size)
    checkpointing = job_config.activation_checkpoint
    kind = checkpointing.selective_ac_option if checkpointing.mode == "selective" else checkpointing.mode
    if kind in ("op", "products"):
        for block in model.layers.values():
            block.mixer.keep_states = False
    if kind == "products":
        keep_products(model, checkpointing)
    elif kind != "none":
        apply_ac(
            model,
            checkpointing,
            model_compile_enabled=compile_model,
            op_sac_save_list=OPS_TO_SAVE,
            base_folder=job_config.job.dump_folder,
        )
    if job_config.compile.enable:
        set_up_compiler()
    if compile_model:
        for name, block in model.layers.named_children():
            compiled = torch.compile(block, backend=job_config.compile.backend, fullgraph=True)
            model.layers.register_module(name, compiled)
    if job_config.compile.enable and "loss" in job_config.compile.components:
        model.loss_backend = job_config.compile.backend
    mesh, reason = data_parallel_mesh(parallel_dims, job_config)
    if mesh is not None:
        shard(model, mesh, job_config)
    logger.info("data parallelism: %s", reason)
    return model


def lowered_weights(model: nn.Module, job_config: JobConfig) -> LoweredWeights:
    """What gives `model`, its weights on the device, its compute dtype in a step; FSDP does so itself."""
    training = job_config.training
    sharded = isinstance(model, FSDPModule)
    dtype = TORCH_DTYPE_MAP[training.dtype if sharded else training.mixed_precision_param]
    return LoweredWeights(model, dtype, kept=decays(model))


def decays(model: nn.Module) -> list[nn.Module]:
    """A_log and dt_bias of all layers: computed in float32 whatever the precision of the rest."""
    return [block.mixer.decay for block in model.layers.values() if model.args.use_forget_gate]


def keep_products(model: nn.Module, options: ActivationCheckpoint) -> None:
    """Each block keeps what took arithmetic, matrix products and the operator's solved chunks, and its backward pass
    computes again what takes bandwidth: norms, activations, convolutions."""

    def policy(_context, op, *_args, **_options) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in OPS_TO_SAVE else CheckpointPolicy.PREFER_RECOMPUTE

    names = "preserve_rng_state", "determinism_check", "early_stop", "debug"
    given = {name: getattr(options, name) for name in names}
    for name, block in model.layers.named_children():
        model.layers.register_module(name, checkpointed(block, policy, **given))


def sum_over_ranks(values: torch.Tensor, parallel_dims: ParallelDims) -> torch.Tensor:
    """values: [n] of this rank's tokens, on the device -> their sums over all ranks, in place."""
    if parallel_dims.dp_cp_enabled:
        dist.all_reduce(values, group=parallel_dims.get_mesh("loss").get_group())
    return values


def sequence_ranks(parallel_dims: ParallelDims) -> SequenceRanks | None:
    """The ranks that share this rank's sequences, in the order of their parts; None: each has its own."""
    if not parallel_dims.cp_enabled:
        return None
    group = parallel_dims.get_mesh("cp").get_group()
    return SequenceRanks(group.group_name, dist.get_rank(group), dist.get_world_size(group))


def set_up_compiler() -> None:
    """Settings of torch.compile for the process.

    A restarted run repeats its losses to the bit if the code of a shape depends on the shape alone. So Inductor's
    kernels are chosen without timing them (`deterministic` says so of reductions only), and a graph is made for the
    lengths it sees, not, after the second length, for any length; nor does the compiler remember lengths of the runs
    before. (A curriculum's words are padded to the full length.) Blocks share one function, and each of its variants
    (training, validation at another length, with documents or without) is a recompilation; the default limit of eight
    makes the ninth an error under `fullgraph`.
    """
    # Loading them takes a second, which a run that compiles nothing need not spend.
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    with deaf_children():
        start_compile_workers()
    force_compiler_settings(inductor, {"deterministic": True, "triton.autotune_pointwise": False})
    limit = max(dynamo.recompile_limit, 64)
    lengths = {"automatic_dynamic_shapes": False, "automatic_dynamic_local_pgo": False}
    force_compiler_settings(dynamo, lengths | {"recompile_limit": limit})


def data_parallel_mesh(parallel_dims: ParallelDims, job_config: JobConfig) -> tuple[DeviceMesh | None, str]:
    """The mesh to shard over, and the reason; no mesh for one process."""
    replicate, fsdp = parallel_dims.dp_replicate, parallel_dims.dp_shard * parallel_dims.cp
    if fsdp > 1 and replicate > 1:
        return parallel_dims.get_mesh(["dp_replicate", "fsdp"]), f"HSDP, {replicate} replicas of {fsdp} shards"
    if fsdp > 1:
        return parallel_dims.get_mesh("fsdp"), f"FSDP2 over {fsdp} ranks"
    # torchtitan gives a mesh dimension of one rank a fake backend, so these two build their own.
    if replicate > 1:
        mesh = init_device_mesh(utils.device_type, (replicate, 1), mesh_dim_names=("dp_replicate", "fsdp"))
        return mesh, f"DDP over {replicate} ranks (HSDP with shards of one rank)"
    if job_config.training.enable_cpu_offload:
        mesh = init_device_mesh(utils.device_type, (1,), mesh_dim_names=("fsdp",))
        return mesh, "none; FSDP2 on one rank, for the sake of offloading"
    idle = job_config.parallelism.fsdp_reshard_after_forward != "default"
    return None, "none, one process" + "; there is nothing for fsdp_reshard_after_forward to do" * idle


def shard(model: nn.Module, mesh: DeviceMesh, job_config: JobConfig) -> None:
    """Shards `model` in place, one FSDP group a block and one for what surrounds the blocks."""
    training = job_config.training
    options = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=TORCH_DTYPE_MAP[training.mixed_precision_param],
            reduce_dtype=TORCH_DTYPE_MAP[training.mixed_precision_reduce],
            # The embedding's output has the right dtype already, and the decay handed to a block is to stay float32.
            cast_forward_inputs=False,
        ),
    }
    if training.enable_cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy()
    card = utils.device_module.get_device_properties(utils.device_module.current_device()).total_memory
    parameters = sum(p.numel() for p in model.parameters())
    reshard, reason = reshard_after_forward(job_config, mesh.size(mesh.ndim - 1), parameters, card)
    logger.info("gathered weights: %s for the backward pass (%s)", "gathered again" if reshard else "kept", reason)
    if in_float32 := decays(model):
        full = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
        fully_shard(in_float32, **(options | {"mp_policy": full}), reshard_after_forward=False)
    blocks = list(model.layers.values())
    for block in blocks:
        fully_shard(block, **options, reshard_after_forward=reshard)
    # A tied weight must belong to one group, and a group is one module: embedding and head stay with the root then.
    if not model.args.tie_word_embeddings:
        fully_shard(model.tok_embeddings, **options, reshard_after_forward=reshard)
        # The backward pass begins with these: only who asks for it has them gathered twice.
        always = job_config.parallelism.fsdp_reshard_after_forward == "always"
        fully_shard([model.norm, model.output], **options, reshard_after_forward=always)
    fully_shard(model, **options)
    for block, following in itertools.pairwise(blocks):
        block.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([block])
    for module in model.modules():
        # One rank has nothing to reduce, and given a factor it would divide all gradients by 1.
        if isinstance(module, FSDPModule) and mesh.size() > 1:
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
