"""Builds csrc/*.cu into one shared library for a GPU's architecture on first use, and loads it.

    load((9, 0))                          for a GPU of compute capability 9.0
    load_emulated()                       for the CPU, by the C++ compiler: csrc/emulated.h
    python -m kernels.cuda.build --check  compiles for all architectures: nothing warned of, nothing spilled

Capabilities 8.x run sm_80's code, 9.0 sm_90a's; others are not supported. A library needs nvcc when it is built and
nothing but the driver when it runs: the CUDA runtime is linked into it.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kernels import native_build
from kernels.kept import note_use
from kernels.native_build import BuildError, default_cache, ensure_built, identity_of, key_of, make, run
from kernels.native_library import Library

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
BUILD_TIMEOUT_S = 300.0
_SUFFIXES = (".cu", ".h")

_COMMON = ("-std=c++17", "-O3", "--shared", "-Xcompiler", "-fPIC", "-cudart", "static")
ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "sm_80": ("-gencode=arch=compute_80,code=sm_80", "-DML_CLUSTER=1", "-DML_WARPS=8"),
    "sm_90a": ("-gencode=arch=compute_90a,code=sm_90a", "-DML_CLUSTER=8", "-DML_WARPS=4"),
}
"""Architecture -> nvcc's flags beside the common ones: the machine code, blocks of a cluster, warps of a block."""

_EMULATED = (
    *("-x", "c++", "-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"),
    *("-U_FORTIFY_SOURCE", "-DML_CUDA_EMULATED"),  # fortified longjmp refuses to change stacks
)


@dataclass(frozen=True)
class Kernel:
    """What the assembler says of one kernel."""

    name: str
    registers: int  # of a thread
    stack: int  # bytes of a thread in device memory: spilled registers, or arrays that are none
    shared: int  # bytes of a block


def architecture_of(capability: tuple[int, int]) -> str | None:
    """The one whose code a GPU runs; None: there is none."""
    if capability[0] == 8:
        return "sm_80"
    return "sm_90a" if capability == (9, 0) else None


def load(capability: tuple[int, int], cache: Path | None = None, sources: Path = SOURCES) -> Library | None:
    """The library for a GPU, built if need be; one log line says which, or why there is none."""
    architecture = architecture_of(capability)
    if architecture is None:
        log.warning(
            "CUDA C++ kernels: compute capability %d.%d is not supported (8.x and 9.0 are); use triton", *capability
        )
        return None
    try:
        library = open_library(architecture, default_cache() if cache is None else cache, sources)
    except (BuildError, OSError) as error:
        log.warning("CUDA C++ kernels: none for %s; use triton: %s", architecture, error)
        return None
    log.info("CUDA C++ kernels: %s (%s)", architecture, library.path)
    return library


def open_library(architecture: str, cache: Path, sources: Path = SOURCES) -> Library:
    """The library for an architecture from the cache, built where it is missing or damaged.

    Raises BuildError, or OSError where the cache folder can't be written.
    """
    flags = (*_COMMON, *ARCHITECTURES[architecture])
    name = f"cuda-{architecture}-{key_of(sources, _SUFFIXES, flags)}"
    try:
        compiler = find_nvcc()
    except BuildError as error:
        path = native_build.of_another_compiler(cache, name)
        if path is None:
            raise
        log.info("CUDA C++ kernels: %s; the library in the cache is used", error)
        note_use(path)
        return _opened(path, architecture)
    identity = identity_of((run([compiler, "--version"], BUILD_TIMEOUT_S).stdout,))
    return _built([compiler, *flags], cache / f"{name}-{identity}.so", architecture, sources)


def load_emulated(
    compiler: Sequence[str], cluster: int, warps: int, cache: Path | None = None, sources: Path = SOURCES
) -> Library:
    """The same sources for the CPU, with clusters of `cluster` blocks of `warps` warps. Raises BuildError."""
    command = [*compiler, *_EMULATED, f"-DML_CLUSTER={cluster}", f"-DML_WARPS={warps}"]
    key = key_of(sources, _SUFFIXES, command[len(compiler) :])
    identity = identity_of((run([*compiler, "--version"], BUILD_TIMEOUT_S).stdout, *compiler[1:]))
    path = (default_cache() if cache is None else cache) / f"cuda-emulated-{key}-{identity}.so"
    return _built(command, path, "emulated", sources)


