"""Building a shared library on first use into a cache folder, once for all processes: for kernels/cpu and kernels/cuda.

A library's name has two keys of everything that went into it: sources and flags, and the compiler. It is made in a
folder of its own and renamed into place, with its checksum beside it: loading a truncated one would kill the process.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from kernels.kept import note_use


class BuildError(Exception):
    """The library could not be built; the message says which step failed and ends with the compiler's own words."""


def default_cache() -> Path:
    """$MULTILORA_CACHE/kernels, or the same under ~/.cache/multilora, where the server keeps all else."""
    base = os.environ.get("MULTILORA_CACHE")
    return (Path(base).expanduser() if base else Path.home() / ".cache" / "multilora") / "kernels"


def key_of(sources: Path, suffixes: Sequence[str], flags: Iterable[str]) -> str:
    """Of the machine's kind, the flags, and the names and contents of the files in `sources` with these suffixes."""
    digest = hashlib.sha256()
    for part in (platform.machine(), *flags):
        digest.update(part.encode() + b"\0")
    for path in sorted(sources.iterdir()):
        if path.suffix in suffixes:
            content = path.read_bytes()
            digest.update(f"{path.name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:32]


def identity_of(words: Iterable[str]) -> str:
    """A key of what tells compilers apart."""
    return hashlib.sha256("\0".join(words).encode()).hexdigest()[:16]


def ensure_built(path: Path, build: Callable[[Path], Path], on_build: Callable[[], object]) -> None:
    """See that a whole library lies at `path`, by one process: `build(folder)` makes it in a folder that is then gone.

    `on_build` is called before. Raises what `build` does, and OSError where the cache can't be written.
    """
    note_use(path)  # before it is looked at: then no other process's sweep takes it
    if is_whole(path):  # looked at without the lock, whose file a read-only cache does not let us open
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.with_suffix(".lock")):
        if is_whole(path):
            return
        on_build()
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder:
            made = build(Path(folder))
            checksum = _checksum(made)
            made.replace(path)
            Path(folder, "checksum").write_text(checksum)
            Path(folder, "checksum").replace(path.with_suffix(".sha256"))


def of_another_compiler(cache: Path, name: str) -> Path | None:
    """A whole library of the same sources and flags, whoever built it."""
    return next(filter(is_whole, sorted(cache.glob(f"{name}-*.so"))), None)


def make(command: Sequence[str], made: Path, timeout_s: float) -> str:
    """Run a compiler that makes the file `made`; what it said on standard error."""
    said = run([*command, "-o", str(made)], timeout_s).stderr
    if not made.is_file():
        raise BuildError(f"{' '.join(command)} ended with exit status 0 and made no {made.name}")
    return said


def run(command: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run a command to its end. Raises BuildError, with the end of what it said."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise BuildError(f"{command[0]} took more than {timeout_s:.0f} s: {' '.join(command[-3:])}") from None
    if done.returncode:
        tail = "\n".join((done.stderr or done.stdout).splitlines()[-20:])
        raise BuildError(f"{' '.join(command)} failed with exit status {done.returncode}:\n{tail}")
    return done


def is_whole(path: Path) -> bool:
    """Whether the file is there, byte for byte as it was built."""
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
