"""The lines a run prints before its first step: what was built, each derived number with what it derives from."""

import time

from ..checkpoint import CheckpointInfo
from ..config import Schedule
from ..devices import peak_flops
from ..events import last_stop
from ..formats import count
from ..models import counts


def describe(trainer) -> list[str]:
    """Lines on model, data, batch, schedule, memory savers and run folder of a `Trainer` before its first step."""
    config, dims = trainer.job_config, trainer.parallel_dims
    args = trainer.model_args.architecture
    ranks = dims.dp_replicate * dims.dp_shard
    training = config.training
    samples = training.samples_per_step(ranks)
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
        f"{trainer.gradient_accumulation_steps} accumulated x {ranks} rank{'s' if ranks > 1 else ''})"
        + (f", each sequence cut in {dims.cp} parts of {training.seq_len // dims.cp:,}" if dims.cp > 1 else ""),
        f"schedule: {training.steps:,} steps = {tokens * training.steps:,} tokens; lr {config.optimizer.lr:g}, "
        f"{_phases(Schedule.of(config.lr_scheduler, training.steps))}",
        f"activation checkpointing: {_checkpointing(config.activation_checkpoint)}; "
        f"compile: {'+'.join(config.compile.components) if config.compile.enable else 'off'}; "
        f"MFU against {f'{peak / 1e12:,.0f} TFLOP/s ({device})' if peak else f'nothing: peak of {device!r} unknown'}",
        f"run folder: {config.job.dump_folder}; {_saving(config.checkpoint)}",
    ]
    return lines


def resumed(
    info: CheckpointInfo, past: list[dict], ranks: int, step: int, steps: int, tokens: int, now: float | None = None
) -> str:
    """The line at a restart: from what, why the run had stopped, and where in the data it is.

    `resumed step 12,000 of 66,758 (saved 14:02 on SIGUSR1, 16 -> 8 ranks); data at token 6.29 B`
    """
    saved, today = time.localtime(info.marker.time), time.localtime(now)
    when = time.strftime("%H:%M" if saved[:3] == today[:3] else "%Y-%m-%d %H:%M", saved)
    reason = info.marker.reason
    on = f"on {reason}" if reason.startswith("SIG") or reason == "walltime" else f"by {reason}"
    parts = [f"saved {when} {on}"]
    if info.marker.ranks != ranks:
        parts.append(f"{info.marker.ranks} -> {ranks} ranks")
    launched = any(event["event"] == "launch" for event in past)
    stop = last_stop(past)
    if stop is None:
        parts += ["the last launch was killed"] if launched else []
    elif stop["reason"] in ("failed", "machine", "hung", "lost_peer"):
        how = {"lost_peer": "lost a rank", "machine": "was failed by its machine"}.get(stop["reason"], stop["reason"])
        parts.append(f"the last launch {how}: {stop['detail']}")
    return f"resumed step {step:,} of {steps:,} ({', '.join(parts)}); data at token {count(tokens)}"


def _phases(schedule: Schedule) -> str:
    """`warm-up to step 512, stable to step 32,001, sqrt decay to 10% at step 36,240`."""
    words = {
        "warm-up": "warm-up to",
        "stable": "stable to",
        "decay": f"{schedule.decay_type} decay to {schedule.min_lr_factor:.0%} at",
    }
    return ", ".join(f"{words[name]} step {end:,}" for name, (_, end) in schedule.phases().items())


def _checkpointing(config) -> str:
    return f"selective ({config.selective_ac_option})" if config.mode == "selective" else config.mode


def _saving(config) -> str:
    if not config.enable:
        return "no checkpoints (checkpoint.enable = false): a run that stops starts over"
    mode = "" if config.async_mode == "disabled" else f", {config.async_mode}"
    kept = f"the newest {config.keep_latest_k} kept" if config.keep_latest_k else "all kept"
    kept += f", and every {config.keep_every:,}th step" if config.keep_every and config.keep_latest_k else ""
    kept += f", and the best {config.keep_best} by validation" if config.keep_best and config.keep_latest_k else ""
    return f"checkpoint every {config.interval:,} steps{mode}, {kept}"
