"""The records of the options that torchtitan 0.2.2 defines and this toolkit takes over, or refuses.

No option is parsed and ignored: a key of torchtitan's job config has its record here (or, where our default differs, in
`config.job`), or is refused by name unless it is left alone. To support a refused option, give it a record.

    record_of("parallelism.tensor_parallel_degree").refused.instead
    # 'use parallelism.data_parallel_shard_degree (FSDP2)'
"""

from dataclasses import replace
from fnmatch import fnmatchcase

from ..options import (
    COUNT,
    COUNT_OR_ZERO,
    NOT_EMPTY,
    POSITIVE,
    Option,
    Range,
    at_least_or,
    breaking,
    harmless,
    notable,
    only,
    read_with,
    record,
    refused,
    within,
)  # fmt: skip
from .job import LOGGING, NEXT_STEP, NOT_COMPARABLE, OTHER_ROUNDING, SAVING, SPEED

FOLDERS = harmless("names and folders")
TIMEOUTS = harmless("timeouts and traces")
SPEED_AND_MEMORY = notable("speed and memory")
SAME_BATCH = notable("the same global batch in other pieces")
FIRST_START = notable("no effect: the run has checkpoints of its own")
THIS_START = notable("decides what this start does")
SAVED = read_with("checkpoint.enable", True, otherwise="does nothing without enable = true")
BUDGET = read_with("activation_checkpoint.mode", "memory_budget")

