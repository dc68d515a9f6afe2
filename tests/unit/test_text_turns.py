"""Turns are given one at a time, to whoever used the least lately, and none is ever lost."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.errors import Overloaded
from server.text import turns as module
from server.text.turns import HALF_LIFE_S, NEW_NAME_S, Turns


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def turns(clock) -> Turns:
    return Turns(clock)


async def spend(turns: Turns, clock: Clock, name: str, seconds: float) -> None:
    await turns.take(name)
    clock.now += seconds
    turns.give_back()


async def order_of(turns: Turns, clock: Clock, names: list[str], seconds: dict[str, float]) -> list[str]:
    """Who goes in which order when all of `names` wait, in this order, for a turn that is held."""
    order = []

    async def one(name: str) -> None:
        await turns.take(name)
        order.append(name)
        clock.now += seconds.get(name, 0.0)
        turns.give_back()

    await turns.take("holder")
    tasks = [asyncio.create_task(one(name)) for name in names]
    await asyncio.sleep(0)
    turns.give_back()
    await asyncio.gather(*tasks)
    return order


async def test_equal_names_go_in_the_order_of_arrival(turns, clock):
    assert await order_of(turns, clock, ["a", "b", "c"], {}) == ["a", "b", "c"]


async def test_a_name_with_many_long_turns_holds_others_up_by_one(turns, clock):
    await spend(turns, clock, "good", 0.001)
    order = await order_of(turns, clock, ["bad"] * 5 + ["good", "new", "good"], {"bad": 2.0, "good": 0.001})
    assert order == ["good", "good", "bad", "new", "bad", "bad", "bad", "bad"]


async def test_known_and_quick_goes_before_new_and_new_before_slow(turns, clock):
    await spend(turns, clock, "slow", 2.0)
    await spend(turns, clock, "quick", 0.001)
    assert await order_of(turns, clock, ["slow", "new", "quick"], {}) == ["quick", "new", "slow"]


async def test_used_time_is_forgotten(turns, clock):
    await spend(turns, clock, "slow", 2.0)
    assert turns.used_s("slow") == pytest.approx(2.0) and turns.used_s("new") == NEW_NAME_S
    clock.now += HALF_LIFE_S
    assert turns.used_s("slow") == pytest.approx(1.0)
    clock.now += 10 * HALF_LIFE_S
    assert await order_of(turns, clock, ["new", "slow"], {}) == ["slow", "new"]


async def test_the_queue_is_bounded_and_the_heaviest_leave_it(turns, clock, monkeypatch):
    monkeypatch.setattr(module, "MAX_WAITING", 3)
    await spend(turns, clock, "bad", 2.0)
    await turns.take("holder")
    waiting = [asyncio.create_task(turns.take(name)) for name in ("bad", "bad", "good", "good", "good", "good")]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    refused = [task.done() for task in waiting]
    assert refused == [True, True, False, False, False, True]
    for task in (waiting[0], waiting[1], waiting[5]):
        with pytest.raises(Overloaded) as raised:
            await task
        assert raised.value.retry_after_s
    for task in waiting[2:5]:
        turns.give_back()
        await task
    turns.give_back()
    await turns.take("anyone")


async def test_a_wait_is_bounded(turns, monkeypatch):
    monkeypatch.setattr(module, "MAX_WAIT_S", 0.01)
    await turns.take("holder")
    with pytest.raises(Overloaded):
        await turns.take("late")
    turns.give_back()
    await turns.take("next")  # the late one is not in the way


async def test_a_waiter_cancelled_just_before_its_turn_is_passed_over(turns):
    await turns.take("holder")
    first, second = (asyncio.create_task(turns.take(name)) for name in "ab")
    await asyncio.sleep(0)
    first.cancel()
    turns.give_back()
    await asyncio.wait_for(second, 1)
    assert (await asyncio.gather(first, return_exceptions=True))[0].__class__ is asyncio.CancelledError


async def test_a_waiter_cancelled_together_with_its_turn_passes_it_on(turns):
    await turns.take("holder")
    first, second = (asyncio.create_task(turns.take(name)) for name in "ab")
    await asyncio.sleep(0)
    turns.give_back()
    first.cancel()
    await asyncio.wait_for(second, 1)
    assert (await asyncio.gather(first, return_exceptions=True))[0].__class__ is asyncio.CancelledError


async def test_names_are_not_remembered_for_ever(turns, clock, monkeypatch):
    monkeypatch.setattr(module, "MAX_NAMES", 2)
    for name in ("a", "b", "c"):
        await spend(turns, clock, name, 1.0)
    assert turns.used_s("a") == NEW_NAME_S
    assert turns.used_s("b") > NEW_NAME_S


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.sampled_from("abc")),
        st.tuples(st.just("cancel"), st.integers(0, 30)),
        st.tuples(st.just("give back"), st.floats(0, 3)),
        st.tuples(st.just("let run"), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=200, deadline=None)
@given(OPERATIONS)
def test_whatever_happens_one_holds_and_no_turn_is_lost(operations):
    """Cancelled before, after and together with its turn: someone waiting always gets the next one."""
    asyncio.run(run_operations(operations))


async def run_operations(operations: list) -> None:
    clock = Clock()
    turns, tasks, holders = Turns(clock), [], []

    async def one(name: str) -> None:
        await turns.take(name)
        holders.append(asyncio.current_task())
        assert len(holders) == 1
        try:
            await asyncio.Event().wait()  # until it is ended below
        finally:
            holders.pop()
            turns.give_back()

    for what, argument in operations:
        if what == "take":
            tasks.append(asyncio.create_task(one(argument)))
        elif what == "cancel" and tasks:
            tasks[argument % len(tasks)].cancel()
        elif what == "give back" and holders:
            clock.now += argument
            holders[0].cancel()
        elif what == "let run":
            await asyncio.sleep(0)
    for _ in range(len(tasks) + 1):
        for _ in range(6):
            await asyncio.sleep(0)
        if holders:
            holders[0].cancel()
    assert all(task.cancelled() for task in tasks)
    assert turns._num_waiting == 0 and not turns._waiting
    await asyncio.wait_for(turns.take("z"), 1)
