"""What a TOML will do: parameters, FLOPs, data and its epochs, memory, disk, learning rates. Needs no GPU.

    python -m torchtitan_deltaproduct.plan x.toml --world-size 8 [--section.key value ...]
    python -m torchtitan_deltaproduct.plan x.toml --world-size 8 --mfu 0.4 --device H100

`--tokens-per-second N` (all ranks together), or `--mfu F` with `--device NAME` or `metrics.peak_flops`, adds
the duration of the run. What is wrong with the data is said, with exit code 1, and the rest is printed all the same: it
may lie where only the nodes see it. The memory of a rank is compared with that of `--device`, or with `--device-memory
GB`. For more than one rank a prediction of the step follows (docs/scaling.md).
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .arguments import Parser
from .checkpoint import retention
from .config import Environment, JobConfig, load_config
from .config.schedule import Schedule
from .config.schema import schema
from .config.values import shorten, show
from .data.planned import UNUSABLE, Rows, data_rows
from .devices import DEVICES, memory_gb, peak_flops
from .errors import ConfigError, exit_on_user_error, nearest
from .formats import amount, duration, sparkline
from .memory import (
    accumulates,
    activation_width,
    activations_by_checkpointing,
    checkpoint_bytes,
    exchange_bytes,
    final_checkpoint_bytes,
    largest_local_batch,
    longest_sequence,
    on_kernels,
    rank_memory,
    reshard_after_forward,
    shard_degree,
)
from .models import counts
from .optimizers import OPTIMIZERS, orthogonalization_flops
from .options import value_of
from .scaling import GOOD, MEASURED_DEVICE, Inputs, advised, measured_mfu, predict, smallest_tokens

DEVICE_MEMORY = 80.0
"""GB of a device where none is named."""
SPARE = 1.2
"""Share of the counted memory that a device needs: the operator's work space, fragmentation, communication buffers."""


def main(argv: list[str] | None = None) -> int:
    options, overrides = _parse(sys.argv[1:] if argv is None else argv)
    arguments = ["--job.config_file", options.toml, *overrides]
    world_size = options.world_size
    if world_size is None:
        world_size = _ranks_asked_for(load_config(arguments, Environment()))
    config = load_config(arguments, Environment(world_size=world_size))
    seconds = _duration(config, world_size, options)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(f"[bold]{options.toml}[/] on {world_size} rank{'s' * (world_size > 1)}", soft_wrap=True)
    if config.job.description:
        console.print(escape(config.job.description), soft_wrap=True)
    device_memory = options.device_memory or memory_gb(options.device or "") or DEVICE_MEMORY
    unusable = False
    for title, rows in sections(config, world_size, seconds, device_memory, options.device):
        console.print(f"\n[bold]{title}[/]")
        console.print(_table(rows))
        unusable |= any(text.startswith(UNUSABLE) for row in rows for text in row)
    return int(unusable)


def sections(
    config: JobConfig,
    world_size: int,
    seconds: float | None = None,
    device_memory: float = DEVICE_MEMORY,
    device: str | None = None,
) -> Iterator[tuple[str, Rows]]:
    """The parts of the plan: a title, and rows of text whose first column is a name.

    Args:
        config: the job.
        world_size: its ranks.
        seconds: how long it takes; None: not known.
        device_memory: of a device in GB, as it is sold: 80 for an H100.
        device: its name in `devices`; None: predictions are for the one that was measured.
    """
    yield f"Model: {describe_model(config)}", model_rows(config)
    yield "Compute", compute_rows(config, world_size, seconds)
    yield "Data", data_rows(config, world_size)
    kind = {2: "bfloat16", 4: "float32"}[activation_width(config)]
    yield f"Memory of a rank (estimate, {kind} activations)", memory_rows(config, world_size, device_memory)
    if config.parallelism.context_parallel_degree > 1:
        yield "Context parallelism", context_rows(config, world_size, device_memory)
    if world_size > 1:
        name = device or MEASURED_DEVICE
        title = f"Speed on {name}, a prediction (docs/scaling.md)"
        yield title, scaling_rows(config, world_size, name, device_memory)
    yield "Checkpoints on disk", checkpoint_rows(config)
    yield f"Learning rate  {sparkline(lr_curve(config), low=0.0)}", schedule_rows(config)
    yield "Values that are not defaults", provenance_rows(config)


