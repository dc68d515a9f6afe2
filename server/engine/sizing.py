"""How much memory the KV cache and the adapters take: as asked, or a share of what is free beside the weights."""

from __future__ import annotations

from dataclasses import dataclass

from server.config import EngineConfig, format_bytes
from server.errors import ConfigError

# In host memory, which others use too: shares, and the most that is taken unasked.
KV_SHARE, MAX_KV_BYTES = 4, 4 << 30
ADAPTER_SHARE, MAX_ADAPTER_BYTES = 8, 2 << 30
# On a GPU what activations, graphs and libraries need stays free, and the KV cache gets what adapters leave.
WORK_SHARE, MIN_WORK_BYTES = 8, 1 << 30
GPU_ADAPTER_SHARE, MAX_GPU_ADAPTER_BYTES = 8, 16 << 30


@dataclass(frozen=True, slots=True)
class Memory:
    """What the memory flags came to."""

    num_blocks: int  # the dummy included
    kv_bytes: int
    adapter_bytes: int


def size_memory(config: EngineConfig, free: int, block_bytes: int) -> Memory:
    """`free` bytes are free on the device of `config`, a KV block takes `block_bytes`. Raises ConfigError."""
    for flag, num_bytes in (("--kv-memory", config.kv_memory), ("--adapter-memory", config.adapter_memory)):
        if num_bytes is not None and num_bytes > free:
            raise ConfigError(
                f"{flag} {format_bytes(num_bytes)}: only {format_bytes(free)} are free on {config.device}"
            )
    if config.device == "cpu":
        kv_bytes, adapter_bytes = min(free // KV_SHARE, MAX_KV_BYTES), min(free // ADAPTER_SHARE, MAX_ADAPTER_BYTES)
        if config.kv_memory is not None:
            kv_bytes = config.kv_memory
        if config.adapter_memory is not None:
            adapter_bytes = config.adapter_memory
    else:
        kv_bytes, adapter_bytes = _on_gpu(config, free)
    num_blocks = kv_bytes // block_bytes
    if num_blocks < 2:
        raise ConfigError(
            f"--kv-memory {format_bytes(kv_bytes)} holds {num_blocks} KV blocks of {format_bytes(block_bytes)}; "
            "at least 2 are needed (one stays empty)"
        )
    return Memory(num_blocks, num_blocks * block_bytes, adapter_bytes)


def _on_gpu(config: EngineConfig, free: int) -> tuple[int, int]:
    """(KV bytes, adapter bytes). What was asked for may go into what would be left free, but not beyond it."""
    usable = max(0, free - max(free // WORK_SHARE, MIN_WORK_BYTES))
    adapter_bytes = config.adapter_memory
    if adapter_bytes is None:
        adapter_bytes = min(usable // GPU_ADAPTER_SHARE, MAX_GPU_ADAPTER_BYTES)
        if config.kv_memory is not None:
            adapter_bytes = min(adapter_bytes, max(0, usable - config.kv_memory))
    kv_bytes = max(0, usable - adapter_bytes) if config.kv_memory is None else config.kv_memory
    if kv_bytes + adapter_bytes > free:
        raise ConfigError(
            f"--kv-memory {format_bytes(kv_bytes)} and --adapter-memory {format_bytes(adapter_bytes)} together: "
            f"only {format_bytes(free)} are free on {config.device}"
        )
    return kv_bytes, adapter_bytes
