"""The path of a request: resolve, tokenize, send to the engine, turn its events into text."""

from __future__ import annotations

import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry

from adapters_store.catalog import Catalog
from adapters_store.errors import AdapterCorrupt
from adapters_store.store import AdapterStore
from server.api.errors import RequestFailed
from server.api.schemas import ChatRequest, CompletionRequest, GenerationRequest
from server.api.supply import AdapterSupply, Hold, Target
from server.engine.client import Engine
from server.engine.messages import AddRequest, RequestError, RequestOutput, SamplingParams
from server.errors import BadRequest, ContextLengthExceeded, EngineDead
from server.metrics import EngineFacts, Metrics
from server.text.output import Delta, OutputText
from server.text.tokenizer import BaseTokenizer

DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's, for /v1/completions
_SEED_MASK = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiLimits:
    """Bounds that the API itself keeps."""

    max_body_bytes: int = 16 << 20
    max_adapters_per_step: int = 64  # the engine's, told in /metrics


@dataclass(slots=True, kw_only=True)
class ServerState:
    """All that an app works with; made once, owned by who made it. `base_names[0]` is the base's own name."""

    engine: Engine
    catalog: Catalog
    store: AdapterStore
    tokenizer: BaseTokenizer
    base_names: Sequence[str]
    api_key: str | None = None
    limits: ApiLimits = field(default_factory=ApiLimits)
    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    started_s: float = field(default_factory=time.time)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What one HTTP request asks of the engine."""

    request_id: str  # ours, never the client's: two clients may send the same
    target: Target
    prompt_ids: list[int]
    params: SamplingParams
    stops: Sequence[str]
    cache_salt: str
    arrival_s: float  # time.time()
    continues_prompt: bool  # the output's text goes on where the prompt's ends


class Service:
    """Answers generation requests. Owns the metrics and the adapter supply."""

    def __init__(self, state: ServerState) -> None:
        self.state = state
        self.supply = AdapterSupply(state.engine, state.catalog, state.store, state.base_names)
        facts = EngineFacts(
            stats=lambda: state.engine.last_stats,
            ready=lambda: state.engine.ready,
            max_adapters=state.limits.max_adapters_per_step,
        )
        self.metrics = Metrics(state.registry, state.base_names[0], facts)

    async def prepare(self, asked: GenerationRequest) -> Generation:
        """Resolve the model, tokenize, check the length. Raises ServerError, AdapterError."""
        arrival_s = time.time()
        if not self.state.engine.is_alive:
            raise EngineDead("The engine has stopped; the server is going down.")
        target = await self.supply.resolve(asked.model)
        prompt_ids = await self._encode(asked)
        job = Job(
            request_id=uuid.uuid4().hex,
            target=target,
            prompt_ids=prompt_ids,
            params=_sampling_params(asked, len(prompt_ids), self.state.engine.ready.max_model_len),
            stops=asked.stop,
            cache_salt=asked.cache_salt,
            arrival_s=arrival_s,
            continues_prompt=isinstance(asked, CompletionRequest),
        )
        return Generation(self, job)

    async def close(self) -> None:
        """End what runs in the background."""
        await self.supply.close()

    async def _encode(self, asked: GenerationRequest) -> list[int]:
        if isinstance(asked, ChatRequest):
            field_name = "messages"
            ids = await self.state.tokenizer.encode_chat(
                [message.model_dump() for message in asked.messages],
                add_generation_prompt=asked.add_generation_prompt,
                add_special_tokens=asked.add_special_tokens,
            )
        else:
            assert isinstance(asked, CompletionRequest)
            if isinstance(asked.prompt, list):
                return asked.prompt
            field_name = "prompt"
            ids = await self.state.tokenizer.encode_async(asked.prompt, add_special_tokens=asked.add_special_tokens)
        if not ids:
            raise BadRequest("The prompt has no tokens", param=field_name)
        return ids


class Generation:
    """One request in the engine: deltas() runs it, the fields tell of it. Single use.

    num_output, num_cached, phases, image_key: what is known so far; image_key from the first delta on.
    """

    def __init__(self, service: Service, job: Job) -> None:
        self.job = job
        self.num_output = 0
        self.num_cached = 0
        self.image_key = ""
        self.phases: dict[str, float] = {"resolve_s": job.target.resolve_s} if job.target.version else {}
        self._engine = service.state.engine
        self._supply = service.supply
        self._metrics = service.metrics
        context = job.prompt_ids if job.continues_prompt else ()
        detokenizer = service.state.tokenizer.detokenizer(context)
        self._text = OutputText(detokenizer, job.stops, job.params.min_tokens)
        self._is_started = False

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """The answer; the last delta has the finish_reason. Close it (aclosing): that aborts what still runs.

        Raises RequestFailed when the engine ends the request with an error, EngineDead when it is gone.
        """
        reason = "abort"
        hold = self._supply.hold(self.job.target.version)
        try:
            async with aclosing(self._engine.generate(self._add_request(hold))) as events:
                # No await from here to the first event's: the request must reach the engine before the news
                # of its adapter can.
                self._supply.fetch(hold)
                async for event in events:
                    delta = self._take(event, hold)
                    reason = delta.finish_reason or reason
                    yield delta
                    if delta.finish_reason is not None:
                        return
            raise EngineDead("The engine ended this request without saying why.")
        except (RequestFailed, EngineDead):
            reason = "error"
            raise
        finally:
            self._supply.release(hold)
            self._metrics.request_end(reason, time.time() - self.job.arrival_s)

    def usage(self, *, has_phases: bool) -> dict[str, object]:
        """OpenAI's usage object, with the phases if the client wants them."""
        num_prompt = len(self.job.prompt_ids)
        usage: dict[str, object] = {
            "prompt_tokens": num_prompt,
            "completion_tokens": self.num_output,
            "total_tokens": num_prompt + self.num_output,
            "prompt_tokens_details": {"cached_tokens": self.num_cached},
        }
        if has_phases:
            usage["multilora"] = {"phases": self.phases}
        return usage

    def _add_request(self, hold: Hold) -> AddRequest:
        return AddRequest(
            request_id=self.job.request_id,
            prompt_ids=self.job.prompt_ids,
            params=self.job.params,
            adapter=hold.ref,
            pending=hold.pending,
            cache_salt=self.job.cache_salt,
            arrival_s=self.job.arrival_s,
        )

    def _take(self, event: RequestOutput, hold: Hold) -> Delta:
        """One event's delta; the first event also brings what is told once."""
        if event.error is not None:
            if event.error.code == AdapterCorrupt.code:
                self._supply.discard(hold)
            raise RequestFailed(event.error)
        if event.finish_reason == "abort":
            raise RequestFailed(RequestError(503, "request_aborted", "The server ended this request."))
        if not self._is_started:
            self._start(event, hold)
        delta = self._text.feed(event.token_ids, event.finish_reason, event.stop_token_id)
        self.num_output += len(delta.token_ids)
        self._metrics.tokens(len(delta.token_ids))
        return delta

    def _start(self, event: RequestOutput, hold: Hold) -> None:
        self._is_started = True
        ttft_s = time.time() - self.job.arrival_s
        self.image_key = hold.ref.image_key if hold.ref is not None else ""
        self.num_cached = event.num_cached_tokens or 0
        self.phases |= hold.phases | (event.phases or {}) | {"ttft_s": ttft_s}
        self._metrics.first_token(len(self.job.prompt_ids), ttft_s)