def describe_model(config: JobConfig) -> str:
    """DeltaProduct, n_h = 2, eigenvalues in [-1, 1], ... in one line."""
    args = config.model
    name = "DeltaNet" if args.num_householder == 1 else "DeltaProduct"
    heads = f"{args.num_heads} heads of {args.head_dim} x {args.head_v_dim}"
    label = f"{args.flavor}, " if args.flavor else ""
    return (
        f"{label}{'Gated ' * args.use_forget_gate}{name}, n_h = {args.num_householder}, "
        f"eigenvalues in [{'-1' if args.allow_neg_eigval else '0'}, 1]; "
        f"{args.num_hidden_layers} layers, width {args.hidden_size}, {heads}, MLP {args.mlp_size}"
    )


def model_rows(config: JobConfig) -> Rows:
    parts, total = counts.parameters_by_part(config.model), counts.total_parameters(config.model)
    rows = [(part, f"{count:,}", f"{count / total:.1%}") for part, count in parts.items() if count]
    return [*rows, ("parameters", f"{total:,}", amount(total, ""))]


def compute_rows(config: JobConfig, world_size: int, seconds: float | None) -> Rows:
    training = config.training
    readers = config.data_ranks(world_size)
    sequences = training.samples_per_step(readers)
    micro_batches = sequences // (training.local_batch_size * readers)
    cut = f", cut among {world_size // readers} ranks each" if readers < world_size else ""
    tokens = sequences * training.seq_len
    flops = counts.training_flops_per_token(config.model)
    rows = [
        ("FLOPs per token", amount(flops, "FLOP"),
         f"forward {amount(counts.forward_flops_per_token(config.model), 'FLOP')}, backward twice that"),
        ("batch", f"{sequences:,} sequences",
         f"{training.local_batch_size} local x {micro_batches} accumulated x {readers} ranks{cut}"),
        ("tokens per step", f"{tokens:,}", f"{training.seq_len:,} a sequence"),
        ("tokens in total", f"{tokens * training.steps:,}",
         f"{training.steps:,} steps, {tokens * training.steps / counts.total_parameters(config.model):.1f} "
         "tokens a parameter"),
        ("FLOPs in total", amount(flops * tokens * training.steps, "FLOP"), ""),
    ]  # fmt: skip
    if OPTIMIZERS[config.optimizer.name].hidden:
        rows.append(orthogonalization_row(config, world_size, flops * tokens))
    if seconds is not None:
        rows.append(("time", duration(seconds), f"{tokens * training.steps / seconds:,.0f} tokens/s"))
    return rows


def memory_rows(config: JobConfig, world_size: int, device_memory: float) -> Rows:
    parts = counts.parameters_by_part(config.model)
    memory = rank_memory(config, world_size, parts)
    ac, shards = config.activation_checkpoint, shard_degree(config, world_size)
    reshard, reason = reshard_after_forward(config, shards, sum(parts.values()))
    mode = f"{ac.mode} {ac.selective_ac_option}" if ac.mode == "selective" else ac.mode
    offload = "; on the host" if config.training.enable_cpu_offload else ""
    remarks = {
        "weights": f"float32, 1/{shards} of them{offload}",
        "gradients": "float32, all of them: reduced with the last micro-batch"
        if accumulates(config, world_size)
        else f"float32, 1/{shards} of them{offload}",
        "optimizer state": f"{config.optimizer.name}, {moments(config)}{offload}",
        "gathered weights": f"unsharded for use: {'embedding, head, two blocks' if reshard else 'all'} ({reason})",
        "activations": f"checkpointing {mode}; "
        + ("compiled, on our kernels" if on_kernels(config) else "as if eager; torch.compile keeps less"),
        "loss": "logits of a chunk of tokens, gradients of the head and its input",
    }
    rows = [(name, amount(size, "B"), remarks[name]) for name, size in memory.items() if size]
    kinds = activations_by_checkpointing(config, world_size, parts)
    others = ", ".join(f"{name} {amount(size, 'B')}" for name, size in kinds.items())
    rows.insert([name for name, *_ in rows].index("activations") + 1, ("", "", f"by checkpointing: {others}"))
    needed = SPARE * sum(memory.values())
    # Memory of devices is sold in powers of two, and the driver keeps a part for itself.
    room = 0.99 * device_memory * 2**30
    verdict = "fits" if needed <= room else "does not fit"
    return [
        *rows,
        ("sum", amount(sum(memory.values()), "B"), f"and 20 % for work space: {amount(needed, 'B')}"),
        (f"{verdict} {device_memory:g} GB", f"{needed / room:.0%}", "of what a device has for it"),
        _largest_batch_row(config, world_size, parts, room / SPARE),
    ]


