"""The path of a request: resolve, tokenize, and make the choices that the engine will answer."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from msgspec.structs import replace

from adapters_store.catalog import Catalog
from adapters_store.store import AdapterStore
from server.adapter_metrics import OTHER
from server.api.choices import Choice, Generation, Job
from server.api.door import Door, check_choices
from server.api.naming import AdapterNames
from server.api.params import (
    SamplingDefaults,
    bad_word_ids,
    is_echoed,
    num_logprobs,
    sampling_params,
    seed_of,
    truncated,
)
from server.api.pins import Pins
from server.api.schemas import ChatRequest, CompletionRequest, GenerationRequest, PromptInput, TokenizeRequest
from server.api.stall import StallGuard
from server.api.supply import AdapterSupply, Target
from server.api.tasks import Tasks
from server.desired import DesiredAdapters
from server.desired_file import AdaptersFile
from server.engine.client import Engine
from server.engine_metrics import EngineFacts
from server.errors import BadRequest, ContextLengthExceeded, EngineDead
from server.metrics import Metrics, Siblings
from server.text.output import TextOptions
from server.text.tokenizer import BaseTokenizer

MAX_LONG_CHARS = 1 << 20  # of a text that may be longer than the context: it is only counted, or will be cut


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiLimits:
    """Bounds that the API itself keeps."""

    max_body_bytes: int = 16 << 20
    max_adapters_per_step: int = 64  # the engine's, told in /metrics
    max_queue_len: int = 4096  # choices that wait to run; more are refused at arrival
    max_queue_wait_s: float = 60.0  # the engine's, which ends what has waited for longer
    engine_stall_timeout_s: float = 60.0  # an engine silent for longer is not healthy
    has_access_log: bool = False
    adapter_metrics_top: int = 50  # adapters that have metrics of their own
    allowed_origins: Sequence[str] = ()  # of browsers' pages (CORS)


@dataclass(slots=True, kw_only=True)
class ServerState:
    """All that an app works with; made once, owned by who made it. `base_names[0]` is the base's own name."""

    engine: Engine
    catalog: Catalog
    store: AdapterStore
    tokenizer: BaseTokenizer
    base_names: Sequence[str]
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    api_keys: Sequence[str] = ()  # none: open to whoever reaches it
    door: Door = field(default_factory=Door)
    may_load_adapters: bool = False  # by /v1/load_lora_adapter and unload
    guards_loading: bool = False  # nobody asked for it: it is on by loopback, and other sites' pages are refused
    pins: Pins | None = None  # those made at start
    adapters_file: AdaptersFile | None = None  # what --adapters-file said at start
    limits: ApiLimits = field(default_factory=ApiLimits)
    started_s: float = field(default_factory=time.time)


