"""Compiles a launch for a GPU that need not be there, as its first call would: types and divisibility of its arguments.

Shared memory and registers are read from what ptxas made.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.triton.launch import Launch

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}  # of one program at most
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Compiled:
    registers: int  # per thread
    stack: int  # bytes per thread: what registers spilled, or arrays that are none
    shared: int  # bytes per program
    ptx: str


def compiled(launch: Launch, capability: int, folder: Path) -> Compiled:
    """The kernel for compute capability `capability` (80, 90); its binary goes to `folder`."""
    target = GPUTarget("cuda", capability, 32)
    kernel = triton.compile(_source(launch), target=target, options=launch.options)
    binary = folder / "kernel.cubin"
    binary.write_bytes(kernel.asm["cubin"])
    usage = subprocess.run([CUOBJDUMP, "-res-usage", binary], check=True, capture_output=True, text=True).stdout
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(found["REG"], found["STACK"] + found["LOCAL"], kernel.metadata.shared, kernel.asm["ptx"])


def _source(launch: Launch) -> ASTSource:
    kernel, signature, constants, attributes = launch.kernel, {}, {}, {}
    free = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    arguments = dict(zip(kernel.arg_names, launch.args, strict=False)) | launch.sizes
    assert list(arguments) == kernel.arg_names
    for index, (name, value) in enumerate(arguments.items()):
        if name in launch.sizes or (name not in free and type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(index,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
            if name not in free and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)
