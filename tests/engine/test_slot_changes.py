"""What came to the device and left it reaches the API: every change once, in order, however little else happens."""

from __future__ import annotations

import os

import msgspec
import pytest

from server.engine.loop import EngineLoop, apply
from server.engine.messages import (
    DropAdapter,
    FromEngine,
    PinAdapter,
    Shutdown,
    SlotChange,
    StepOutputs,
    StepStats,
    ToEngine,
)
from server.engine.residents import MAX_FAILURES, Residents
from tests.unit.byte_device import make_ref


class Core:
    """Each step tells what `script` says and has the same stats: nothing else would make the loop send it."""

    def __init__(self, script: list[list[SlotChange]]) -> None:
        self.script = list(script)
        self.calls: list[tuple[str, object]] = []

    def step(self) -> StepOutputs:
        return StepOutputs(outputs=[], stats=StepStats(), slot_changes=self.script.pop(0))

    def has_work(self) -> bool:
        return True

    def abort(self, request_ids) -> None:
        pass

    def check_integrity(self) -> None:
        pass

    def pin_adapter(self, ref) -> None:
        self.calls.append(("pin", ref))

    def drop_adapter(self, image_key) -> None:
        self.calls.append(("drop", image_key))


class Wire:
    """Both directions through the real encoding; Shutdown comes when the core's script is over."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.sent: list[StepOutputs] = []

    def receive(self, wait_s: float) -> list[ToEngine]:
        return [] if self.core.script else [Shutdown()]

    def send(self, message: FromEngine) -> None:
        decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=FromEngine)
        assert isinstance(decoded, StepOutputs)
        self.sent.append(decoded)


def test_every_change_is_sent_once_and_in_order():
    a, b, c = SlotChange("a", "ready"), SlotChange("a", "gone"), SlotChange("c", "failed", "checksum differs")
    core = Core([[a], [], [b, c], [a], []])
    wire = Wire(core)
    EngineLoop(core, wire, os.getppid()).run()
    assert [change for message in wire.sent for change in message.slot_changes] == [a, b, c, a]


@pytest.mark.parametrize("message", [PinAdapter(make_ref("a", 1)), DropAdapter("a")])
def test_pin_and_drop_reach_the_core(message):
    core = Core([])
    apply(core, msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=ToEngine))
    assert core.calls == [("pin", message.ref) if isinstance(message, PinAdapter) else ("drop", "a")]


def test_residents():
    residents = Residents()
    residents.apply([SlotChange("a", "ready"), SlotChange("b", "failed", "why"), SlotChange("c", "gone")])
    assert ("a" in residents, "b" in residents, len(residents)) == (True, False, 1)
    assert (residents.failure("b"), residents.failure("a")) == ("why", None)
    residents.apply([SlotChange("b", "ready"), SlotChange("a", "gone")])
    assert ("a" in residents, "b" in residents) == (False, True)
    assert residents.failure("b") is None


def test_residents_of_host_memory_are_told_apart():
    residents = Residents()
    residents.apply([SlotChange("a", "hosted"), SlotChange("b", "ready"), SlotChange("c", "hosted")])
    assert [residents.is_hosted(key) for key in "abc"] == [True, False, True]
    assert ("a" in residents, "b" in residents) == (False, True)
    residents.apply([SlotChange("a", "unhosted"), SlotChange("c", "gone")])
    assert [residents.is_hosted(key) for key in "abc"] == [False, False, True]


def test_failures_are_not_remembered_without_end():
    residents = Residents()
    residents.apply(SlotChange(f"k{index}", "failed", "why") for index in range(MAX_FAILURES + 3))
    assert residents.failure("k2") is None
    assert residents.failure("k3") == "why"
