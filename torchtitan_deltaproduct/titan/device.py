"""Which device a run uses, and how torchtitan learns of it.

The rule: CUDA if a device is visible, else CPU with gloo.

    device_type, reason = select_device()
    install(device_type, peak_flops=0.0)
"""

import contextlib
import os
import types
from pathlib import Path

import torch

from ..devices import peak_flops
from . import patches


def select_device() -> tuple[str, str]:
    """Returns the device type to run on and the reason, for the log."""
    if torch.cuda.is_available():
        return "cuda", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)} visible"
    return "cpu", "no CUDA device is visible"


class CpuModule(types.ModuleType):
    """`torch.cpu` with what torchtitan expects of a device module: name, capacity, and peak memory of this process."""

    def __init__(self) -> None:
        super().__init__("torch.cpu")

    def __getattr__(self, name: str):
        return getattr(torch.cpu, name)

    def current_device(self) -> int:
        return 0

    def get_device_name(self, device=None) -> str:
        with contextlib.suppress(OSError, StopIteration):
            lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        return "CPU"

    def get_device_properties(self, device=None) -> types.SimpleNamespace:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return types.SimpleNamespace(name=self.get_device_name(), total_memory=total)

    def memory_stats(self, device=None) -> dict[str, int]:
        peak = 0
        with contextlib.suppress(OSError, StopIteration):
            lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
            peak = 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
        stats = {"active_bytes.all.peak": peak, "reserved_bytes.all.peak": peak}
        return stats | {"num_alloc_retries": 0, "num_ooms": 0}

    def reset_peak_memory_stats(self, device=None) -> None:
        # 5 resets the peak resident size (proc(5)); a container may forbid it, and the peak then covers the whole run.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")

    def empty_cache(self) -> None:
        pass


def install(device_type: str, peak: float = 0.0) -> None:
    """Makes torchtitan use `device_type` everywhere, and `peak` FLOP/s for MFU (0.0: look it up by device name)."""
    module = CpuModule() if device_type == "cpu" else getattr(torch, device_type)
    patches.bind_device(device_type, module, lambda name: peak or peak_flops(name))
