"""Decode steps by graphs, over stand-ins for graph and kernels: whatever a replay does not read anew is wrong here.

The oracle is the eager pass over its own KV cache, and for whole answers transformers with merged weights.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kernels.ops import get_backend
from kernels.types import BIAS_OFFSET, RANK, TABLE_COLUMNS, SlotWeights
from server.adapters.layer import StepState
from server.adapters.plan import segments_of
from server.engine.batch import ScheduledRequest
from server.engine.request import Request
from server.model import runner as runner_module
from server.model.forward import ModuleForward
from server.model.graphs import NO_ADAPTER, WITH_SETS, CudaGraph, GraphForward, GraphShape
from server.model.kv import KVCache
from server.model.loader import load_base
from server.model.manifest import build_manifest
from server.model.runner import ModelRunner
from server.model.surgery import adapt
from tests import device_ops
from tests.model.harness import BLOCK_SIZE, MAX_ROWS, NUM_BLOCKS, Driver, Served, greedy, make_batch
from tests.model.test_models import CERTIFIED, LONGROPE, build
from tests.model.test_runner import fill_slots, merged_oracle, with_slot
from tests.recorded_graph import RecordedGraph
from tests.zoo import greedy_tokens, load_oracle_base, random_prompts, tiny_base

MAX_SEQS = 20
MAX_BLOCKS = 16


class CountedGraph(CudaGraph):
    replays = 0

    def replay(self) -> None:
        self.replays += 1
        super().replay()


@dataclass
class Graphed(Served):
    """A base whose decode steps are replays, and the graphs behind them in the order of their capture."""

    graphs: list[Any]  # RecordedGraph, CountedGraph or what `graph_of` gave

    @property
    def replays(self) -> int:
        return sum(graph.replays for graph in self.graphs)


def serve_graphed(
    path: Path,
    device: str = "cpu",
    *,
    max_seqs: int = MAX_SEQS,
    max_rank: int = 64,
    max_members: int = 1,
    ops: Any = None,
    graph_of: Callable[[StepState], Any] | None = None,
) -> Graphed:
    """As harness.serve, with graphs captured while no slot holds anything; fp32, block 0 poisoned as all others.

    On the CPU by stand-ins for graphs and kernels unless others are given, on a GPU by the real ones.
    """
    base = load_base(path, "float32", device)
    manifest = build_manifest(path, "float32")
    table = torch.zeros(3, len(manifest.sites), TABLE_COLUMNS, dtype=torch.int64)
    table[..., BIAS_OFFSET] = -1
    step_weights = SlotWeights(torch.full((1 << 20,), torch.nan, device=device), table.to(device))
    ops = ops or (device_ops if device == "cpu" else get_backend("triton"))
    pool = None if device == "cpu" else torch.cuda.graph_pool_handle()
    step = StepState(weights=step_weights, ops=ops)
    replacements = adapt(base.model, manifest, step)
    kv = KVCache(base.kv_shape, NUM_BLOCKS, BLOCK_SIZE, base.dtype, base.device)
    for cache in (*kv.keys, *kv.values):
        cache[:] = torch.nan
    graphs: list[Any] = []

    def new_graph() -> Any:
        if graph_of is not None:
            graphs.append(graph_of(step))
        else:
            graphs.append(RecordedGraph() if pool is None else CountedGraph(pool))
        return graphs[-1]

    sizes = (max_seqs, max_rank, MAX_BLOCKS, BLOCK_SIZE, manifest.vocab_size)
    shape = GraphShape(*sizes, base.dtype, base.device, max_members)
    forward = GraphForward(ModuleForward(base.model, step, kv, ops), step, shape, new_graph)
    runner = ModelRunner(
        forward,
        step,
        eos_token_ids=base.eos_token_ids,
        block_size=BLOCK_SIZE,
        max_rows=MAX_ROWS,
        device=base.device,
    )
    return Graphed(base, manifest, runner, kv, step, replacements, graphs)


def fill_in_place(served: Graphed) -> dict[int, dict[str, torch.Tensor]]:
    """fill_slots, into the tensors that the graphs were captured with."""
    weights = served.step.weights
    arena, table = weights.arena, weights.table
    deltas = fill_slots(served)
    arena[: len(weights.arena)], table[:] = weights.arena, weights.table
    weights.arena, weights.table = arena, table
    return deltas


def test_sizes_and_buckets() -> None:
    shape = GraphShape(64, 48, 1, 1, 1, torch.float32, torch.device("cpu"))
    assert shape.sizes == [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64] and shape.buckets == [NO_ADAPTER, 16, 64]
    for most in (1, 2, 3, 4, 5, 9, 100, 256, 257, 300, 1000):
        sizes = GraphShape(most, 512, 1, 1, 1, torch.float32, torch.device("cpu")).sizes
        assert sizes == sorted(set(sizes)) and sizes[-1] == most and sizes[0] == 1


ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="runs where torch sees an NVIDIA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, ON_GPU])]
GRAPHED = {name: CERTIFIED[name] for name in ("llama", "gemma3", "qwen3", "phi3")} | {"longrope": ("phi3", LONGROPE)}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", GRAPHED)
def test_answers_are_those_of_merged_weights(name: str, device: str, tmp_path: Path) -> None:
    """Requests of several adapters arrive and end one by one: steps of one to twelve rows, every token checked."""
    path = build(tmp_path, *GRAPHED[name])
    served = serve_graphed(path, device)
    deltas = fill_in_place(served)
    slots = (0, 1, 2, 1, 0, 2, 2, 1, 0, 0, 1, 2)
    prompts = random_prompts(len(slots), 320, seed=4, lengths=(2, 25))
    answers = Driver(served, row_budget=30, stagger=1).run(
        [with_slot(greedy(p, str(i), 6 + 3 * i), slot) for i, (p, slot) in enumerate(zip(prompts, slots, strict=True))]
    )
    oracles = {slot: merged_oracle(path, served, deltas[slot]) for slot in deltas} | {0: load_oracle_base(path)}
    for i, (prompt, slot) in enumerate(zip(prompts, slots, strict=True)):
        assert answers[i] == greedy_tokens(oracles[slot], prompt, 6 + 3 * i), i
    assert served.replays > 20


@dataclass
class Decodes:
    """Requests that decode forever in blocks of their own, in any subset and with any slots, step by step."""

    served: Served
    requests: list[Request]

    @classmethod
    def of(cls, served: Served, count: int) -> Decodes:
        prompts = random_prompts(count, 320, seed=8, lengths=(3, 9))
        requests = [greedy(prompt, str(i), 100) for i, prompt in enumerate(prompts)]
        for i, request in enumerate(requests):
            request.blocks = list(range(1 + i * MAX_BLOCKS, 1 + (i + 1) * MAX_BLOCKS))
        return cls(served, requests)

    def prefill(self) -> None:
        for request in self.requests:
            item = ScheduledRequest(request, 0, len(request.token_ids), samples=True)
            self.served.runner.logits(make_batch([item]))

    def step(self, chosen: Sequence[tuple[int, int, int]]) -> torch.Tensor:
        """One decode row for each (request, slot, token) of `chosen`: the logits."""
        items = []
        for number, slot, token in chosen:
            request = self.requests[number]
            request.slot, request.adapter = 0, None
            with_slot(request, slot)
            request.token_ids.append(token)
            items.append(ScheduledRequest(request, len(request.token_ids) - 1, 1, samples=True))
        return self.served.runner.logits(make_batch(items)).clone()


@pytest.mark.parametrize("device", DEVICES)
def test_any_rows_and_slots_in_any_order(device: str, tmp_path: Path) -> None:
    """Long steps after short ones and short after long, adapters or none: logits as without graphs."""
    path = tiny_base(tmp_path, "llama")
    graphed = serve_graphed(path, device)
    eager = serve_graphed(path, device)
    eager.runner._forward = eager.runner._forward._eager  # the same kernels, a cache of its own
    for served in (graphed, eager):
        fill_in_place(served)
    worlds = [Decodes.of(served, MAX_SEQS) for served in (graphed, eager)]
    for world in worlds:
        world.prefill()
    rng = random.Random(5)
    for count in (1, 20, 3, 1, 17, 16, 2, 9, 4, 20, 5, 8, 1):
        numbers = rng.sample(range(MAX_SEQS), count)
        slots = sorted(rng.choice((0, 1, 2)) for _ in numbers) if rng.random() < 0.7 else [0] * count
        chosen = [(number, slot, rng.randrange(320)) for number, slot in zip(numbers, slots, strict=True)]
        found, right = (world.step(chosen) for world in worlds)
        torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)
    assert graphed.replays == 13 and eager.replays == 0


def test_padding_rows_write_nowhere(tmp_path: Path) -> None:
    """A step of 5 in a graph of 8, after one of 8: no block but the dummy's and the five's changes."""
    served = serve_graphed(tiny_base(tmp_path, "llama"))
    world = Decodes.of(served, 8)
    world.prefill()
    world.step([(n, 0, 7) for n in range(8)])
    before = [cache.clone() for cache in (*served.kv.keys, *served.kv.values)]
    world.step([(n, 0, 9) for n in range(5)])
    own = {0} | {block for request in world.requests[:5] for block in request.blocks}
    others = [block for block in range(NUM_BLOCKS) if block not in own]
    for cache, old in zip((*served.kv.keys, *served.kv.values), before, strict=True):
        torch.testing.assert_close(cache[others], old[others], equal_nan=True, atol=0, rtol=0)


def test_a_slot_that_changes_hands_between_replays(tmp_path: Path) -> None:
    """The table and the arena are rewritten under a captured graph: the next replay answers by what is there now."""
    path = tiny_base(tmp_path, "llama")
    served = serve_graphed(path)
    deltas = fill_in_place(served)
    world = Decodes.of(served, 2)
    world.prefill()
    weights = served.step.weights
    first = world.step([(0, 1, 5), (1, 2, 6)])
    for request in world.requests:
        request.token_ids.pop()
    weights.table[[1, 2]] = weights.table[[2, 1]]
    weights.version += 1
    swapped = world.step([(0, 2, 5), (1, 1, 6)])
    torch.testing.assert_close(first, swapped, atol=1e-5, rtol=1e-5)
    for request in world.requests:
        request.token_ids.pop()
    weights.table[1] = torch.tensor([0, 0, -1, 0, 0])  # evicted, its bytes NaN
    weights.version += 1
    rows = world.step([(0, 1, 5), (1, 2, 6)])
    base = load_oracle_base(path)
    with torch.inference_mode():
        expected = base(torch.tensor([world.requests[0].token_ids])).logits[0, -1]
    assert torch.isfinite(rows).all() and deltas
    torch.testing.assert_close(rows[0], expected, atol=2e-3, rtol=2e-3)


def test_the_bucket_is_that_of_the_largest_rank_in_the_step(tmp_path: Path) -> None:
    served = serve_graphed(tiny_base(tmp_path, "llama"))
    fill_in_place(served)
    served.step.weights.table[2, :, RANK] = 0
    served.step.weights.version += 1
    world = Decodes.of(served, 2)
    world.prefill()
    by_key = {key: captured.graph for key, captured in served.runner._forward._graphs.items()}

    def replayed(chosen) -> set[tuple[int, int]]:
        counts = {key: graph.replays for key, graph in by_key.items()}
        world.step(chosen)
        return {key for key, graph in by_key.items() if graph.replays > counts[key]}

    assert replayed([(0, 0, 1), (1, 0, 1)]) == {(2, NO_ADAPTER)}
    assert replayed([(0, 0, 1), (1, 1, 1)]) == {(2, 16)}
    served.step.weights.slot_ranks = np.array([0, 17, 0])
    assert replayed([(1, 1, 1)]) == {(1, 64)}
    assert replayed([(0, 0, 1), (1, 2, 1)]) == {(2, 16)}
    served.step.weights.slot_ranks = np.array([0, 65, 0])
    assert replayed([(1, 1, 1)]) == set(), "above the ranks that graphs were captured for: eagerly"


SETS = {3: ((1, 0.5), (2, -1.5)), 4: ((2, 0.25), (1, 1.0), (2, 1.0)), 5: ((1, 2.0), (2, 0.0))}
"""What the tests take slots beyond the table's for, until requests can name sets"""


