"""A real server on a loopback port around a scripted engine, a real tokenizer and a real catalog."""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai
import pytest
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from adapters_store.catalog import Catalog
from adapters_store.sources.local import LocalSource
from adapters_store.sources.named import NamedSource
from server.api.app import create_app
from server.api.protocol import OneAtATimeProtocol
from server.api.service import ApiLimits, ServerState
from server.engine.messages import AddRequest
from server.text.tokenizer import BaseTokenizer
from tests.api.doubles import Script, ScriptedEngine, ScriptedStore

BASE = "tiny/base"
CORPUS = ["the quick brown fox jumps over the lazy dog", "ein kleines Wörterbuch für Tests", "日本語のテスト 🙂 done"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
ANSWER = "the quick brown fox 日本語 🙂 done"


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> Path:
    """A tokenizer trained on a small corpus, with a chat template."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "TokenizersBackend", "eos_token": "<|end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def tokenizer(model_dir) -> BaseTokenizer:
    return BaseTokenizer(model_dir)


@pytest.fixture
def adapters_dir(tmp_path) -> Path:
    """A folder with the adapters "support-fr" and "team/sql"; only their presence matters here."""
    for name in ("support-fr", "team/sql"):
        add_adapter(tmp_path / "adapters", name)
    return tmp_path / "adapters"


def add_adapter(root: Path, name: str) -> None:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"\0" * 8)


@dataclass
class Served:
    """The server under test and everything behind it."""

    url: str
    engine: ScriptedEngine
    store: ScriptedStore
    state: ServerState
    adapters_dir: Path
    scripts: dict[str, Script] = field(default_factory=dict)  # by adapter name; "" is the base
    choices: dict[int, Script] = field(default_factory=dict)  # by the choice's index, before the names

    @property
    def tokenizer(self) -> BaseTokenizer:
        return self.state.tokenizer

    def answer(self, text: str, *, adapter: str = "", choice: int | None = None, **fields) -> Script:
        """Answer with `text` and an eos (unless something else ends it); `choice` sets that of one index alone."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if fields.get("finish_reason", "stop") == "stop" and "stop_token_id" not in fields:
            ids = [*ids, self.engine.eos_id]
        script = Script(ids, **fields)
        if choice is None:
            self.scripts[adapter] = script
        else:
            self.choices[choice] = script
        return script

    def client(self, **options) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, **options)

    def sync_client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, timeout=10, verify=False)  # a TLS context costs 20 ms

    def assert_quiet(self) -> None:
        """Nothing runs and nothing is held: every request had exactly one end, every lease was given back."""
        assert sorted(self.engine.ended) == sorted(request.request_id for request in self.engine.added)
        assert self.engine.num_open == 0
        assert not +self.store.leases


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # the signals are pytest's


@contextlib.asynccontextmanager
async def serve(tokenizer, adapters_dir, **options) -> AsyncIterator[Served]:
    """A server for the duration of the block."""
    served: Served

    def script(request: AddRequest) -> Script:
        index = int(request.request_id.rpartition("-")[2])
        if index in served.choices:
            return served.choices[index]
        name = request.adapter.name if request.adapter else ""
        return served.scripts.get(name) or served.scripts[""]

    engine = ScriptedEngine(tokenizer.num_tokens, tokenizer.encode("<|end|>", add_special_tokens=False)[0], script)
    store = ScriptedStore()
    state = ServerState(
        engine=engine,
        catalog=Catalog([LocalSource(adapters_dir)], [BASE], named=NamedSource([adapters_dir])),
        store=store,
        tokenizer=tokenizer,
        base_names=(BASE, "base-alias"),
        **options,
    )
    config = uvicorn.Config(
        create_app(state), host="127.0.0.1", port=0, log_level="warning", lifespan="on", http=OneAtATimeProtocol
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.005)
        assert not task.done(), task
    port = server.servers[0].sockets[0].getsockname()[1]
    served = Served(f"http://127.0.0.1:{port}", engine, store, state, adapters_dir)
    served.answer(ANSWER)
    try:
        yield served
    finally:
        server.should_exit = True
        await asyncio.wait_for(task, 10)


@pytest.fixture
async def served(tokenizer, adapters_dir) -> AsyncIterator[Served]:
    async with serve(tokenizer, adapters_dir) as server:
        yield server


@pytest.fixture
async def guarded(tokenizer, adapters_dir) -> AsyncIterator[Served]:
    """The same with an API key, "s3cret"."""
    async with serve(tokenizer, adapters_dir, api_keys=("s3cret",), limits=ApiLimits(max_body_bytes=20_000)) as server:
        yield server


@pytest.fixture
def served_in_thread(tokenizer, adapters_dir) -> Iterator[Served]:
    """The same in a thread with its own event loop, for synchronous clients, who may load and unload adapters."""
    started: queue.Queue[Served] = queue.Queue()
    stop: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def run() -> None:
        async with serve(tokenizer, adapters_dir, may_load_adapters=True) as server:
            stop.append((asyncio.get_running_loop(), asyncio.Event()))
            started.put(server)
            await stop[0][1].wait()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    try:
        yield started.get(timeout=10)
    finally:
        loop, event = stop[0]
        loop.call_soon_threadsafe(event.set)
        thread.join(10)
