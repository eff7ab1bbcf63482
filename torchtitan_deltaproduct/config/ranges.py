"""The values each option may take, one line an option.

A range is a predicate and how to say it; an option without a line takes every value of its type. An unset
optional option is never out of range.

    >>> RANGES["training.steps"].allows(0), RANGES["training.steps"].text
    (False, 'must be at least 1')
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    allows: Callable[[Any], bool]
    text: str
    """Completes a sentence that begins with the value: "must be at least 1"."""


def _at_least(low: float, why: str = "") -> Range:
    return Range(lambda value: value >= low, f"must be at least {low}{why}")


def _within(low: float, high: float, why: str = "") -> Range:
    return Range(lambda value: low <= value <= high, f"must lie between {low} and {high}{why}")


def _or(special: int, low: int, meaning: str) -> Range:
    text = f"must be at least {low}, or {special} for {meaning}"
    return Range(lambda value: value == special or value >= low, text)


def _subset(*choices: str) -> Range:
    listed = ", ".join(f'"{choice}"' for choice in choices)
    return Range(lambda value: set(value) <= set(choices), f"may hold only {listed}")


_POSITIVE = Range(lambda value: value > 0, "must be positive")
_BELOW_ONE = Range(lambda value: 0 <= value < 1, "must be at least 0 and below 1")
_NOT_EMPTY = Range(lambda value: bool(value.strip()), "must not be empty")
_NO_BLANKS = Range(lambda value: all(item.strip() for item in value), "must not hold an empty name")
_SEED = _within(0, 2**63 - 1)
_COUNT = _at_least(1)
_COUNT_OR_ZERO = _at_least(0)

RANGES = {
    "job.dump_folder": _NOT_EMPTY,
    "profiling.profile_freq": _COUNT,
    "profiling.profiler_active": _COUNT,
    "profiling.profiler_warmup": _COUNT_OR_ZERO,
    "metrics.log_freq": _COUNT,
    "metrics.peak_flops": _COUNT_OR_ZERO,
    "model.vocab_size": _at_least(2),
    "model.hidden_size": _COUNT,
    "model.num_hidden_layers": _COUNT,
    "model.num_heads": _COUNT,
    "model.head_dim": _within(1, 256, ", the widest head of the kernels"),
    "model.expand_v": _POSITIVE,
    "model.num_householder": _within(1, 8),
    "model.conv_size": _at_least(2, "; use_short_conv = false turns the convolution off"),
    "model.hidden_ratio": _POSITIVE,
    "model.intermediate_size": _COUNT,
    "model.norm_eps": _POSITIVE,
    "model.initializer_range": _POSITIVE,
    "data.paths": _NO_BLANKS,
    "data.weights": Range(lambda value: all(weight > 0 for weight in value), "must all be positive"),
    "data.seed": _SEED,
    "data.split": _NOT_EMPTY,
    "data.text_field": _NOT_EMPTY,
    "data.shuffle_buffer": _COUNT_OR_ZERO,
    "data.curriculum_start": _or(0, 1, "full length from the start"),
    "data.curriculum_steps": _COUNT_OR_ZERO,
    "data.min_length": _COUNT,
    "data.max_length": _COUNT,
    "data.num_workers": _COUNT_OR_ZERO,
    "data.prefetch_factor": _COUNT,
    "optimizer.lr": _POSITIVE,
    "optimizer.beta1": _BELOW_ONE,
    "optimizer.beta2": _BELOW_ONE,
    "optimizer.eps": _POSITIVE,
    "optimizer.weight_decay": _COUNT_OR_ZERO,
    "lr_scheduler.warmup_steps": _COUNT_OR_ZERO,
    "lr_scheduler.total_steps": _COUNT,
    "lr_scheduler.decay_ratio": _within(0, 1),
    "lr_scheduler.min_lr_factor": _within(0, 1),
    "training.local_batch_size": _COUNT,
    "training.global_batch_size": _or(-1, 1, "local batch x data-parallel ranks"),
    "training.seq_len": _COUNT,
    "training.max_norm": Range(lambda value: value > 0, "must be positive; 1e9 never clips"),
    "training.steps": _COUNT,
    "training.gc_freq": _COUNT,
    "training.max_skipped_steps": _COUNT,
    "parallelism.data_parallel_replicate_degree": _COUNT,
    "parallelism.data_parallel_shard_degree": _or(-1, 1, "all remaining ranks"),
    "parallelism.context_parallel_degree": _COUNT,
    "checkpoint.folder": _NOT_EMPTY,
    "checkpoint.interval": _COUNT,
    "checkpoint.keep_latest_k": Range(
        lambda value: value == 0 or value >= 2,
        "must be 0 (keep all) or at least 2: the newest may be incomplete when a run dies",
    ),
    "checkpoint.keep_every": _COUNT_OR_ZERO,
    "guard.walltime_minutes": _COUNT_OR_ZERO,
    "guard.walltime_margin_seconds": _COUNT_OR_ZERO,
    "guard.hang_seconds": _COUNT_OR_ZERO,
    "guard.spike_threshold": _COUNT_OR_ZERO,
    "checkpoint.load_step": _or(-1, 0, "the newest complete one"),
    "checkpoint.exclude_from_loading": _subset("optimizer", "lr_scheduler", "dataloader", "train_state"),
    "activation_checkpoint.selective_ac_option": Range(
        lambda value: value == "op" or (value.isascii() and value.isdigit() and int(value) >= 1),
        'must be "op" (per operation) or the text of a whole number n, such as "2" (every n-th block)',
    ),
    "activation_checkpoint.memory_budget": _within(0, 1),
    "activation_checkpoint.determinism_check": Range(
        lambda value: value in ("default", "none"), 'must be "default" or "none"'
    ),
    "compile.components": _subset("model", "loss"),
    "compile.backend": _NOT_EMPTY,
    "comm.init_timeout_seconds": _COUNT,
    "comm.train_timeout_seconds": _COUNT,
    "comm.trace_buf_size": _COUNT_OR_ZERO,
    "validation.paths": _NO_BLANKS,
    "validation.freq": _COUNT,
    "validation.steps": _or(-1, 1, "every window of the set"),
    "validation.local_batch_size": _COUNT,
    "validation.lengths": Range(lambda value: all(length >= 1 for length in value), "must all be at least 1"),
    "validation.samples": _COUNT,
    "validation.seq_len": _or(0, 1, "the length of training"),
    "debug.seed": _SEED,
}