def name_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments of a slot in SETS become those of its members."""

    def planned(batch, holds):
        plans = segments_of(batch, holds)
        for plan in plans:
            plan.members = [SETS.get(members[0][0], members) for members in plan.members]
        return plans

    monkeypatch.setattr(runner_module, "segments_of", planned)


def total_delta(served: Served, deltas: dict[int, dict[str, torch.Tensor]], slot: int) -> dict[str, torch.Tensor]:
    """That of a slot, or of the set that it stands for, at each site."""
    members = SETS.get(slot, ((slot, 1.0),))
    names = [site.name for site in served.manifest.sites]
    return {name: sum((weight * deltas[member][name] for member, weight in members), torch.zeros(())) for name in names}


@pytest.mark.parametrize("device", DEVICES)
def test_sets_that_come_and_go(device: str, tmp_path: Path, monkeypatch) -> None:
    """Steps with sets, without, with sets of fewer and of more members: replays, and the logits of the eager pass."""
    name_sets(monkeypatch)
    path = tiny_base(tmp_path, "llama")
    graphed, eager = (serve_graphed(path, device, max_members=3) for _ in range(2))
    eager.runner._forward = eager.runner._forward._eager
    for served in (graphed, eager):
        fill_in_place(served)
    worlds = [Decodes.of(served, MAX_SEQS) for served in (graphed, eager)]
    for world in worlds:
        world.prefill()
    rng = random.Random(6)
    choices = [(0, 1, 2, 3, 4, 5), (1, 2), (3,), (0,), (5, 0), (4,), (4, 3), (0, 1), (0, 1, 2, 3, 4, 5)]
    for count, slots_of_step in zip((20, 9, 1, 3, 17, 20, 2, 5, 20), choices, strict=True):
        numbers = rng.sample(range(MAX_SEQS), count)
        slots = sorted(rng.choice(slots_of_step) for _ in numbers)
        chosen = [(number, slot, rng.randrange(320)) for number, slot in zip(numbers, slots, strict=True)]
        found, right = (world.step(chosen) for world in worlds)
        torch.testing.assert_close(found, right, atol=1e-5, rtol=1e-5)
    by_family = dict.fromkeys((NO_ADAPTER, 16, 64, WITH_SETS), 0)
    for (_, family), captured in graphed.runner._forward._graphs.items():
        by_family[family] += captured.graph.replays
    assert by_family == {NO_ADAPTER: 1, 16: 2, 64: 0, WITH_SETS: 6} and eager.replays == 0


@pytest.mark.parametrize("device", DEVICES)
def test_a_sets_answer_is_that_of_merged_weights(device: str, tmp_path: Path, monkeypatch) -> None:
    name_sets(monkeypatch)
    path = tiny_base(tmp_path, "llama")
    served = serve_graphed(path, device, max_members=3)
    deltas = fill_in_place(served)
    prompts = random_prompts(6, 320, seed=4, lengths=(2, 25))
    slots = (3, 1, 4, 0, 5, 3)
    answers = Driver(served, row_budget=30, stagger=1).run(
        [with_slot(greedy(p, str(i), 8 + i), slot) for i, (p, slot) in enumerate(zip(prompts, slots, strict=True))]
    )
    for i, (prompt, slot) in enumerate(zip(prompts, slots, strict=True)):
        oracle = merged_oracle(path, served, total_delta(served, deltas, slot)) if slot else load_oracle_base(path)
        assert answers[i] == greedy_tokens(oracle, prompt, 8 + i), i
    assert served.replays > 5


def test_sets_that_nobody_said_there_are_run_eagerly(tmp_path: Path, monkeypatch) -> None:
    """And are not captured: no graph for any, or for those of as many members as there may be."""
    name_sets(monkeypatch)
    for max_members, replays in ((1, [0, 0, 0]), (2, [1, 0, 1])):
        served = serve_graphed(tiny_base(tmp_path / str(max_members), "llama"), max_members=max_members)
        assert any(family == WITH_SETS for _, family in served.runner._forward._graphs) == (max_members > 1)
        fill_in_place(served)
        world = Decodes.of(served, 2)
        world.prefill()
        for slot, count in zip((3, 4, 5), replays, strict=True):
            before = served.replays
            world.step([(0, slot, 7)])
            assert served.replays - before == count
        served.step.weights.slot_ranks = np.array([0, 65, 0])
        before = served.replays
        world.step([(0, 3, 7)])
        assert served.replays == before, "a rank above those that graphs were captured for"


def test_what_no_graph_is_for_runs_eagerly(tmp_path: Path) -> None:
    """Prompts, mixed steps, steps that sample nothing, and more decodes than any graph has rows."""
    served = serve_graphed(tiny_base(tmp_path, "llama"))
    world = Decodes.of(served, MAX_SEQS + 1)
    world.prefill()
    world.step([(n, 0, 3) for n in range(MAX_SEQS + 1)])
    assert served.replays == 0
    world.step([(n, 0, 3) for n in range(MAX_SEQS)])
    assert served.replays == 1


def test_a_prompt_whose_rows_all_reach_the_head_is_no_decode_step(tmp_path: Path) -> None:
    served = serve_graphed(tiny_base(tmp_path, "llama"))
    request = greedy([5, 9, 200, 31], "r", 1)
    request.blocks = [1]
    item = ScheduledRequest(request, 0, 4, samples=True, logprob_positions=range(3))
    batch = make_batch([item])
    assert len(batch.head_rows) == batch.num_rows == 4
    logits = served.runner.logits(batch)
    with torch.inference_mode():
        expected = load_oracle_base(tmp_path)(torch.tensor([request.token_ids])).logits[0]
    torch.testing.assert_close(logits, expected[[3, 0, 1, 2]], atol=2e-3, rtol=2e-3)
    assert served.replays == 0
