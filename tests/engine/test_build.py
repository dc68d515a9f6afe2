"""Putting an engine together: what is refused, and when."""

from __future__ import annotations

from typing import get_args

import pytest

import kernels.cpu
from kernels import ops
from server.config import EngineConfig, KernelBackend
from server.engine.build import build
from server.errors import ConfigError


def test_the_command_line_has_every_backend_and_auto():
    assert set(get_args(KernelBackend)) == {"auto", *ops.MODULES}


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_a_level_that_there_is_not_is_refused_before_the_base_is_looked_at(monkeypatch, tmp_path, backend):
    monkeypatch.setattr(kernels.cpu, "library", kernels.cpu.library.__wrapped__)
    monkeypatch.setenv("MULTILORA_CPU_KERNELS", "bogus")
    with pytest.raises(ConfigError, match="MULTILORA_CPU_KERNELS: unknown level 'bogus'"):
        build(EngineConfig(model=str(tmp_path / "none"), threads=1, backend=backend))
