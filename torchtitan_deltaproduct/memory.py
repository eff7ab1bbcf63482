"""Bytes of a run, estimated from its config: what a rank holds, what a checkpoint takes on disk.

    parts = models.counts.parameters_by_part(config.model)
    rank_memory(config, 8, parts)      # {"weights": 106_800_000, ..., "loss": 984_612_864}

Weights, gradients and the moments of the optimizer are float32 and divided by the shard degree: exact. Where a step
adds up micro-batches, gradients are whole until the last one. Activations count what autograd keeps of each block:
compiled and in 16 bits, what our kernels keep; else what PyTorch keeps in eager mode, 10 % more than a small model was
seen to keep. The operator's work space, allocator fragmentation and communication buffers are left out: plan for 20 %
more.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from .config.job import JobConfig
from .models import counts
from .models.args import DeltaProductArgs
from .models.loss import peak_bytes
from .ops.triton_geometry import HEAD_DIMS, MAX_HOUSEHOLDER, Geometry, native
from .optimizers import OPTIMIZERS

_FLOAT32 = 4
_SMALL = 0.05
"""Share of the card's memory that gathered weights may take for a whole step."""
_CARD = 80 << 30
"""Bytes of a card where there is none to ask."""


def shard_degree(config: JobConfig, world_size: int) -> int:
    """Ranks that share one copy of the weights."""
    parallelism = config.parallelism
    if parallelism.data_parallel_shard_degree > 0:
        return parallelism.data_parallel_shard_degree * parallelism.context_parallel_degree
    return max(1, world_size // parallelism.data_parallel_replicate_degree)


def rank_memory(config: JobConfig, world_size: int, parts: Mapping[str, int]) -> dict[str, int]:
    """Bytes by purpose on one rank at the peak of a step, backward of the last micro-batch.

    Args:
        config: The job. `mixed_precision_param = "auto"` counts as bfloat16, its meaning on CUDA.
        world_size: Ranks of the job.
        parts: Number of parameters by part of the model, "embedding" and "head" among them.
    """
    width = activation_width(config)
    own = -(-sum(parts.values()) // shard_degree(config, world_size))
    tokens = config.training.local_batch_size * config.training.seq_len // config.parallelism.context_parallel_degree
    offloaded = config.training.enable_cpu_offload
    return {
        "weights": 0 if offloaded else _FLOAT32 * own,
        # Reduced ones are sharded; up to the last micro-batch a rank holds all of its own.
        "gradients": _FLOAT32 * (sum(parts.values()) if accumulates(config, world_size) else 0 if offloaded else own),
        "optimizer state": 0 if offloaded else _FLOAT32 * -(-state_numbers(config) // shard_degree(config, world_size)),
        "gathered weights": _gathered_weights(config, world_size, parts) * width,
        "activations": int(tokens * activation_elements(config) * width),
        "loss": peak_bytes(tokens, config.model.vocab_size, config.model.hidden_size, width, _compiles_loss(config)),
    }


def activations_by_checkpointing(config: JobConfig, world_size: int, parts: Mapping[str, int]) -> dict[str, int]:
    """Bytes of activations on a rank with each kind of checkpointing that needs no number, the most first."""
    kinds = {
        "none": ("none", "op"),
        "products": ("selective", "products"),
        "op": ("selective", "op"),
        "full": ("full", "op"),
    }
    found = {}
    for name, (mode, option) in kinds.items():
        wrapped = replace(config.activation_checkpoint, mode=mode, selective_ac_option=option)
        other = replace(config, activation_checkpoint=wrapped)
        found[name] = rank_memory(other, world_size, parts)["activations"]
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def exchange_bytes(config: JobConfig) -> dict[str, int]:
    """What a rank sends to each other one that shares its sequences, in one layer; float32, the halo in activations.

    Backends keep the maps of all ranks for the backward pass.
    """
    args, rows = config.model, config.training.local_batch_size
    state = _FLOAT32 * rows * args.num_heads * args.head_dim
    halo = rows * (args.conv_size - 1) * _widths(args)[0] * activation_width(config) if args.use_short_conv else 0
    maps = state * (args.head_dim + args.head_v_dim)
    return {"map, forward": maps, "gradient, backward": state * args.head_v_dim, "halo, each way": halo}


def longest_sequence(config: JobConfig, world_size: int, parts: Mapping[str, int], room: float, step: int) -> int:
    """Tokens of the longest sequence for which a rank needs at most `room` bytes: a multiple of `step`, or 0."""
    return step * largest(lambda steps: _needed(config, world_size, parts, seq_len=steps * step) <= room)


def largest_local_batch(config: JobConfig, world_size: int, parts: Mapping[str, int], room: float) -> int:
    """The most sequences of a micro-batch for which a rank needs at most `room` bytes; 0: not even one.

    Where the global batch is fixed, only those that divide a rank's share of it.
    """

    def fits(sequences: int) -> bool:
        return _needed(config, world_size, parts, local_batch_size=sequences) <= room

    share = config.training.global_batch_size // config.data_ranks(world_size)
    if share > 0:
        return max((b for b in range(1, share + 1) if share % b == 0 and fits(b)), default=0)
    return largest(fits)


def largest(fits: Callable[[int], bool]) -> int:
    """The largest whole number that fits, if all below it do, by doubling and halving; 0 if 1 does not."""
    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _needed(config: JobConfig, world_size: int, parts: Mapping[str, int], **training: int) -> float:
    """Bytes of a rank under other values of `[training]`."""
    other = replace(config, training=replace(config.training, **training))
    return sum(rank_memory(other, world_size, parts).values())


def on_kernels(config: JobConfig) -> bool:
    """Whether activations are counted as a compiled model on our kernels keeps them."""
    args = config.model
    compiled = config.compile.enable and "model" in config.compile.components
    fits = max(args.head_dim, args.head_v_dim) <= HEAD_DIMS[-1] and args.num_householder <= MAX_HOUSEHOLDER
    return compiled and fits and activation_width(config) == 2 and args.op_backend in ("auto", "triton")


def _compiles_loss(config: JobConfig) -> bool:
    return config.compile.enable and "loss" in config.compile.components


def accumulates(config: JobConfig, world_size: int) -> bool:
    """Whether a step has more than one micro-batch."""
    ranks = config.data_ranks(world_size)
    return config.training.samples_per_step(ranks) > config.training.local_batch_size * ranks


def reshard_after_forward(config: JobConfig, shards: int, parameters: int, card: int = _CARD) -> tuple[bool, str]:
    """Whether a block's gathered weights are let go after its forward pass and gathered anew for the backward pass.

    Args:
        config: the job; its `parallelism.fsdp_reshard_after_forward` decides unless it is "default".
        shards: ranks that share one copy of the weights.
        parameters: of the whole model.
        card: bytes of memory of the device.

    Returns:
        The answer and its reason.
    """
    policy, gathered = config.parallelism.fsdp_reshard_after_forward, parameters * activation_width(config)
    if policy != "default":
        return policy == "always", "as set"
    if shards == 1:
        return False, "one rank holds them all"
    share = f"{gathered / 1e9:.2f} GB are {gathered / card:.1%} of the memory"
    return gathered > _SMALL * card, share


def activation_width(config: JobConfig) -> int:
    """Bytes of an activation."""
    return 4 if config.training.mixed_precision_param == "float32" else 2


def hidden_parameters(config: JobConfig) -> int:
    """Parameters in the hidden matrices of all layers."""
    matrices = counts.hidden_matrices(config.model).values()
    return config.model.num_hidden_layers * sum(count * rows * columns for count, rows, columns in matrices)


def state_numbers(config: JobConfig) -> int:
    """Float32 numbers of the optimizer's state, all ranks together."""
    kind = OPTIMIZERS[config.optimizer.name]
    return kind.state_numbers(counts.total_parameters(config.model), hidden_parameters(config))


def checkpoint_bytes(config: JobConfig) -> int:
    """A full checkpoint, all ranks together: weights and the optimizer's moments in float32."""
    return _FLOAT32 * (counts.total_parameters(config.model) + state_numbers(config))


def final_checkpoint_bytes(config: JobConfig) -> int:
    """The last checkpoint of the run, which may hold weights only."""
    checkpoint = config.checkpoint
    if not checkpoint.last_save_model_only:
        return checkpoint_bytes(config)
    width = {"float32": 4, "bfloat16": 2, "float16": 2}[checkpoint.export_dtype]
    return width * counts.total_parameters(config.model)


def activation_elements(config: JobConfig) -> float:
    """Activations kept for the backward pass, per token, over all blocks."""
    ac, layers = config.activation_checkpoint, config.model.num_hidden_layers
    everything = _kernel_elements(config) if on_kernels(config) else _block_elements(config.model)
    block_input = config.model.hidden_size
    if ac.mode == "none":
        return layers * everything
    # A checkpointed block keeps its input; while its backward runs, the block is there in full as well.
    checkpointed = layers * block_input + everything
    if ac.mode == "full":
        return checkpointed
    if ac.mode == "memory_budget":
        return checkpointed + ac.memory_budget * max(0, layers * everything - checkpointed)
    if ac.selective_ac_option == "products":
        return (layers - 1) * _kept_products(config) + everything
    if ac.selective_ac_option == "op":
        records = _chunk_elements(config, states=False) if on_kernels(config) else 0
        return checkpointed + layers * (_kept_per_op(config.model) + records)
    skipped = layers - layers // int(ac.selective_ac_option)
    return min(layers * everything, checkpointed + skipped * (everything - block_input))


def _widths(args: DeltaProductArgs) -> tuple[int, int]:
    """Elements per token of q, k and v together, and of the operator's output."""
    keys, values = args.num_heads * args.head_dim, args.num_heads * args.head_v_dim
    return keys + args.num_householder * (keys + values), values


def _block_elements(args: DeltaProductArgs) -> int:
    """Elements per token that autograd keeps of one block: inputs of products, SiLUs, norms, the operator."""
    projected, output = _widths(args)
    keys = args.num_heads * args.head_dim
    stages = 2 + args.use_short_conv  # projection, convolution, SiLU
    mixer = stages * projected + (1 + args.num_householder) * keys + 2 * output
    mixer += 2 * output * args.use_output_gate
    return 4 * args.hidden_size + mixer + 4 * args.mlp_size


def _kernel_elements(config: JobConfig) -> float:
    """The same of a compiled block on our kernels: products before and after a fused convolution (v not after it: no
    backward reads it), the operator's records, and of the MLP what Inductor does not compute again."""
    args = config.model
    projected, output = _widths(args)
    convolved = (1 + args.num_householder) * args.num_heads * args.head_dim * args.use_short_conv
    mixer = projected + convolved + _chunk_elements(config) + 2 * output + 2 * output * args.use_output_gate
    return 4 * args.hidden_size + mixer + 3 * args.mlp_size


def _chunk_elements(config: JobConfig, states: bool = True) -> float:
    """Elements per token that our kernels keep of a layer's chunks, with or without the states before them."""
    args, packed = config.model, config.data.reset_state_at_documents
    dims = native(args.head_dim), native(args.head_v_dim)
    geometry = Geometry(args.num_householder, *dims, args.use_forget_gate, packed)
    return args.num_heads * (geometry.prepared + states * geometry.states) / geometry.tokens


def _kept_per_op(args: DeltaProductArgs) -> int:
    """Selective per operation: every second matrix product and the operator's output."""
    projected, output = _widths(args)
    products = projected + output * args.use_output_gate + 2 * args.hidden_size + 2 * args.mlp_size
    return products // 2 + output


def _kept_products(config: JobConfig) -> float:
    """Selective "products": a block's input, its products but the last, and what the operator keeps."""
    args = config.model
    projected, output = _widths(args)
    products = projected + output * args.use_output_gate + args.hidden_size + 2 * args.mlp_size
    return args.hidden_size + products + output + (_chunk_elements(config, states=False) if on_kernels(config) else 0)


def _gathered_weights(config: JobConfig, world_size: int, parts: Mapping[str, int]) -> int:
    """Parameters that stand unsharded in the compute type: the root's group and two blocks, or all."""
    layers = config.model.num_hidden_layers
    if world_size == 1 and activation_width(config) == _FLOAT32:
        return 0
    total = sum(parts.values())
    if world_size == 1 and not config.training.enable_cpu_offload:
        return total
    if not reshard_after_forward(config, shard_degree(config, world_size), total)[0]:
        return total
    around = parts["embedding"] + parts["head"]
    return around + min(2, layers) * (total - around) // layers