class Service:
    """Answers generation requests. Owns the metrics, the adapter supply, the names and the stall guard."""

    def __init__(self, state: ServerState) -> None:
        self.state = state
        self.supply = AdapterSupply(state.engine, state.catalog, state.store, state.base_names, state.pins)
        self.stall = StallGuard(
            state.engine,
            stall_timeout_s=state.limits.engine_stall_timeout_s,
            max_queue_wait_s=state.limits.max_queue_wait_s,
        )
        facts = EngineFacts(
            stats=lambda: state.engine.last_stats,
            ready=lambda: state.engine.ready,
            disk=state.store.tier,
            max_adapters=state.limits.max_adapters_per_step,
        )
        self.metrics = Metrics(state.base_names[0], facts, state.limits.adapter_metrics_top)
        state.engine.residents.on_ready = self._count_load
        self.names = AdapterNames(state.engine, state.catalog, state.store, tuple(state.base_names), self.supply)
        self.tasks = Tasks()
        """what routes began and nobody waits for"""
        self.desired = None if state.adapters_file is None else DesiredAdapters(state.adapters_file, self.names)
        if self.desired is not None:
            self.metrics.add_lines(self.desired.metrics)

    async def prepare(self, asked: GenerationRequest) -> Generation:
        """Resolve the model, tokenize, check the lengths. Raises ServerError, AdapterError."""
        arrival_s = time.time()
        if not self.state.engine.is_alive:
            raise EngineDead("The engine has stopped; the server is going down.")
        check_choices(self.state.engine, self.state.limits.max_queue_len, len(_prompts(asked)) * asked.n)
        target = await self.supply.resolve(asked.model)
        request_id = uuid.uuid4().hex
        bad_words = bad_word_ids(self.state.tokenizer, asked.bad_words)
        max_model_len = self.state.engine.ready.max_model_len
        choices: list[Choice] = []
        for prompt in _prompts(asked):
            ids = await self.encode(asked, prompt, target)
            if not ids:
                raise BadRequest("The prompt has no tokens", param="messages" if prompt is None else "prompt")
            kept = truncated(ids, asked, max_model_len)
            params = sampling_params(asked, len(kept), max_model_len, self.state.defaults, bad_words)
            echo = (prompt if isinstance(prompt, str) and kept is ids else "") if is_echoed(asked) else None
            siblings = Siblings(asked.n)
            scorer: Choice | None = None  # of the prompt, for its other choices too
            for index in range(asked.n):
                seeded = replace(params, seed=seed_of(asked, index))
                job = Job(
                    index=len(choices),
                    request_id=f"{request_id}-{len(choices)}",
                    target=target,
                    prompt_ids=kept,
                    params=seeded if scorer is None else replace(seeded, prompt_logprobs=None),
                    text=_text_options(asked),
                    skips_special=asked.skip_special_tokens,
                    echo=echo,
                    cache_salt=asked.cache_salt,
                    priority=asked.priority,
                    arrival_s=arrival_s,
                    siblings=siblings,
                    continues_prompt=isinstance(asked, CompletionRequest) or _continues(asked),
                )
                choices.append(Choice(self, job, scorer))
                if scorer is None and params.prompt_logprobs is not None:
                    scorer = choices[-1]
        return Generation(request_id, target, choices, asked.n)

    async def encode(
        self, asked: GenerationRequest | TokenizeRequest, prompt: PromptInput | None, target: Target
    ) -> list[int]:
        """Token ids of `prompt`, or of the messages where there is none. Raises BadRequest, AdapterError."""
        if isinstance(prompt, list):
            return prompt
        self._check_chars(asked, prompt)
        if prompt is not None:
            assert isinstance(asked, CompletionRequest | TokenizeRequest)
            adds_special = asked.add_special_tokens is not False
            return await self.state.tokenizer.encode_async(prompt, add_special_tokens=adds_special)
        assert isinstance(asked, ChatRequest | TokenizeRequest) and asked.messages is not None
        template = await self.supply.chat_template(target)
        return await self.state.tokenizer.encode_chat(
            [message.model_dump() for message in asked.messages],
            add_generation_prompt=_adds_generation_prompt(asked),
            add_special_tokens=bool(asked.add_special_tokens),
            continue_final_message=asked.continue_final_message,
            template=template,
            kwargs=asked.chat_template_kwargs,
            max_chars=self._max_chars(asked),
        )

    def _max_chars(self, asked: GenerationRequest | TokenizeRequest) -> int:
        """Of a text that is tokenized: more than any context could hold, unless it is only counted or cut."""
        max_chars = self.state.engine.ready.max_model_len * self.state.tokenizer.max_token_chars
        if isinstance(asked, TokenizeRequest) or asked.truncate_prompt_tokens is not None:
            return max(max_chars, MAX_LONG_CHARS)
        return max_chars

    def _check_chars(self, asked: GenerationRequest | TokenizeRequest, prompt: str | None) -> None:
        """Refuse a text that no context could hold before it is rendered and tokenized, which costs far more."""
        if prompt is not None:
            name, num_chars = "prompt", len(prompt)
        else:
            assert isinstance(asked, ChatRequest | TokenizeRequest) and asked.messages is not None
            name, num_chars = "messages", sum(message.num_chars for message in asked.messages)
        max_tokens, max_chars = self.state.engine.ready.max_model_len, self._max_chars(asked)
        if num_chars > max_chars:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {max_tokens} tokens. However, the {name} "
                f"{'has' if name == 'prompt' else 'have'} {num_chars} characters, above the {max_chars} that "
                f"this server tokenizes. Please reduce the length of the {name}.",
                param=name,
            )

    def _count_load(self, image_key: str) -> None:
        self.metrics.adapters.of(self.supply.user_of(image_key) or OTHER).loaded()

    async def close(self) -> None:
        """End what runs in the background."""
        if self.desired is not None:
            await self.desired.close()
        await self.tasks.close()
        await self.supply.close()
        await self.state.tokenizer.close()


def _prompts(asked: GenerationRequest) -> list[PromptInput] | list[None]:
    """The prompts of a completion; for a chat one None, its messages."""
    return asked.prompt if isinstance(asked, CompletionRequest) else [None]


def _continues(asked: GenerationRequest) -> bool:
    return isinstance(asked, ChatRequest) and asked.continue_final_message


def _adds_generation_prompt(asked: ChatRequest | TokenizeRequest) -> bool:
    return not asked.continue_final_message if asked.add_generation_prompt is None else asked.add_generation_prompt


def _text_options(asked: GenerationRequest) -> TextOptions:
    return TextOptions(
        stops=asked.stop,
        min_tokens=asked.min_tokens,
        keeps_stop=asked.include_stop_str_in_output,
        has_offsets=isinstance(asked, CompletionRequest) and num_logprobs(asked) is not None,
    )
