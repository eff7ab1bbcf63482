"""Options of torchtitan 0.2.2 that this toolkit does not honour: refused by name unless left alone.

No option is parsed and ignored: each key of `JobConfig` is either in `HONOURED` or matched by one of `RULES`,
which a test enumerates. To support an option, move its key from one to the other.

    >>> refusal("parallelism.tensor_parallel_degree").instead
    'use parallelism.data_parallel_shard_degree (FSDP2)'
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache

from .fields import schema


@dataclass(frozen=True)
class Rule:
    """Why the options that match `pattern` are refused, and what to do instead."""

    pattern: str
    """A key, or the beginning of some followed by `*`."""
    reason: str
    instead: str


_FSDP = "use parallelism.data_parallel_shard_degree (FSDP2)"
_DATA = 'use data.paths, or data.kind = "streaming" and data.dataset'
_LOADER = "use data.num_workers and data.prefetch_factor"
_DELETE = "delete the line"

RULES = (
    Rule("job.custom_config_module", "the job config is this toolkit's own", "add fields in config/job.py"),
    Rule("metrics.save_for_all_ranks", "rank 0 keeps the records of all", _DELETE),
    Rule("model.name", "the only model is deltaproduct", "DeltaNet and Gated DeltaNet are settings of it"),
    Rule("model.tokenizer_path", "deprecated in torchtitan", "use model.hf_assets_path"),
    Rule("model.converters", "float8 and other model converters are not supported yet", _DELETE),
    Rule("model.print_after_conversion", "there are no model converters", _DELETE),
    Rule(
        "optimizer.early_step_in_backward",
        "a step inside backward cannot clip the gradient, accumulate, or skip a non-finite one",
        _DELETE,
    ),
    Rule("training.dataset*", "torchtitan's data sets are not used", _DATA),
    Rule("training.dataloader.*", "torchtitan's loader is not used", _LOADER),
    Rule(
        "training.dtype",
        "all-bfloat16 training keeps no float32 master weights",
        'use training.mixed_precision_param = "bfloat16"',
    ),
    Rule("parallelism.tensor_parallel_degree", "tensor parallelism is not supported yet", _FSDP),
    Rule("parallelism.disable_loss_parallel", "tensor parallelism is not supported yet", _DELETE),
    Rule("parallelism.enable_async_tensor_parallel", "tensor parallelism is not supported yet", _DELETE),
    Rule("parallelism.pipeline_parallel_degree", "pipeline parallelism is not supported yet", _FSDP),
    Rule("parallelism.pipeline_parallel_*", "pipeline parallelism is not supported yet", _DELETE),
    Rule("parallelism.module_fqns_per_model_part", "pipeline parallelism is not supported yet", _DELETE),
    Rule("parallelism.context_parallel_*", "a recurrence cuts sequences in order, and has no attention", _DELETE),
    Rule("parallelism.expert_*", "the model has no experts", _DELETE),
    Rule("checkpoint.enable_ft_dataloader_checkpoints", "torchft is not supported", _DELETE),
    Rule(
        "checkpoint.initial_load_in_hf*",
        "Hugging Face weights are imported before training, not by it",
        "run python -m torchtitan_deltaproduct.checkpoint.from_hf HF OUT and name OUT in checkpoint.initial_load_path",
    ),
    Rule(
        "checkpoint.last_save_in_hf",
        "a run is exported after training, not by it",
        "run python -m torchtitan_deltaproduct.checkpoint.to_hf RUN OUT",
    ),
    Rule(
        "activation_checkpoint.per_op_sac_force_recompute_mm_shapes_by_fqns",
        "the list of operations to recompute is fixed for this model",
        _DELETE,
    ),
    Rule("quantize.*", "float8 and mx quantization are not supported yet", _DELETE),
    Rule(
        "comm.mode",
        "simulated communication is not supported",
        "check a layout with python -m torchtitan_deltaproduct.config.plan X.toml --world-size N",
    ),
    Rule(
        "memory_estimation.*",
        "torchtitan's estimator does not know this model",
        "use python -m torchtitan_deltaproduct.config.plan X.toml",
    ),
    Rule("fault_tolerance.*", "torchft is not supported", "restart the run: it resumes exactly"),
    Rule("experimental.*", "external modules are not loaded", "add the code to the package"),
    Rule("validation.dataset*", "torchtitan's data sets are not used", "use validation.paths"),
    Rule("validation.dataloader.*", "validation data is read in the training process", _DELETE),
    Rule("debug.moe_force_load_balance", "the model has no experts", _DELETE),
)

HONOURED = frozenset(f"{table}.{name}" for table, names in {
    "job": "config_file dump_folder description print_config save_config_file",
    "profiling": "enable_profiling save_traces_folder profile_freq profiler_active profiler_warmup "
                 "enable_memory_snapshot save_memory_snapshot_folder",
    "metrics": "log_freq enable_tensorboard disable_color_printing save_tb_folder enable_wandb",
    "model": "flavor hf_assets_path",
    "optimizer": "name lr beta1 beta2 eps weight_decay implementation",
    "lr_scheduler": "warmup_steps total_steps decay_ratio decay_type min_lr_factor",
    "training": "local_batch_size global_batch_size seq_len max_norm steps enable_cpu_offload "
                "mixed_precision_param mixed_precision_reduce gc_freq gc_debug",
    "parallelism": "data_parallel_replicate_degree data_parallel_shard_degree fsdp_reshard_after_forward "
                   "context_parallel_degree",
    "checkpoint": "enable folder interval initial_load_path initial_load_model_only last_save_model_only "
                  "export_dtype async_mode keep_latest_k load_step exclude_from_loading "
                  "enable_first_step_checkpoint create_seed_checkpoint load_only",
    "activation_checkpoint": "mode selective_ac_option early_stop memory_budget "
                             "visualize_memory_budget_pareto preserve_rng_state determinism_check debug",
    "compile": "enable components backend",
    "comm": "init_timeout_seconds train_timeout_seconds trace_buf_size save_traces_folder "
            "save_traces_file_prefix",
    "validation": "enable seq_len local_batch_size freq steps",
    "debug": "seed deterministic deterministic_warn_only",
}.items() for name in names.split())  # fmt: skip
"""Keys that torchtitan defines and the trainer acts on; fields that only we define are honoured by birth."""


@cache
def refusal(key: str) -> Rule | None:
    """The rule that refuses `key`, or None."""
    if key in HONOURED:
        return None
    return next((rule for rule in RULES if fnmatchcase(key, rule.pattern)), None)


@cache
def supported_keys() -> tuple[str, ...]:
    """Every key a user may set, in schema order."""
    return tuple(key for key in schema() if refusal(key) is None)
