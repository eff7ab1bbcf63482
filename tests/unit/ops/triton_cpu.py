"""Triton kernels where there is no GPU: interpreted on CPU tensors, or compiled and read.

TRITON_INTERPRET must be set before Triton is imported, so interpreted tests stand in a file of their own, which pytest
does not collect by itself (its name does not begin with test_), and a test beside it runs that file in another process:

    def test_interpreted():
        run_interpreted("tests/unit/ops/interpreted_short_conv.py")
"""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).parents[3]
QUICK = "tests.unit.ops.quick_interpreter"
TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64"}


def run_interpreted(path: str, timeout: float = 500) -> None:
    """Runs a file of tests, its path from the root of the repository, under Triton's interpreter."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", QUICK, path]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-8000:] + result.stderr[-2000:]


class Compiled(NamedTuple):
    """What a kernel became for one GPU."""

    registers: int
    """Of a thread."""
    opcodes: Counter[str]
    """Instructions by name with suffixes, e.g. LDG.E.128; predicates left out."""
    shared: int
    """Bytes of shared memory of a program."""
    ttgir: str
    """Triton's own form of the kernel, after its choice of layouts."""

    @property
    def spills(self) -> int:
        """Instructions that move a register to or from local memory."""
        return sum(count for name, count in self.opcodes.items() if name.split(".")[0] in ("LDL", "STL"))


def compile_launch(kernel, capability: int, *arguments, **constants_and_options) -> Compiled:
    """Compiles what `kernel[grid](*arguments, **constants_and_options)` would compile on such a GPU.

    Tensors may be on the meta device; they count as aligned to 16 bytes.
    """
    constants = {name: x for name, x in constants_and_options.items() if name in kernel.arg_names}
    options = {name: x for name, x in constants_and_options.items() if name not in constants}
    signature, constexprs, attributes = {}, {}, {}
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
    for index, name in enumerate(kernel.arg_names):
        value, aligned = values[name], False
        if isinstance(value, torch.Tensor):
            signature[name], aligned = f"*{TYPES[value.dtype]}", True
        elif value is None or name in constants:
            signature[name], constexprs[(index,)] = "constexpr", value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
            aligned = value % 16 == 0 and not kernel.params[index].do_not_specialize
        if aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        registers = re.search(r"REG:(\d+)", _cuobjdump("-res-usage", file))[1]
        names = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)", _cuobjdump("-sass", file))
    return Compiled(int(registers), Counter(names), compiled.metadata.shared, compiled.asm["ttgir"])


def _cuobjdump(option: str, file: Path) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([program, option, file], capture_output=True, text=True, check=True).stdout
