"""The CUDA C++ kernels on the CPU: csrc/emulated.h behind the interface of a backend, with its switches."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from kernels import torch_backend
from kernels.cpu.build import find_compiler
from kernels.cuda import build
from kernels.cuda.lora import Lora
from kernels.native_library import Library

SMALL, HOPPER, AMPERE = (2, 2), (8, 4), (1, 8)
"""Blocks of a cluster, warps of a block: the smallest that has all barriers, and what kernels/cuda/build.py ships."""

FORWARD, BACKWARD = 0, 1  # the order of warps; larger numbers are seeds


@functools.cache
def library(shape: tuple[int, int] = SMALL) -> Library:
    return build.load_emulated(find_compiler(), *shape)


class Emulated:
    """The backend "cuda" without a GPU; what the kernel leaves to others is torch's."""

    segmented_embedding = staticmethod(torch_backend.segmented_embedding)

    def __init__(self, of: Library, *, resident: int | None = None) -> None:
        self.lora = Lora(of, torch_backend, is_early=False, resident=resident)
        self.segmented_lora = self.lora.segmented_lora
        self._order = of.function("ml_emulated_order", ctypes.c_int, result=None)
        self._allow = of.function("ml_emulated_allow", ctypes.c_void_p, ctypes.c_int64, result=None)
        self._allow_all = of.function("ml_emulated_allow_all", result=None)
        self._late = of.function("ml_emulated_late", ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, result=None)

    @contextmanager
    def order(self, order: int) -> Iterator[None]:
        self._order(order)
        try:
            yield
        finally:
            self._order(FORWARD)

    @contextmanager
    def only(self, *views: torch.Tensor) -> Iterator[None]:
        """Whatever touches other memory than these (contiguous) views is given up with an error."""
        for view in views:
            assert view.is_contiguous()
            self._allow(view.data_ptr(), view.numel() * view.itemsize)
        try:
            yield
        finally:
            self._allow_all()

    def late(self, tensor: torch.Tensor) -> torch.Tensor:
        """NaN now; in the next launch it gets its contents when the kernel first waits for those before it.

        Returns them: to be kept until then.
        """
        contents = tensor.clone(memory_format=torch.preserve_format)
        assert contents.stride() == tensor.stride()
        tensor.fill_(torch.nan)
        self._late(tensor.data_ptr(), contents.data_ptr(), tensor.untyped_storage().nbytes())
        return contents


def changed(folder: Path, old: str, new: str, name: str = "lora.cu") -> Library:
    """The emulated library of sources in which `old`, found once in the file `name`, is `new`."""
    for path in build.SOURCES.iterdir():
        text = path.read_text()
        if path.name == name:
            assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {name}"
            text = text.replace(old, new)
        (folder / path.name).write_text(text)
    return build.load_emulated(find_compiler(), *SMALL, cache=folder, sources=folder)
