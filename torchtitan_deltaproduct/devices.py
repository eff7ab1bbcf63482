"""What is known of accelerators by name: the peak that MFU and `plan` divide by. The one table of it.

peak_flops("NVIDIA H100 80GB HBM3")      # 989e12
"""

import re

# Dense bf16 peak of one device, FLOP/s, from the vendors' datasheets; the longest matching name wins.
PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "H20": 148e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "MI250X": 191.5e12,
    "MI300X": 1300e12,
    "MI355X": 2500e12,
}


def peak_flops(device_name: str) -> float:
    """Dense bf16 peak of the named device in FLOP/s; 0.0 where it is not known (a CPU, say)."""
    # A name is a word of the device's: an L40 is no L4.
    matches = [
        name
        for name in PEAK_FLOPS
        if re.search(rf"(?<![a-z0-9]){name.replace(' ', ' ?')}(?![a-z0-9])", device_name, re.IGNORECASE)
    ]
    return PEAK_FLOPS[max(matches, key=len)] if matches else 0.0
