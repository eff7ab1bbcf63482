"""What our Triton kernels are specialised to and how they are launched: a function of shapes, never of a measurement.

geometry = Geometry(n=3, K=128, V=128, gated=False, packed=True)
launches(geometry, torch.bfloat16, capability=90)["forward"]         # Launch(columns=64, warps=4, stages=3)
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from torchtitan_deltaproduct.ops.launch import power_of_two

ROWS = 64
"""R, rows of a chunk."""

DTYPES = ("bfloat16", "float16", "float32")
MAX_HOUSEHOLDER = 8
HEAD_DIMS = (16, 32, 64, 128)
"""K and V of the kernels; other sizes up to 128 are padded with zeros."""


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched: columns of V (`local`: of K) a program or a step, warps, stages of its pipeline."""

    columns: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


@dataclass(frozen=True)
class Geometry:
    """What the kernels are specialised to."""

    n: int
    K: int
    V: int
    gated: bool
    packed: bool

    @property
    def tokens(self) -> int:
        """C, whole tokens of a chunk."""
        return ROWS // self.n

    @property
    def padded_tokens(self) -> int:
        """C rounded up to a tile."""
        return max(16, power_of_two(self.tokens))

    @property
    def decay(self) -> bool:
        return self.gated or self.packed

    @property
    def factors(self) -> int:
        """Rows of a chunk's factors: beta; with decays also enter, leave, G and across."""
        return 5 if self.decay else 1

    @property
    def prepared(self) -> int:
        """Numbers that are prepared of a chunk: T, P, and enter . q with decays."""
        return (ROWS + self.padded_tokens) * ROWS + self.decay * self.padded_tokens * self.K

    @property
    def states(self) -> int:
        """Numbers that the scan leaves of a chunk for the backward: D, and the state before."""
        return self.V * (ROWS + self.K)

    def products(self, dtype: torch.dtype) -> str:
        """How products are made: as tf32, which holds 16-bit numbers exactly, and of float32 as three products of tf32
        each, which keep 21 of its 23 bits.

        In IEEE arithmetic where a chunk has 16 tokens: there three products read outside of memory (Triton 3.6, H200).
        """
        return "tf32" if dtype != torch.float32 else "tf32x3" if self.padded_tokens > 16 else "ieee"

    def constants(self) -> dict[str, int]:
        sizes = {"K": self.K, "V": self.V, "N": self.n, "C": self.tokens, "CP": self.padded_tokens, "R": ROWS}
        return sizes | {"WIDTH": self.prepared}


@lru_cache
def launches(geometry: Geometry, dtype: torch.dtype, capability: int) -> dict[str, Launch]:
    """The configuration of each kernel: the fastest measured on Hopper; before it one that fits, not measured.

    The scans want three tiles in flight; a device with less shared memory than Hopper's 227 KB gets two (A100) or one.
    """
    columns, keys, solve = min(64, geometry.V), min(64, geometry.K), Launch(0, 1, 1)
    if dtype == torch.float32:
        if geometry.products(dtype) == "ieee":
            one = Launch(min(32, geometry.V), 4, 1)
            return {"prepare": one, "solve": solve, "forward": one, "backward": one, "local": Launch(keys, 8, 1)}
        # Split in three, operands take three times the registers: wider tiles spill.
        narrow = Launch(16, 4, 1)
        return dict.fromkeys(("prepare", "forward", "backward", "local"), narrow) | {"solve": solve}
    stages = 3 if capability // 10 in (9, 10) else 2 if capability == 80 else 1
    if capability < 90:
        scan = Launch(min(32, geometry.V), 4, stages)
        return {"prepare": Launch(0, 8, 1), "solve": solve, "forward": scan, "backward": scan,
                "local": Launch(keys, 8, 1)}  # fmt: skip
    alone = geometry.n == 1
    return {
        "prepare": Launch(0, 4, 1),
        "solve": solve,
        "forward": Launch(columns, 8 if alone and not geometry.decay else 4, stages),
        "backward": Launch(columns, 4, stages),
        # Halves of K: with a gate, whose tiles want the registers; with n = 1, where they are as fast.
        "local": Launch(keys if alone or geometry.gated else geometry.K, 4, 2 if geometry.gated and not alone else 1),
    }


def native(size: int) -> int:
    """The smallest size of the kernels that holds `size`."""
    return next(native for native in HEAD_DIMS if native >= size)


def segments(programs: int, chunks: int, multiprocessors: int) -> int:
    """In how many segments to cut the sequence, so that one wave of programs fills the device; 1 is not to cut.

    Cutting costs a second pass, so it pays from three segments on; each keeps at least 8 chunks.
    """
    fitting = multiprocessors // max(1, programs)
    return 1 if fitting < 3 else min(fitting, max(1, chunks // 8))