HONOURED: dict[str, Option] = {key: option for keys, option in {
    "job.config_file job.description job.print_config job.save_config_file": record(FOLDERS),
    "job.dump_folder": record(
        FOLDERS, NOT_EMPTY, is_path=True, aliases="output_dir out_dir output_folder run_dir dump_dir"),
    "profiling.enable_profiling profiling.save_traces_folder profiling.enable_memory_snapshot "
    "profiling.save_memory_snapshot_folder metrics.disable_color_printing metrics.save_tb_folder": record(LOGGING),
    "profiling.profile_freq profiling.profiler_active": record(LOGGING, COUNT),
    "profiling.profiler_warmup": record(LOGGING, COUNT_OR_ZERO),
    "metrics.enable_wandb": record(LOGGING, aliases="wandb use_wandb"),
    "optimizer.eps": record(NEXT_STEP, POSITIVE, aliases="epsilon adam_eps adam_epsilon"),
    "lr_scheduler.warmup_steps": record(
        NEXT_STEP, COUNT_OR_ZERO, aliases="warmup warmup_iters num_warmup_steps lr_warmup_steps"),
    "lr_scheduler.total_steps": record(NEXT_STEP, COUNT),
    "lr_scheduler.decay_ratio": record(NEXT_STEP, within(0, 1)),
    "lr_scheduler.decay_type": record(NEXT_STEP, aliases="lr_scheduler_type lr_decay_style"),
    "lr_scheduler.min_lr_factor": record(NEXT_STEP, within(0, 1), aliases="min_lr lr_min min_lr_ratio min_ratio"),
    "training.local_batch_size": record(
        SAME_BATCH, COUNT, aliases="batch_size micro_batch_size microbatch_size per_device_batch_size mbs "
        "per_device_train_batch_size device_batch_size train_batch_size"),
    "training.global_batch_size": record(
        SAME_BATCH, at_least_or(-1, 1, "local batch x data-parallel ranks"),
        aliases="total_batch_size gbs batch_size_global"),
    "training.seq_len": record(
        breaking("other windows"), COUNT,
        aliases="sequence_length context_length block_size max_seq_len max_length ctx_len seqlen"),
    "training.max_norm": record(
        NEXT_STEP, Range(lambda value: value > 0, "must be positive; 1e9 never clips"),
        aliases="grad_clip clip max_grad_norm gradient_clipping grad_norm clip_grad clip_grad_norm"),
    "training.steps": record(
        notable("the new end; a schedule without total_steps stretches with it"), COUNT,
        aliases="max_steps num_steps train_steps total_train_steps n_steps iterations max_iters"),
    "training.mixed_precision_reduce": record(notable("other rounding")),
    "training.gc_freq": record(SPEED, COUNT),
    "training.gc_debug": record(SPEED),
    "parallelism.data_parallel_replicate_degree": record(OTHER_ROUNDING, COUNT, aliases="dp_replicate ddp_degree"),
    "parallelism.data_parallel_shard_degree": record(
        OTHER_ROUNDING, at_least_or(-1, 1, "all remaining ranks"),
        aliases="dp_shard fsdp fsdp_degree data_parallel_degree"),
    "parallelism.context_parallel_degree": record(
        OTHER_ROUNDING, COUNT, aliases="cp cp_degree context_parallel_size sequence_parallel_degree"),
    "parallelism.fsdp_reshard_after_forward": record(OTHER_ROUNDING),
    "checkpoint.folder": record(SAVING, NOT_EMPTY, aliases="checkpoint_dir ckpt_dir save_dir"),
    "checkpoint.interval": record(
        SAVING, COUNT, aliases="save_interval save_steps save_every checkpoint_interval ckpt_interval"),
    "checkpoint.initial_load_path": record(
        FIRST_START, reader=SAVED, is_path=True, aliases="resume resume_from init_from load_path pretrained"),
    "checkpoint.initial_load_model_only": record(FIRST_START),
    "checkpoint.export_dtype": record(
        notable("decides what the last checkpoint holds"),
        reader=read_with("checkpoint.last_save_model_only", True,
                         otherwise="does nothing without last_save_model_only = true: full checkpoints keep float32")),
    "checkpoint.async_mode": record(SAVING),
    "checkpoint.load_step": record(THIS_START, at_least_or(-1, 0, "the newest complete one"), reader=SAVED),
    "checkpoint.exclude_from_loading": record(
        FIRST_START, only("optimizer", "lr_scheduler", "dataloader", "train_state")),
    "checkpoint.enable_first_step_checkpoint": record(SAVING, reader=SAVED),
    "checkpoint.create_seed_checkpoint checkpoint.load_only": record(THIS_START, reader=SAVED),
    "training.enable_cpu_offload activation_checkpoint.early_stop activation_checkpoint.preserve_rng_state "
    "activation_checkpoint.debug": record(SPEED_AND_MEMORY),
    "activation_checkpoint.mode": record(
        SPEED_AND_MEMORY, aliases="gradient_checkpointing activation_checkpointing recompute use_checkpoint"),
    "activation_checkpoint.selective_ac_option": record(
        SPEED_AND_MEMORY,
        Range(lambda value: value in ("op", "products") or (value.isascii() and value.isdigit() and int(value) >= 1),
              'must be "products" (all but matrix products is computed again), "op" (every other product, too) or the '
              'text of a whole number n, such as "2" (every n-th block)')),
    "activation_checkpoint.memory_budget": record(SPEED_AND_MEMORY, within(0, 1), reader=BUDGET),
    "activation_checkpoint.visualize_memory_budget_pareto": record(SPEED_AND_MEMORY, reader=BUDGET),
    "activation_checkpoint.determinism_check": record(
        SPEED_AND_MEMORY, Range(lambda value: value in ("default", "none"), 'must be "default" or "none"')),
    "compile.enable": record(OTHER_ROUNDING, aliases="torch_compile use_compile compile"),
    "compile.components": record(OTHER_ROUNDING, only("model", "loss")),
    "comm.init_timeout_seconds": record(TIMEOUTS, COUNT),
    "comm.trace_buf_size": record(TIMEOUTS, replace(COUNT_OR_ZERO, highest=1_000_000)),
    "comm.save_traces_folder comm.save_traces_file_prefix": record(TIMEOUTS),
    "validation.enable": record(harmless("how often to validate")),
    "validation.freq": record(
        harmless("how often to validate"), COUNT, aliases="eval_interval eval_steps val_interval eval_every"),
    "validation.local_batch_size": record(NOT_COMPARABLE, COUNT),
    "debug.deterministic": record(notable("speed")),
    "debug.deterministic_warn_only": record(
        notable("speed"),
        reader=read_with("debug.deterministic", True, otherwise="does nothing without deterministic = true")),
}.items() for key in keys.split()}  # fmt: skip

