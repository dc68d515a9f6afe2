"""A server in its own processes over a real bucket that is reached through a proxy of faults, and traffic on it.

What each adapter must answer is what unmerged PEFT says.
"""

from __future__ import annotations

import asyncio
import json
import resource
import threading
import time
from collections import Counter
from collections.abc import Coroutine, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from adapters_store.sources.folder import CONFIG_FILE, WEIGHTS_FILE
from tests.e2e.tiny_server import TinyServer, World, tiny_server
from tests.store.fault_proxy import FaultProxy
from tests.store.s3_server import S3Server, s3_server
from tests.store.test_source_objects import use
from tests.zoo import LoraConfig, ZooAdapter, greedy_tokens, load_oracle_base, peft_oracle, save_adapter

BUCKET, PREFIX = "adapters", "team"
PROMPT = [5, 17, 99, 42, 7, 123]
NUM_TOKENS = 16
MISS_TTL_S, POLL_S = 1.0, 1.0
QUIET_S, END_S = 60.0, 60.0
POOLED = 3  # connections to a store: who asks for several names at a time keeps more than who asked for one
IMAGE = "x-multilora-image-key"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Outcome(NamedTuple):
    """How a request ended."""

    status: int
    code: str
    """of the error; empty for an answer"""
    token_ids: list[int]
    image_key: str

    @property
    def told(self) -> tuple[int, str]:
        return self.status, self.code


