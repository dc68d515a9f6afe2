"""Drives a real engine core step by step, with the real store and compiler worker beside it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from adapters_store.catalog import Catalog
from adapters_store.errors import AdapterError
from adapters_store.manifest import read_manifest
from adapters_store.ref import AdapterRef, SourceVersion
from adapters_store.sources.local import LocalSource
from adapters_store.store import AdapterStore
from kernels.types import Segments
from server.config import EngineConfig
from server.engine.batch import Batch
from server.engine.build import build
from server.engine.device import Device, open_device
from server.engine.messages import AdapterFailed, AddRequest, RequestError, SamplingParams, TokenLogprobs


@dataclass(slots=True)
class Answer:
    """What came of one request so far."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: RequestError | None = None
    num_terminal: int = 0
    phases: dict[str, float] | None = None
    num_cached_tokens: int | None = None
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None


class Driver:
    """A base, a folder of adapters, and an engine that moves only when told to."""

    def __init__(
        self,
        base: Path,
        adapters: Path,
        cache: Path,
        open_device: Callable[[str], Device] = open_device,
        **config: object,
    ) -> None:
        fields: dict[str, object] = {
            "model": str(base),
            "cache_dir": str(cache),
            "dtype": "float32",
            "kv_memory": 64 << 20,
            "adapter_memory": 256 << 20,
            **config,
        }
        self.core = build(EngineConfig(**fields), open_device=open_device)
        self.manifest = read_manifest(Path(self.core.ready.manifest_path))
        self.answers: dict[str, Answer] = {}
        self.max_distinct_adapters = 0
        self.num_steps = 0
        self._loop = asyncio.Runner()
        self.store = self.run(self._open_store(adapters, cache))
        self._count = 0
        self._leases: dict[str, AdapterRef] = {}

    async def _open_store(self, adapters: Path, cache: Path) -> AdapterStore:
        catalog = Catalog([LocalSource(adapters)], ["base"])
        store = AdapterStore(cache, self.manifest, catalog)
        await store.start()
        return store

    def run(self, awaitable):
        """Run a coroutine of the store on the driver's own event loop."""
        return self._loop.run(awaitable)

    def resolve(self, name: str) -> SourceVersion:
        return self.run(self.store.resolve(name))

    def ref(self, name: str) -> AdapterRef:
        """The compiled image of what `name` points to now."""
        return self.run(self.store.ensure(self.resolve(name)))

    def submit(
        self,
        prompt: Sequence[int],
        adapter: str | None = None,
        params: SamplingParams | None = None,
        **fields: object,
    ) -> str:
        """Add a request whose image is on disk; returns its id."""
        ref = self.ref(adapter) if adapter is not None else None
        return self.add(prompt, params, adapter=ref, **fields)

    def add(self, prompt: Sequence[int], params: SamplingParams | None = None, **fields: object) -> str:
        """Add a request as the API would, with an AdapterRef, a pending key, or neither."""
        self._count += 1
        request_id = f"r{self._count}"
        params = params or SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
        message = AddRequest(request_id=request_id, prompt_ids=list(prompt), params=params, **fields)
        if message.adapter is not None:
            self._lease(request_id, message.adapter)
        self.answers[request_id] = Answer()
        self.core.add(message)
        return request_id

    def bring(self, version: SourceVersion) -> AdapterRef | None:
        """Compile a pending SourceVersion and tell the engine, as the API does; None when it failed."""
        try:
            ref = self.run(self.store.ensure(version))
        except AdapterError as error:
            self.core.adapter_failed(AdapterFailed(version.key, error.http_status, error.code, error.message))
            return None
        self.core.adapter_ready(version.key, ref)
        return ref

    def step(self) -> None:
        """One engine step; outputs go to `answers`."""
        outputs = self.core.step()
        self.num_steps += 1
        self.max_distinct_adapters = max(self.max_distinct_adapters, outputs.stats.distinct_adapters)
        for output in outputs.outputs:
            answer = self.answers[output.request_id]
            assert answer.num_terminal == 0, "an output after the terminal one"
            answer.token_ids += output.token_ids
            answer.phases = answer.phases or output.phases
            answer.logprobs += output.logprobs or []
            if output.prompt_logprobs is not None:
                assert answer.prompt_logprobs is None, "prompt logprobs came twice"
                answer.prompt_logprobs = output.prompt_logprobs
            if output.num_cached_tokens is not None:
                answer.num_cached_tokens = output.num_cached_tokens
            if output.finish_reason is not None:
                answer.finish_reason = str(output.finish_reason)
                answer.error = output.error
                answer.num_terminal += 1
                self._unlease(output.request_id)

    def finish(self, ids: Iterable[str], max_steps: int = 20_000) -> dict[str, Answer]:
        """Step until these requests have ended."""
        waiting = set(ids)
        wanted = sorted(waiting)
        for _ in range(max_steps):
            waiting = {i for i in waiting if not self.answers[i].num_terminal}
            if not waiting:
                return {i: self.answers[i] for i in wanted}
            self.step()
        raise AssertionError(f"{len(waiting)} requests did not end in {max_steps} steps")

    def wait_for_loads(self) -> None:
        """Until every adapter asked for so far is resident."""
        while self.core.slots.num_loading:
            assert not self.core.slots.poll()
            time.sleep(0.001)

    def logits_with_and_without_adapters(
        self, prompts: Sequence[Sequence[int]], adapters: Sequence[str | None]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Two runs of the very same batch, as planned and with its segment plans emptied.

        Returns their logits [S, V] and which sampled rows are base rows [S].
        """
        ids = [self.submit(p, a) for p, a in zip(prompts, adapters, strict=True)]
        self.wait_for_loads()
        captured: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        runner = self.core._runner
        original = runner.logits

        def twice(batch: Batch) -> torch.Tensor:
            import server.model.runner as module

            planned = module.segments_of
            module.segments_of = lambda *_: (Segments(), Segments())
            try:
                without = original(batch).clone()
            finally:
                module.segments_of = planned
            logits = original(batch)
            is_base = torch.tensor([item.request.adapter is None for item in batch.sample_items])
            captured.append((logits.clone(), without, is_base))
            return logits

        runner.logits = twice
        try:
            self.finish(ids)
        finally:
            runner.logits = original
        together = [found for found in captured if len(found[2]) == len(ids)]
        assert together, f"no step sampled all {len(ids)} requests; steps sampled {[len(f[2]) for f in captured]}"
        return together[0]

    def _lease(self, request_id: str, ref: AdapterRef) -> None:
        self.store.lease(ref)
        self._leases[request_id] = ref

    def _unlease(self, request_id: str) -> None:
        ref = self._leases.pop(request_id, None)
        if ref is not None:
            self.store.release(ref)

    def assert_nothing_leaked(self) -> None:
        """Everything ended once; no block, slot, ref, lease or queue entry is left."""
        self.step()  # collects what was in flight when the last request ended
        assert self.core.scheduler.stats().kv_usage == 0.0, "blocks leaked"
        assert all(answer.num_terminal == 1 for answer in self.answers.values())
        self.core.check_integrity()
        assert not self.core.scheduler.has_work
        assert not self._leases and not self.store.disk.num_leases

    def close(self) -> None:
        self.core.close()
        self.run(self.store.close())
        self._loop.close()
