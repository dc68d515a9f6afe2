"""Priorities: who is admitted, who is preempted, who is not held back; and the bound on prompt logprobs."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.limits import SchedulerLimits
from server.engine.messages import SamplingParams
from server.engine.queues import Line
from server.engine.request import Request
from server.errors import ConfigError
from tests.unit.scheduler_world import World, adapter

A, B, C = adapter("a"), adapter("b"), adapter("c")


def admitted(world: World) -> list[str]:
    """Run to the end; ids in order of admission."""
    world.run()
    world.check_ended()
    return world.started


# --- admission ----------------------------------------------------------------------------------------------


def test_lower_first_inside_an_adapter():
    world = World(max_num_seqs=1)
    for name, priority in (("p5", 5), ("p0", 0), ("p-3", -3), ("q0", 0), ("q5", 5)):
        world.add(name, priority=priority)
    assert admitted(world) == ["p-3", "p0", "q0", "p5", "q5"]


def test_lower_first_across_adapters_before_fairness():
    """The adapter that was served most still goes first when its request does."""
    world = World(max_num_seqs=1)
    world.add("busy", 30, A, max_tokens=20)
    world.run_until(lambda: "busy" in world.ended)
    world.add("b1", 4, B)
    world.add("a9", 4, A, priority=9)
    world.add("base", 4)
    world.add("a-1", 4, A, priority=-1)
    assert admitted(world) == ["busy", "a-1", "base", "b1", "a9"]


def test_a_preempted_request_waits_for_one_of_more_priority_only():
    """Two fill the memory; the later one is preempted. A newcomer of more priority goes first, an equal one not."""
    world = World(num_blocks=9, block_size=4, has_prefix_cache=False)
    world.add("old", 12, max_tokens=12)
    preempted = world.add("late", 12, max_tokens=12)
    world.run_until(lambda: preempted.num_preemptions > 0)
    world.add("equal", 4, max_tokens=4)
    world.add("urgent", 4, priority=-1, max_tokens=4)
    order: list[str] = []
    while world.scheduler.has_work:
        world.step()
        order += [r.request_id for r in world.scheduler._running if r.request_id not in order]
    assert order.index("urgent") < order.index("late") < order.index("equal")
    world.check_ended()


def test_a_preempted_request_of_less_priority_waits_for_another_adapters():
    world = World(num_blocks=9, block_size=4, has_prefix_cache=False, max_num_seqs=2)
    world.add("old", 12, max_tokens=12)
    preempted = world.add("late", 12, max_tokens=12, priority=5)
    world.run_until(lambda: preempted.num_preemptions > 0)
    world.add("first", 12, A, max_tokens=4)
    world.finish_loads()
    order: list[str] = []
    while world.scheduler.has_work:
        world.step()
        order += [r.request_id for r in world.scheduler._running if r.request_id not in order]
    assert order.index("first") < order.index("late")
    world.check_ended()


@pytest.mark.parametrize("priority", [0, 7, -7])
def test_equal_priorities_change_nothing(priority):
    """The same story at any one priority is the same step by step."""

    def story(priority: int) -> list[dict[str, int]]:
        world, rng = World(num_blocks=14, max_num_seqs=4), random.Random(4)
        steps = []
        for number in range(40):
            ref = rng.choice([None, A, B, C])
            world.add(f"r{number}", rng.randint(1, 12), ref, max_tokens=rng.randint(1, 12), priority=priority)
            steps.append(world.step())
        while world.scheduler.has_work:
            steps.append(world.step())
        assert world.scheduler.num_preemptions > 0
        world.check_ended()
        return steps

    assert story(priority) == story(0)


def test_a_drain_does_not_hold_who_goes_first():
    """The arena drains for a starving adapter; a resident one's urgent request runs, its ordinary one waits."""
    world = World(arena_pages=1, max_slots=4, age_limit_s=1.0, max_num_seqs=4)
    world.add("running", 4, A, max_tokens=40)
    world.run_until(lambda: "running" in world.started)
    world.add("starving", 4, B)
    world.run_until(lambda: world.scheduler._admission._drain._starving is not None, seconds=0.6)
    world.step()
    world.add("ordinary", 4, A)
    world.add("urgent", 4, A, priority=-1)
    world.step()
    assert world.started == ["running", "urgent"]
    assert admitted(world) == ["running", "urgent", "starving", "ordinary"]


def test_waiting_for_an_adapter_is_timed_at_every_priority():
    """An urgent request that joins a line of those already held back is marked as held back too."""
    world = World(max_num_seqs=4)
    first = world.add("first", 4, A)
    world.schedule()  # the adapter is LOADING
    world.now += 1.0
    urgent = world.add("urgent", 4, A, priority=-1)
    world.schedule()
    assert first.adapter_wait_s == 1000.0 and urgent.adapter_wait_s == 1001.0
    world.run()
    world.check_ended()


# --- preemption ---------------------------------------------------------------------------------------------


