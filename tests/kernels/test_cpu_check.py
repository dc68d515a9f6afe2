"""The proof at start: right libraries pass, wrong ones are not used."""

from __future__ import annotations

import ctypes

import pytest
import torch

from kernels import cpu
from kernels.cpu import build
from kernels.cpu.check import is_right


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    """Without it an output that nobody writes may hold the right values of an earlier call."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class Broken:
    """A library whose function `name` does nothing, so that its output is whatever was there."""

    def __init__(self, library, name: str, level: str) -> None:
        self._library, self._name, self.level = library, name, level

    def function(self, name: str, *types, result=ctypes.c_int):
        return (lambda *args: 0) if name == self._name else self._library.function(name, *types, result=result)


@pytest.mark.parametrize("level", ["portable", "avx512", "amx-emulated"])
def test_right_ones_pass(level):
    assert is_right(build.open_library(level, build.default_cache()))


@pytest.mark.parametrize("name", ["ml_pack", "ml_gemm", "ml_paged_attention"])
def test_wrong_ones_do_not(name):
    assert not is_right(Broken(build.open_library("portable", build.default_cache()), name, "portable"))


def test_a_wrong_one_gives_way(monkeypatch, caplog):
    """Tiles that compute wrongly leave the place to the dot products, those to torch's kernels."""
    right = build.open_library("portable", build.default_cache())
    asked = []

    def load(level=None):
        asked.append(level)
        return None if level == "none" else Broken(right, "ml_gemm", level or "amx")

    monkeypatch.setattr(cpu, "load", load)
    assert cpu.library.__wrapped__() is None
    assert asked == [None, "avx512", "none"] and "level amx computes wrongly" in caplog.text
    monkeypatch.setattr(cpu, "load", lambda level=None: right)
    assert cpu.library.__wrapped__() is right