def _largest_batch_row(config: JobConfig, world_size: int, parts: dict[str, int], room: float) -> tuple[str, ...]:
    largest, training = largest_local_batch(config, world_size, parts, room), config.training
    if not largest:
        one = replace(config, training=replace(training, local_batch_size=1))
        memory = rank_memory(one, world_size, parts)
        most = max(memory, key=memory.__getitem__)
        whole, part = amount(SPARE * sum(memory.values()), "B"), amount(memory[most], "B")
        return "largest that fits", "none", f"one sequence needs {whole}, the most of it {most} ({part})"
    remark = f"training.local_batch_size; it is {training.local_batch_size:,}"
    if training.global_batch_size > 0:
        share = training.global_batch_size // config.data_ranks(world_size)
        remark += f"; must divide {share:,}, a rank's share of the global batch"
    return "largest that fits", f"{largest:,} sequence{'s' * (largest > 1)}", remark


def scaling_rows(config: JobConfig, world_size: int, device: str, device_memory: float) -> Rows:
    """What a step takes with the layout of the config, which shard degree is advised, and how few tokens are enough."""
    inputs = Inputs.of(config, world_size, peak_flops(device))
    own, context = shard_degree(config, world_size), config.parallelism.context_parallel_degree
    parts, room = counts.parameters_by_part(config.model), 0.99 * device_memory * 2**30 / SPARE

    def needed(shards: int) -> int:
        layout = replace(config.parallelism, data_parallel_shard_degree=shards // context)
        other = replace(config, parallelism=layout)
        return sum(rank_memory(other, world_size, parts).values())

    degrees = [s for s in range(context, world_size + 1, context) if world_size % s == 0]
    best = advised(inputs, [s for s in degrees if needed(s) <= room] or degrees)

    def row(name: str, shards: int, more: str = "") -> tuple[str, ...]:
        step = predict(inputs, shards)
        remark = f"step {step.seconds:.3g} s, {step.efficiency:.1%} efficient, padding {step.padding:.1%}"
        return name, f"{shards} shards x {world_size // shards}", remark + more

    rows = [row("as configured", own)]
    if best != own:
        degrees = best // context, world_size // best
        rows.append(row("advised", best, f": data_parallel_shard_degree = {degrees[0]}, replicate {degrees[1]}"))
    own_step = predict(inputs, own)
    tokens = config.training.samples_per_step(config.data_ranks(world_size)) * config.training.seq_len
    used = own_step.efficiency * measured_mfu(config.model)
    whole = own_step.seconds * config.training.steps
    return [
        *rows,
        ("speed", f"{tokens / own_step.seconds:,.0f} tokens/s", f"as configured, MFU {used:.1%}"),
        ("whole run", duration(whole), f"{whole * world_size / 3600:,.0f} GPU-hours, without validation and saves"),
        ("smallest batch", f"{smallest_tokens(inputs, best):,} tokens",
         f"a GPU and micro-batch, for {GOOD:.0%} efficiency with {best} shards"),
    ]  # fmt: skip


def context_rows(config: JobConfig, world_size: int, device_memory: float) -> Rows:
    """What the ranks that share a sequence send one another, what they keep, and how long a sequence can be."""
    ranks, layers = config.parallelism.context_parallel_degree, config.model.num_hidden_layers
    sent = exchange_bytes(config)
    parts, room = counts.parameters_by_part(config.model), 0.99 * device_memory * 2**30 / SPARE
    longest = longest_sequence(config, world_size, parts, room, 1024 * ranks)
    return [
        ("tokens a rank", f"{config.training.seq_len // ranks:,}", f"of {config.training.seq_len:,}, on {ranks} ranks"),
        *((name, amount(size, "B"), "a layer to each rank, however long the sequence") for name, size in sent.items()),
        ("maps kept", amount(ranks * layers * sent["map, forward"], "B"), "of all ranks and layers, until backward"),
        ("longest sequence", f"{longest:,}" if longest else "none", f"tokens that fit {device_memory:g} GB (estimate)"),
    ]


def moments(config: JobConfig) -> str:
    kind = OPTIMIZERS[config.optimizer.name]
    words = {1: "one moment", 2: "two moments"}
    text = words.get(kind.moments, f"{kind.moments} moments")
    return f"{words[kind.hidden.moments]} of hidden matrices, {text} of the rest" if kind.hidden else text


def orthogonalization_row(config: JobConfig, world_size: int, step_flops: float) -> tuple[str, ...]:
    """What Muon computes in a step, beside forward and backward."""
    matrices = counts.hidden_matrices(config.model).values()
    layer = sum(count * orthogonalization_flops(rows, columns) for count, rows, columns in matrices)
    flops, shards = config.model.num_hidden_layers * layer, shard_degree(config, world_size)
    share = f"{flops / step_flops:.1%} of the FLOPs of a step"
    if shards > 1:
        # Replicas do it side by side, and one of s ranks takes its share of the matrices.
        replicas = world_size // shards
        share = f"{flops * replicas / step_flops:.1%} of the FLOPs of a step, each matrix on one of {shards} ranks"
    return "orthogonalisation", amount(flops, "FLOP"), share


def checkpoint_rows(config: JobConfig) -> Rows:
    checkpoint, size = config.checkpoint, checkpoint_bytes(config)
    if not checkpoint.enable:
        return [("checkpoints", "none", "checkpoint.enable = false: a run that stops is lost")]
    steps, reasons = saved_steps(config), kept_steps(config).values()
    kept, milestones = len(reasons), sum(reason.startswith("milestone") for reason in reasons)
    # Which they are only validation can tell: this is the most.
    best = min(checkpoint.keep_best, len(steps) - kept)
    kept += best
    last = ", the last of all weights only: it cannot be continued" if checkpoint.last_save_model_only else ""
    of_them = f", {milestones} of them milestones, every {checkpoint.keep_every:,} steps" if milestones else ""
    return [
        ("one", amount(size, "B"), f"weights and {moments(config)} in float32"),
        ("written", f"{len(steps)}", f"every {checkpoint.interval} steps and at the end{last}"),
        ("kept", f"{kept}", f"{amount(kept * size, 'B')}{of_them}{', the best by validation among them' * (best > 0)}"),
        ("largest at once", amount(min(kept + 1, len(steps)) * size, "B"), "with the one being written"),
        ("at the end", amount((kept - 1) * size + final_checkpoint_bytes(config), "B"), ""),
    ]


def saved_steps(config: JobConfig) -> list[int]:
    """The steps that a run which nothing stops saves."""
    checkpoint, last = config.checkpoint, config.training.steps
    first = {1} if checkpoint.enable_first_step_checkpoint else set()
    return sorted({*range(checkpoint.interval, last + 1, checkpoint.interval), last} | first)


def kept_steps(config: JobConfig) -> dict[int, str]:
    """Those that are there at its end, and why."""
    return retention(saved_steps(config), config.checkpoint.keep_latest_k, config.checkpoint.keep_every)


def schedule_rows(config: JobConfig) -> Rows:
    """The phases of the schedule in words, the steps where it turns, and from where a stable phase can be branched."""
    steps, peak = config.training.steps, config.optimizer.lr
    schedule = Schedule.of(config.lr_scheduler, steps)
    rates = [peak * factor for factor in lr_curve(config)]
    begin = schedule.total_steps - schedule.decay_steps
    phases = schedule.phases()
    words = {
        "warm-up": f"rises to {peak:.3g}, linearly",
        "stable": f"stays at {peak:.3g}",
        "decay": f"falls to {peak * schedule.min_lr_factor:.3g}, {schedule.decay_type}",
    }
    rows = [
        (name, f"steps {first:,} to {last:,}", words[name] + f", beyond the last step, {steps:,}" * (last > steps))
        for name, (first, last) in phases.items()
    ]
    marks = {
        1: "first step",
        schedule.warmup_steps: "end of the warm-up",
        begin + 1: f"last step at the peak, {schedule.decay_type} decay follows",
        (begin + steps) // 2: "middle of the decay",
        steps: "last step",
    }
    reached = sorted(step for step in marks if 1 <= step <= steps)
    rows += [(f"step {step:,}", f"{rates[step - 1]:.3g}", marks[step]) for step in reached]
    return rows + (_branch_rows(config, schedule) if {"stable", "decay"} <= phases.keys() else [])


def _branch_rows(config: JobConfig, schedule: Schedule) -> Rows:
    """The newest checkpoint from which the stable phase can be extended once the run is over."""
    every, last = config.checkpoint.interval, min(schedule.last_at_peak, config.training.steps)
    if not config.checkpoint.enable or last < every:
        return [("branch from", "none", f"no checkpoint is saved up to step {last:,}")]
    kept = [step for step in saved_steps(config) if step <= last and step in kept_steps(config)]
    newest = last // every * every
    if kept and kept[-1] == newest:
        return [("branch from", f"step {newest:,}", "the last checkpoint before the decay, kept to the end")]
    way = f"the last checkpoint before the decay is step {newest:,}: checkpoint.keep_every keeps such ones"
    return [("branch from", f"step {kept[-1]:,}" if kept else "none at the end", way)]


def lr_curve(config: JobConfig) -> list[float]:
    """The factor of every step of the run."""
    schedule = Schedule.of(config.lr_scheduler, config.training.steps)
    return [schedule(step) for step in range(config.training.steps)]


def provenance_rows(config: JobConfig) -> Rows:
    """Each value that is not its default: where it was given, and the default."""
    rows = []
    for key, option in schema().items():
        value = value_of(config, key)
        if value != option.default and key != "job.config_file":
            source = config.provenance.get(key, "").replace(f"{config.job.config_file}:", "line ")
            rows.append((key, shorten(show(value), 48), f"{source}; default {show(option.default)}"))
    return rows or [("none", "", "")]


def _duration(config: JobConfig, world_size: int, options: argparse.Namespace) -> float | None:
    training = config.training
    tokens = training.samples_per_step(config.data_ranks(world_size)) * training.seq_len * training.steps
    if options.tokens_per_second:
        return tokens / options.tokens_per_second
    if not options.mfu:
        return None
    peak = config.metrics.peak_flops or peak_flops(options.device or "")
    if not peak:
        raise ConfigError(f"--mfu needs --device or metrics.peak_flops; --device is one of {', '.join(DEVICES)}")
    return tokens * counts.training_flops_per_token(config.model) / (options.mfu * peak * world_size)


def _ranks_asked_for(config: JobConfig) -> int:
    """The smallest job the degrees of the TOML describe."""
    parallelism = config.parallelism
    degrees = parallelism.data_parallel_replicate_degree, max(1, parallelism.data_parallel_shard_degree)
    return degrees[0] * degrees[1] * parallelism.context_parallel_degree


def _table(rows: Rows) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(justify="left", overflow="fold")
    table.add_column(style="dim", overflow="fold")
    for name, *rest in rows:
        table.add_row(f"  {name}", *map(escape, rest))
    return table


class _Parser(Parser):
    def error(self, message: str) -> None:
        raise ConfigError(f"{message}\n{self.format_usage().strip()}")


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and the rest: overrides."""
    parser = _Parser("torchtitan_deltaproduct.plan", __doc__, in_full=True, allow_abbrev=False,
                     usage="%(prog)s X.toml [options] [--section.key value ...]")  # fmt: skip
    parser.add_argument("--world-size", type=int, help="ranks; default: the product of the degrees")
    parser.add_argument("--tokens-per-second", type=float, help="measured speed of all ranks together")
    parser.add_argument("--mfu", type=float, help="assumed share of the peak FLOP/s, for example 0.4")
    parser.add_argument("--device", help=f"one of {', '.join(DEVICES)}")
    parser.add_argument("--device-memory", type=float, metavar="GB", help=f"default: --device's, or {DEVICE_MEMORY:g}")
    # The file comes first: argparse could not tell it from the value of an override.
    toml, rest = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    options, overrides = parser.parse_with_overrides(rest)
    if toml is None:
        parser.error("the job's TOML file comes first")
    for name in ("world_size", "tokens_per_second", "mfu", "device_memory"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be positive")
    if options.device and not peak_flops(options.device):
        near = nearest(options.device.upper(), DEVICES)
        known = f"nearest: {near}" if near else f"known: {', '.join(DEVICES)}"
        raise ConfigError(f"--device {options.device}: {known}")
    options.toml = toml
    return options, overrides


if __name__ == "__main__":
    exit_on_user_error(main)
