"""Every test that takes `backend` runs once per registered backend."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from kernels.ops import Backend, backends, get_backend
from tests.kernels.on_cuda import OnCuda


@pytest.fixture(params=backends())
def backend(request: pytest.FixtureRequest) -> Backend:
    found = get_backend(request.param)
    if request.param in ("triton", "cuda") and torch.cuda.is_available() and not _is_interpreted():
        return cast(Backend, OnCuda(found))
    return found


def _is_interpreted() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)
