"""Our model and flash-linear-attention's in the same bare training loop on one GPU: speed, memory, where time goes.

    python -m benchmarks.training                                   392M and 805M, n_h 1 to 3, plain and gated
    python -m benchmarks.training --sizes 392M --householders 3 --gates plain --models ours ours-lean fla fla-compiled
    python -m benchmarks.training --minutes 30 --steps 30
    python -m benchmarks.training --sizes 392M --householders 3 --gates plain --models ours --ranks 1 4
    python -m benchmarks.training --device cpu --householders 1     a toy of ours, to see that this script runs

Shapes are those of train_configs/fineweb/deltaproduct_{size}_n{n}_4k.toml. Every row is a job of its own, one after the
other: on one GPU without sharding (`titan.lowered`), on several with FSDP2, bfloat16 with float32 gradients, random
tokens, our clipping and AdamW for both, no data loading. `ours` is our model with our `parallelize`, compiled, and
keeps all activations; `ours-graph` is the same with its forward and backward in one CUDA graph, `ours-lean` with
activation_checkpoint.selective_ac_option = "products". `fla` is GatedDeltaProductForCausalLM in eager mode
with its fused cross-entropy, `fla-linear` with its fused linear cross-entropy, `fla-compiled` is `fla`, its layers
compiled. Steps are timed by events on the device, and the median is taken after those that compile and tune. Tokens/s
are of one GPU. A row that fails, or that the time no longer allows, says why. Milliseconds of a step by kind of kernel
are the profiler's.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median

from rich.console import Console
from rich.table import Table

from benchmarks.tables import columns

SIZES = ("392M", "805M")
MODELS = ("ours", "ours-graph", "ours-lean", "fla", "fla-linear", "fla-compiled")
WARM_UP = 4
"""Steps that are not counted: they compile, tune, and make the optimizer's state."""
KINDS = {
    "copy": ("memcpy", "memset", "nccl", "copy_kernel", "aten::copy_", "catarray", "chunk_cat", "split_with_sizes"),
    "matmul": ("nvjet", "gemm", "cutlass", "cublas", "xmma", "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"),
    "conv": ("conv",),
    "loss": ("cross_entropy", "logsumexp", "softmax", "nll_loss", "amax"),
    "optimizer": ("adam", "multi_tensor", "_foreach"),
    "elementwise": ("triton_", "norm_fwd", "norm_bwd", "norm_gated", "swiglu", "elementwise", "aten::"),
    "operator": ("chunk", "delta", "kkt", "cumsum", "l2norm", "recompute_w", "solve", "wy_", "local_kernel",
                 "prepare_kernel", "forward_kernel", "backward_kernel", "combine_kernel"),
}  # fmt: skip
"""Kind of kernel -> parts of kernels' names; the first that matches counts, and "other" is what none does."""
TOY = ["hidden_size=32", "num_hidden_layers=2", "num_heads=2", "head_dim=16", "intermediate_size=64", "vocab_size=320"]


@dataclass(frozen=True)
class Variant:
    """One row; `batch` sequences of `length` tokens a step, `steps` of them timed."""

    model: str
    size: str
    num_householder: int
    gated: bool
    device: str
    batch: int
    length: int
    steps: int
    ranks: int

    @property
    def config_arguments(self) -> list[str]:
        """Of `load_config`, for this shape."""
        toy, size = self.size == "toy", SIZES[0] if self.size == "toy" else self.size
        path = f"train_configs/fineweb/deltaproduct_{size}_n{self.num_householder}_4k.toml"
        dtype = "bfloat16" if self.device == "cuda" else "float32"
        settings = [f"model.use_forget_gate={str(self.gated).lower()}", f"training.mixed_precision_param={dtype}"]
        lean = self.model == "ours-lean"
        settings += [f"activation_checkpoint.mode={'selective' if lean else 'none'}"]
        settings += ["activation_checkpoint.selective_ac_option=products"] * lean
        settings += [f"model.{option}" for option in TOY if toy]
        return ["--job.config_file", path, *(f"--{setting}" for setting in settings)]


class HostMark:
    """A CUDA event's part, on the host's clock."""

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, later: "HostMark") -> float:
        """Milliseconds."""
        return 1e3 * (later.seconds - self.seconds)


def kind_of(kernel: str) -> str:
    """`triton_red_fused_mul_0` -> `elementwise`."""
    name = kernel.lower()
    # An operator's own names first where another kind's would match them, too: `chunk_local_cumsum_...`, `l2norm_fwd`.
    if "l2norm" in name:
        return "operator"
    return next((kind for kind, words in KINDS.items() if any(word in name for word in words)), "other")


def our_model(config, architecture, device: str, dims):
    """With its first weights, cut among the ranks as the `ParallelDims` say."""
    import torch

    from torchtitan_deltaproduct.models import DeltaProductLM
    from torchtitan_deltaproduct.titan.parallelize import parallelize

    with torch.device("meta"):
        model = DeltaProductLM(architecture)
    model = parallelize(model, dims, config)
    model.to_empty(device=device)
    with torch.no_grad():
        model.init_weights()
    return model


