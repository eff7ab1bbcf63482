"""Training on sequences cut among GPUs (context parallelism) beside the same number of tokens that are not.

    torchrun --standalone --nproc-per-node 4 -m benchmarks.context_parallel                     32,768 tokens a GPU
    torchrun --standalone --nproc-per-node 4 -m benchmarks.context_parallel --tokens 524288     and one such sequence
    torchrun --standalone --nproc-per-node 2 -m benchmarks.context_parallel --tokens 131072 --rows long
    torchrun --standalone --nproc-per-node 2 -m benchmarks.context_parallel --device cpu        a toy, to see it run
    python -m benchmarks.context_parallel --operator [--device cpu]                             the operator alone

The model is that of train_configs/fineweb/deltaproduct_392M_n2_4k.toml, on random tokens: FSDP2 over all ranks,
bfloat16 with float32 gradients, compiled blocks, our clipping and AdamW, no data loading. Rows, each of a new model:

    apart       a sequence of --part tokens on each rank: no context parallelism
    together    one sequence of --part x ranks tokens, cut among them: the same tokens a rank and a step
    long        one sequence of --tokens, cut among all ranks

Overhead is the time of `together` over that of `apart`. A step's time is the slowest rank's, the median after those
that compile; memory is the largest rank's peak; the loss is that of the last step. Checkpointing keeps what is dear to
compute (op), or a block's input alone (full); by default op up to 65,536 tokens a rank.

--operator times forward and backward of the operator alone, in one process: of a whole sequence, and of a shard with
its maps and responses, gathered from one rank.
"""

import argparse
import gc
import os
import sys
import time
from functools import partial
from statistics import median

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.tables import columns
from benchmarks.training import TOY, our_model, step_of

WARM_UP = 3


def train(options: argparse.Namespace, length: int, over_ranks: bool) -> dict[str, float]:
    """Trains a new model and returns a row: seconds a step, peak GiB, loss, parameters.

    Args:
        options: of the command line.
        length: tokens of a sequence.
        over_ranks: whether there is one sequence, cut among the ranks, or one on each of them.
    """
    from torchtitan.distributed import ParallelDims

    from torchtitan_deltaproduct.config import load_config
    from torchtitan_deltaproduct.models import counts
    from torchtitan_deltaproduct.titan.feed import own_part
    from torchtitan_deltaproduct.titan.parallelize import lowered_weights, sequence_ranks
    from torchtitan_deltaproduct.titan.spec import ModelArgs

    cuda, world, rank = options.device == "cuda", dist.get_world_size(), dist.get_rank()
    own = length // world if over_ranks else length
    mode = options.checkpointing or ("op" if own <= 65536 else "full")
    config, args = load_config(config_arguments(options, mode)), ModelArgs()
    args.update_from_config(config)
    shard, context = (1, world) if over_ranks else (world, 1)
    dims = ParallelDims(dp_replicate=1, dp_shard=shard, cp=context, tp=1, pp=1, ep=1, etp=1, world_size=world)
    dims.build_mesh()
    model = our_model(config, args.architecture, options.device, dims)
    random = torch.Generator().manual_seed(0 if over_ranks else rank)
    tokens = torch.randint(args.architecture.vocab_size, (1, length), generator=random)
    inputs, labels = own_part(({"input": tokens}, tokens.roll(-1, 1)), sequence_ranks(dims))
    tokens, labels = inputs["input"].to(options.device), labels.to(options.device)
    step = step_of(model, lowered_weights(model, config), lambda: model(tokens, labels=labels) / (own * world))
    seconds = []
    for i in range(WARM_UP + options.steps):
        if cuda and i == WARM_UP:
            torch.cuda.reset_peak_memory_stats()
        dist.barrier()
        start = time.perf_counter()
        loss = step()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
    # The slowest rank's step, the largest rank's peak, and the sum of the losses.
    worst = torch.tensor([*seconds, peak], dtype=torch.float64, device=options.device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    dist.all_reduce(loss)
    *seconds, peak = worst.tolist()
    return {
        "tokens": own * world, "own": own, "checkpointing": mode, "seconds": median(seconds[WARM_UP:]),
        "first": seconds[0], "gib": peak, "loss": loss.item(),
        "flops": counts.training_flops_per_token(args.architecture),
    }  # fmt: skip


def operator(options: argparse.Namespace) -> Table:
    """Milliseconds of the operator on a whole sequence and as a shard; the best of some turns."""
    from benchmarks.op import best
    from torchtitan_deltaproduct.ops import SequenceRanks, gated_delta_product

    cuda = options.device == "cuda"
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    ranks = SequenceRanks(dist.group.WORLD.group_name, 0, 1)
    names = ("T x H x K", "n", "gate", "fwd", "shard", "ratio", "fwd+bwd", "shard", "ratio")
    table = Table(*columns(*names), title_justify="left")
    table.title = f"{torch.cuda.get_device_name() if cuda else 'CPU, one thread'}: ms"
    for length, heads, dim in [(options.part, 8, 128)] if cuda else [(1024, 4, 64), (1024, 8, 128)]:
        for n, gated in ((1, False), (2, False), (3, False), (2, True)):
            torch.manual_seed(0)
            unit = torch.nn.functional.normalize
            q, k, v = (torch.randn(1, rows, heads, dim, device=options.device) for rows in (length, *[length * n] * 2))
            q, k, v = (x.bfloat16() if cuda else x for x in (unit(q, dim=-1), unit(k, dim=-1), v))
            beta = 2 * torch.rand(1, length * n, heads, device=options.device)
            g = -0.2 * torch.rand(1, length, heads, device=options.device) if gated else None
            leaves = [x.requires_grad_() for x in (q, k, v, g, beta) if x is not None]
            do = torch.randn_like(q[..., :dim])

            def forward(over, q=q, k=k, v=v, g=g, beta=beta, n=n):
                return gated_delta_product(q, k, v, g, beta, n, unit_keys=True, ranks=over)[0]

            def both(over, forward=forward, leaves=leaves, do=do):
                torch.autograd.grad(forward(over), leaves, do)

            cells = []
            for function in (torch.no_grad()(forward), both):
                turns = [partial(function, over) for over in (None, ranks)]
                whole, shard = best(turns, options.steps + 1, options.device)
                cells += [f"{whole:.2f}", f"{shard:.2f}", f"{shard / whole:.2f}x"]
            table.add_row(f"{length} x {heads} x {dim}", str(n), "yes" if gated else "no", *cells)
    dist.destroy_process_group()
    return table


def config_arguments(options: argparse.Namespace, mode: str) -> list[str]:
    """Of `load_config`."""
    checkpointing = ["--activation_checkpoint.mode", {"op": "selective"}.get(mode, mode)]
    if mode == "op":
        checkpointing += ["--activation_checkpoint.selective_ac_option", "op"]
    cpu = options.device == "cpu"
    return ["--job.config_file", "train_configs/fineweb/deltaproduct_392M_n2_4k.toml", *checkpointing,
            f"--model.use_forget_gate={str(options.gated).lower()}",
            f"--training.mixed_precision_param={'float32' if cpu else 'bfloat16'}",
            *(["--compile.no-enable"] if options.eager else []),
            *(f"--model.{option}" for option in TOY if cpu)]  # fmt: skip


def table_of(rows: dict[str, dict], device: str, world: int) -> Table:
    """One line a row, and the overhead where there is something to compare with."""
    from torchtitan_deltaproduct.devices import peak_flops

    peak = peak_flops(device) * world
    names = ["row", "tokens a step", "a rank", "checkpointing", "s a step", "tok/s", "MFU", "GiB", "loss", "first s"]
    table = Table(*columns(*names, no_wrap=True), title=f"{world} x {device}", title_justify="left")
    for name, row in rows.items():
        if "failed" in row:
            table.add_row(name, f"{row['tokens']:,}", row["failed"])
            continue
        speed = row["tokens"] / row["seconds"]
        table.add_row(
            *(name, f"{row['tokens']:,}", f"{row['own']:,}", row["checkpointing"], f"{row['seconds']:.3f}"),
            *(f"{speed:,.0f}", f"{row['flops'] * speed / peak:.1%}" if peak else "-"),
            *(f"{row['gib']:.2f}" if row["gib"] else "-", f"{row['loss']:.4f}", f"{row['first']:.0f}"),
        )
    return table


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, help="of the sequence of row `long`; without it there is no such row")
    parser.add_argument("--part", type=int, help="tokens a rank of the other rows (32,768; on a CPU 128)")
    parser.add_argument("--rows", nargs="+", choices=("apart", "together", "long"), help="(default: all)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--checkpointing", choices=("none", "op", "full"), help="(default: by tokens a rank)")
    parser.add_argument("--gated", action="store_true", help="with a forget gate")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--operator", action="store_true", help="time the operator alone, in one process")
    parser.add_argument("--minutes", type=float, default=9, help="after which no row is begun")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    options = parser.parse_args(argv)
    options.part = options.part or (32768 if options.device == "cuda" else 128)
    options.rows = options.rows or ["apart", "together", *(["long"] if options.tokens else [])]
    if "long" in options.rows and not options.tokens:
        parser.error("row long needs --tokens")
    return options


