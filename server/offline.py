"""The engine without a server, for scripts and measurements:

from server.offline import LLM
llm = LLM("path/to/base", adapters="path/to/adapters")
for answer in llm.generate(["Hello", "SELECT"], adapter=[None, "sql-writer"], max_tokens=32):
    print(answer.text)
llm.close()
"""

from __future__ import annotations

import asyncio
import itertools
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters_store.catalog import Catalog
from adapters_store.manifest import BaseManifest, read_manifest
from adapters_store.ref import AdapterRef
from adapters_store.sources.local import LocalSource
from adapters_store.store import AdapterStore
from server.config import EngineConfig, default_cache_dir
from server.engine.build import build
from server.engine.core import EngineCore
from server.engine.messages import AddRequest, RequestOutput, SamplingParams, TokenLogprobs
from server.errors import BadRequest, ContextLengthExceeded
from server.text.tokenizer import BaseTokenizer

Prompt = str | Sequence[int]

_RANGES = (
    ("max_tokens", 0, math.inf),
    ("min_tokens", 0, math.inf),
    ("temperature", 0, math.inf),
    ("top_p", 1e-9, 1),
    ("top_k", 0, math.inf),
    ("min_p", 0, 1),
    ("presence_penalty", -2, 2),
    ("frequency_penalty", -2, 2),
    ("repetition_penalty", 0.01, 10),
)


@dataclass(slots=True)
class Answer:
    """What one prompt was answered. `error` is set, and the rest partial, when it failed."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    logprobs: list[TokenLogprobs] = field(default_factory=list)  # of token_ids, if asked for
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of prompt tokens 1, 2, ..., if asked for
    error: str | None = None


class LLM:
    """One base and its adapters in this process. Calls block; nothing runs between them.

    model: the base's folder, or an EngineConfig. adapters: a folder whose sub-folders are adapters; one
    added later is found by the first prompt that names it. Raises ConfigError for a base that can't be served.
    """

    def __init__(self, model: str | Path | EngineConfig, adapters: str | Path | None = None) -> None:
        config = model if isinstance(model, EngineConfig) else EngineConfig(model=str(model))
        cache = Path(config.cache_dir) if config.cache_dir else default_cache_dir()
        self.core: EngineCore = build(config)
        self.manifest: BaseManifest = read_manifest(Path(self.core.ready.manifest_path))
        self._tokenizer_dir = Path(config.model)
        self._tokenizer: BaseTokenizer | None = None
        self._runner = asyncio.Runner()
        self._store = self._runner.run(_open_store(cache, self.manifest, adapters))
        self._ids = itertools.count()

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        adapter: str | Sequence[str | None] | None = None,
        **sampling: Any,
    ) -> list[Answer]:
        """Answer all prompts in one continuous batch.

        prompts: texts or lists of token ids. adapter: one name for all, or one per prompt (None = base).
        sampling: fields of SamplingParams; max_tokens defaults to 16, and logit_bias may be a mapping. Raises
        AdapterError for an adapter that can't be served and BadRequest for what can't be run, before anything runs.
        """
        adapters = [adapter] * len(prompts) if adapter is None or isinstance(adapter, str) else list(adapter)
        if isinstance(sampling.get("logit_bias"), Mapping):
            sampling["logit_bias"] = tuple(sampling["logit_bias"].items())
        if isinstance(prompts, str):
            raise BadRequest("prompts is a string: pass a list of prompts", param="prompts")
        params = _checked(SamplingParams(**{"max_tokens": 16, "seed": secrets.randbits(63), **sampling}))
        for name in dict.fromkeys(adapters):
            if name is not None:
                self.adapter(name)
        encoded = [self._encode(prompt, params) for prompt in prompts]  # all of them, before anything is queued
        ids = [self.submit(p, name, params) for p, name in zip(encoded, adapters, strict=True)]
        answers = {request_id: Answer() for request_id in ids}
        num_open = len(ids)
        while num_open:
            for output in self.core.step().outputs:
                num_open -= _take(answers[output.request_id], output)
        for answer in answers.values():
            answer.text = self.tokenizer.decode(answer.token_ids)
        return list(answers.values())

    def adapter(self, name: str) -> AdapterRef:
        """The compiled image of what `name` points to now. Raises AdapterError."""
        return self._runner.run(self._ensure(name))

    def submit(self, prompt: Prompt, adapter: str | None, params: SamplingParams) -> str:
        """Queue one prompt without running it; its outputs come from `core.step()`. Returns its id."""
        request_id = f"offline-{next(self._ids)}"
        ids = self._encode(prompt, params)
        ref = None if adapter is None else self.adapter(adapter)
        self.core.add(AddRequest(request_id=request_id, prompt_ids=ids, params=params, adapter=ref))
        return request_id

    def _encode(self, prompt: Prompt, params: SamplingParams) -> list[int]:
        """Token ids that the engine can run. Raises BadRequest, ContextLengthExceeded."""
        ids = self.tokenizer.encode(prompt, add_special_tokens=True) if isinstance(prompt, str) else list(prompt)
        ready = self.core.ready
        if not ids:
            raise BadRequest("a prompt has no tokens", param="prompts")
        for token_id in ids:
            if not 0 <= token_id < ready.vocab_size:
                raise BadRequest(
                    f"token id {token_id} is outside the vocabulary: 0 to {ready.vocab_size - 1}", param="prompts"
                )
        if len(ids) + params.max_tokens > ready.max_model_len:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {ready.max_model_len} tokens; a prompt has {len(ids)} and "
                f"max_tokens is {params.max_tokens}",
                param="prompts",
            )
        return ids

    @property
    def tokenizer(self) -> BaseTokenizer:
        """The base's tokenizer, read at first use: token ids need none."""
        if self._tokenizer is None:
            self._tokenizer = BaseTokenizer(self._tokenizer_dir)
        return self._tokenizer

    def close(self) -> None:
        """End the compiler process and release the memory."""
        self.core.close()
        self._runner.run(self._store.close())
        self._runner.close()

    async def _ensure(self, name: str) -> AdapterRef:
        return await self._store.ensure(await self._store.resolve(name))


def _checked(params: SamplingParams) -> SamplingParams:
    """`params`, each in its range; BadRequest names the first that is not."""
    for name, low, high in _RANGES:
        value = getattr(params, name)
        if not low <= value <= high:  # NaN is in no range
            raise BadRequest(f"{name} is {value}; it goes from {low:g} to {high:g}", param=name)
    return params


async def _open_store(cache: Path, manifest: BaseManifest, adapters: str | Path | None) -> AdapterStore:
    sources = [LocalSource(Path(adapters))] if adapters is not None else []
    store = AdapterStore(cache, manifest, Catalog(sources, ()))
    await store.start()
    return store


def _take(answer: Answer, output: RequestOutput) -> bool:
    """Add an output to its answer; whether it was the last."""
    answer.token_ids += output.token_ids
    answer.logprobs += output.logprobs or []
    answer.prompt_logprobs += output.prompt_logprobs or []
    if output.error is not None:
        answer.error = output.error.message
    answer.finish_reason = output.finish_reason or ""
    return output.finish_reason is not None
