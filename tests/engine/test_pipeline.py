"""Two steps in flight through core, scheduler, runner and sampler: the answers of one, in the order of two."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from server.model import sampler as sampler_module
from server.model.sampler import Sampler, filtered_weights
from tests.engine.pipeline_rig import BROKEN, EOS, VOCAB, LateCopies, Rig
from tests.model.test_sampler import GRID, make_request, mixed_requests, random_logits


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- the order ----------------------------------------------------------------------------------------------


def test_the_next_step_is_dispatched_before_the_last_is_collected():
    rig = Rig(2)
    rig.add("a", [1, 2, 3], max_tokens=5, ignore_eos=True)
    rig.run()
    assert rig.log == ["dispatch", *["dispatch", "collect"] * 4, "collect"]
    one = Rig(1)
    one.add("a", [1, 2, 3], max_tokens=5, ignore_eos=True)
    one.run()
    assert one.log == ["dispatch", "collect"] * 5


def test_every_engine_step_gives_a_steps_results():
    """So that its driver never takes a step that only dispatched for one that could do nothing."""
    rig = Rig(2)
    rig.add("a", [1, 2, 3], max_tokens=5, ignore_eos=True)
    rig.add("b", [1, 2, 3], max_tokens=5, ignore_eos=True, bad_words=((94, 95),))
    while rig.core.has_work():
        before = rig.log.count("collect")
        rig.step()
        assert rig.log.count("collect") == before + 1
    assert len(rig.outputs["a"]) == len(rig.outputs["b"]) == 5


def test_work_is_left_until_the_last_row_is_collected():
    rig = Rig(2)
    rig.add("a", [1, 2, 3], max_tokens=30, stop_token_ids=tuple(range(VOCAB)))
    while not rig.is_over("a"):
        rig.step()
    assert rig.core.has_work() and not rig.core.scheduler.has_work
    assert rig.blocks.num_free < rig.blocks.num_usable
    rig.core.check_integrity()
    rig.step()
    assert not rig.core.has_work() and rig.blocks.num_free == rig.blocks.num_usable
    assert rig.log.count("dispatch") == rig.log.count("collect") == 2, "one row too many, after the token"


# --- the answers --------------------------------------------------------------------------------------------

KINDS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 30},
    {"temperature": 1.2, "min_p": 0.02, "logprobs": 2},
    {"logprobs": 1, "prompt_logprobs": 1},
    {"repetition_penalty": 1.3, "temperature": 0.9},
    {"presence_penalty": 0.7, "frequency_penalty": 0.4},
    {"bad_words": ((3,), (4, 5), (1, 2, 3))},
    {"logit_bias": ((9, 3.0),), "min_tokens": 4},
    {"allowed_token_ids": tuple(range(40)), "temperature": 1.0},
    {"stop_token_ids": tuple(range(60, 90)), "min_tokens": 2},
    {"max_tokens": 0, "prompt_logprobs": 0},
    {"max_tokens": 1},
]


def answers(
    seed: int, steps_in_flight: int, *, copies: LateCopies | None = None, device: str = "cpu", num_blocks: int = 30
) -> dict[str, Any]:
    """Thirty requests of all kinds, coming while others run, over blocks for some of them."""
    rng = random.Random(seed)
    rig = Rig(steps_in_flight, copies=copies, device=device, num_blocks=num_blocks)
    requests = [
        (
            [rng.choice([t for t in range(VOCAB) if t != BROKEN]) for _ in range(rng.randint(1, 20))],
            {"max_tokens": rng.randint(1, 25), "seed": n, "ignore_eos": n % 3 == 0} | rng.choice(KINDS),
        )
        for n in range(30)
    ]
    for number, (prompt, params) in enumerate(requests):
        rig.add(f"r{number}", prompt, **params)
        for _ in range(rng.randint(0, 2)):
            rig.step()
    found = rig.run()
    assert len(found) == 30
    return found


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_the_answers_are_those_of_one_step_in_flight(seed):
    assert answers(seed, 2, copies=LateCopies()) == answers(seed, 1)


def test_all_ends_come_up_in_these():
    """Else the test above says less than it seems to."""
    found = [answer for seed in range(4) for answer in answers(seed, 2).values()]
    assert {reason for _, reason, _ in found} == {"stop", "length", "error"}
    assert any(EOS in tokens for tokens, _, _ in found) and any(logprobs for _, _, logprobs in found)


def test_a_row_behind_a_failure_runs_with_some_token(monkeypatch):
    """In place of an id the table would have -1, which no embedding has a row for."""
    rig = Rig(2)
    rig.add("a", [1], logit_bias=((BROKEN, 100.0),), ignore_eos=True)
    seen: list[int] = []
    original = rig.forward.__call__
    monkeypatch.setattr(rig.runner, "_forward", lambda inputs: (seen.extend(inputs.ids.tolist()), original(inputs))[1])
    found = rig.run()
    assert found["a"][:2] == ([BROKEN], "error") and seen == [1, BROKEN, 0]


# --- the runner ---------------------------------------------------------------------------------------------


def test_a_dispatch_waits_for_nothing_and_writes_where_no_copy_reads():
    copies = LateCopies()
    rig = Rig(2, copies=copies)
    for number in range(4):
        rig.add(f"r{number}", [number + 1] * 3, max_tokens=10, ignore_eos=True)
    rig.run()
    assert copies.num_waits == rig.log.count("collect")


def test_one_host_buffer_for_two_steps_is_a_wait():
    """The stand-in can tell: this is what the test above would show."""
    rig = Rig(2, copies=LateCopies())
    rig.runner._inputs._stage._buffers.pop()
    rig.add("a", [1, 2, 3], ignore_eos=True)
    with pytest.raises(AssertionError, match="waited for a step in flight"):
        rig.run()


def test_a_buffer_written_too_early_is_seen(monkeypatch):
    rig = Rig(2, copies=LateCopies())
    stage = rig.runner._inputs._stage
    stage._buffers.pop()
    monkeypatch.setattr(stage, "begin", lambda: stage._buffers[0][0])
    rig.add("a", [1, 2, 3], ignore_eos=True)
    with pytest.raises(AssertionError, match="wrote to a buffer that a copy was reading"):
        rig.run()


class NoReads(TorchDispatchMode):
    """A device whose values nobody on the host may ask for."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not any(name == read or name.startswith(f"{read}_") for read in self.READS), f"{func} reads the device"
        if name in ("index", "index_put", "index_put_"):
            indices = [index for index in args[1] if index is not None]
            assert all(index.dtype is not torch.bool for index in indices), f"{func} by a mask reads the device"
        return func(*args, **(kwargs or {}))


