"""The lines a run prints before its first step: what was built, each derived number with what it derives from."""

from ..models import counts
from .device import peak_flops
from .spec import global_batch_size


def describe(trainer) -> list[str]:
    """Lines on model, data, batch, schedule, memory savers and run folder of a `Trainer` before its first step."""
    config, dims = trainer.job_config, trainer.parallel_dims
    args = trainer.model_args.architecture
    ranks = dims.dp_replicate * dims.dp_shard
    training, schedule = config.training, config.lr_scheduler
    samples = global_batch_size(config, ranks)
    tokens = samples * training.seq_len
    device = trainer.metrics_processor.device_memory_monitor.device_name
    peak = config.metrics.peak_flops or peak_flops(device)
    lines = [
        f"model: {config.model.flavor or 'DeltaProduct'}, n_h = {args.num_householder}, eigenvalues in "
        f"{'[-1, 1]' if args.allow_neg_eigval else '[0, 1]'}, {counts.total_parameters(args):,} parameters, "
        f"{counts.training_flops_per_token(args) / 1e6:,.1f} MFLOP a training token",
        trainer.dataloader.describe(),
    ]
    if config.validation.enable:
        lines.append(trainer.validator.describe())
    lines += [
        f"step: {samples} sequences of {training.seq_len:,} = {tokens:,} tokens ({training.local_batch_size} a rank x "
        f"{trainer.gradient_accumulation_steps} accumulated x {ranks} rank{'s' if ranks > 1 else ''})",
        f"schedule: {training.steps:,} steps = {tokens * training.steps:,} tokens; lr {config.optimizer.lr:g}, "
        f"{schedule.warmup_steps} steps of warm-up, then {_decay(schedule)} to {schedule.min_lr_factor:.0%}",
        f"activation checkpointing: {_checkpointing(config.activation_checkpoint)}; "
        f"compile: {'+'.join(config.compile.components) if config.compile.enable else 'off'}; "
        f"MFU against {f'{peak / 1e12:,.0f} TFLOP/s ({device})' if peak else f'nothing: peak of {device!r} unknown'}",
        f"run folder: {config.job.dump_folder}; {_saving(config.checkpoint)}",
    ]
    return lines


def _decay(schedule) -> str:
    when = "" if schedule.decay_ratio is None else f" over the last {schedule.decay_ratio:.0%}"
    return f"{schedule.decay_type} decay{when}"


def _checkpointing(config) -> str:
    return f"selective ({config.selective_ac_option})" if config.mode == "selective" else config.mode


def _saving(config) -> str:
    if not config.enable:
        return "no checkpoints (checkpoint.enable = false): a run that stops starts over"
    mode = "" if config.async_mode == "disabled" else f", {config.async_mode}"
    kept = f"the newest {config.keep_latest_k} kept" if config.keep_latest_k else "all kept"
    return f"checkpoint every {config.interval:,} steps{mode}, {kept}"