class Network:
    """The proxy before the bucket, on a loop in a thread of its own: tests wait for servers, it never waits."""

    def __init__(self, upstream: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="network", daemon=True)
        self._thread.start()
        self.proxy = FaultProxy(upstream)
        self.call(self.proxy.listen())

    def call(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def ignore(self) -> None:
        """Nobody who connects gets any answer, until `listen`."""
        self._loop.call_soon_threadsafe(self.proxy.ignore)

    def refuse(self) -> None:
        """Who connects is refused, until `listen`."""
        self._loop.call_soon_threadsafe(self.proxy.refuse)

    def listen(self) -> None:
        """As before any fault."""
        self.proxy.faults.clear()
        self.proxy.always.clear()
        self.call(self.proxy.listen())

    def close(self) -> None:
        async def end() -> None:
            self.proxy.refuse()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self.call(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()


@dataclass
class StoreWorld:
    """The bucket, the network before it, what PEFT says of each adapter in it, and one server after another."""

    world: World
    s3: S3Server
    network: Network
    flags: tuple[str, ...] = ()
    answers: dict[str, list[int]] = field(default_factory=dict)
    server_stack: ExitStack = field(default_factory=ExitStack)
    running: TinyServer | None = None

    @property
    def server(self) -> TinyServer:
        assert self.running is not None
        return self.running

    @property
    def cache(self) -> Path:
        return self.world.root / "cache"

    def start(self) -> None:
        """A server over the cache as it is, in place of the one that runs."""
        self.server_stack.close()
        flags = ["--adapter-source", f"s3://{BUCKET}/{PREFIX}", "--adapter-source-allow-private"]
        flags += ["--adapter-poll-interval", str(POLL_S), "--adapter-miss-ttl", str(MISS_TTL_S)]
        self.running = self.server_stack.enter_context(
            tiny_server(self.world, *flags, "--disable-access-log", *self.flags)
        )

    def put(self, *names: str, rank: int = 8) -> None:
        """Adapters of random content, each its own."""
        base = load_oracle_base(self.world.root / "base")
        for name in names:
            made = ZooAdapter(name, self.world.root / "made" / name)
            config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=TARGETS)
            save_adapter(base, config, made.path, seed=len(self.answers), scale=1.0, dtype=torch.float32)
            with peft_oracle(base, made) as oracle:
                self.answers[name] = greedy_tokens(oracle, PROMPT, NUM_TOKENS)
            files = {file: (made.path / file).read_bytes() for file in (CONFIG_FILE, WEIGHTS_FILE)}
            self.s3.put(BUCKET, f"{PREFIX}/{name}", files)
        self.answers["base"] = greedy_tokens(base, PROMPT, NUM_TOKENS)
        assert len(set(map(tuple, self.answers.values()))) == len(self.answers), "each answers its own way"

    async def ask(self, http: httpx.AsyncClient, name: str, *, streams: bool = False) -> Outcome:
        """One request to its end. An answer's tokens are PEFT's, or it is an AssertionError."""
        body = {"model": name, "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
        body |= {"return_token_ids": True, "stream": streams}
        async with http.stream("POST", f"{self.server.url}/v1/completions", json=body, timeout=90) as response:
            lines = (await response.aread()).decode()
        if response.status_code != 200:
            return Outcome(response.status_code, json.loads(lines)["error"]["code"], [], "")
        if streams:
            events = [line.removeprefix("data: ") for line in lines.splitlines() if line]
            assert events[-1] == "[DONE]", events
            chunks = [json.loads(event) for event in events[:-1]]
            assert not [chunk for chunk in chunks if "error" in chunk], chunks
            token_ids = [
                token for chunk in chunks for choice in chunk["choices"] for token in choice.get("token_ids") or ()
            ]
        else:
            token_ids = json.loads(lines)["choices"][0]["token_ids"]
        assert token_ids == self.answers[name], f"{name} did not answer as PEFT does"
        return Outcome(200, "", token_ids, response.headers.get(IMAGE, ""))

    # --- what is seen from outside ---

    def samples(self, name: str) -> dict[str, float]:
        """A metric's values by tier ("" where it has none)."""
        text = httpx.get(f"{self.server.url}/metrics", timeout=30).text
        return {
            sample.labels.get("tier", ""): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name
        }

    def counts(self) -> tuple[float, float]:
        """How many fetches and compiles there were."""
        names = ("multilora_adapter_fetches_total", "multilora_adapter_compiles_total")
        fetches, compiles = (self.samples(name)[""] for name in names)
        return fetches, compiles

    def image(self, image_key: str) -> Path:
        """Where the image is on disk."""
        return self.cache / "images" / f"{image_key}.safetensors"

    def raw(self, name: str) -> Path:
        """Where the files of a name are, as fetched."""
        records = {
            path: json.loads(path.read_bytes())["version"]["name"] for path in self.cache.glob("raw/*/record.json")
        }
        (found,) = [path.parent for path, held in records.items() if held == name]
        return found

    def open_files(self) -> int:
        """Descriptors of the API process."""
        return len(list(Path(f"/proc/{self.server.pid('api')}/fd").iterdir()))

    def what_is_left(self) -> dict[str, object]:
        """Of requests that have ended: nothing."""
        listed = httpx.get(f"{self.server.url}/v1/adapters", timeout=30).json()["data"]
        left: dict[str, object] = {
            "running": self.samples("vllm:num_requests_running")[""],
            "waiting": self.samples("vllm:num_requests_waiting")[""],
            "leases": sum(self.samples("multilora_tier_leases").values()),
            "under way": sum(self.samples("multilora_tier_under_way").values()),
            "fetching": [item["id"] for item in listed if "fetching" in json.dumps(item)],
            "temporary files": [str(path) for path in self.cache.rglob("*.tmp")],
        }
        return {what: found for what, found in left.items() if found}

    def until_quiet(self, open_files: int) -> None:
        """Wait until nothing is left of what ran, and no more files are open than there were, but for POOLED ones."""
        deadline = time.monotonic() + QUIET_S
        while (left := self.what_is_left()) or (now := self.open_files()) > open_files + POOLED:
            assert time.monotonic() < deadline, left or f"{now} open files, {open_files} before"
            time.sleep(0.1)

    async def until(self, tier: str, metric: str, value: float) -> None:
        """Wait until a tier's gauge has this value."""
        async with asyncio.timeout(QUIET_S):
            while (await asyncio.to_thread(self.samples, metric))[tier] != value:
                await asyncio.sleep(0.02)


class Traffic:
    """Requests on sound adapters, one after another from each of some clients; every one must be answered right."""

    def __init__(self, store: StoreWorld, names: list[str]) -> None:
        self.store = store
        self.names = names
        self.answered: Counter[str] = Counter()
        self.http = httpx.AsyncClient()
        self._is_over = False
        self._clients: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Traffic:
        for name in self.names:  # here before anything breaks
            assert (await self.store.ask(self.http, name)).told == (200, "")
        self._clients = [asyncio.create_task(self._client(index)) for index in range(len(self.names))]
        return self

    async def __aexit__(self, *failure: object) -> None:
        if failure[0] is None:
            async with asyncio.timeout(END_S):
                while min(self.answered[name] for name in self.names) < 3 and not any(
                    client.done() for client in self._clients
                ):
                    await asyncio.sleep(0.05)
        self._is_over = True
        ends = await asyncio.gather(*self._clients, return_exceptions=True)
        await self.http.aclose()
        if failure[0] is None:
            wrong = [end for end in ends if end is not None]
            assert not wrong, wrong

    async def _client(self, index: int) -> None:
        name = self.names[index]
        while not self._is_over:
            outcome = await self.store.ask(self.http, name, streams=bool(index % 2))
            assert outcome.told == (200, ""), f"{name}, which nothing was done to: {outcome.told}"
            self.answered[name] += 1
            await asyncio.sleep(0.05)


@contextmanager
def store_world(root: Path, *flags: str) -> Iterator[StoreWorld]:
    """Everything but the server, which is started by `start`."""
    world = World.make(root, 0)
    (root / "adapters").mkdir()
    (root / "s3").mkdir()
    with pytest.MonkeyPatch.context() as patch, s3_server(root / "s3") as s3:
        network = Network(s3.port)
        use(patch, network.proxy.url)
        store = StoreWorld(world, s3, network, flags)
        try:
            yield store
        finally:
            store.server_stack.close()
            network.close()


@contextmanager
def file_size_limit(pid: int, num_bytes: int) -> Iterator[None]:
    """No file of a process can grow beyond this: what writes more gets an OSError, as on a disk that is full.

    The kernel does it to that process alone, at once and without rights that only some machines give.
    """
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
