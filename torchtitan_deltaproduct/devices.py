"""What is known of accelerators by name: the peak that MFU and `plan` divide by, and their memory. The one table of it.

peak_flops("NVIDIA H100 80GB HBM3")      # 989e12
memory_gb("H100")                        # 80.0
threads(ranks)                           # what each of so many processes here may use of the CPU
"""

import os
import re

MOST_THREADS = 8
"""Of a process; more only wait for one another."""

# Dense bf16 peak of a device in FLOP/s, from the vendors' datasheets; the longest matching name wins. Its memory in the
# GB it is sold with, which are powers of two; of an A100 the larger one. B200 and cards with error correction in their
# memory show less than they are sold with: so much is given here.
DEVICES = {
    "A100": (312e12, 80.0),
    "H100 PCIe": (756e12, 80.0),
    "H100 NVL": (835e12, 94.0),
    "H100": (989e12, 80.0),
    "H200": (989e12, 141.0),
    "H20": (148e12, 96.0),
    "GH200": (989e12, 96.0),
    "B200": (2250e12, 180.0),
    "L40S": (362e12, 45.0),
    "L4": (121e12, 22.5),
    "A10": (125e12, 22.5),
    "RTX 4090": (165e12, 24.0),
    "MI250X": (191.5e12, 64.0),
    "MI300X": (1300e12, 192.0),
    "MI355X": (2500e12, 288.0),
}


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads(processes: int) -> int:
    """CPU threads of each of some processes: its share of the cores, at most `MOST_THREADS`."""
    return min(MOST_THREADS, max(1, cores() // processes))


def peak_flops(device_name: str) -> float:
    """Dense bf16 peak of the named device in FLOP/s; 0.0 where it is not known (a CPU, say)."""
    return DEVICES.get(known_name(device_name), (0.0, 0.0))[0]


def memory_gb(device_name: str) -> float:
    """Memory of the named device in GB of 2^30 bytes; 0.0 where it is not known."""
    return DEVICES.get(known_name(device_name), (0.0, 0.0))[1]


def known_name(device_name: str) -> str:
    """The name in the tables that stands in a device's name; "" if none does."""
    # A name is a word of the device's: an L40 is no L4.
    matches = [
        name
        for name in DEVICES
        if re.search(rf"(?<![a-z0-9]){name.replace(' ', ' ?')}(?![a-z0-9])", device_name, re.IGNORECASE)
    ]
    return max(matches, key=len, default="")
