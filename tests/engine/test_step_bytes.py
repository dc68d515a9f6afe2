"""What sizing leaves free for a step, against what steps take: allocations, counted by torch's own profiler."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from server.config import EngineConfig
from server.engine import sizing
from server.engine.batch import ScheduledRequest
from server.model import sampler as sampler_module
from server.model.sampler import Sampler
from tests.model.harness import greedy, make_batch
from tests.model.test_graphs import fill_in_place, serve_graphed
from tests.model.test_nucleus import EOS, make_request, random_logits
from tests.model.test_runner import with_slot
from tests.zoo import random_prompts, tiny_base


def peak_bytes(run) -> int:
    """The most that was allocated at once while `run` ran, beyond what there was before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    assert events, "nothing was counted"
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_a_step_of_prompts_fits(family: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sizing, "SAMPLING_BYTES", 0)
    monkeypatch.setattr(sizing, "MAX_PROMPT_LOGITS", 0)
    served = serve_graphed(tiny_base(tmp_path, family, hidden_size=64, intermediate_size=512), max_seqs=4)
    fill_in_place(served)
    rows, count = 120, 10
    requests = [
        with_slot(greedy(p, str(i), 1), 1 + i % 2)
        for i, p in enumerate(random_prompts(count, 320, seed=1, lengths=(12, 13)))
    ]
    for i, request in enumerate(requests):
        request.blocks = [1 + 3 * i, 2 + 3 * i, 3 + 3 * i]
    items = [ScheduledRequest(r, 0, 12, samples=True) for r in requests]
    runner = served.runner
    peak = peak_bytes(lambda: runner.logits(make_batch(items)))
    config = EngineConfig(model="m", max_step_tokens=rows, max_num_seqs=count)
    estimate = sizing.step_bytes(config, served.manifest, 4)
    assert peak <= estimate <= 8 * peak


@pytest.mark.parametrize("vocab", [1000, 50_000, 151_936])
def test_the_samplers_temporaries_fit(vocab: int, monkeypatch) -> None:
    monkeypatch.setattr(sampler_module, "is_near", lambda device: False)
    rows = 64
    logits = random_logits(rows, vocab)
    requests = [make_request(top_p=0.9, top_k=50, min_p=0.01, repetition_penalty=1.2, seed=n) for n in range(rows)]
    peak = peak_bytes(lambda: Sampler([EOS]).sample(logits, requests)) - 2 * 4 * rows * vocab
    assert sizing.SAMPLING_BYTES / 8 < peak <= sizing.SAMPLING_BYTES