WORDS = {
    "lr_scheduler.warmup_steps": "Steps of the linear warm-up.",
    "lr_scheduler.total_steps": "Steps of the schedule, if it is that of a longer run. Unset: `training.steps`.",
    "lr_scheduler.decay_ratio":
        "Share of the steps that decay, at the end. Unset: the decay follows the warm-up at once.",
    "lr_scheduler.decay_type": "Shape of the decay. `linear`, `sqrt` (one minus the root) or `cosine`.",
    "lr_scheduler.min_lr_factor": "Factor of the peak rate at the end of the decay.",
    "training.mixed_precision_reduce": "Dtype in which gradients are summed over micro-batches and ranks.",
    "training.gc_debug": "Collect garbage at every step, to find cycles that hold CUDA tensors.",
    "parallelism.data_parallel_replicate_degree":
        "Copies of the weights: with shards of one rank this is DDP, with larger ones HSDP.",
    "parallelism.data_parallel_shard_degree":
        "Ranks that share one copy of the weights (FSDP2). `-1`: all that the other degrees leave.",
    "parallelism.fsdp_reshard_after_forward":
        "Whether a block's weights are gathered again for its backward pass. `default`: where they take much memory.",
    "checkpoint.initial_load_path":
        "Run folder, or a step of one, to start from, as long as the run has no checkpoint of its own.",
    "checkpoint.initial_load_model_only":
        "Whether only the weights of `initial_load_path` are taken, and not optimizer, schedule and data position.",
    "checkpoint.async_mode":
        "Whether training waits for saves. `disabled` waits, `async` writes in a thread, `async_with_pinned_mem` in a "
        "process (CUDA).",
    "checkpoint.exclude_from_loading":
        "Parts of `initial_load_path` that start anew: `optimizer`, `lr_scheduler`; `train_state` or `dataloader`: the "
        "step, the schedule and the place in the data together. A run's own checkpoints are always loaded whole.",
    "checkpoint.enable_first_step_checkpoint": "Save after the first step, too, to see whether saving works.",
    "checkpoint.create_seed_checkpoint": "Save the initial weights as step 0 and end; by one process.",
    "checkpoint.load_only": "Load a checkpoint, and save none.",
    "activation_checkpoint.mode":
        "What the backward pass computes again. Nothing (`none`), some (`selective`), all of each block (`full`), or "
        "as torch.compile finds best in a memory (`memory_budget`).",
    "activation_checkpoint.selective_ac_option":
        "What mode = \"selective\" computes again: parts of each block, or whole blocks, one of so many.",
    "activation_checkpoint.memory_budget":
        "Memory of activations, from 0, as little as with `full`, to 1, all that is fastest.",
    "activation_checkpoint.visualize_memory_budget_pareto":
        "Draw run time against memory for budgets from 0 to 1, in the run folder's memory_budget_pareto.",
    "activation_checkpoint.preserve_rng_state": "Restore the state of random numbers for what is computed again.",
    "activation_checkpoint.determinism_check": "Whether what is computed again is compared with what it was.",
    "activation_checkpoint.debug": "Record what is computed again, and compare; slow.",
    "validation.enable": "Validate every `freq` steps, before the first and after the last.",
    "validation.freq": "Steps between validations.",
}  # fmt: skip
"""Our doc strings for fields whose own in torchtitan are long, or not true here."""

FSDP = "use parallelism.data_parallel_shard_degree (FSDP2)"
DELETE = "delete the line"
NO_TENSOR_PARALLEL = "tensor parallelism is not supported yet"
NO_PIPELINE = "pipeline parallelism is not supported yet"
NO_ATTENTION = "a recurrence cuts sequences in order, and has no attention"
NO_EXPERTS = "the model has no experts"
OWN_DATA = "torchtitan's data sets are not used"