def main() -> None:
    options, start = arguments(), time.monotonic()
    if options.operator:
        Console(width=120).print(operator(options))
        return
    if "WORLD_SIZE" not in os.environ:
        sys.exit("start it with torchrun: see python -m benchmarks.context_parallel --help")
    from torchtitan_deltaproduct.titan import device

    cuda = options.device == "cuda"
    device.install(options.device)
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    world = dist.get_world_size()
    name = torch.cuda.get_device_name() if cuda else "CPU"
    lengths = {"apart": options.part, "together": options.part * world, "long": options.tokens}
    rows, console = {}, Console(width=None if sys.stdout.isatty() else 140)
    for row in options.rows:
        late = torch.tensor(float(time.monotonic() - start > 60 * options.minutes), device=options.device)
        dist.all_reduce(late)
        if late.item():
            rows[row] = {"tokens": lengths[row], "failed": "not run: the time was over (--minutes)"}
            continue
        try:
            rows[row] = train(options, lengths[row], over_ranks=row != "apart")
        except torch.OutOfMemoryError as error:
            # The others wait in a collective: nothing can follow.
            print(f"rank {dist.get_rank()}: {row}, {lengths[row]:,} tokens: {str(error).splitlines()[0]}", flush=True)
            os._exit(1)
        gc.collect()
        if cuda:
            torch.cuda.empty_cache()
        if dist.get_rank() == 0:
            console.print(table_of({row: rows[row]}, name, world))
    if dist.get_rank() == 0:
        console.print(table_of(rows, name, world))
        if all("seconds" in rows.get(row, {}) for row in ("apart", "together")):
            overhead = rows["together"]["seconds"] / rows["apart"]["seconds"] - 1
            print(f"overhead of context parallelism at {options.part:,} tokens a rank: {overhead:.1%}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
