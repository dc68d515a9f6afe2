"""Every test that takes `backend` runs once per registered backend."""

from __future__ import annotations

import pytest

from kernels.ops import Backend, backends, get_backend


@pytest.fixture(params=backends())
def backend(request: pytest.FixtureRequest) -> Backend:
    return get_backend(request.param)
