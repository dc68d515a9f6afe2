"""Memory for KV and adapters: what is asked for, what is taken unasked, what is refused."""

from __future__ import annotations

import pytest

from server.config import EngineConfig
from server.engine.sizing import size_memory
from server.errors import ConfigError

GIB = 1 << 30
BLOCK = 1 << 20


def config(device: str = "cpu", kv: int | None = None, adapters: int | None = None) -> EngineConfig:
    return EngineConfig(model="m", device=device, kv_memory=kv, adapter_memory=adapters)


def test_in_host_memory_shares_with_a_bound():
    small, large = (size_memory(config(), free, BLOCK) for free in (8 * GIB, 100 * GIB))
    assert (small.kv_bytes, small.adapter_bytes) == (2 * GIB, GIB)
    assert (large.kv_bytes, large.adapter_bytes) == (4 * GIB, 2 * GIB)
    assert small.num_blocks == 2048


@pytest.mark.parametrize("free", [2 * GIB, 8 * GIB, 24 * GIB, 80 * GIB, 125 * GIB])
@pytest.mark.parametrize("kv", [None, GIB // 2])
@pytest.mark.parametrize("adapters", [None, GIB // 4])
def test_on_a_gpu_the_kv_cache_gets_what_is_left(free, kv, adapters):
    memory = size_memory(config("cuda", kv, adapters), free, BLOCK)
    left = free - memory.kv_bytes - memory.adapter_bytes
    assert left >= max(free // 8, GIB), "nothing is left to work with"
    assert kv is None or memory.kv_bytes == kv
    assert adapters is None or memory.adapter_bytes == adapters
    assert kv is not None or left <= max(free // 8, GIB) + BLOCK, "memory that nobody uses"
    assert memory.adapter_bytes >= min(free // 16, GIB // 8) and memory.kv_bytes == memory.num_blocks * BLOCK


def test_what_does_not_fit_is_refused_by_name():
    for device in ("cpu", "cuda:1"):
        with pytest.raises(ConfigError, match=rf"--kv-memory 3.00 GiB: only 2.00 GiB are free on {device}"):
            size_memory(config(device, kv=3 * GIB), 2 * GIB, BLOCK)
        with pytest.raises(ConfigError, match=r"--adapter-memory 3.00 GiB"):
            size_memory(config(device, adapters=3 * GIB), 2 * GIB, BLOCK)
    with pytest.raises(ConfigError, match=r"together: only 4.00 GiB"):
        size_memory(config("cuda", kv=3 * GIB, adapters=2 * GIB), 4 * GIB, BLOCK)
    with pytest.raises(ConfigError, match="at least 2 are needed"):
        size_memory(config(kv=BLOCK), 4 * GIB, BLOCK)
    with pytest.raises(ConfigError, match="at least 2 are needed"):
        size_memory(config("cuda"), GIB // 2, BLOCK)
