"""A real server in its own processes over a tiny base, and clients that account for each request's end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from loadtest.adapters import write_random_adapter
from server.model.manifest import build_manifest
from tests.zoo import tiny_base

START_S, END_S = 120.0, 30.0
TEXT = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen liquor jugs"]


@dataclass(frozen=True)
class World:
    """A base, its adapters' folder and the cache, kept over restarts."""

    root: Path
    num_adapters: int

    @classmethod
    def make(cls, root: Path, num_adapters: int) -> World:
        """A llama of two layers with a byte-level tokenizer, and adapters a0, a1, ..."""
        torch.set_num_threads(1)
        tiny_base(root / "base", "llama", num_hidden_layers=2)
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        special = ["<pad>", "<s>", "</s>"]
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(TEXT, trainer)
        tokenizer.save(str(root / "base" / "tokenizer.json"))
        (root / "base" / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
        world = cls(root, num_adapters)
        for index in range(num_adapters):
            world.add_adapter(f"a{index}", seed=index)
        return world

    def add_adapter(self, name: str, seed: int) -> None:
        write_random_adapter(self.root / "adapters" / name, build_manifest(self.root / "base"), 8, seed=seed)

    @property
    def names(self) -> list[str]:
        """The base and its adapters."""
        return ["base", *(f"a{index}" for index in range(self.num_adapters))]


@dataclass
class TinyServer:
    """The processes: the API's, and its children found in /proc."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path  # standard output: the access log

    @property
    def exit_code(self) -> int:
        """Waits for the end."""
        return self.process.wait(END_S)

    def pid(self, what: str) -> int:
        """The process id of "api", "engine" or "worker"."""
        if what == "api":
            return self.process.pid
        module = {"engine": "server.engine.loop", "worker": "adapters_store.worker"}[what]
        for task in Path(f"/proc/{self.process.pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                with contextlib.suppress(OSError):
                    if module in Path(f"/proc/{child}/cmdline").read_text():
                        return int(child)
        raise AssertionError(f"no {what} process")

    def kill(self, what: str) -> None:
        os.kill(self.pid(what), signal.SIGKILL)

    def lines(self) -> list[dict]:
        """The access log so far."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics", timeout=30).text
        (line,) = [line for line in text.splitlines() if line.startswith((name + "{", name + " "))]
        return float(line.rsplit(" ", 1)[1])


@contextmanager
def tiny_server(world: World, *flags: str) -> Iterator[TinyServer]:
    """Serving when the block begins; whatever is left of it at the end is killed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "server", "serve", "--model", str(world.root / "base"), "--port", str(port)),
        *("--served-model-name", "base", "--adapters", str(world.root / "adapters"), "--threads", "1"),
        *("--cache-dir", str(world.root / "cache"), "--kv-memory", "4MiB", "--adapter-memory", "4MiB", *flags),
    ]
    log = world.root / f"access-{port}.log"
    with log.open("wb") as out, (world.root / f"server-{port}.log").open("wb") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors)
    server = TinyServer(process, f"http://127.0.0.1:{port}", log)
    try:
        _until_ready(server)
        yield server
    finally:
        process.kill()
        process.wait()


def _until_ready(server: TinyServer) -> None:
    deadline = time.monotonic() + START_S
    while True:
        assert server.process.poll() is None, f"ended with {server.process.returncode} before it served"
        assert time.monotonic() < deadline, "not ready in time"
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{server.url}/ready", timeout=5).status_code == 200:
                return
        time.sleep(0.05)


def until_gone(pids: list[int]) -> None:
    """Wait until these processes have ended (a zombie has)."""
    deadline = time.monotonic() + END_S
    while left := [pid for pid in pids if _lives(pid)]:
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.02)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@dataclass
class Load:
    """Streams that follow each other until stop(); `ends` counts how each of them ended.

    done: finish_reason and [DONE]. error:<code>: an error event and [DONE] on a stream that had begun.
    <status>:<code>: refused. lost: the connection broke. Anything else of a stream is an AssertionError.
    """

    server: TinyServer
    models: list[str]
    seed: int
    ends: Counter[str] = field(default_factory=Counter)
    num_begun: int = 0
    is_stopped: bool = False
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def start(self, num_clients: int) -> None:
        for index in range(num_clients):
            self._tasks.append(asyncio.create_task(self._client(random.Random(self.seed * 1000 + index))))

    async def until_done(self, count: int) -> None:
        """Wait until so many streams have ended well: the server is then at work."""
        async with asyncio.timeout(END_S):
            while self.ends["done"] < count:
                await asyncio.sleep(0.005)

    async def stop(self) -> None:
        """No new streams; waits for the end of the open ones."""
        self.is_stopped = True
        await asyncio.wait_for(asyncio.gather(*self._tasks), END_S)

    async def _client(self, rng: random.Random) -> None:
        async with httpx.AsyncClient(base_url=self.server.url, timeout=END_S, verify=False) as http:
            while not self.is_stopped:
                end = await self._stream(http, rng.choice(self.models), rng.randrange(1, 150))
                self.ends[end] += 1
                if end == "lost":
                    return

    async def _stream(self, http: httpx.AsyncClient, model: str, max_tokens: int) -> str:
        body = {"model": model, "prompt": TEXT[0], "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
        self.num_begun += 1
        try:
            async with http.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    return f"{response.status_code}:{json.loads(await response.aread())['error']['code']}"
                return end_of([line async for line in response.aiter_lines() if line])
        except httpx.TransportError:
            return "lost"


def end_of(lines: list[str]) -> str:
    """How a stream that was read to its end has ended; asserts that it did so exactly once."""
    assert lines[-1] == "data: [DONE]", lines[-3:]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    ends = [f"error:{chunk['error']['code']}" if "error" in chunk else "done" for chunk in chunks if _is_end(chunk)]
    assert len(ends) == 1 and _is_end(chunks[-1]), chunks
    return ends[0]


def _is_end(chunk: dict) -> bool:
    return "error" in chunk or chunk["choices"][0]["finish_reason"] is not None
