"""Rows keep their own adapters and their own keys while graphs replay and adapters, requests and blocks come and go.

A small decoder runs decode steps from captured graphs, two in flight. Meanwhile images are copied into slots on a side
stream, idle ones evicted, requests aborted while their row is in flight, blocks given to others; what is freed becomes
NaN. Every row of every step is compared with a forward pass in fp32 that has its own adapters and its own keys.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.functional import linear

from kernels.types import AttentionMetadata, Segments
from loadtest.gpu.adapters import Adapters, Delta, Members, group_sites, make_adapters, segments_of
from loadtest.gpu.decoder import BLOCK_SIZE, Decoder, StepAdapters
from loadtest.gpu.machine import Graph, Machine
from loadtest.gpu.plans import AttentionPlan, SegmentsPlan
from loadtest.gpu.residency import Residency, image_of
from loadtest.gpu.shapes import Shape
from loadtest.gpu.small import TorchOps

Fault = Literal["none", "refs", "plan"]
"""Broken on purpose: slots in use are refilled; a graph is replayed with another step's segments."""

BASE = -1


@dataclass(frozen=True)
class Setting:
    """Sizes of a run."""

    shape: Shape
    dtype: torch.dtype
    sizes: tuple[int, ...]  # rows of the captured graphs
    num_names: int
    num_slots: int
    ranks: tuple[int, ...]
    num_steps: int
    max_context: int
    tolerance: float  # of a row's logits, by norm


REAL = Setting(Shape(4, 1024, 8, 2, 128, 2048, 4096), torch.bfloat16, (8, 32), 24, 8, (8, 16, 40, 64), 1000, 96, 0.1)
TINY = Setting(Shape(2, 32, 4, 2, 8, 48, 64), torch.float32, (2, 4), 5, 2, (4, 8), 45, 24, 1e-3)


@dataclass
class Request:
    """One row of each step it is in."""

    name: int  # of its adapter, or BASE
    slot: int  # 0 for the base
    lane: int  # its keys at the oracle, and its blocks
    context: int
    left: int  # steps


@dataclass
class Flight:
    """A step whose results were not looked at yet."""

    errors: torch.Tensor  # [2, rows] on the host: against the row's own oracle, and another adapter's
    event: torch.cuda.Event | None  # after which they are there
    ended: list[Request]


@dataclass
class Counts:
    """What happened."""

    steps: int = 0
    rows: int = 0
    wrong: int = 0
    aborts: int = 0
    error: float = 0.0  # the largest of a right row
    other_error: float = float("inf")  # the smallest against another adapter's result


def measure_isolation(
    machine: Machine, backend: str, setting: Setting, seed: int, fault: Fault = "none"
) -> dict[str, Any]:
    """Run it; counts, and by how much another adapter would have been off."""
    storm = Storm(machine, backend, setting, seed, fault)
    counts = storm.run()
    return {
        "steps": counts.steps,
        "rows checked": counts.rows,
        "wrong": counts.wrong,
        "loads": storm.residency.num_loads,
        "evictions": storm.residency.num_evictions,
        "aborts": counts.aborts,
        "largest error": counts.error,
        "smallest error of another adapter": counts.other_error,
    }


