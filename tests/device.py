"""An engine on stand-ins for a device: its streams, its graphs and its kernels, on the CPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from kernels import ops
from server.engine.batch import Batch, StepResult
from server.engine.core import EngineCore
from server.engine.device import Device
from tests.recorded_graph import RecordedGraph
from tests.streams import Extent, RecordedStreams, Work, extent


class StandIn:
    """`open` goes to build(); `watch` makes each step of that core's a piece of work that reads its adapters.

    A step is collected, for the streams, when the engine collects it: what is overwritten before is a race.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        """`patch` puts tests.device_ops where the engine looks for the backend "triton"."""
        patch.setitem(ops.MODULES, "triton", "tests.device_ops")
        self.streams = RecordedStreams()
        self.graphs: list[RecordedGraph] = []

    def open(self, name: str) -> Device:
        assert name == "cpu"
        return Device(torch.device("cpu"), streams=self.streams, new_graph=self._new_graph)

    def watch(self, core: EngineCore) -> None:
        core._runner = _WatchedRunner(core, self.streams)
        arena: Any = core.slots._device
        check_table = arena.check_table

        def check_what_was_given(residents: Iterable[Any]) -> None:
            self.streams.drain()  # a device's table is read in stream order
            check_table(residents)

        arena.check_table = check_what_was_given

    @property
    def replays(self) -> int:
        return sum(graph.replays for graph in self.graphs)

    def _new_graph(self) -> RecordedGraph:
        self.graphs.append(RecordedGraph())
        return self.graphs[-1]


class _WatchedRunner:
    def __init__(self, core: EngineCore, streams: RecordedStreams) -> None:
        self._runner = core._runner
        self._slots = core.slots
        self._weights = self._runner._step.weights
        self._streams = streams

    def dispatch(self, batch: Batch) -> tuple[Work, Any]:
        work = self._streams.step(self._reads({slot for slot in batch.row_slots if slot}))
        self._streams.force(work)  # table rows and moves that were given before it, as it runs at once here
        return work, self._runner.dispatch(batch)

    def collect(self, handle: tuple[Work, Any]) -> StepResult:
        work, inner = handle
        self._streams.wait(work)
        return self._runner.collect(inner)

    def _reads(self, slots: set[int]) -> list[Extent]:
        raw = self._weights.arena.view(torch.uint8)
        images = [raw[at : at + ref.data_bytes] for slot, ref, at in self._slots.residents() if slot in slots]
        return [extent(image) for image in images] + [extent(self._weights.table[slot]) for slot in slots]
