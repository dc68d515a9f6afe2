"""Builds csrc/*.cpp into one shared library for this machine on first use, and loads it.

    load()            the best level that this CPU runs, or None: then torch's kernels are used
    load("portable")  that level

Levels: "portable" (plain C++), "avx512" (with bf16 dot products), "amx" (avx512 and bf16 tiles) and, for
tests, "amx-emulated" (the tile code with plain loops for the tiles). MULTILORA_CPU_KERNELS=portable|avx512|
amx|none chooses where the caller does not. Where there is no compiler, or the cache can't be written, a library
that lies there is used all the same (kernels/native_build.py).
"""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import shlex
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path

import torch  # noqa: F401  (its OpenMP runtime must be mapped before a library that shares it)

from kernels import native_build
from kernels.kept import note_use, sweep
from kernels.native_build import BuildError, default_cache, ensure_built, identity_of, key_of, make, run
from kernels.native_library import Library

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "csrc"
BUILD_TIMEOUT_S = 300.0  # of one compiler process

_COMMON = (
    *("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-Wall", "-Wextra", "-fno-exceptions", "-fno-rtti"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off", "-fno-semantic-interposition"),
    "-Wno-maybe-uninitialized",  # gcc 12 warns of its own intrinsics
)
_AVX512 = (
    *("-mavx2", "-mfma", "-mbmi2", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16"),
    "-mprefer-vector-width=512",
)
LEVELS: dict[str, tuple[str, ...]] = {
    "portable": (),
    "avx512": _AVX512,
    "amx": (*_AVX512, "-mamx-tile", "-mamx-bf16", "-DML_AMX"),
    "amx-emulated": (*_AVX512, "-DML_AMX", "-DML_AMX_EMULATED"),
}
"""Level -> the compiler's flags beside the common ones."""

_AVX512_FEATURES = {"avx2", "fma", "bmi2", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"}
FEATURES: dict[str, set[str]] = {
    "portable": set(),
    "avx512": _AVX512_FEATURES,
    "amx": _AVX512_FEATURES | {"amx_tile", "amx_bf16"},
    "amx-emulated": _AVX512_FEATURES,
}
"""Level -> the CPU's features that it needs, as /proc/cpuinfo names them."""


def load(level: str | None = None, cache: Path | None = None, sources: Path = SOURCES) -> Library | None:
    """The library at `level`, built if need be; one log line says which, or why there is none.

    level    None: MULTILORA_CPU_KERNELS, else the best one that this CPU (and, for amx, its kernel) runs
    cache    the folder of built libraries; None: default_cache()
    sources  the folder of the C++ sources

    Raises ValueError for a level that there is not.
    """
    asked = "" if level else os.environ.get("MULTILORA_CPU_KERNELS", "")
    level = level or asked or best_level()
    if level == "none":
        log.info("native CPU kernels: off by MULTILORA_CPU_KERNELS=none; torch's kernels are used")
        return None
    if level not in LEVELS:
        where = "MULTILORA_CPU_KERNELS: " if asked else ""
        raise ValueError(f"{where}unknown level {level!r} of the CPU kernels; there are {', '.join(LEVELS)} and none")
    if not is_supported(level):
        log.warning("native CPU kernels: this machine does not run level %s; torch's kernels are used", level)
        return None
    try:
        library = open_library(level, default_cache() if cache is None else cache, sources)
    except (BuildError, OSError) as error:
        log.warning("native CPU kernels: none at level %s, torch's kernels are used: %s", level, error)
        return None
    log.info("native CPU kernels: level %s (%s)", level, library.path)
    return library


def best_level() -> str:
    """The fastest level that this machine runs."""
    return next(level for level in ("amx", "avx512", "portable") if is_supported(level))


def is_supported(level: str) -> bool:
    """Whether this machine runs `level`'s instructions. For amx, asks its kernel for the tiles' state."""
    if FEATURES[level] and platform.machine() != "x86_64":
        return False
    return cpu_features() >= FEATURES[level] and (level != "amx" or _may_use_tiles())


def cpu_features(path: Path = Path("/proc/cpuinfo")) -> set[str]:
    """The first processor's feature flags; empty where the system does not list them."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())


def _may_use_tiles() -> bool:
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18  # the whole process gets the permission
    return bool(ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0)


def open_library(level: str, cache: Path, sources: Path = SOURCES) -> Library:
    """The library of `sources` at `level` from the cache, built where it is missing or damaged.

    Raises BuildError, or OSError where the cache folder can't be written.
    """
    name = f"{level}-{key_of(sources, ('.cpp', '.h'), (*_COMMON, *LEVELS[level], *map(str, _openmp())))}"
    try:
        compiler = find_compiler()
        path = cache / f"{name}-{_identity(compiler)}.so"
    except BuildError as error:
        path = _of_another_compiler(cache, name, error)
        note_use(path)
    else:
        ensure_built(
            path,
            lambda folder: _build(compiler, level, sources, folder),
            lambda: log.info("building the native CPU kernels at level %s: some seconds, once", level),
        )
    try:
        library = Library(path, level)
    except OSError as error:
        raise BuildError(f"{path} was built and does not load: {error}") from error
    sweep(cache)
    return library


def find_compiler() -> list[str]:
    """The command of the C++ compiler: $CXX, which may have arguments; else c++, g++ or clang++, the first there is.

    Raises BuildError, also for a CXX that is not there: another compiler than the one asked for is no answer to it.
    """
    asked = os.environ.get("CXX", "")
    try:
        words = shlex.split(asked)
    except ValueError as error:
        raise BuildError(f"CXX={asked!r} is no command: {error}") from None
    names = words[:1] or ["c++", "g++", "clang++"]
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None and words:
        raise BuildError(f"no C++ compiler: CXX={asked!r} names {words[0]!r}, which is not there; correct or unset it")
    if found is None:
        raise BuildError(f"no C++ compiler found (looked for {', '.join(names)}); install g++ or set CXX")
    return [found, *words[1:]]


def _of_another_compiler(cache: Path, name: str, error: BuildError) -> Path:
    """A whole library of the same sources and flags, whoever built it. Raises `error` where there is none."""
    path = native_build.of_another_compiler(cache, name)
    if path is None:
        raise error
    told = logging.WARNING if os.environ.get("CXX") else logging.INFO  # who set it wants that very compiler
    log.log(told, "native CPU kernels: %s; the library in the cache is used", error)
    return path


def _identity(compiler: Sequence[str]) -> str:
    """Of the compiler: its version, and the arguments that CXX gives it."""
    version = run([*compiler, "--version"], BUILD_TIMEOUT_S).stdout.partition("\n")[0]
    return identity_of((version, *compiler[1:]))


def _openmp(maps: Path = Path("/proc/self/maps")) -> list[Path | str]:
    """The OpenMP runtime to link: the very one that torch has mapped, so that there is one pool of threads."""
    rows = (line.split(maxsplit=5) for line in maps.read_text().splitlines())  # the sixth, a path, may have spaces
    mapped = {Path(row[5]) for row in rows if len(row) == 6}
    return [*sorted(path for path in mapped if path.name.startswith("libgomp"))[:1]] or ["-lgomp"]


def _build(compiler: Sequence[str], level: str, sources: Path, folder: Path) -> Path:
    """Compile and link in `folder`, objects side by side."""
    units = sorted(sources.glob("*.cpp"))
    with ThreadPoolExecutor(2) as pool:
        objects = [Path(folder, unit.name).with_suffix(".o") for unit in units]
        flags = [*_COMMON, *LEVELS[level]]
        commands = [[*compiler, *flags, "-c", str(unit)] for unit in units]
        list(pool.map(make, commands, objects, repeat(BUILD_TIMEOUT_S)))
    made = Path(folder, "library.so")
    make([*compiler, "-shared", "-Wl,-z,defs", *map(str, objects), *map(str, _openmp())], made, BUILD_TIMEOUT_S)
    return made
