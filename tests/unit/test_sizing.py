"""Memory for KV and adapters: what is asked for, what is taken unasked, what is refused."""

from __future__ import annotations

import pytest

from adapters_store.manifest import BaseManifest, Site
from server.config import EngineConfig
from server.engine.sizing import LIBRARY_BYTES, max_step_tokens, size_memory, step_bytes
from server.errors import ConfigError

GIB = 1 << 30
BLOCK = 1 << 20


def config(device: str = "cpu", kv: int | None = None, adapters: int | None = None) -> EngineConfig:
    return EngineConfig(model="m", device=device, kv_memory=kv, adapter_memory=adapters)


def test_in_host_memory_shares_with_a_bound():
    small, large = (size_memory(config(), free, BLOCK, GIB) for free in (8 * GIB, 100 * GIB))
    assert (small.kv_bytes, small.adapter_bytes) == (2 * GIB, GIB)
    assert (large.kv_bytes, large.adapter_bytes) == (4 * GIB, 2 * GIB)
    assert small.num_blocks == 2048


@pytest.mark.parametrize("free", [2 * GIB, 8 * GIB, 24 * GIB, 80 * GIB, 125 * GIB])
@pytest.mark.parametrize("kv", [None, GIB // 2])
@pytest.mark.parametrize("adapters", [None, GIB // 4])
@pytest.mark.parametrize("work", [GIB // 2, GIB])
def test_on_a_gpu_the_kv_cache_gets_what_is_left(free, kv, adapters, work):
    memory = size_memory(config("cuda", kv, adapters), free, BLOCK, work)
    left = free - memory.kv_bytes - memory.adapter_bytes
    needed = max(free // 8, LIBRARY_BYTES + work)
    asked = (kv or 0) + (adapters or 0)
    assert left >= min(needed, free - asked), "nothing is left to work with"
    assert kv is None or memory.kv_bytes == kv
    assert adapters is None or memory.adapter_bytes == adapters
    assert kv is not None or left <= needed + BLOCK, "memory that nobody uses"
    assert memory.adapter_bytes >= min(max(0, free - needed - (kv or 0)) // 16, GIB // 8)
    assert memory.kv_bytes == memory.num_blocks * BLOCK


def test_what_does_not_fit_is_refused_by_name():
    for device in ("cpu", "cuda:1"):
        with pytest.raises(ConfigError, match=rf"--kv-memory 3.00 GiB: only 2.00 GiB are free on {device}"):
            size_memory(config(device, kv=3 * GIB), 2 * GIB, BLOCK, GIB)
        with pytest.raises(ConfigError, match=r"--adapter-memory 3.00 GiB"):
            size_memory(config(device, adapters=3 * GIB), 2 * GIB, BLOCK, GIB)
    with pytest.raises(ConfigError, match=r"together: only 4.00 GiB"):
        size_memory(config("cuda", kv=3 * GIB, adapters=2 * GIB), 4 * GIB, BLOCK, GIB)
    with pytest.raises(ConfigError, match="at least 2 are needed"):
        size_memory(config(kv=BLOCK), 4 * GIB, BLOCK, GIB)
    with pytest.raises(ConfigError, match="at least 2 are needed"):
        size_memory(config("cuda"), GIB // 2, BLOCK, GIB)


def test_rows_of_a_step_by_the_device():
    def rows(device: str, **options: int) -> int:
        return max_step_tokens(EngineConfig(model="m", device=device, **options))

    assert [rows("cpu"), rows("cuda"), rows("cuda:1")] == [512, 2048, 2048]
    assert [rows("cpu", max_num_seqs=700), rows("cuda", max_num_seqs=4096)] == [700, 4096]
    assert [rows("cuda", max_step_tokens=100), rows("cpu", max_step_tokens=5000)] == [100, 5000]


def test_fewer_rows_than_requests_are_refused_by_their_flags():
    with pytest.raises(ConfigError, match=r"--max-num-batched-tokens 10 is less than --max-num-seqs 50"):
        max_step_tokens(EngineConfig(model="m", max_num_seqs=50, max_step_tokens=10))


def test_what_a_step_of_an_8b_model_needs():
    """Of 32 layers only the widest counts; more rows, requests and vocabulary need more."""
    widths = {"q": (4096, 4096), "k": (4096, 1024), "gate": (4096, 14336), "down": (14336, 4096)}
    sites = tuple(
        Site(f"{layer}.{name}", f"m.{layer}.{name}", "linear", k, n, f"{layer}.{name}", 0, 0)
        for layer in range(32)
        for name, (k, n) in widths.items()
    )
    sites += (Site("lm_head", "lm_head", "head", 4096, 128_256, "lm_head", 0, 0),)
    manifest = BaseManifest("d", "m", "llama", "bfloat16", 128_256, 4096, 32, False, "", sites)
    bare = {"model": "m", "device": "cuda", "max_num_seqs": 64}
    num_bytes = step_bytes(EngineConfig(**bare), manifest, 2)
    one_more = step_bytes(EngineConfig(**bare, max_step_tokens=2049), manifest, 2) - num_bytes
    assert one_more == 2 * (8192 + 5120 + 2 * 18432) + 16 * 4096
    assert GIB // 2 < num_bytes < 2 * GIB
    assert step_bytes(EngineConfig(**{**bare, "max_num_seqs": 65}), manifest, 2) - num_bytes == 128_256 * 10
