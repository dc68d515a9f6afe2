"""A real core without a model: every answer is a function of its prompt, so every stream has an oracle."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Sequence

import msgspec

from adapters_store.ref import AdapterRef
from server.engine.client import AsyncEngine
from server.engine.messages import (
    AdapterFailed,
    AddRequest,
    EngineReady,
    RequestError,
    RequestOutput,
    SamplingParams,
    StepOutputs,
    StepStats,
)
from server.errors import ConfigError

CORE = "tests.engine.scripted_core:build"


class Script(msgspec.Struct, frozen=True, kw_only=True):
    """What the core shall do, beside answering."""

    start_s: float = 0.0  # time a start takes
    start_error: str | None = None  # a start that fails: unexpectedly …
    start_refusal: str | None = None  # … or by a ConfigError
    step_s: float = 0.0  # time of a step that runs something
    silent_steps: int = 0  # steps a request takes before its first token, as prefill chunks do
    fail_at_step: int | None = None  # working step that raises
    hang_at_step: int | None = None  # working step that takes a minute
    stall_at_step: int | None = None  # working step from which on steps do nothing, until an abort
    is_leaky: bool = False  # check_integrity finds something


def token(prompt_ids: Sequence[int], index: int) -> int:
    """The output token at `index` of a request with this prompt."""
    return (31 * sum(prompt_ids) + 7 * index) % 50_000


def answer(request: AddRequest) -> list[int]:
    """All tokens that `request` gets when it runs to its end."""
    return [token(request.prompt_ids, i) for i in range(request.params.max_tokens)]


def make_request(
    request_id: str, prompt_ids: list[int] | None = None, *, max_tokens: int = 8, pending: str | None = None
) -> AddRequest:
    return AddRequest(
        request_id=request_id,
        prompt_ids=prompt_ids or [len(request_id), *request_id.encode()],
        params=SamplingParams(max_tokens=max_tokens),
        pending=pending,
    )


class _Running:
    def __init__(self, request: AddRequest, delay: int) -> None:
        self.request = request
        self.num_output = 0
        self.delay = delay


class ScriptedCore:
    """One token per running request and step. `stats.preemptions` counts the requests ended by abort."""

    def __init__(self, script: Script) -> None:
        time.sleep(script.start_s)
        if script.start_error is not None:
            raise RuntimeError(script.start_error)
        if script.start_refusal is not None:
            raise ConfigError(script.start_refusal)
        self.script = script
        self.num_aborted = 0
        self.num_steps = 0
        self.is_closed = False
        self.refs: dict[str, AdapterRef] = {}
        self._running: dict[str, _Running] = {}
        self._pending: dict[str, AddRequest] = {}
        self._ended: list[RequestOutput] = []
        self.ready = EngineReady(
            manifest_path="",
            max_model_len=1024,
            vocab_size=50_000,
            eos_token_ids=(0,),
            num_kv_blocks=64,
            block_size=16,
            adapter_bytes=0,
            weights_bytes=0,
        )

    def add(self, request: AddRequest) -> None:
        assert request.request_id not in self._running, "a request id was used twice"
        if request.pending is not None:
            self._pending[request.request_id] = request
        else:
            self._running[request.request_id] = _Running(request, self.script.silent_steps)

    def abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            was_running = self._running.pop(request_id, None) is not None
            if was_running or self._pending.pop(request_id, None) is not None:
                self.num_aborted += 1
                self._ended.append(RequestOutput(request_id=request_id, finish_reason="abort"))

    def adapter_ready(self, key: str, ref: AdapterRef) -> None:
        self.refs[key] = ref
        for request_id in [i for i, r in self._pending.items() if r.pending == key]:
            self._running[request_id] = _Running(self._pending.pop(request_id), 0)

    def adapter_failed(self, failed: AdapterFailed) -> None:
        error = RequestError(status=failed.status, code=failed.code, message=failed.message)
        for request_id in [i for i, r in self._pending.items() if r.pending == failed.key]:
            del self._pending[request_id]
            self._ended.append(RequestOutput(request_id=request_id, finish_reason="error", error=error))

    def has_work(self) -> bool:
        return bool(self._running or self._ended)

    def step(self) -> StepOutputs:
        outputs, self._ended = self._ended, []
        is_stalled = self.script.stall_at_step is not None and self.num_steps >= self.script.stall_at_step
        if self._running and not is_stalled:
            self._work()
        for running in [] if is_stalled else list(self._running.values()):
            if running.delay:
                running.delay -= 1
            else:
                outputs.append(self._advance(running))
        stats = StepStats(
            num_running=len(self._running),
            num_waiting=len(self._pending),
            preemptions=self.num_aborted,
            prefix_queries=self.num_steps,
        )
        return StepOutputs(outputs=outputs, stats=stats)

    def check_integrity(self) -> None:
        assert not self.script.is_leaky, "a block leaked"
        assert not self._running, "requests are left"

    def close(self) -> None:
        self.is_closed = True

    def _work(self) -> None:
        self.num_steps += 1
        if self.num_steps == self.script.fail_at_step:
            raise ValueError("the model gave NaN")
        time.sleep(60 if self.num_steps == self.script.hang_at_step else self.script.step_s)

    def _advance(self, running: _Running) -> RequestOutput:
        request = running.request
        is_first = running.num_output == 0
        token_id = token(request.prompt_ids, running.num_output)
        running.num_output += 1
        is_last = running.num_output == request.params.max_tokens
        if is_last:
            del self._running[request.request_id]
        return RequestOutput(
            request_id=request.request_id,
            token_ids=[token_id],
            finish_reason="length" if is_last else None,
            num_cached_tokens=len(request.prompt_ids) if is_first else None,
            phases={"queue": 0.5} if is_first else None,
        )


def build(config_json: bytes) -> ScriptedCore:
    """The factory that the engine process imports."""
    return ScriptedCore(msgspec.json.decode(config_json, type=Script))


@contextlib.asynccontextmanager
async def serving(**script: object) -> AsyncIterator[AsyncEngine]:
    """A started AsyncEngine over a ScriptedCore in a real child process."""
    engine = AsyncEngine(CORE, start_timeout_s=20)
    await engine.start(msgspec.convert(script, Script))
    try:
        yield engine
    finally:
        await engine.close()
