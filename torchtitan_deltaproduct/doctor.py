"""Looks at this machine as a run will: one line a check, with the fix where something is wrong.

    python -m torchtitan_deltaproduct.doctor                     run folders go to outputs/
    python -m torchtitan_deltaproduct.doctor --out /scratch/me

Exit code 0: nothing stands in the way; 1: something does. On a cluster, run it in a job: `srun ... python -m ...`.
"""

import contextlib
import importlib.metadata
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .arguments import Parser
from .arguments import path as path_of
from .devices import cores
from .errors import exit_on_user_error, first_line

if TYPE_CHECKING:
    import torch

TESTED = {
    "torch": ("2.11", "2.13"),
    "triton": ("3.5", "3.9"),
    "torchtitan": ("0.2.2", "0.2.2"),
    "flash-linear-attention": ("0.6.0", "0.6.0"),
    "torchdata": ("0.11", "0.11"),
    "datasets": ("3.6", "5.2"),
    "tokenizers": ("0.21", "0.23"),
}
"""Oldest and newest version the toolkit was run with."""
ROOM = 20e9
"""Free bytes below which a run folder is small: a few checkpoints of a 400M model."""
GOOD, NOTE, BAD = "ok", "note", "FAIL"


@dataclass(frozen=True)
class Finding:
    """One line: how it stands, what was looked at, what was found, and how to fix it."""

    status: str
    name: str
    text: str
    fix: str = ""

    def __str__(self) -> str:
        line = f"{self.status:>4}  {self.name:<14} {self.text}"
        return f"{line}\n      {'':<14} -> {self.fix}" if self.fix else line


def python() -> Finding:
    return Finding(GOOD, "python", f"{platform.python_version()} ({sys.executable})")


def versions() -> Finding:
    """Compares what is installed with what was tested."""
    found, strange = [], []
    for name, (oldest, newest) in TESTED.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return Finding(BAD, "versions", f"{name} is not installed", "pip install -e . -c constraints.txt")
        found.append(f"{name} {version}")
        if not numbers(oldest) <= numbers(version)[: len(numbers(oldest))] or (
            numbers(version)[: len(numbers(newest))] > numbers(newest)
        ):
            strange.append(f"{name} {version} (tested: {oldest} to {newest})")
    if any(text.startswith("torchtitan ") for text in strange):
        return Finding(BAD, "versions", "; ".join(strange), "pip install torchtitan==0.2.2: the trainer is built on it")
    if strange:
        return Finding(NOTE, "versions", "; ".join(strange), "run bash launch/test.sh, or install constraints.txt")
    return Finding(GOOD, "versions", ", ".join(found))


def numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` -> (2, 13, 0)."""
    parts = version.partition("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())


def accelerator() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding(NOTE, "accelerator", f"none: runs on {cores()} CPU cores with gloo",
                       "on a GPU machine, install a CUDA build of torch and look at nvidia-smi")  # fmt: skip
    names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
    memory = min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    count = torch.cuda.device_count()
    text = f"{count} x {', '.join(sorted(names))}, {memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    if not torch.cuda.is_bf16_supported():
        return Finding(NOTE, "accelerator", text + ", no bfloat16", 'set training.mixed_precision_param = "float32"')
    return Finding(GOOD, "accelerator", text)


def operator() -> Finding:
    """Output and gradients of the operator as a run would take it, against the recurrence in float64."""
    return compared("operator", "output and gradients", compiled=False)


def compiler() -> Finding:
    """The same compiled, as most runs are: whether torch.compile can compile here, and to what."""
    tools = [tool for tool in ("gcc", "cc", "clang") if shutil.which(tool)]
    if not tools:
        return Finding(BAD, "compiler", "no C compiler: torch.compile and Triton need one", "apt-get install gcc g++")
    try:
        return compared("compiler", f"the operator under torch.compile with {tools[0]}", compiled=True)
    except Exception as error:  # whatever the compiler, the driver or the cache come up with
        return Finding(BAD, "compiler", f"torch.compile: {first_line(error)}", "set compile.enable = false, or mend it")


def compared(name: str, what: str, *, compiled: bool) -> Finding:
    """A finding on the operator in each dtype that models train in here, by its worst relative error."""
    import torch

    from .ops.interface import resolve_backend

    device = "cuda" if torch.cuda.is_available() else "cpu"
    found, wrong = [], False
    for dtype in (torch.bfloat16, torch.float32) if device == "cuda" else (torch.float32,):
        error, limit = operator_error(device, dtype, compiled), 2e-2 if dtype == torch.bfloat16 else 1e-4
        text = str(dtype).removeprefix("torch.")
        backend = resolve_backend("auto", device, (text,) * 3, False, 64, 64, 2)
        wrong |= not error <= limit
        at_most = "" if error <= limit else f", at most {limit:.0e} is right"
        found.append(f"{text} (backend {backend}) off by {error:.1e}{at_most}")
    text = f"{what} beside float64: {', '.join(found)}"
    if wrong:
        fix = "another torch or triton, or compile.enable = false" if compiled else "another torch or triton"
        return Finding(BAD, name, text, f"{fix}; see pytest tests/gpu")
    return Finding(GOOD, name, text)


def operator_error(device: str, dtype: "torch.dtype", compiled: bool) -> float:
    """The worst relative error of the operator's output and gradients."""
    import torch

    from .ops import gated_delta_product, recurrent_gated_delta_product

    generator, n = torch.Generator().manual_seed(0), 2
    shapes = [(1, 130 * rows, 2, 64) for rows in (1, n, n, 1)]
    *qkv, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    beta = 2 * torch.rand(1, 130 * n, 2, generator=generator, dtype=torch.float64)

    def of(operator: Callable, kind: torch.dtype, where: str) -> list[torch.Tensor]:
        def output(q, k, v, beta):
            return operator(q, k, v, None, beta, n, use_qk_l2norm=True)[0]

        inputs = [x.to(where, kind, copy=True).requires_grad_() for x in qkv]
        o = (torch.compile(output, fullgraph=True) if compiled and kind == dtype else output)(*inputs, beta.to(where))
        (o * weight.to(where, o.dtype)).sum().backward()
        return [x.detach().cpu().double() for x in (o, *(x.grad for x in inputs))]

    results = of(gated_delta_product, dtype, device), of(recurrent_gated_delta_product, torch.float64, "cpu")
    return max(float((found - true).norm() / true.norm()) for found, true in zip(*results, strict=True))


def processes() -> Finding:
    """Two ranks of a process group say hello through torchrun."""
    import torch

    gpus = torch.cuda.device_count()
    ranks, backend = (min(gpus, 8), "nccl") if gpus > 1 else (2, "gloo")
    program = (
        "import os, torch, torch.distributed as d\n"
        f"d.init_process_group('{backend}')\n"
        f"x = torch.ones(1, device='cuda:' + os.environ['LOCAL_RANK'] if '{backend}' == 'nccl' else 'cpu')\n"
        "d.all_reduce(x)\nassert x.item() == d.get_world_size()\nd.barrier()\nd.destroy_process_group()\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "hello.py")
        path.write_text(program, encoding="utf-8")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        start = time.monotonic()
        try:
            done = subprocess.run(
                [*command, str(path)], capture_output=True, encoding="utf-8", errors="replace", timeout=120,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return Finding(BAD, "process group", f"{ranks} ranks over {backend}: no answer in 120 s", host_hint())
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "Error" in line] or done.stderr.splitlines()[-1:]
        return Finding(BAD, "process group", f"{ranks} ranks over {backend}: {errors[0].strip()}", host_hint())
    seconds = time.monotonic() - start
    return Finding(GOOD, "process group", f"{ranks} ranks over {backend} said hello in {seconds:.1f} s")


def host_hint() -> str:
    name = socket.gethostname()
    return f"torchrun needs {name!r} to resolve and loopback to be open; GLOO_SOCKET_IFNAME picks an interface"


def host() -> Finding:
    name = socket.gethostname()
    try:
        return Finding(GOOD, "host", f"{name} is {socket.gethostbyname(name)}")
    except OSError as error:
        return Finding(NOTE, "host", f"{name} does not resolve ({error})", f"add it to /etc/hosts: 127.0.0.1 {name}")


def output(folder: Path) -> Finding:
    """Room and write speed where run folders go."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-") as file:
            block, start = os.urandom(1 << 20), time.monotonic()
            for _ in range(64):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = (64 << 20) / (time.monotonic() - start)
        free = shutil.disk_usage(folder).free
        # Under srun others look at the same folder.
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()
    except OSError as error:
        return Finding(BAD, "output", f"{folder} cannot be written: {error.strerror}", "name another folder with --out")
    text = f"{folder}: {free / 1e9:,.0f} GB free, writes {speed / 1e6:,.0f} MB/s"
    if free < ROOM:
        fix = "a checkpoint of a 400M model takes 5 GB: lower checkpoint.keep_latest_k, or use another disk"
        return Finding(NOTE, "output", text, fix)
    return Finding(GOOD, "output", text)


def shared_memory() -> Finding:
    """Readers of data hand batches over in /dev/shm."""
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return Finding(NOTE, "shared memory", "no /dev/shm", "keep data.num_workers = 0")
    text = f"/dev/shm has {free / 1e9:,.1f} GB free"
    if free < 1e9:
        fix = "keep data.num_workers = 0, or start the container with --shm-size 8g"
        return Finding(NOTE, "shared memory", text, fix)
    return Finding(GOOD, "shared memory", text)


def slurm() -> Finding:
    if not shutil.which("sbatch"):
        return Finding(NOTE, "slurm", "sbatch is not here: start runs with launch/local.sh or launch/multinode.sh")
    done = subprocess.run(["scontrol", "ping"], capture_output=True, encoding="utf-8", errors="replace", timeout=30)
    if done.returncode:
        answer = ((done.stdout + done.stderr).strip().splitlines() or ["no answer"])[0]
        return Finding(NOTE, "slurm", f"sbatch is here, its controller does not answer: {answer}",
                       "log in to a node of the cluster, or set SLURM_CONF")  # fmt: skip
    job, end = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_JOB_END_TIME", "")
    until = f", until {time.strftime('%Y-%m-%d %H:%M', time.localtime(float(end)))}" if end.isdigit() else ""
    inside = f"; this is job {job}{until}" if job else "; submit with python -m launch.slurm"
    return Finding(GOOD, "slurm", done.stdout.strip().splitlines()[0] + inside)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser("torchtitan_deltaproduct.doctor", __doc__)
    parser.add_argument("--out", type=path_of, default="outputs", help="where run folders go (default: %(default)s)")
    options = parser.parse_args(arguments)
    checks: list[Callable[[], Finding]] = [python, versions, accelerator, operator, compiler, host, processes,
                                           lambda: output(Path(options.out)), shared_memory, slurm]  # fmt: skip
    failed = 0
    for check in checks:
        with contextlib.redirect_stdout(sys.stderr):
            finding = guarded(check)
        print(finding, flush=True)
        failed += finding.status == BAD
    print(f"\n{failed} of {len(checks)} checks failed" if failed else "\nnothing stands in the way of a run")
    return 1 if failed else 0


def guarded(check: Callable[[], Finding]) -> Finding:
    """A check that breaks is a finding too."""
    try:
        return check()
    except Exception as error:  # a broken installation raises nearly anything
        name = getattr(check, "__name__", "check").replace("<lambda>", "output")
        return Finding(BAD, name, f"{type(error).__name__}: {first_line(error)}", "pip install -e . -c constraints.txt")


if __name__ == "__main__":
    exit_on_user_error(main)