class NoWaits(TorchFunctionMode):
    """The same of what torch does without dispatching it; and no tensor is made on the device out of host values, but
    by `to_device`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.cpu), f"{func} reads the device"
        assert func is not torch.tensor or "device" not in (kwargs or {}), "torch.tensor with a device waits for it"
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(part, (list, np.ndarray)) for part in parts), "an index on the host waits for it"
        return func(*args, **(kwargs or {}))


def test_a_dispatch_reads_nothing_of_the_device(monkeypatch):
    """Every kind of request; where the sampler would look at a CPU's tensors it takes the way of a GPU."""
    monkeypatch.setattr(sampler_module, "is_near", lambda device: False)
    rig = Rig(2, copies=LateCopies())
    original = rig.runner.dispatch

    def watched(batch):
        with NoWaits(), NoReads():
            return original(batch)

    monkeypatch.setattr(rig.runner, "dispatch", watched)
    for number, params in enumerate(KINDS):
        rig.add(f"r{number}", [number + 10, number + 11], seed=number, **params)
    rig.run()


def test_the_modes_above_see_what_they_shall():
    values = torch.randn(4)
    for read in (lambda: values.tolist(), lambda: values[0].item(), lambda: bool(values[0] > 0), values.nonzero,
                 lambda: values[values > 0]):  # fmt: skip
        with pytest.raises(AssertionError, match="reads the device"), NoWaits(), NoReads():
            read()
    for wait in (lambda: torch.tensor([1], device="cpu"), lambda: values[[0, 1]], lambda: values.__setitem__([1], 0)):
        with pytest.raises(AssertionError, match="waits for it"), NoWaits():
            wait()


# --- the sampler without a look at its values ---------------------------------------------------------------


def test_filters_are_the_same_without_reading_back(monkeypatch):
    """Mixed rows: a nucleus of thousands, a few, top-k alone, neither."""
    requests = [make_request(**fields) for fields in GRID]
    for scale in (0.3, 3.0):
        logits = random_logits(len(GRID), 3000, scale=scale)
        expected = filtered_weights(logits, requests)
        by_top_k = [row for row, fields in enumerate(GRID) if fields["top_p"] == 1.0]
        free = [row for row in by_top_k if not GRID[row]["top_k"]]
        with monkeypatch.context() as patch:
            patch.setattr(sampler_module, "is_near", lambda device: False)
            for rows in (list(range(len(GRID))), by_top_k, free, [0]):
                found = filtered_weights(logits[rows], [requests[row] for row in rows])
                assert torch.equal(found, expected[rows])


def test_tokens_are_the_same_without_reading_back(monkeypatch):
    requests, logits = mixed_requests(24), random_logits(24, 3000)
    expected = Sampler([EOS]).sample(logits, requests)
    monkeypatch.setattr(sampler_module, "is_near", lambda device: False)
    assert torch.equal(Sampler([EOS]).sample(logits, requests), expected)


# --- on a GPU -----------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs where torch sees an NVIDIA GPU")
@pytest.mark.parametrize("seed", range(5))
def test_on_a_gpu_no_dispatch_waits_and_answers_are_those_of_the_cpu(seed, monkeypatch):
    original = Rig.dispatch

    def watched(rig, batch):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return original(rig, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Rig, "dispatch", watched)
    found, expected = answers(seed, 2, device="cuda"), answers(seed, 1)
    assert {name: answer[:2] for name, answer in found.items()} == {n: a[:2] for n, a in expected.items()}
