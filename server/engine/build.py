"""Putting an engine together: named steps, each resolving what the configuration left open."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from adapters_store.cpus import available_cpus
from adapters_store.host import HostCache
from adapters_store.manifest import BaseManifest, write_manifest
from kernels.ops import DEFAULT_BACKEND, Backend, backends, get_backend
from kernels.triton import is_interpreted
from server.adapters.arena import AdapterArena
from server.adapters.layer import StepState
from server.adapters.pinned import PinnedPool
from server.adapters.slots import AdapterSlots, SlotDevice
from server.config import EngineConfig, available_memory, default_cache_dir, format_bytes
from server.engine.batch import BatchBuilder
from server.engine.blocks import BlockPool
from server.engine.core import EngineCore
from server.engine.device import Device, open_device
from server.engine.limits import SchedulerLimits
from server.engine.messages import EngineReady
from server.engine.scheduler import Scheduler
from server.engine.sizing import MAX_PROMPT_LOGITS, Memory, max_step_tokens, size_memory, step_bytes
from server.errors import ConfigError
from server.model.forward import Forward, forward_of
from server.model.graphs import GraphForward, GraphShape
from server.model.kv import KVCache
from server.model.loader import LoadedBase, load_base
from server.model.manifest import build_manifest
from server.model.runner import ModelRunner
from server.model.surgery import adapt
from server.model.warmup import warm_up

logger = logging.getLogger(__name__)

MIXED_PREFILL_SHARE = 8  # of a step's rows, for prompts while others decode: smaller chunks read an adapter more often
GRAPH_BACKENDS = ("triton", "cuda")  # their kernels read what changes from step to step in device memory


def build(
    config: EngineConfig,
    *,
    device_of: Callable[[AdapterArena], SlotDevice] = lambda arena: arena,
    open_device: Callable[[str], Device] = open_device,
) -> EngineCore:
    """Load the base, size the memory, wire the parts. Raises ConfigError and ModelUnsupported.

    `device_of`: for measurements, what the slots see in place of the arena, such as one whose loads take longer.
    `open_device`: for tests, what gives the device by its name.
    """
    torch.set_num_threads(config.threads or available_cpus())
    device = open_device(config.device)
    backend_name, backend = _backend(config, device)
    max_rows = max_step_tokens(config)
    manifest, manifest_path = _manifest(config)
    base = load_base(config.model, config.dtype, str(device.where), config.max_model_len)
    memory = size_memory(
        config,
        _free_bytes(base),
        base.kv_shape.bytes_per_block(config.block_size, base.dtype),
        step_bytes(config, manifest, base.dtype.itemsize),
    )
    max_slots = config.max_loaded_adapters + 1  # slot 0 is the base's
    host = _host_tier(config, device)
    arena = AdapterArena(
        manifest,
        arena_bytes=memory.adapter_bytes,
        max_slots=max_slots,
        dtype=base.dtype,
        device=base.device,
        host=host,
        streams=device.streams,
    )
    step = StepState(weights=arena.weights, ops=backend)
    adapt(base.model, manifest, step)
    if device.where.type == "cuda":
        torch.cuda.empty_cache()  # the unpacked projections' memory, in pieces that the KV cache could not use
    slots = AdapterSlots(arena_bytes=memory.adapter_bytes, max_slots=max_slots, device=device_of(arena))
    kv = KVCache(base.kv_shape, memory.num_blocks, config.block_size, base.dtype, base.device)
    limits = _limits(config, base, manifest)
    forward = forward_of(base, manifest, step, kv, backend, max_rows)
    if backend_name in GRAPH_BACKENDS:
        forward = _made_ready(forward, config, base, manifest, step, device)
    runner = ModelRunner(
        forward,
        step,
        eos_token_ids=base.eos_token_ids,
        block_size=config.block_size,
        max_rows=max_rows,
        device=base.device,
        holds=slots.holds,
        steps_in_flight=limits.steps_in_flight,
        num_places=limits.num_places,
    )
    blocks = BlockPool(memory.num_blocks, config.block_size, has_prefix_cache=config.enable_prefix_cache)
    return EngineCore(
        ready=_ready(config, base, manifest, manifest_path, memory, device),
        scheduler=Scheduler(limits, blocks, slots),
        batches=BatchBuilder(
            max_rows=max_rows,
            max_requests=config.max_num_seqs,
            max_blocks_per_seq=-(-base.max_model_len // config.block_size),
            block_size=config.block_size,
        ),
        runner=runner,
        slots=slots,
        phases_of=arena.phases,
        host=host,
        warm=arena.warm if host is not None else None,
        on_close=arena.close,
        steps_in_flight=limits.steps_in_flight,
    )


def _manifest(config: EngineConfig) -> tuple[BaseManifest, Path]:
    """The base's manifest, and the file of it that the compiler worker reads."""
    cache = Path(config.cache_dir or default_cache_dir())
    folder = cache / "manifests"
    for private in (cache, folder):  # `parents` would make the first one for everyone
        private.mkdir(parents=True, exist_ok=True, mode=0o700)
    manifest = build_manifest(config.model, config.dtype, cache)
    path = folder / f"{manifest.digest[:32]}-{manifest.dtype}.json"
    write_manifest(manifest, path)
    return manifest, path


