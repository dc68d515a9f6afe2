"""Builds csrc/*.cpp into one shared library for this machine on first use, and loads it.

    load()            the best level that this CPU runs, or None: then torch's kernels are used
    load("portable")  that level

Levels: "portable" (plain C++), "avx512" (with bf16 dot products), "amx" (avx512 and bf16 tiles) and, for
tests, "amx-emulated" (the tile code with plain loops for the tiles). MULTILORA_CPU_KERNELS=portable|avx512|
amx|none chooses where the caller does not. A library lies in the cache folder under two keys of everything that
went into it: sources and flags, and the compiler. Two processes that want the same one build it once. Where
there is no compiler, or the cache can't be written, a library that lies there is used all the same.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch  # noqa: F401  (its OpenMP runtime must be mapped before a library that shares it)

from kernels.cpu.kept import note_use, sweep
from kernels.cpu.library import Library

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


class BuildError(Exception):
    """The library could not be built; the message says which step failed and ends with the compiler's own words."""


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


def default_cache() -> Path:
    """$MULTILORA_CACHE/kernels, or the same under ~/.cache/multilora, where the server keeps all else."""
    base = os.environ.get("MULTILORA_CACHE")
    return (Path(base).expanduser() if base else Path.home() / ".cache" / "multilora") / "kernels"


def open_library(level: str, cache: Path, sources: Path = SOURCES) -> Library:
    """The library of `sources` at `level` from the cache, built where it is missing or damaged.

    Raises BuildError, or OSError where the cache folder can't be written.
    """
    name = f"{level}-{_key(level, sources)}"
    try:
        compiler = find_compiler()
        path = cache / f"{name}-{_identity(compiler)}.so"
    except BuildError as error:
        path = _of_another_compiler(cache, name, error)
        note_use(path)
    else:
        note_use(path)  # before it is looked at: then no other process's sweep takes it
        _ensure_built(compiler, level, sources, path)
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


def _ensure_built(compiler: Sequence[str], level: str, sources: Path, path: Path) -> None:
    if _is_whole(path):  # looked at without the lock, whose file a read-only cache does not let us open
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        if not _is_whole(path):
            log.info("building the native CPU kernels at level %s: some seconds, once", level)
            _build(compiler, level, sources, path)


def _of_another_compiler(cache: Path, name: str, error: BuildError) -> Path:
    """A whole library of the same sources and flags, whoever built it. Raises `error` where there is none."""
    path = next(filter(_is_whole, sorted(cache.glob(f"{name}-*.so"))), None)
    if path is None:
        raise error
    told = logging.WARNING if os.environ.get("CXX") else logging.INFO  # who set it wants that very compiler
    log.log(told, "native CPU kernels: %s; the library in the cache is used", error)
    return path


def _key(level: str, sources: Path) -> str:
    """Of the sources and the flags."""
    digest = hashlib.sha256()
    for part in (platform.machine(), *_COMMON, *LEVELS[level], *map(str, _openmp())):
        digest.update(part.encode() + b"\0")
    for path in sorted(sources.iterdir()):
        if path.suffix in (".cpp", ".h"):
            content = path.read_bytes()
            digest.update(f"{path.name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:32]


def _identity(compiler: Sequence[str]) -> str:
    """Of the compiler: its version, and the arguments that CXX gives it."""
    version = _run([*compiler, "--version"]).partition("\n")[0]
    return hashlib.sha256("\0".join((version, *compiler[1:])).encode()).hexdigest()[:16]


def _openmp(maps: Path = Path("/proc/self/maps")) -> list[Path | str]:
    """The OpenMP runtime to link: the very one that torch has mapped, so that there is one pool of threads."""
    rows = (line.split(maxsplit=5) for line in maps.read_text().splitlines())  # the sixth, a path, may have spaces
    mapped = {Path(row[5]) for row in rows if len(row) == 6}
    return [*sorted(path for path in mapped if path.name.startswith("libgomp"))[:1]] or ["-lgomp"]


def _build(compiler: Sequence[str], level: str, sources: Path, path: Path) -> None:
    """Compile and link into `path`: objects side by side in a folder of their own, the result renamed into place."""
    units = sorted(sources.glob("*.cpp"))
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder, ThreadPoolExecutor(2) as pool:
        objects = [Path(folder, unit.name).with_suffix(".o") for unit in units]
        flags = [*_COMMON, *LEVELS[level]]
        commands = [[*compiler, *flags, "-c", str(unit)] for unit in units]
        list(pool.map(_make, commands, objects))
        made = Path(folder, path.name)
        _make([*compiler, "-shared", "-Wl,-z,defs", *map(str, objects), *map(str, _openmp())], made)
        checksum = _checksum(made)
        made.replace(path)
        Path(folder, "checksum").write_text(checksum)
        Path(folder, "checksum").replace(path.with_suffix(".sha256"))


def _make(command: Sequence[str], made: Path) -> None:
    _run([*command, "-o", str(made)])
    if not made.is_file():
        raise BuildError(f"{' '.join(command)} ended with exit status 0 and made no {made.name}")


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise BuildError(f"{command[0]} took more than {BUILD_TIMEOUT_S:.0f} s: {' '.join(command[-3:])}") from None
    if done.returncode:
        tail = "\n".join(done.stderr.splitlines()[-20:])
        raise BuildError(f"{' '.join(command)} failed with exit status {done.returncode}:\n{tail}")
    return done.stdout


def _is_whole(path: Path) -> bool:
    """Whether the file is there, byte for byte as it was built: loading a truncated one would kill the process."""
    try:
        return path.with_suffix(".sha256").read_text() == _checksum(path)
    except OSError:
        return False


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