REFUSED: dict[str, Option] = {
    "job.custom_config_module": refused("the job config is this toolkit's own", "add fields in config/job.py"),
    "metrics.save_for_all_ranks": refused("rank 0 keeps the records of all", DELETE),
    "model.name": refused("the only model is deltaproduct", "DeltaNet and Gated DeltaNet are settings of it"),
    "model.tokenizer_path": refused("deprecated in torchtitan", "use model.hf_assets_path"),
    "model.converters": refused("float8 and other model converters are not supported yet", DELETE),
    "model.print_after_conversion": refused("there are no model converters", DELETE),
    "optimizer.early_step_in_backward": refused(
        "a step inside backward cannot clip the gradient, accumulate, or skip a non-finite one", DELETE),
    "training.dataset*": refused(OWN_DATA, 'use data.paths, or data.kind = "streaming" and data.dataset'),
    "training.dataloader.*": refused(
        "torchtitan's loader is not used", "use data.num_workers and data.prefetch_factor"),
    "training.dtype": refused(
        "all-bfloat16 training keeps no float32 master weights", 'use training.mixed_precision_param = "bfloat16"'),
    "parallelism.tensor_parallel_degree": refused(NO_TENSOR_PARALLEL, FSDP),
    "parallelism.disable_loss_parallel": refused(NO_TENSOR_PARALLEL, DELETE),
    "parallelism.enable_async_tensor_parallel": refused(NO_TENSOR_PARALLEL, DELETE),
    "parallelism.pipeline_parallel_degree": refused(NO_PIPELINE, FSDP),
    "parallelism.pipeline_parallel_*": refused(NO_PIPELINE, DELETE),
    "parallelism.module_fqns_per_model_part": refused(NO_PIPELINE, DELETE),
    "parallelism.context_parallel_load_balancer": refused(NO_ATTENTION, DELETE),
    "parallelism.context_parallel_rotate_method": refused(NO_ATTENTION, DELETE),
    "parallelism.expert_*": refused(NO_EXPERTS, DELETE),
    "checkpoint.enable_ft_dataloader_checkpoints": refused("torchft is not supported", DELETE),
    "checkpoint.initial_load_in_hf*": refused(
        "Hugging Face weights are imported before training, not by it",
        "run python -m torchtitan_deltaproduct.checkpoint.from_hf HF OUT and name OUT in checkpoint.initial_load_path"),
    "checkpoint.last_save_in_hf": refused(
        "a run is exported after training, not by it",
        "run python -m torchtitan_deltaproduct.checkpoint.to_hf RUN OUT"),
    "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns": refused(
        "the list of operations to recompute is fixed for this model", DELETE),
    "quantize.*": refused("float8 and mx quantization are not supported yet", DELETE),
    "comm.mode": refused(
        "simulated communication is not supported",
        "check a layout with python -m torchtitan_deltaproduct.plan X.toml --world-size N"),
    "memory_estimation.*": refused(
        "torchtitan's estimator does not know this model", "use python -m torchtitan_deltaproduct.plan X.toml"),
    "fault_tolerance.*": refused("torchft is not supported", "restart the run: it resumes exactly"),
    "experimental.*": refused("external modules are not loaded", "add the code to the package"),
    "validation.dataset*": refused(OWN_DATA, "use validation.paths"),
    "validation.dataloader.*": refused("validation data is read in the training process", DELETE),
    "debug.moe_force_load_balance": refused(NO_EXPERTS, DELETE),
}  # fmt: skip
"""By key, or the beginning of several followed by `*`; the first that matches holds."""


def record_of(key: str) -> Option | None:
    """The record of an option that only torchtitan declares; None if nobody has thought of it."""
    if key in HONOURED:
        return HONOURED[key]
    return next((option for pattern, option in REFUSED.items() if fnmatchcase(key, pattern)), None)
