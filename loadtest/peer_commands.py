"""How each server is started for `multilora bench peers`, and how it is asked."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

from loadtest.dialects import Dialect
from loadtest.launch import launched

BASE = "base"


@dataclass(frozen=True)
class PeerOptions:
    """What a run is over, and where the peers are. Paths that are None: that peer is not there."""

    model: Path
    adapters: tuple[Path, ...]  # folders, by name
    out: Path
    prompt_tokens: int
    output_tokens: int
    highest_id: int  # of prompts
    min_requests: int
    max_adapters: int  # of any scenario
    max_concurrency: int
    max_rank: int
    threads: int
    timeout_s: float
    vllm_python: str | None = None
    llama_server: str | None = None
    llama_model: Path | None = None
    llama_adapters: tuple[Path, ...] = ()  # GGUF files, by name
    peft_python: str | None = None
    flags: tuple[tuple[str, str], ...] = ()  # (peer, more of its command line)
    preload: str = ""  # libraries for vLLM's process (LD_PRELOAD)

    @property
    def context_tokens(self) -> int:
        """Of one request, with some room."""
        return self.prompt_tokens + self.output_tokens + 16

    def more(self, peer: str) -> list[str]:
        """What a person wants on a peer's command line."""
        return shlex.split(dict(self.flags).get(peer, ""))


@dataclass(frozen=True)
class Peer:
    """One server."""

    name: str
    missing: Callable[[PeerOptions], str]  # what it needs and hasn't; "" if it can be run
    command: Callable[[PeerOptions, int, int], list[str]]  # (options, port, adapters)
    env: Callable[[PeerOptions], dict[str, str]] = lambda options: {}
    kind: str = "openai"  # of its dialect

    def serve(
        self, options: PeerOptions, port: int, num_adapters: int, url: str, log: Path
    ) -> AbstractContextManager[Popen[bytes]]:
        """Started until it answers. Errors: RuntimeError."""
        return launched(self.command(options, port, num_adapters), url, log, self.env(options))

    def dialect(self, options: PeerOptions, num_adapters: int) -> Dialect:
        """How it is asked."""
        return Dialect(self.kind, BASE, [path.name for path in options.adapters[:num_adapters]])


def _lacks_adapters(options: PeerOptions) -> str:
    found, needed = len(options.adapters), options.max_adapters
    return f"{needed} adapters, and --adapters has {found}" if found < needed else ""


def _ours(options: PeerOptions, port: int, num_adapters: int) -> list[str]:
    adapters = ["--adapters", str(options.adapters[0].parent)] if num_adapters else []
    return [
        *(sys.executable, "-m", "server", "serve", "--model", str(options.model), *adapters),
        *("--port", str(port), "--served-model-name", BASE, "--cache-dir", str(options.out / "cache")),
        *("--threads", str(options.threads), "--disable-access-log"),
        *options.more("ours"),
    ]


def _vllm(options: PeerOptions, port: int, num_adapters: int) -> list[str]:
    lora: list[str] = []
    if num_adapters:
        named = [f"{path.name}={path.resolve()}" for path in options.adapters[:num_adapters]]
        number, rank = str(num_adapters), str(options.max_rank)
        lora = ["--enable-lora", "--max-loras", number, "--max-cpu-loras", number, "--max-lora-rank", rank]
        lora += ["--lora-modules", *named]
    return [
        *(options.vllm_python or "", "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(options.model), "--served-model-name", BASE, "--dtype", "bfloat16"),
        *("--host", "127.0.0.1", "--port", str(port), "--max-num-seqs", str(options.max_concurrency)),
        *("--max-model-len", str(options.context_tokens)),
        *lora,
        *options.more("vllm"),
    ]


def _vllm_env(options: PeerOptions) -> dict[str, str]:
    env = {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "2")}  # GiB
    return env | ({"LD_PRELOAD": options.preload} if options.preload else {})


def _llamacpp(options: PeerOptions, port: int, num_adapters: int) -> list[str]:
    # One value with commas: of repeated flags only the last would count.
    files = ",".join(str(path) for path in options.llama_adapters[:num_adapters])
    slots = options.max_concurrency
    return [
        *(options.llama_server or "", "--model", str(options.llama_model), "--alias", BASE),
        *("--host", "127.0.0.1", "--port", str(port), "--parallel", str(slots)),
        *("--ctx-size", str(slots * options.context_tokens), "--threads", str(options.threads)),
        *(("--lora", files, "--lora-init-without-apply") if files else ()),
        *options.more("llamacpp"),
    ]


def _llamacpp_missing(options: PeerOptions) -> str:
    if not options.llama_server:
        return "--llama-server"
    if not options.llama_model:
        return "--llama-model"
    found = len(options.llama_adapters)
    return f"{options.max_adapters} GGUF adapters, not {found}" if found < options.max_adapters else ""


PEERS = {
    peer.name: peer
    for peer in (
        Peer("ours", _lacks_adapters, _ours),
        Peer("vllm", lambda o: "" if o.vllm_python else "--vllm-python", _vllm, _vllm_env),
        Peer("llamacpp", _llamacpp_missing, _llamacpp, kind="llamacpp"),
        Peer("peft", lambda o: "" if o.peft_python else "--peft-python", lambda options, port, num_adapters: []),
    )
}
