"""How large a step may be, and how much memory the KV cache and the adapters take: as asked, or by the device."""

from __future__ import annotations

from dataclasses import dataclass

from adapters_store.manifest import BaseManifest
from server.config import EngineConfig, format_bytes
from server.errors import ConfigError

# In host memory, which others use too: shares, and the most that is taken unasked.
KV_SHARE, MAX_KV_BYTES = 4, 4 << 30
ADAPTER_SHARE, MAX_ADAPTER_BYTES = 8, 2 << 30
# On a GPU what steps, graphs and libraries need stays free, and the KV cache gets what adapters leave.
WORK_SHARE, LIBRARY_BYTES = 8, 1 << 29
GPU_ADAPTER_SHARE, MAX_GPU_ADAPTER_BYTES = 8, 16 << 30

# Rows of a step, unasked: as many as make a prompt's chunk bound by computing, not by reading the weights.
STEP_TOKENS, GPU_STEP_TOKENS = 512, 2048
MAX_PROMPT_LOGITS = 1 << 25  # elements: prompt logprobs may add so many logits to a step (64 MiB in bf16)
SAMPLING_BYTES = 1 << 29  # of the sampler's temporaries, a chunk of rows at a time


@dataclass(frozen=True, slots=True)
class Memory:
    """What the memory flags came to."""

    num_blocks: int  # the dummy included
    kv_bytes: int
    adapter_bytes: int


def max_step_tokens(config: EngineConfig) -> int:
    """Rows of a step: as asked; else by the device, and at least one for each request. Raises ConfigError."""
    if config.max_step_tokens is not None:
        if config.max_step_tokens < config.max_num_seqs:
            raise ConfigError(
                f"--max-num-batched-tokens {config.max_step_tokens} is less than --max-num-seqs "
                f"{config.max_num_seqs}: a step needs a row for each running request"
            )
        return config.max_step_tokens
    return max(STEP_TOKENS if config.device == "cpu" else GPU_STEP_TOKENS, config.max_num_seqs)


def step_bytes(config: EngineConfig, manifest: BaseManifest, itemsize: int) -> int:
    """What a step of the most rows needs at most beside weights, caches and adapters, in values of `itemsize` bytes.

    That is, as if nothing of a layer were freed before its end: inputs and outputs of its projections, with their
    activations and the norms' fp32; then the logits, with two fp32 copies of those that are sampled from.
    """
    widths: dict[str, int] = {}
    for site in manifest.sites:
        if site.kind == "linear":
            layer = site.name.partition(".")[0]
            widths[layer] = widths.get(layer, 0) + site.in_features + site.out_features
    row_bytes = max(widths.values(), default=0) * itemsize + 4 * manifest.hidden_size * 4
    logits = config.max_num_seqs * manifest.vocab_size
    prompt_logits = max(MAX_PROMPT_LOGITS, manifest.vocab_size)
    return max_step_tokens(config) * row_bytes + logits * (itemsize + 2 * 4) + prompt_logits * itemsize + SAMPLING_BYTES


def size_memory(config: EngineConfig, free: int, block_bytes: int, work_bytes: int) -> Memory:
    """`free` bytes are free on the device of `config`, a KV block takes `block_bytes`; a GPU's steps need `work_bytes`.

    Raises ConfigError.
    """
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
        kv_bytes, adapter_bytes = _on_gpu(config, free, work_bytes)
    num_blocks = kv_bytes // block_bytes
    if num_blocks < 2:
        raise ConfigError(
            f"--kv-memory {format_bytes(kv_bytes)} holds {num_blocks} KV blocks of {format_bytes(block_bytes)}; "
            "at least 2 are needed (one stays empty)"
        )
    return Memory(num_blocks, num_blocks * block_bytes, adapter_bytes)


def _on_gpu(config: EngineConfig, free: int, work_bytes: int) -> tuple[int, int]:
    """(KV bytes, adapter bytes). What was asked for may go into what would be left free, but not beyond it."""
    usable = max(0, free - max(free // WORK_SHARE, LIBRARY_BYTES + work_bytes))
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
