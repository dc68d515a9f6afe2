"""What the API is tested against: the engine's own protocol and streams, with a script in place of the model."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import Literal

from msgspec.structs import replace

from adapters_store.histogram import Counts
from adapters_store.inspect import AdapterReport
from adapters_store.ref import AdapterRef, SourceVersion
from adapters_store.store import StoreTier
from adapters_store.versions import Held, find_version
from server.engine.messages import (
    Abort,
    AdapterFailed,
    AdapterReady,
    AddRequest,
    DropAdapter,
    EngineReady,
    PinAdapter,
    PrefetchAdapter,
    RequestError,
    RequestOutput,
    SetWeight,
    SlotChange,
    StepStats,
    ToEngine,
    TokenLogprobs,
)
from server.engine.residents import Residents
from server.engine.streams import Streams, Taker

REPORT = AdapterReport(
    path="adapter",
    base="base",
    family="LORA",
    digest="digest",
    file_bytes=10,
    image_bytes=4096,
    ranks={8: 2, 0: 1},
    targets={"q_proj": 2},
    options={"r, lora_alpha": "8, 16"},
    problems=[],
    warnings=["a warning"],
    dropped=[],
)
COMPILED = Counts((0, 0, 0, 0, 0, 0, 0, 1, 0, 0), 1.5)  # seconds of one compile


@dataclass
class Script:
    """What the engine answers one request with."""

    token_ids: list[int]
    finish_reason: str = "stop"
    tokens_per_event: int = 1
    delay_s: float = 0.0  # before each event
    stop_token_id: int | None = None
    error: RequestError | None = None  # in place of the end
    hangs: bool = False  # in place of the end: nothing more
    num_cached_tokens: int = 0


@dataclass
class ScriptedEngine:
    """The Engine protocol over real Streams. `script` says what a request is answered with."""

    vocab_size: int
    eos_id: int
    script: Callable[[AddRequest], Script]
    max_model_len: int = 128
    added: list[AddRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    ready_keys: list[str] = field(default_factory=list)
    failed_keys: list[str] = field(default_factory=list)
    last_stats: StepStats = field(default_factory=StepStats)
    silent_s: float = 0.0
    stuck_s: float = 0.0
    residents: Residents = field(default_factory=Residents)
    pinned: list[str] = field(default_factory=list)  # image keys, in the order of the messages
    dropped: list[str] = field(default_factory=list)
    prefetched: list[tuple[str, str]] = field(default_factory=list)  # (image key, tier)
    weights: dict[str, float] = field(default_factory=dict)
    load_errors: dict[str, str] = field(default_factory=dict)  # by image key
    is_crowded: bool = False  # prefetches to the device come to nothing, and pins wait for room

    def __post_init__(self) -> None:
        self.died = asyncio.Event()
        self.ready = EngineReady(
            manifest_path="",
            max_model_len=self.max_model_len,
            vocab_size=self.vocab_size,
            eos_token_ids=(self.eos_id,),
            num_kv_blocks=100,
            block_size=16,
            adapter_bytes=1 << 20,
            weights_bytes=0,
            host_bytes=1 << 20,
        )
        self._streams = Streams(self._receive)
        self._waiting: dict[str, list[AddRequest]] = {}
        self._running: dict[str, asyncio.Task[None]] = {}

    @property
    def is_alive(self) -> bool:
        return self._streams.is_admitting

    @property
    def num_open(self) -> int:
        return len(self._streams.open_ids)

    def generate(self, request: AddRequest) -> AsyncGenerator[RequestOutput, None]:
        self._streams.check()
        return self._streams.stream(request)

    def divert(self, request_id: str, take: Taker) -> None:
        self._streams.divert(request_id, take)

    def abort(self, request_id: str) -> None:
        self._streams.abort(request_id)

    def adapter_ready(self, key: str, ref: AdapterRef) -> None:
        self._receive(AdapterReady(key, ref))

    def adapter_failed(self, key: str, status: int, code: str, message: str) -> None:
        self._receive(AdapterFailed(key, status, code, message))

    def pin_adapter(self, ref: AdapterRef) -> None:
        self._receive(PinAdapter(ref))

    def drop_adapter(self, image_key: str) -> None:
        self._receive(DropAdapter(image_key))

    def prefetch_adapter(self, ref: AdapterRef, tier: Literal["host", "device"]) -> None:
        self._receive(PrefetchAdapter(ref, tier))

    def set_weight(self, name: str, weight: float) -> None:
        self._receive(SetWeight(name, weight))

    async def close(self) -> None:
        self.die()

    def die(self) -> None:
        """As when the process has gone."""
        self._streams.refuse("The engine has stopped.")
        for task in self._running.values():
            task.cancel()
        self._streams.fail_all(RequestError(503, "engine_dead", "The engine stopped before this request ended."))
        self.died.set()

    def _receive(self, message: ToEngine) -> None:
        match message:
            case AddRequest(pending=None):
                self.added.append(message)
                self._start(message)
            case AddRequest(pending=key):
                self.added.append(message)
                self._waiting.setdefault(key, []).append(message)
            case AdapterReady(key, ref):
                self.ready_keys.append(key)
                # like the real one, it forgets news that nothing waits for
                for request in self._waiting.pop(key, []):
                    self._start(replace(request, adapter=ref))
            case AdapterFailed(key, status, code, text):
                self.failed_keys.append(key)
                for request in self._waiting.pop(key, []):
                    self._end(request.request_id, error=RequestError(status, code, text))
            case PinAdapter(ref):
                self.pinned.append(ref.image_key)
                self._came(ref.image_key, "ready")
            case PrefetchAdapter(ref, tier):
                self.prefetched.append((ref.image_key, tier))
                self._came(ref.image_key, "ready" if tier == "device" else "hosted")
            case SetWeight(name, weight):
                self.weights[name] = weight
            case DropAdapter(image_key):
                self.dropped.append(image_key)
                self.residents.apply([SlotChange(image_key, "gone")])
            case Abort(request_ids):
                for request_id in request_ids:
                    self._abort(request_id)

    def _came(self, image_key: str, state: Literal["ready", "hosted"]) -> None:
        if image_key in self.load_errors:
            self.residents.apply([SlotChange(image_key, "failed", self.load_errors[image_key])])
        elif not self.is_crowded:
            self.residents.apply([SlotChange(image_key, state)])

    def _abort(self, request_id: str) -> None:
        self.aborted.append(request_id)
        for requests in self._waiting.values():
            requests[:] = [request for request in requests if request.request_id != request_id]
        if (task := self._running.pop(request_id, None)) is not None:
            task.cancel()
        self._end(request_id, finish_reason="abort")

    def _start(self, request: AddRequest) -> None:
        self._running[request.request_id] = asyncio.create_task(self._run(request))

    async def _run(self, request: AddRequest) -> None:
        script = self.script(request)
        ids, reason = script.token_ids, script.finish_reason
        if len(ids) > request.params.max_tokens:
            ids, reason = ids[: request.params.max_tokens], "length"
        is_whole = script.error is None and not script.hangs
        starts = range(0, len(ids), script.tokens_per_event) if request.params.max_tokens else [0]
        for start in starts:
            await asyncio.sleep(script.delay_s)
            piece = ids[start : start + script.tokens_per_event]
            is_last = is_whole and start + script.tokens_per_event >= len(ids)
            self._put(
                RequestOutput(
                    request_id=request.request_id,
                    token_ids=piece,
                    finish_reason=reason if is_last else None,
                    stop_token_id=script.stop_token_id if is_last and reason == "stop" else None,
                    num_cached_tokens=script.num_cached_tokens if start == 0 else None,
                    logprobs=scores(piece, request.params.logprobs),
                    prompt_logprobs=scores(request.prompt_ids[1:], request.params.prompt_logprobs)
                    if start == 0
                    else None,
                    phases={"queue_s": 0.25, "adapter_wait_s": 0.5, "prefill_s": 0.125} if start == 0 else None,
                )
            )
        if script.error is not None:
            await asyncio.sleep(script.delay_s)
            self._end(request.request_id, error=script.error)

    def _end(self, request_id: str, finish_reason: str = "error", error: RequestError | None = None) -> None:
        self._put(RequestOutput(request_id=request_id, finish_reason=finish_reason, error=error))

    def _put(self, output: RequestOutput) -> None:
        if output.finish_reason is not None:
            self.ended.append(output.request_id)
        self._streams._put(output)


@dataclass
class ScriptedStore:
    """The AdapterStore's part that the API uses. Errors, holds and damage are set per adapter name."""

    errors: dict[str, Exception] = field(default_factory=dict)
    gates: dict[str, asyncio.Event] = field(default_factory=dict)  # ensure() waits for it
    ensured: list[str] = field(default_factory=list)
    leases: Counter[str] = field(default_factory=Counter)  # by image key; all zero when nothing runs
    leased: list[str] = field(default_factory=list)
    discarded: list[str] = field(default_factory=list)
    retried: list[str] = field(default_factory=list)
    inspected: list[SourceVersion] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)  # that an inspection finds
    on_disk: dict[str, AdapterRef] = field(default_factory=dict)
    versions: dict[str, SourceVersion] = field(default_factory=dict)  # those that were ensured, by key

    def lookup(self, version_key: str) -> AdapterRef | None:
        return self.on_disk.get(version_key)

    def peek(self, version_key: str) -> AdapterRef | None:
        return self.on_disk.get(version_key)

    def pinned(self, current: SourceVersion, prefix: str) -> SourceVersion:
        former = [version for version in self.versions.values() if version.name == current.name]
        found = {version.key: version for version in (current, *reversed(former))}
        return find_version(
            current.name, prefix, [Held(key, v, self.on_disk.get(key)) for key, v in found.items()]
        ).version

    def is_compiling(self, version_key: str) -> bool:
        return False

    async def ensure(self, version: SourceVersion) -> AdapterRef:
        self.ensured.append(version.name)
        if version.name in self.gates:
            await self.gates[version.name].wait()
        if version.name in self.errors:
            raise self.errors[version.name]
        ref = self.on_disk[version.key] = ref_of(version)
        self.versions[version.key] = version
        return ref

    def retry(self, version: SourceVersion) -> None:
        self.retried.append(version.name)

    async def inspect(self, version: SourceVersion) -> AdapterReport:
        self.inspected.append(version)
        if version.name in self.errors:
            raise self.errors[version.name]
        return replace(REPORT, problems=self.problems)

    def phases(self, version_key: str) -> dict[str, float]:
        return {"resolve": 1.0, "queue": 2.0, "fetch": 3.0, "compile": 4.0}

    def lease(self, ref: AdapterRef) -> None:
        self.leases[ref.image_key] += 1
        self.leased.append(ref.image_key)

    def release(self, ref: AdapterRef) -> None:
        assert self.leases[ref.image_key] > 0, "released without a lease"
        self.leases[ref.image_key] -= 1

    def tier(self) -> StoreTier:
        return StoreTier(len(self.on_disk), 1000 * len(self.on_disk), 2, len(self.ensured), {"compile": COMPILED}, 6)

    def discard(self, ref: AdapterRef) -> None:
        self.discarded.append(ref.image_key)
        self.on_disk.pop(ref.version, None)


def scores(token_ids: list[int], num_top: int | None) -> list[TokenLogprobs] | None:
    """Made-up logprobs, another for each token; the chosen one is the third most likely."""
    if num_top is None:
        return None
    return [
        TokenLogprobs(
            token_id=token_id,
            logprob=-0.5 - token_id / 1024,
            rank=3,
            top=[((token_id + shift) % 256, -0.125 * shift - token_id / 1024) for shift in range(1, num_top + 1)],
        )
        for token_id in token_ids
    ]


def ref_of(version: SourceVersion) -> AdapterRef:
    """A ref with the identities that the API passes on."""
    return AdapterRef(
        name=version.name,
        version=version.key,
        digest="digest",
        image_key=f"image-of-{version.name}",
        image_path="",
        data_offset=4096,
        data_bytes=1,
        checksum="",
        max_rank=8,
    )
