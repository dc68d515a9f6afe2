"""Prefetches and weights on their way from the API to the scheduler, the slots and host memory."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from adapters_store.host import HostCache
from server.engine.core import EngineCore
from server.engine.inproc import InprocEngine
from server.engine.loop import apply
from server.engine.messages import PrefetchAdapter, SetWeight, SlotChange, StepOutputs, StepStats, ToEngine
from server.engine.residents import Residents
from tests.engine.scripted_core import Script, ScriptedCore
from tests.engine.test_arena import Rig


class World:
    """An EngineCore whose scheduler has nothing to run, over real slots, a real arena and real host memory."""

    def __init__(self, folder: Path, host: HostCache | None) -> None:
        self.rig = Rig(folder, host=host)
        self.weights: dict[str, float] = {}
        scheduler = SimpleNamespace(
            set_weight=self.weights.__setitem__,
            schedule=lambda now: SimpleNamespace(items=[], ended=[]),
            stats=StepStats,
            has_work=False,
        )
        self.core = EngineCore(
            ready=None,
            scheduler=scheduler,
            batches=None,
            runner=None,
            slots=self.rig.slots,
            phases_of=self.rig.arena.phases,
            host=host,
            warm=self.rig.arena.warm if host is not None else None,
        )
        self.told: list[SlotChange] = []

    def send(self, message: ToEngine) -> None:
        apply(self.core, msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=ToEngine))

    def step_until(self, *states: str) -> None:
        deadline = time.monotonic() + 20
        while [change.state for change in self.told] != list(states):
            outputs = self.core.step()
            assert isinstance(outputs, StepOutputs)
            self.told += outputs.slot_changes
            assert time.monotonic() < deadline, self.told
            time.sleep(0.001)


def test_a_weight_reaches_the_scheduler_by_its_adapters_name(tmp_path):
    world = World(tmp_path, None)
    world.send(SetWeight("team/sql", 2.5))
    assert world.weights == {"team/sql": 2.5}


def test_a_prefetch_to_the_device_is_a_load_without_a_request(tmp_path):
    world = World(tmp_path, None)
    ref = world.rig.image(1)
    world.send(PrefetchAdapter(ref, "device"))
    world.step_until("ready")
    world.rig.check()
    assert world.rig.slots.resident == 1


def test_a_prefetch_to_host_memory_leaves_the_device_alone(tmp_path):
    host = HostCache(1 << 20)
    world = World(tmp_path, host)
    ref = world.rig.image(1)
    world.send(PrefetchAdapter(ref, "host"))
    world.step_until("hosted")
    assert ref.image_key in host and world.rig.slots.resident == 0 and world.rig.slots.num_loading == 0
    world.rig.hold(ref)
    world.rig.check()
    assert (host.reads, host.hits) == (1, 1)  # from memory


def test_a_prefetch_that_fails_is_told_once(tmp_path):
    world = World(tmp_path, HostCache(1 << 20))
    ref = world.rig.image(1)
    Path(ref.image_path).unlink()
    world.send(PrefetchAdapter(ref, "host"))
    world.step_until("failed")
    assert "can't be read" in world.told[0].message
    for _ in range(3):
        assert world.core.step().slot_changes == []


def test_without_host_memory_there_is_nothing_to_do(tmp_path):
    world = World(tmp_path, None)
    world.send(PrefetchAdapter(world.rig.image(1), "host"))
    assert world.core.step().slot_changes == []


def test_a_failure_is_forgotten_where_it_is_tried_again():
    residents = Residents()
    residents.apply([SlotChange("a", "failed", "why")])
    residents.forget_failure("b")
    assert residents.failure("a") == "why"
    residents.forget_failure("a")
    assert residents.failure("a") is None


@pytest.mark.parametrize("what", ["prefetch", "weight"])
async def test_the_engines_pass_both_on(tmp_path, what):
    core = ScriptedCore(Script())
    seen: list[tuple[object, ...]] = []
    core.prefetch_adapter = lambda *args: seen.append(args)
    core.set_weight = lambda *args: seen.append(args)
    engine = InprocEngine(core)
    ref = Rig(tmp_path).image(1)
    if what == "prefetch":
        engine.prefetch_adapter(ref, "host")
    else:
        engine.set_weight("a", 3.0)
    await engine.close()
    assert seen == [(ref, "host") if what == "prefetch" else ("a", 3.0)]