def step_of(model, weights, loss_of_step: Callable, graph: bool = False) -> Callable:
    """A function that does a step, with our clipping and AdamW, and returns its loss."""
    from torchtitan_deltaproduct.optimizers import AdamW, clip_gradients
    from torchtitan_deltaproduct.titan.captured import CapturedStep

    optimizer = AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), fused=True)

    def forward_backward():
        loss = loss_of_step()
        loss.backward()
        weights.collect()
        return loss.detach()

    captured = CapturedStep(forward_backward, model.parameters()) if graph else None

    def step():
        (captured or optimizer).zero_grad()
        with weights:
            loss = (captured or forward_backward)()
        clip_gradients(model.parameters(), 1.0)
        optimizer.step()
        return loss

    return step


def fla_model(which: str, architecture, device: str, tokens) -> tuple:
    """(model, a function that returns the loss of a step); which: of `MODELS`."""
    import torch
    import torch.distributed as dist
    from fla.models import GatedDeltaProductConfig, GatedDeltaProductForCausalLM
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from torchtitan_deltaproduct.models.hf_names import to_hf_config

    linear = which == "fla-linear"
    fields = to_hf_config(architecture) | {"fuse_cross_entropy": not linear, "fuse_linear_cross_entropy": linear}
    model = GatedDeltaProductForCausalLM(GatedDeltaProductConfig(**fields | {"use_cache": False})).to(device)
    if which == "fla-compiled":
        for layer in model.model.layers:
            layer.compile()
    if dist.get_world_size() > 1:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        for layer in model.model.layers:
            fully_shard(layer, mp_policy=policy, reshard_after_forward=False)
        fully_shard(model, mp_policy=policy)
    # It shifts the labels itself.
    return model, lambda: model(input_ids=tokens, labels=tokens).loss


