"""What crosses the process boundary between API and engine. msgspec structs only, no torch, no text."""

from __future__ import annotations

from typing import Literal

import msgspec

from adapters_store.histogram import Counts
from adapters_store.ref import AdapterRef


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How one request is sampled. Validated by the API; the engine trusts it."""

    max_tokens: int  # 0: nothing is drawn; what the prompt gives ends it
    min_tokens: int = 0
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 = all
    min_p: float = 0.0
    seed: int = 0  # always set: drawn at arrival when the client gives none
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: tuple[int, ...] = ()  # the client's; end the request and are kept in the output
    ignore_eos: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, added to its logit)
    allowed_token_ids: tuple[int, ...] = ()  # nothing else is drawn; () = all
    bad_words: tuple[tuple[int, ...], ...] = ()  # sequences that the output may not complete
    logprobs: int | None = None  # the chosen token's and so many most likely ones; None = none
    prompt_logprobs: int | None = None  # the same for each prompt token but the first


# --- API -> engine ---------------------------------------------------------------------------------------


class AddRequest(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A new request. With `pending` set it waits for AdapterReady/AdapterFailed of that key."""

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    adapter: AdapterRef | None = None
    pending: str | None = None
    cache_salt: str = ""
    arrival_s: float = 0.0  # time.time() at arrival in the API
    priority: int = 0  # lower goes first


class AdapterReady(msgspec.Struct, frozen=True, tag=True):
    """The image behind `key` is on disk; requests pending it may be scheduled."""

    key: str
    ref: AdapterRef


class AdapterFailed(msgspec.Struct, frozen=True, tag=True):
    """The image behind `key` will not come; requests pending it end with this error."""

    key: str
    status: int
    code: str
    message: str


class PinAdapter(msgspec.Struct, frozen=True, tag=True):
    """Load this image as soon as there is room and never evict it, until DropAdapter names it."""

    ref: AdapterRef


class DropAdapter(msgspec.Struct, frozen=True, tag=True):
    """Forget this image, pinned or not, as soon as nothing uses it. Requests that have it keep it to their end."""

    image_key: str


class PrefetchAdapter(msgspec.Struct, frozen=True, tag=True):
    """Bring this image to host memory, or to the device where no request has to make way for it."""

    ref: AdapterRef
    tier: Literal["host", "device"]


class SetWeight(msgspec.Struct, frozen=True, tag=True):
    """The share of an adapter's requests, by its name, when several adapters have work; 1 is everyone's."""

    name: str
    weight: float


class Abort(msgspec.Struct, frozen=True, tag=True):
    """The clients of these requests are gone (or a stop string was found)."""

    request_ids: list[str]


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Abort everything and exit 0."""


ToEngine = (
    AddRequest
    | AdapterReady
    | AdapterFailed
    | PinAdapter
    | DropAdapter
    | PrefetchAdapter
    | SetWeight
    | Abort
    | Shutdown
)

# --- engine -> API ---------------------------------------------------------------------------------------


class EngineReady(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The engine serves; what was resolved at start."""

    manifest_path: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    num_kv_blocks: int
    block_size: int
    adapter_bytes: int
    weights_bytes: int
    host_bytes: int = 0  # of the host tier; 0: there is none
    facts: tuple[tuple[str, str], ...] = ()  # (label, value) lines of the start banner


class RequestError(msgspec.Struct, frozen=True):
    """Why a request ended without (more) output."""

    status: int
    code: str
    message: str
    retry_after_s: int | None = None


class TokenLogprobs(msgspec.Struct, frozen=True):
    """One position: log-softmax of the model's own logits, before penalties, biases and temperature."""

    token_id: int
    logprob: float
    rank: int  # 1 = the most likely
    top: list[tuple[int, float]] = []  # (token id, logprob) of the most likely ones, best first


class RequestOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What one step did for one request. The one with `finish_reason` set is its terminal event.

    finish_reason: "stop" (eos or a stop id; the id is the last of token_ids), "length", "abort", "error".
    """

    request_id: str
    token_ids: list[int] = []
    finish_reason: str | None = None
    stop_token_id: int | None = None  # set when a stop id of the client, not an eos, ended it
    error: RequestError | None = None
    num_cached_tokens: int | None = None  # with the first output: prompt tokens taken from the prefix cache
    phases: dict[str, float] | None = None  # with the first output: seconds by phase, engine side
    logprobs: list[TokenLogprobs] | None = None  # one for each of token_ids, if asked for
    prompt_logprobs: list[TokenLogprobs] | None = None  # with the first output: of prompt tokens 1, 2, ...


class StepStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counts after a step, for metrics. Counters are totals since start."""

    num_running: int = 0
    num_waiting: int = 0
    running_adapters: tuple[str, ...] = ()
    waiting_adapters: tuple[str, ...] = ()
    kv_usage: float = 0.0  # share of KV blocks in use, 0..1
    rows: int = 0
    adapter_rows: int = 0
    distinct_adapters: int = 0
    step_s: float = 0.0
    prefix_queries: int = 0  # tokens asked of the prefix cache, total
    prefix_hits: int = 0  # tokens found there, total
    preemptions: int = 0
    adapter_loads: int = 0
    adapter_evictions: int = 0
    resident_adapters: int = 0
    adapter_bytes_used: int = 0
    adapter_acquires: int = 0  # times a request got its adapter's slot
    load_seconds: dict[str, Counts] = {}  # by phase, of all loads into device memory
    steps_by_rows: tuple[int, ...] = ()  # steps by tally.ROW_BOUNDS
    rows_total: float = 0
    steps_by_adapters: tuple[int, ...] = ()  # steps by tally.ADAPTER_BOUNDS
    adapters_total: float = 0
    host_images: int = 0
    host_bytes_used: int = 0
    host_hits: int = 0
    host_evictions: int = 0


class SlotChange(msgspec.Struct, frozen=True):
    """An image came to the device, left it, or could not be loaded; or came to host memory, or left that."""

    image_key: str
    state: Literal["ready", "gone", "failed", "hosted", "unhosted"]
    message: str = ""  # why it failed


class StepOutputs(msgspec.Struct, frozen=True, tag=True):
    """All that one step produced: one message a step, never one a token."""

    outputs: list[RequestOutput]
    stats: StepStats
    slot_changes: list[SlotChange] = []  # since the last message, in order: every one is told exactly once


class EngineFailed(msgspec.Struct, frozen=True, tag=True):
    """The engine is about to exit non-zero; or could not start."""

    message: str


FromEngine = EngineReady | StepOutputs | EngineFailed
