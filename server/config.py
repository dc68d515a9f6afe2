"""Configuration: what was asked for, as plain data. Resolution against a model happens in the engine."""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import Literal

import msgspec

from adapters_store.remote_names import NamePolicy
from server.errors import ConfigError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
KernelBackend = Literal["auto", "cpu", "torch", "triton", "cuda", "reference"]  # auto, and kernels/ops.py's names

_UNITS = {"": 1} | {letter: 1000**power for power, letter in enumerate("kmgt", 1)}
_UNITS |= {f"{letter}i": 1024**power for power, letter in enumerate("kmgt", 1)}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", re.IGNORECASE)


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """All that the engine process is told. None means: resolved at start, and printed."""

    model: str
    dtype: Dtype = "auto"
    device: str = "cpu"  # or cuda, cuda:N
    max_model_len: int | None = None
    max_num_seqs: int = 64  # requests in one step
    max_step_tokens: int | None = None  # rows in one step: decodes plus prefill chunks; None: by device, see sizing.py
    max_adapters_per_step: int = 64
    max_loaded_adapters: int = 1024  # slots in the table; bytes are the real bound
    max_lora_rank: int = 512  # the compiler refuses higher ones, and no graph is captured for them
    block_size: int = 16
    kv_memory: int | None = None  # bytes
    adapter_memory: int | None = None  # bytes of the device arena
    host_memory: int = 0  # bytes of the host tier; 0 = images are read straight into the arena
    max_queue_wait_s: float = 60.0
    enable_prefix_cache: bool = True
    threads: int | None = None
    cache_dir: str = ""
    backend: KernelBackend = "auto"
    enforce_eager: bool = False  # no graphs on a GPU
    steps_in_flight: int | None = None  # 2: one is scheduled while another runs; None: 1 on the CPU, 2 on a GPU


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the API process needs beside the engine's share."""

    engine: EngineConfig
    served_names: tuple[str, ...]
    adapter_roots: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = ()  # any of them opens the API; none: it is open
    allowed_origins: tuple[str, ...] = ()  # of browsers' pages
    max_queue_len: int = 4096  # requests that wait to run; more get 429
    shutdown_timeout_s: float = 25.0  # how long open requests may go on after SIGTERM; Kubernetes kills after 30
    engine_stall_timeout_s: float = 60.0
    has_access_log: bool = True
    adapter_metrics_top: int = 50  # adapters that have metrics of their own; all others have them together
    adapter_sources: tuple[str, ...] = ()  # URLs, after the folders
    allow_private_sources: bool = False  # http:// and addresses of this machine or network
    source_redirect_hosts: tuple[str, ...] = ()  # further hosts that web sources may redirect to
    names: NamePolicy = NamePolicy()  # of remote sources: how long answers hold, what holds without one
    disk_quota: int | None = None  # bytes of compiled images kept on disk; None = no bound
    raw_quota: int | None = None  # bytes of fetched files kept on disk; None = no bound
    lora_modules: tuple[tuple[str, str], ...] = ()  # (name, folder) pairs given by hand
    preload: tuple[str, ...] = ()  # adapters compiled before the server is ready
    pin: tuple[str, ...] = ()  # those that stay on the device too
    adapters_file: str | None = None  # what adapters there shall be, watched
    allow_runtime_loading: bool = False  # also without it when bound to loopback

    @property
    def may_load_adapters(self) -> bool:
        """Whether the routes that change adapters work."""
        return self.allow_runtime_loading or is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server bound to `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def parse_bytes(text: str) -> int:
    """Bytes of "2GiB", "512MB", "1.5g" or a plain number. Raises ConfigError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{text!r} is not a size: write bytes or a unit, as in 512MiB or 2GiB")
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


def format_bytes(count: float) -> str:
    """`count` bytes in the largest unit that keeps at least one whole, e.g. 1.5 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def default_cache_dir() -> Path:
    """$MULTILORA_CACHE, or ~/.cache/multilora."""
    configured = os.environ.get("MULTILORA_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "multilora"


def available_memory() -> int:
    """Bytes that can be taken without swapping, bounded by the cgroup's limit."""
    text = Path("/proc/meminfo").read_text()
    match = re.search(r"MemAvailable:\s+(\d+) kB", text)
    available = int(match[1]) * 1024 if match else 4 << 30
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
    except OSError:
        return available
    return available if limit == "max" else max(0, min(available, int(limit) - used))