def measure(variant: Variant) -> dict:
    """Trains in this process, and returns the row: tokens/s, MFU, peak GiB, last loss, milliseconds by kind."""
    import torch
    import torch.distributed as dist
    from torchtitan.distributed import ParallelDims

    from torchtitan_deltaproduct.config import load_config
    from torchtitan_deltaproduct.models import counts
    from torchtitan_deltaproduct.titan import device
    from torchtitan_deltaproduct.titan.lowered import LoweredWeights
    from torchtitan_deltaproduct.titan.parallelize import lowered_weights
    from torchtitan_deltaproduct.titan.spec import ModelArgs

    cuda, alone = variant.device == "cuda", {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    os.environ |= alone if variant.ranks == 1 else {}
    device.install(variant.device)
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if variant.ranks == 1 else {}
    dist.init_process_group("nccl" if cuda else "gloo", **store)
    config, args = load_config(variant.config_arguments), ModelArgs()
    args.update_from_config(config)
    torch.manual_seed(dist.get_rank())
    tokens = torch.randint(args.architecture.vocab_size, (variant.batch, variant.length), device=variant.device)
    if variant.model.startswith("ours"):
        ranks, labels = variant.ranks, tokens.roll(-1, 1)
        dims = ParallelDims(dp_replicate=1, dp_shard=ranks, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=ranks)
        model = our_model(config, args.architecture, variant.device, dims)
        weights = lowered_weights(model, config)

        def loss_of_step():
            return model(tokens, labels=labels) / labels.numel()

    else:
        model, loss_of_step = fla_model(variant.model, args.architecture, variant.device, tokens)
        weights = LoweredWeights(model, torch.float32 if variant.ranks > 1 else torch.bfloat16)
    step = step_of(model, weights, loss_of_step, variant.model == "ours-graph")
    wait = torch.cuda.synchronize if cuda else lambda: None
    start = time.perf_counter()
    for i in range(WARM_UP):
        step()
        wait()
        if i == 0:
            first = time.perf_counter() - start
    if cuda and variant.model != "ours-graph":
        # What a graph needs it has taken for good when it was captured, among the steps that are not counted.
        torch.cuda.reset_peak_memory_stats()
    # Marks on the device's own clock: the host waits for no step, as in a loop that logs every so often.
    marks = [torch.cuda.Event(enable_timing=True) if cuda else HostMark() for _ in range(variant.steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        loss = step()
        mark.record()
    wait()
    seconds = [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]
    speed = variant.batch * variant.length / median(seconds)
    name = torch.cuda.get_device_name() if cuda else "CPU"
    peak = device.peak_flops(name)
    row = {
        "device": name,
        "tokens_per_second": speed,
        "mfu": counts.training_flops_per_token(args.architecture) * speed / peak if peak else None,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "first_step_seconds": first,
        "loss": loss.item(),
        "kernels": profile(step, wait, cuda),
    }
    dist.destroy_process_group()
    return row


def profile(step: Callable, wait: Callable, cuda: bool, steps: int = 2) -> dict[str, float]:
    """Milliseconds of a step by kind of kernel, of the device's own time."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
        for _ in range(steps):
            step()
        wait()
    kernels = {}
    for event in found.key_averages():
        # Ranges that someone named (a step of the optimizer, a gather of FSDP) have the time of what is inside.
        if cuda and (event.device_type != DeviceType.CUDA or event.is_user_annotation):
            continue
        microseconds = event.self_device_time_total if cuda else event.self_cpu_time_total
        kind = kind_of(event.key)
        kernels[kind] = kernels.get(kind, 0.0) + microseconds / 1e3 / steps
    return kernels


def variants(options: argparse.Namespace) -> Iterator[Variant]:
    """The rows in the order they are run: what matters most comes first, and each of ours beside fla's."""
    sizes = ["toy"] if options.device == "cpu" else options.sizes
    models = ["ours"] if options.device == "cpu" else options.models
    for size in sizes:
        for gate in options.gates:
            for n in options.householders:
                for model in models:
                    for ranks in options.ranks:
                        shape = (options.device, options.batch, options.length, options.steps, ranks)
                        yield Variant(model, size, n, gate == "gated", *shape)


def run(variant: Variant, seconds: float) -> dict:
    """The row of `variant`, measured in a process that has so many seconds; `failed` says why there is none."""
    if seconds < 1:
        return {"failed": "not run: the time was over (--minutes)"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={variant.ranks}"]
    command = [sys.executable, *(torchrun if variant.ranks > 1 else []), "-m", "benchmarks.training"]
    command += ["--row", json.dumps(asdict(variant))]
    # What Triton found by tuning one of fla's rows serves the next.
    environment = os.environ | {"TRITON_CACHE_AUTOTUNING": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, env=environment)
    except subprocess.TimeoutExpired:
        return {"failed": "stopped: the time was over (--minutes)"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        errors = [line for line in done.stderr.splitlines() if "Error: " in line] or done.stderr.split("\n")[:-1]
        return {"failed": errors[-1] if errors else f"exit code {done.returncode}"}
    return json.loads(lines[-1])


def table_of(rows: list[tuple[Variant, dict]]) -> Table:
    """One line a row; the ratio is to the `fla` row of the same shape."""
    device = next((row["device"] for _, row in rows if "device" in row), "no row")
    kinds = [*KINDS, "other"]
    shape = f"batch {rows[0][0].batch} x {rows[0][0].length:,} a GPU" if rows else ""
    names = ("size", "n_h", "gate", "model", "GPUs", "tok/s", "/ fla", "MFU", "GiB", "GiB / fla", "first s")
    table = Table(*columns(*names, *kinds, no_wrap=True), title_justify="left")
    table.title = f"{device}, {shape}; ms of a step by kind of kernel"
    beside = {(v.size, v.num_householder, v.gated): row for v, row in rows if v.model == "fla" and "failed" not in row}
    for variant, row in rows:
        gate = "yes" if variant.gated else "no"
        named = [variant.size, str(variant.num_householder), gate, variant.model, str(variant.ranks)]
        if "failed" in row:
            table.add_row(*named, "-")
            continue
        fla = beside.get((variant.size, variant.num_householder, variant.gated), {})
        table.add_row(
            *named,
            f"{row['tokens_per_second']:,.0f}",
            ratio(row, fla, "tokens_per_second"),
            "-" if row["mfu"] is None else f"{row['mfu']:.1%}",
            "-" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}",
            ratio(row, fla, "peak_gib"),
            f"{row['first_step_seconds']:.0f}",
            *(f"{row['kernels'].get(kind, 0):.1f}" for kind in kinds),
        )
    return table


def ratio(row: dict, beside: dict, key: str) -> str:
    return f"{row[key] / beside[key]:.2f}x" if row.get(key) and beside.get(key) else "-"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["ours", "ours-lean", "fla"])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--householders", nargs="+", type=int, choices=(1, 2, 3), default=[3, 1, 2], metavar="N")
    parser.add_argument("--gates", nargs="+", choices=("plain", "gated"), default=["plain", "gated"])
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1], help="GPUs of a row")
    parser.add_argument("--batch", type=int, help="sequences a step and rank (8; on a CPU 2)")
    parser.add_argument("--length", type=int, help="tokens of a sequence (4,096; on a CPU 64)")
    parser.add_argument("--minutes", type=float, default=9.5, help="after which no row is begun or goes on")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.batch = options.batch or (8 if options.device == "cuda" else 2)
    options.length = options.length or (4096 if options.device == "cuda" else 64)
    return options


def main(argv: list[str] | None = None) -> None:
    options = arguments(argv)
    if options.row:
        row = measure(Variant(**json.loads(options.row)))
        if os.environ["LOCAL_RANK"] == "0":
            print(json.dumps(row))
        return
    end, rows = time.monotonic() + 60 * options.minutes, []
    try:
        for variant in variants(options):
            row = run(variant, end - time.monotonic())
            rows.append((variant, row))
            print(json.dumps(asdict(variant) | row), flush=True)
    finally:
        console = Console(width=180)
        console.print(table_of(rows))
        for variant, row in rows:
            if "failed" in row:
                gate = "gated" if variant.gated else "plain"
                console.print(f"{variant.size} n_h = {variant.num_householder} {gate} {variant.model}: {row['failed']}")


if __name__ == "__main__":
    main()