def step_ahead(world: World, depth: int) -> set[str]:
    """Schedule, and collect the oldest step once `depth` are in flight or there is nothing to schedule.

    The ids that the scheduled step has rows of.
    """
    plan = world.schedule()
    if len(world.in_flight) == depth or (world.in_flight and not plan.items):
        world.collect()
    return {item.request.request_id for item in plan.items}


def grow_until_full(depth: int, **priorities: int) -> tuple[World, dict[str, Request]]:
    """Requests that each want more blocks than there are for all, admitted in the order given."""
    world = World(num_blocks=13, block_size=4, has_prefix_cache=False)
    requests = {name: world.add(name, 8, max_tokens=24, priority=p) for name, p in priorities.items()}
    for _ in range(200):
        if world.scheduler.num_preemptions:
            return world, requests
        step_ahead(world, depth)
    raise AssertionError("never full")


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    ("priorities", "victim"),
    [
        ({"x": 0, "y": 0, "z": 0}, "z"),
        ({"x": 5, "y": 0, "z": 0}, "x"),
        ({"x": 0, "y": 5, "z": 5}, "z"),
        ({"x": -1, "y": 5, "z": 0}, "y"),
    ],
)
def test_the_least_priority_goes_first_of_equals_the_latest(depth, priorities, victim):
    world, requests = grow_until_full(depth, **priorities)
    assert {name for name, r in requests.items() if r.num_preemptions} == {victim}
    while world.in_flight:
        world.collect()
    world.run()
    world.check_ended()


@pytest.mark.parametrize("depth", [1, 2])
def test_the_urgent_one_is_never_preempted_whenever_it_came(depth):
    """The urgent request comes last and grows all the time: those before it give way, and it sits out no step."""
    world = World(num_blocks=13, block_size=4, has_prefix_cache=False)
    for number in range(3):
        world.add(f"r{number}", 8, max_tokens=30)
    world.step()
    urgent = world.add("urgent", 3, priority=-1, max_tokens=30)
    for _ in range(400):
        if "urgent" in world.ended:
            break
        rows = step_ahead(world, depth)
        assert depth > 1 or "urgent" in rows or "urgent" not in world.started
    assert urgent.num_preemptions == 0 and list(world.ended) == ["urgent"] and world.scheduler.num_preemptions > 0
    while world.in_flight:
        world.collect()
    world.run()
    world.check_ended()


# --- the line -----------------------------------------------------------------------------------------------


def make_request(name: str, priority: int) -> Request:
    return Request(name, [1], 1, SamplingParams(max_tokens=1), priority=priority)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["append", "push_front", "remove"]), st.integers(-2, 2), st.randoms())))
def test_a_line_is_a_sorted_list(operations):
    line, model = Line(), []  # the model: requests in order
    for number, (operation, priority, rng) in enumerate(operations):
        if operation == "remove":
            if model:
                request = rng.choice(model)
                line.remove(request)
                model.remove(request)
        else:
            request = make_request(f"r{number}", priority)
            getattr(line, operation)(request)
            bound = priority if operation == "append" else priority - 1
            model.insert(sum(r.priority <= bound for r in model), request)
        assert list(line) == model and len(line) == len(model) and bool(line) == bool(model)
        assert not model or line.head is model[0]


# --- prompt logprobs ----------------------------------------------------------------------------------------


def rows_of_head(world: World) -> list[int]:
    """Steps to the end; prompt rows of each."""
    counts = []
    while world.scheduler.has_work:
        world.finish_loads()
        plan = world.schedule()
        if plan.items:
            world.collect()
        counts.append(sum(len(item.logprob_positions) for item in plan.items))
        world.now += 0.01
    world.check_ended()
    return counts


def test_prompt_logprobs_are_bounded_and_others_go_on():
    """Two prompts of 10 share 4 rows a step; a prompt that asks for nothing is not slowed down."""
    world = World(max_logprob_rows=4)
    params: dict[str, Any] = {"prompt_logprobs": 0, "max_tokens": 1}
    world.add("a", 10, **params)
    world.add("b", 10, A, **params)
    world.add("free", 20, max_tokens=1)
    world.finish_loads()
    assert world.step() == {"a": 4, "free": 20}
    assert rows_of_head(world) == [4, 4, 4, 2]


def test_a_recomputed_prompt_is_not_read_twice():
    """Preempted in mid-answer: the prompt's rows go through the model again, none of them to the head."""
    world = World(num_blocks=9, block_size=4, max_logprob_rows=6)
    world.add("old", 12, max_tokens=12)
    request = world.add("late", 12, max_tokens=12, prompt_logprobs=0, logprobs=0)
    counts = rows_of_head(world)
    assert request.num_preemptions > 0 and sum(counts) == 11


def test_a_bound_of_no_rows_is_refused():
    with pytest.raises(ConfigError, match="max_logprob_rows must be at least 1, not 0"):
        SchedulerLimits(max_num_seqs=1, max_step_tokens=1, max_adapters_per_step=1, max_model_len=8, max_logprob_rows=0)