def _sampling_params(asked: GenerationRequest, num_prompt: int, max_model_len: int) -> SamplingParams:
    max_tokens = _max_tokens(asked, num_prompt, max_model_len)
    if asked.min_tokens > max_tokens:
        raise BadRequest(
            f"'min_tokens' is {asked.min_tokens}, above the {max_tokens} of max_tokens", param="min_tokens"
        )
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=asked.min_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=max(asked.top_k, 0),  # -1 and 0 both mean all
        min_p=asked.min_p,
        seed=secrets.randbits(63) if asked.seed is None else asked.seed & _SEED_MASK,
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        repetition_penalty=asked.repetition_penalty,
        stop_token_ids=tuple(dict.fromkeys(asked.stop_token_ids)),
        ignore_eos=asked.ignore_eos,
    )


def _max_tokens(asked: GenerationRequest, num_prompt: int, max_model_len: int) -> int:
    """The bound that the client set, else the endpoint's default; what doesn't fit the context is refused."""
    room = max_model_len - num_prompt
    prompt_name = "messages" if isinstance(asked, ChatRequest) else "prompt"
    name, wanted = "max_tokens", asked.max_tokens
    if isinstance(asked, ChatRequest) and asked.max_completion_tokens is not None:
        if wanted not in (None, asked.max_completion_tokens):
            raise BadRequest("'max_tokens' and 'max_completion_tokens' differ; send one", param="max_tokens")
        name, wanted = "max_completion_tokens", asked.max_completion_tokens
    if room < 1 or (wanted or 1) > room:
        num_output = 1 if wanted is None else wanted
        raise ContextLengthExceeded(
            f"This model's maximum context length is {max_model_len} tokens. However, you requested "
            f"{num_prompt + num_output} tokens ({num_prompt} in the {prompt_name}, {num_output} in the completion). "
            f"Please reduce the length of the {prompt_name} or completion.",
            param=prompt_name if room < 1 else name,
        )
    if wanted is not None:
        return wanted
    return room if isinstance(asked, ChatRequest) else min(DEFAULT_COMPLETION_TOKENS, room)