def _backend(config: EngineConfig, device: Device) -> tuple[str, Backend]:
    """The one asked for; unasked, the native kernels of the device where this machine has them. Its name before it."""
    name: str = config.backend
    if name == "cpu" and config.device != "cpu":
        raise ConfigError(f"--backend cpu does not run on --device {config.device}; leave it out, or use triton")
    if device.streams is None and (name == "cuda" or (name == "triton" and not is_interpreted())):
        raise ConfigError(
            f"--backend {name} does not run on --device {config.device}; leave it out, or use --device cuda"
        )
    try:
        if name == "auto" and config.device != "cpu":
            name = "triton"
        elif name == "auto":
            name = "cpu" if "cpu" in backends() else DEFAULT_BACKEND
        return name, get_backend(name)
    except ValueError as error:
        raise ConfigError(f"--backend {name}: {error}") from None


def _host_tier(config: EngineConfig, device: Device) -> HostCache | None:
    if not config.host_memory:
        return None
    if device.streams is None:
        return HostCache(config.host_memory)
    return HostCache(config.host_memory, PinnedPool(device.streams.pinned(config.host_memory)).allocate)


def _free_bytes(base: LoadedBase) -> int:
    """What is free now that the weights are loaded."""
    return available_memory() if base.device.type == "cpu" else int(torch.cuda.mem_get_info(base.device)[0])


def _made_ready(
    forward: Forward, config: EngineConfig, base: LoadedBase, manifest: BaseManifest, step: StepState, device: Device
) -> Forward:
    """Where the device has graphs: the forward pass with its kernels compiled and its decode steps captured."""
    if device.new_graph is None:
        return forward
    shape = GraphShape(
        max_num_seqs=config.max_num_seqs,
        max_rank=config.max_lora_rank,
        max_blocks=-(-base.max_model_len // config.block_size),
        block_size=config.block_size,
        vocab_size=manifest.vocab_size,
        dtype=base.dtype,
        device=base.device,
    )
    max_rows = max_step_tokens(config)
    max_head_rows = min(max_rows, config.max_num_seqs + _max_logprob_rows(manifest))
    warm_up(forward, step, shape, max_rows, max_head_rows)
    return forward if config.enforce_eager else GraphForward(forward, step, shape, device.new_graph)


def _limits(config: EngineConfig, base: LoadedBase, manifest: BaseManifest) -> SchedulerLimits:
    max_rows = max_step_tokens(config)
    return SchedulerLimits(
        max_num_seqs=config.max_num_seqs,
        max_step_tokens=max_rows,
        max_mixed_prefill=max(1, max_rows // MIXED_PREFILL_SHARE),
        max_adapters_per_step=config.max_adapters_per_step,
        max_model_len=base.max_model_len,
        eos_token_ids=base.eos_token_ids,
        max_logprob_rows=_max_logprob_rows(manifest),
        max_wait_s=config.max_queue_wait_s,
        rope_switch=base.rope_switch,
        steps_in_flight=config.steps_in_flight or (1 if base.device.type == "cpu" else 2),
    )


def _max_logprob_rows(manifest: BaseManifest) -> int:
    """Rows of a step that give logprobs of prompts, at most."""
    return max(1, MAX_PROMPT_LOGITS // manifest.vocab_size)


def _ready(
    config: EngineConfig,
    base: LoadedBase,
    manifest: BaseManifest,
    manifest_path: Path,
    memory: Memory,
    device: Device,
) -> EngineReady:
    """What was resolved, for the API process and the start banner."""
    tokens_in_flight = (memory.num_blocks - 1) * config.block_size
    rank_16 = adapter_image_bytes(manifest, 16, base.dtype.itemsize)
    facts = (
        (
            "base",
            f"{config.model} ({manifest.model_type}, {manifest.dtype}, {format_bytes(base.weights_bytes)})",
        ),
        *device.facts,
        ("context", f"{base.max_model_len} tokens"),
        (
            "KV cache",
            f"{format_bytes(memory.kv_bytes)}: {memory.num_blocks - 1} blocks of {config.block_size}, "
            f"{tokens_in_flight} tokens in flight",
        ),
        (
            "adapters",
            f"{format_bytes(memory.adapter_bytes)}: {memory.adapter_bytes // max(1, rank_16)} of rank 16 "
            f"(all linear, {format_bytes(rank_16)} each), {config.max_adapters_per_step} in one step",
        ),
        (
            "step",
            f"{config.max_num_seqs} requests, {max_step_tokens(config)} rows, {torch.get_num_threads()} threads "
            f"(CPU quota: {available_cpus()})",
        ),
    )
    return EngineReady(
        manifest_path=str(manifest_path),
        max_model_len=base.max_model_len,
        vocab_size=manifest.vocab_size,
        eos_token_ids=base.eos_token_ids,
        num_kv_blocks=memory.num_blocks,
        block_size=config.block_size,
        adapter_bytes=memory.adapter_bytes,
        weights_bytes=base.weights_bytes,
        host_bytes=config.host_memory,
        facts=facts,
    )


def adapter_image_bytes(manifest: BaseManifest, rank: int, itemsize: int) -> int:
    """Bytes of an adapter of `rank` on every linear of the body (pads, below 1 %, left out)."""
    sizes = (site.in_features + site.out_features for site in manifest.sites if site.kind == "linear")
    return rank * itemsize * sum(sizes)