class Storm:
    """The loop."""

    def __init__(self, machine: Machine, backend: str, setting: Setting, seed: int, fault: Fault) -> None:
        self.machine, self.setting, self._fault = machine, setting, fault
        self._rng = random.Random(seed)
        self._generator = torch.Generator(machine.device).manual_seed(seed)
        lanes = 2 * max(setting.sizes)
        self._blocks_each = -(-setting.max_context // BLOCK_SIZE)
        num_blocks, longest = 1 + lanes * self._blocks_each, self._blocks_each * BLOCK_SIZE
        self.decoder = Decoder(machine, backend, setting.shape, setting.dtype, self._generator, num_blocks, longest)
        made = [self._adapter(name) for name in range(setting.num_names)]
        images = [image_of(adapters, 1, machine.is_cuda) for adapters in made]
        self.residency = Residency(machine, images, setting.num_slots, holds_refs=fault != "refs")
        self._oracle = Oracle(self.decoder, [adapters.deltas for adapters in made], lanes, longest)
        self._graphs = {size: _Captured(self, backend, size) for size in setting.sizes}
        self._free = list(range(lanes))
        self._active: list[Request] = []
        self._flights: deque[Flight] = deque()
        self._counts = Counts()

    def run(self) -> Counts:
        for _ in range(self.setting.num_steps):
            self.residency.poll()
            self._arrive()
            if self._active:
                self._flights.append(self._dispatch())
            if len(self._flights) > 1 or not self._active:
                self._collect()
        while self._flights:
            self._collect()
        return self._counts

    def _arrive(self) -> None:
        """Requests up to a number that swings, so that graphs of all sizes take turns."""
        wanted = self._rng.randint(1, max(self.setting.sizes))
        for _ in range(max(wanted - len(self._active), 0)):
            name = self._rng.choice([BASE, *range(self.setting.num_names)])
            slot = 0 if name == BASE else self.residency.acquire(name)
            if slot is None or not self._free:
                if slot:
                    self.residency.release(slot)
                continue
            context = self._rng.randint(0, self.setting.max_context // 2)
            request = Request(name, slot, self._free.pop(0), context, self._rng.randint(1, 8))
            self._write_prompt(request)
            self._active.append(request)

    def _write_prompt(self, request: Request) -> None:
        """Random keys and values, the same for both."""
        shape = self.setting.shape
        drawn = torch.randn(
            *(shape.layers, 2, request.context, shape.kv_heads, shape.head_dim),
            device=self.machine.device,
            generator=self._generator,
        ).to(self.setting.dtype)
        self._oracle.kept[:, :, request.lane, : request.context] = drawn
        for layer, both in zip(self.decoder.layers, drawn, strict=True):
            for cache, stored in zip(layer.caches, both, strict=True):
                cache[self._blocks(request.lane)].flatten(0, 1)[: request.context] = stored

    def _blocks(self, lane: int) -> slice:
        return slice(1 + lane * self._blocks_each, 1 + (lane + 1) * self._blocks_each)

    def _dispatch(self) -> Flight:
        rows = sorted(self._active, key=lambda request: request.slot)
        captured = self._graphs[min(size for size in self._graphs if size >= len(rows))]
        ids = [self._rng.randrange(self.setting.shape.vocab) for _ in rows]
        members: list[Members] = [((request.slot, 1.0),) if request.slot else () for request in rows]
        is_stale = self._fault == "plan" and self._rng.random() < 0.5
        got = captured.replay(ids, self._metadata(rows), None if is_stale else segments_of(members)).float()
        self.residency.used({request.slot for request in rows if request.slot}, self.machine.event())
        names = [request.name for request in rows]
        others = [(name + 2) % (self.setting.num_names + 1) - 1 for name in names]
        inputs = ids, [request.context for request in rows], [request.lane for request in rows]
        other = self._oracle.logits(*inputs, others)
        exact = self._oracle.logits(*inputs, names)  # last: its keys stay
        errors = torch.stack([(got - logits).norm(dim=-1) for logits in (exact, other)]) / exact.norm(dim=-1)
        return Flight(*self.machine.to_host(errors), self._leave(rows))

    def _leave(self, rows: Sequence[Request]) -> list[Request]:
        """Those for whom this was the last step: done, or aborted with their row in flight."""
        ended = []
        for request in rows:
            request.context, request.left = request.context + 1, request.left - 1
            is_aborted = request.left > 0 and self._rng.random() < 0.05
            self._counts.aborts += is_aborted
            if request.left == 0 or is_aborted or request.context + 1 >= self.setting.max_context:
                ended.append(request)
        self._active = [request for request in self._active if request not in ended]
        return ended

    def _collect(self) -> None:
        if not self._flights:
            return
        flight = self._flights.popleft()
        if flight.event is not None:
            flight.event.synchronize()
        errors, others = flight.errors.nan_to_num(nan=torch.inf)
        is_wrong = errors > self.setting.tolerance
        counts = self._counts
        counts.steps, counts.rows = counts.steps + 1, counts.rows + len(errors)
        counts.wrong += int(is_wrong.sum())
        if not bool(is_wrong.all()):
            counts.error = max(counts.error, float(errors[~is_wrong].max()))
            counts.other_error = min(counts.other_error, float(others[~is_wrong].min()))
        for request in flight.ended:
            if request.slot:
                self.residency.release(request.slot)
            for layer in self.decoder.layers:
                for cache in layer.caches:
                    cache[self._blocks(request.lane)] = torch.nan
            self._free.append(request.lane)

    def _metadata(self, rows: Sequence[Request]) -> AttentionMetadata:
        """Made on the host alone."""
        firsts = np.array([self._blocks(request.lane).start for request in rows], dtype=np.int32)
        tables = firsts[:, None] + np.arange(self._blocks_each, dtype=np.int32)
        mapping = torch.tensor([int(first) * BLOCK_SIZE + row.context for first, row in zip(firsts, rows, strict=True)])
        contexts = [request.context + 1 for request in rows]
        return AttentionMetadata(len(rows), range(len(rows) + 1), contexts, tables, mapping, BLOCK_SIZE)

    def _adapter(self, name: int) -> Adapters:
        rank = self.setting.ranks[name % len(self.setting.ranks)]
        sites = {}
        for layer in self.decoder.layers:
            for group in layer.groups.values():
                sites |= group_sites(group, [rank])
        return make_adapters(sites, 2, self.decoder.num_site_rows, self.setting.dtype, self._generator)


@dataclass
class _Captured:
    """A graph for so many rows and the buffers it reads."""

    storm: Storm
    backend: str
    size: int
    graph: Graph = field(init=False)

    def __post_init__(self) -> None:
        machine, setting = self.storm.machine, self.storm.setting
        decoder, device = self.storm.decoder, machine.device
        self.ids, self.positions = (torch.zeros(self.size, dtype=torch.int64, device=device) for _ in range(2))
        self.segments = SegmentsPlan(machine, self.backend, self.size, self.size, max(setting.ranks))
        blocks = -(-setting.max_context // BLOCK_SIZE)
        self.attention = AttentionPlan(machine, self.backend, self.size, blocks, BLOCK_SIZE)
        self.segments.fill(Segments())
        adapters = StepAdapters(self.storm.residency.weights, self.segments.segments)
        self.out = torch.empty(self.size, setting.shape.vocab, dtype=setting.dtype, device=device)

        def step() -> None:
            self.out.copy_(decoder.forward(self.ids, self.positions, self.attention.meta, adapters))

        self.graph = machine.capture(step)

    def replay(self, ids: Sequence[int], meta: AttentionMetadata, segments: Segments | None) -> torch.Tensor:
        """Logits [requests, vocab] of a step; None for `segments` leaves those of the step before."""
        machine, used = self.storm.machine, len(ids)
        self.ids[:used] = machine.to_device(torch.tensor(ids))
        self.positions[:used] = machine.to_device(torch.tensor(meta.context_lens) - 1)
        meta.slot_mapping = machine.to_device(meta.slot_mapping)
        self.attention.fill(meta)
        if segments is not None:
            self.segments.fill(segments)
        self.graph.replay()
        return self.out[:used].clone()


class Oracle:
    """The same decoder in fp32, each row with its own dense adapter and its own keys."""

    def __init__(
        self, decoder: Decoder, deltas: Sequence[dict[tuple[int, int], Delta]], lanes: int, max_context: int
    ) -> None:
        self._decoder, self._small, shape = decoder, TorchOps(), decoder.shape
        device = decoder.machine.device
        self.kept = torch.zeros(shape.layers, 2, lanes, max_context, shape.kv_heads, shape.head_dim, device=device)
        most = max(len(delta.a) for own in deltas for delta in own.values())
        self._stacks = {row: _stack([own[1, row] for own in deltas], most) for row in {row for _, row in deltas[0]}}

    def logits(
        self, ids: Sequence[int], positions: Sequence[int], lanes: Sequence[int], names: Sequence[int]
    ) -> torch.Tensor:
        """fp32 [rows, vocab]; keeps the rows' keys and values. Names are adapters, or BASE."""
        decoder, shape = self._decoder, self._decoder.shape
        told = decoder.machine.to_device(torch.tensor([ids, positions, lanes, names]))
        tokens, at, lane, owner = told  # the owner BASE, -1, is the stacks' last: zeros
        x = decoder.embedding[tokens].float()
        hidden = torch.arange(self.kept.shape[3], device=at.device)[None] > at[:, None]  # [rows, context]
        for number, layer in enumerate(decoder.layers):
            normed = self._norm(x, layer.norms[0])
            heads = self._project(number, "qkv", normed, owner).view(len(at), -1, shape.head_dim)
            rotated = shape.heads + shape.kv_heads
            self._small.rope(heads[:, :rotated], at, decoder.angles)
            q, k, v = heads.split([shape.heads, shape.kv_heads, shape.kv_heads], 1)
            self.kept[number, 0, lane, at], self.kept[number, 1, lane, at] = k, v
            repeats = shape.heads // shape.kv_heads
            keys, values = self.kept[number][:, lane].repeat_interleave(repeats, 3)
            scores = torch.einsum("rhd,rchd->rhc", q, keys) * shape.head_dim**-0.5
            weights = scores.masked_fill(hidden[:, None], -torch.inf).softmax(-1)
            attended = torch.einsum("rhc,rchd->rhd", weights, values).flatten(1)
            x = x + self._project(number, "o", attended, owner)
            gate_up = self._project(number, "gate-up", self._norm(x, layer.norms[1]), owner)
            x = x + self._project(number, "down", self._small.swiglu(gate_up), owner)
        return linear(self._norm(x, decoder.norm), decoder.head.float())

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self._small.add_norm(x, None, weight.float())

    def _project(self, number: int, name: str, x: torch.Tensor, owner: torch.Tensor) -> torch.Tensor:
        layer = self._decoder.layers[number]
        group, y = layer.groups[name], linear(x, layer.projections[name].float())
        for row, offset, width in zip(group.rows, group.offsets, group.widths, strict=True):
            a, b = self._stacks[row]
            v = torch.bmm(a[owner], x[:, :, None])
            y[:, offset : offset + width] += torch.bmm(b[owner], v)[:, :, 0]
        return y


def _stack(deltas: Sequence[Delta], most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 A [names + 1, most, K] and B [names + 1, N, most]; the last is zeros, the base's."""
    a = deltas[0].a.new_zeros(len(deltas) + 1, most, deltas[0].a.shape[1], dtype=torch.float32)
    b = deltas[0].b.new_zeros(len(deltas) + 1, len(deltas[0].b), most, dtype=torch.float32)
    for index, delta in enumerate(deltas):
        a[index, : len(delta.a)] = delta.a
        b[index, :, : len(delta.a)] = delta.b
    return a, b