def find_nvcc() -> str:
    """The newest under $CUDA_HOME, in the PATH or under /usr/local, in this order. Raises BuildError.

    Also for a CUDA_HOME without one: another compiler than the one asked for is no answer to it.
    """
    home = os.environ.get("CUDA_HOME", "")
    if home:
        found = shutil.which("nvcc", path=str(Path(home) / "bin"))
        if found is None:
            raise BuildError(f"no nvcc: CUDA_HOME={home!r} has no bin/nvcc; correct or unset it")
        return found
    folders = sorted(Path("/usr/local").glob("cuda*/bin"), key=_version, reverse=True)
    found = shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(map(str, folders)))
    if found is None:
        raise BuildError("no nvcc found (looked in the PATH and /usr/local/cuda*); install CUDA's or set CUDA_HOME")
    return found


def _version(folder: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", str(folder.parent.resolve().name))]


def _built(command: Sequence[str], path: Path, level: str, sources: Path) -> Library:
    units = [str(unit) for unit in sorted(sources.glob("*.cu"))]

    def build(folder: Path) -> Path:
        made = folder / "library.so"
        make([*command, *units], made, BUILD_TIMEOUT_S)
        return made

    ensure_built(path, build, lambda: log.info("building the CUDA C++ kernels for %s: some seconds, once", level))
    return _opened(path, level)


def _opened(path: Path, level: str) -> Library:
    try:
        return Library(path, level)
    except OSError as error:
        raise BuildError(f"{path} was built and does not load: {error}") from error


def check(architecture: str, sources: Path = SOURCES) -> list[Kernel]:
    """Compile for an architecture with warnings as errors; its kernels. Raises BuildError, also where one spills."""
    flags = (*_COMMON, *ARCHITECTURES[architecture], "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra,-Werror")
    units = [str(unit) for unit in sorted(sources.glob("*.cu"))]
    with tempfile.TemporaryDirectory(prefix="multilora-cuda-") as folder:
        said = make([find_nvcc(), *flags, "-Xptxas", "-v", *units], Path(folder, "library.so"), BUILD_TIMEOUT_S)
    kernels = read_kernels(said)
    spilling = [kernel for kernel in kernels if kernel.stack]
    if spilling or not kernels:
        told = ", ".join(f"{kernel.name} {kernel.stack} bytes a thread" for kernel in spilling) or "it has no kernels"
        raise BuildError(f"{architecture} spills registers: {told}")
    return kernels


def read_kernels(said: str) -> list[Kernel]:
    """From what the assembler says with -v."""
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame.*?Used (\d+) registers(.*?)$",
        said,
        re.DOTALL | re.MULTILINE,
    )
    return [
        Kernel(_readable(name), int(registers), int(stack), int((re.findall(r"(\d+) bytes smem", rest) or ["0"])[0]))
        for name, stack, registers, rest in found
    ]


def _readable(name: str) -> str:
    """lora<Bf16, 16, aligned> of the mangled name."""
    parts = re.search(r"(lora)I\w*?(Bf16|Fp16)E?Li(\d+)ELb([01])E", name)
    if parts is None:
        return name
    kernel, dtype, bucket, is_aligned = parts.groups()
    return f"{kernel}<{dtype}, {bucket}, {'aligned' if is_aligned == '1' else 'any'}>"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit status."""
    options = argparse.ArgumentParser(prog="python -m kernels.cuda.build", description="Compile the CUDA C++ kernels.")
    options.add_argument("--check", action="store_true", required=True, help="for all architectures, to nowhere")
    options.parse_args(arguments)
    try:
        sys.stdout.write(f"CUDA C++ kernels by {find_nvcc()}\n")
    except BuildError as error:
        sys.stdout.write(f"CUDA C++ kernels: not compiled here, {error}\n")
        return int(bool(os.environ.get("CUDA_HOME")))  # one that was named and isn't there is a mistake
    try:
        for architecture in ARCHITECTURES:
            for kernel in check(architecture):
                sizes = f"{kernel.registers:4} registers {kernel.shared:6} bytes shared"
                sys.stdout.write(f"  {architecture:7} {kernel.name:28} {sizes}\n")
    except BuildError as error:
        sys.stdout.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
