"""The loaded library of native kernels, as ctypes sees it."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Library:
    """One shared library at one instruction-set level. Calls release the GIL while they run."""

    def __init__(self, path: Path, level: str) -> None:
        """Raises OSError for a file that is no loadable library."""
        self.path = path
        self.level = level  # kernels/cpu/build.py: "avx512"; kernels/cuda/build.py: "sm_90a", "emulated"
        self._library = ctypes.CDLL(str(path))

    def function(self, name: str, *argument_types: Any, result: Any = ctypes.c_int) -> Callable[..., Any]:
        """The C function `name`, its types set; look it up once and keep it. Raises AttributeError."""
        function = self._library[name]
        function.argtypes = argument_types
        function.restype = result
        return function

    def __repr__(self) -> str:
        return f"Library({self.level!r}, {str(self.path)!r})"
