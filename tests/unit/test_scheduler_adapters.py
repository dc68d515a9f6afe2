"""The scheduler and its adapters: pending, loading, the bound on a step, ageing and draining."""

from __future__ import annotations

from collections import Counter

import pytest

from server.adapters.slots import Acquire
from server.engine.messages import RequestError
from server.engine.request import RequestState
from tests.unit.byte_device import PAGE, make_ref
from tests.unit.scheduler_world import World, adapter

GONE = RequestError(404, "model_not_found", "no such adapter")


def settle(world: World, *requests) -> None:
    """Step until these run."""
    world.run_until(lambda: all(request.state is RequestState.RUNNING for request in requests))


# --- from pending to running -------------------------------------------------------------------------------


def test_pending_requests_wait_for_their_image_only():
    world = World()
    x = adapter("x")
    request = world.add("p", 4, pending="x@1")
    world.add("base", 4, max_tokens=8)
    assert world.step() == {"base": 4}
    world.adapter_ready("other", adapter("y"))
    assert request.state is RequestState.PENDING
    world.adapter_ready("x@1", x)
    assert request.adapter is x and request.state is RequestState.WAITING
    assert world.step() == {"base": 1, "p": 4}
    world.run()
    world.check_ended()


def test_the_adapter_wait_is_a_phase_of_its_own():
    world = World()
    world.add("p", 4, pending="x@1")
    world.now += 3.0
    world.adapter_ready("x@1", adapter("x"))
    world.step(seconds=0.5)
    phases = world.outputs["p"][0].phases
    assert phases == {"queue_s": 0.0, "adapter_wait_s": 3.0, "prefill_s": 0.5}
    world.run()
    world.check_ended()


def test_a_failed_image_ends_those_who_wait_for_it_and_no_others():
    world = World()
    for name, key in [("a", "x@1"), ("b", "x@1"), ("c", "y@1")]:
        world.add(name, 4, pending=key)
    world.scheduler.adapter_failed("x@1", GONE)
    world.scheduler.adapter_failed("unknown", GONE)
    world.step()
    assert world.ended == {"a": "error", "b": "error"} and world.requests["a"].error is GONE
    world.add("d", 4, pending="x@1")  # nothing is remembered of the failure
    world.adapter_ready("x@1", adapter("x")), world.adapter_ready("y@1", adapter("y"))
    world.run()
    assert world.ended["c"] == world.ended["d"] == "length"
    world.check_ended()


def test_pending_has_a_bound_of_its_own():
    world = World(max_wait_s=1.0, max_pending_s=100.0)
    world.add("p", 4, pending="x@1")
    world.now += 99.0
    world.step()
    assert not world.ended
    world.now += 1.0
    world.step()
    error = world.requests["p"].error
    assert error is not None and (error.status, error.code) == (503, "adapter_unavailable")
    world.check_ended()


def test_the_wait_for_an_image_does_not_count_against_the_queue_bound():
    world = World(max_wait_s=10.0, max_num_seqs=1, max_step_tokens=32)
    world.add("base", 4, max_tokens=40)
    world.add("p", 4, pending="x@1")
    world.now += 50.0
    world.step()
    world.adapter_ready("x@1", adapter("x"))
    world.step()
    world.now += 9.0
    world.step()
    assert "p" not in world.ended
    world.now += 2.0
    world.step()
    assert world.ended["p"] == "error"
    world.run()
    world.check_ended()


def test_a_loading_adapter_holds_nobody_else_back():
    world = World()
    x = adapter("x")
    world.add("x", 4, x)
    world.add("base", 4)
    assert world.step(is_loading=True, seconds=1.0) == {"base": 4}
    assert world.step(is_loading=True, seconds=1.0) == {"base": 1}
    assert world.step(seconds=1.0) == {"base": 1, "x": 4}
    assert world.outputs["x"][0].phases == {"queue_s": 0.0, "adapter_wait_s": 2.0, "prefill_s": 1.0}
    world.run()
    world.check_ended()


def test_a_load_that_fails_ends_those_in_line_and_the_next_one_tries_again():
    world = World()
    x = adapter("x")
    world.add("a", 4, x), world.add("b", 4, x), world.add("base", 4)
    world.step(is_loading=True)
    world.device.finish(0, OSError("disk on fire"))
    world.step()
    assert (world.ended["a"], world.ended["b"]) == ("error", "error")
    error = world.requests["a"].error
    assert error is not None and error.status == 503 and "disk on fire" in error.message
    world.add("c", 4, x)
    world.run()
    assert world.ended["c"] == "length"
    world.check_ended()


def test_an_adapter_that_can_never_fit_ends_all_its_requests():
    world = World(arena_pages=4)
    huge = adapter("huge", pages=5)
    world.add("a", 4, huge), world.add("b", 4, huge), world.add("base", 4)
    world.step()
    assert {name: world.ended[name] for name in "ab"} == {"a": "error", "b": "error"}
    error = world.requests["a"].error
    assert error is not None and (error.status, error.code) == (422, "adapter_too_large")
    world.run()
    world.check_ended()


def test_a_slot_is_held_until_its_last_step_is_collected():
    world = World(arena_pages=1)
    x, y = adapter("x"), adapter("y")
    request = world.add("x", 4, x, max_tokens=1)
    world.step(is_loading=True)
    world.finish_loads()
    world.schedule()
    slot = request.slot
    assert slot and world.slots.holds(slot, x.image_key)
    assert world.slots.acquire(y)[0] is Acquire.FULL
    world.collect()
    assert not world.slots.holds(slot, x.image_key)
    assert world.slots.acquire(y)[0] is Acquire.LOADING
    world.check_ended()


def test_versions_of_one_name_are_adapters_apart():
    world = World()
    old, new = adapter("x"), adapter("x")
    new = type(new)(**{**{f: getattr(new, f) for f in new.__struct_fields__}, "image_key": "image-x-2"})
    prompt = list(range(10, 20))
    world.add("old", prompt, old, max_tokens=9)
    world.step(), world.step()
    world.add("new", prompt, new, max_tokens=9)
    world.run()
    assert world.requests["old"].adapter is old and world.outputs["new"][0].num_cached_tokens == 0
    world.check_ended()


def test_stats_name_the_adapters():
    world = World(max_num_seqs=2, max_step_tokens=32)
    x, y = adapter("x"), adapter("y")
    for name, ref in [("a", x), ("b", x), ("c", y), ("d", None)]:
        world.add(name, 4, ref, max_tokens=8)
    world.add("p", pending="z")
    world.step()
    stats = world.scheduler.stats()
    assert (stats.num_running, stats.num_waiting) == (2, 3)
    assert set(stats.running_adapters) | set(stats.waiting_adapters) == {"x", "y"}
    assert 0 < stats.kv_usage < 0.2
    world.scheduler.abort("p")
    world.run()
    assert world.scheduler.stats().running_adapters == ()
    world.check_ended()


def test_names_with_the_same_bytes_are_each_told():
    """Two names of one image share a queue, and a router must see both."""
    world = World(max_num_seqs=2)
    for number, name in enumerate(("s1", "s2", "s2", "s3")):
        world.add(str(number), 4, make_ref("image-x", PAGE, name), max_tokens=3)
    world.step()
    world.finish_loads()
    world.step()
    stats = world.scheduler.stats()
    assert stats.running_adapters == ("s1", "s2") and stats.waiting_adapters == ("s2", "s3")
    world.run()
    world.check_ended()


# --- the bound on a step's adapters ------------------------------------------------------------------------


def test_young_adapters_wait_beyond_the_bound_and_base_rows_do_not():
    world = World(max_adapters_per_step=2, age_limit_s=1000.0)
    refs = [adapter(name) for name in "vwxy"]
    for ref in refs:
        world.add(ref.name, 4, ref, max_tokens=10)
    world.add("base", 4, max_tokens=10)
    world.step()
    assert set(world.step()) == {"v", "w", "base"}
    world.add("v2", 4, refs[0])
    assert set(world.step()) == {"v", "w", "base", "v2"}, "another request of a running adapter"
    world.run_until(lambda: "v" in world.ended)
    assert world.started == ["v", "w", "base", "v2"]
    world.run()
    world.check_ended()


def test_aged_adapters_get_in_and_all_take_turns():
    world = World(max_adapters_per_step=2, age_limit_s=1.0)
    refs = [adapter(name) for name in "stuvwxy"]
    for ref in refs:
        world.add(ref.name, 4, ref, max_tokens=40)
    world.step(), world.step()
    world.now += 1.0
    settle(world, *world.requests.values())
    turns: Counter[str] = Counter()
    for _ in range(70):
        turns.update(world.step().keys())
    assert set(turns.values()) == {20}, turns  # 70 steps of 2 adapters each, among 7
    world.run()
    world.check_ended()


def test_no_adapter_pauses_for_longer_than_a_round():
    world = World(max_adapters_per_step=3, age_limit_s=0.0, num_blocks=200)
    refs = [adapter(name) for name in "stuvwxyz"]
    for index in range(2):
        for ref in refs:
            world.add(f"{ref.name}{index}", 4, ref, max_tokens=30)
    last = {}
    for step in range(100):
        for request_id in world.step():
            assert step - last.get(request_id, step) <= 3, "8 adapters, 3 a step: every third step"
            last[request_id] = step
    world.run()
    world.check_ended()


def test_a_young_request_of_a_running_adapter_joins_in_its_turn():
    world = World(max_adapters_per_step=1, age_limit_s=0.0, max_wait_s=1e9)
    x, y = adapter("x"), adapter("y")
    world.add("x", 4, x, max_tokens=60), world.add("y", 4, y, max_tokens=60)
    settle(world, *world.requests.values())
    late = world.add("late", 4, x, max_tokens=2)
    for _ in range(4):
        world.step()
    assert late.state is not RequestState.WAITING
    world.run()
    world.check_ended()


# --- a full arena ------------------------------------------------------------------------------------------


def hot(world: World, refs, index: int) -> None:
    """One more request for each hot adapter, whenever it has fewer than two."""
    for ref in refs:
        live = [r for r in world.requests.values() if r.adapter is ref and r.state is not RequestState.FINISHED]
        if len(live) < 2:
            world.add(f"{ref.name}{index}", 4, ref, max_tokens=6)


def steps_until_started(world: World, request_id: str, refs, most: int) -> int:
    for index in range(most):
        hot(world, refs, 1000 + index)
        world.step(seconds=0.1)
        if request_id in world.started:
            return index
    return most


def test_a_full_arena_holds_only_its_own_requests_back():
    world = World(arena_pages=2, age_limit_s=1000.0)
    refs = [adapter("x"), adapter("y"), adapter("z")]
    for ref in refs:
        world.add(ref.name, 4, ref, max_tokens=10)
    world.add("base", 4)
    settle(world, world.requests["x"], world.requests["y"], world.requests["base"])
    assert world.requests["z"].state is RequestState.WAITING
    world.run()
    world.check_ended()


def test_hot_adapters_drain_for_a_starving_one():
    world = World(arena_pages=3, age_limit_s=1.0, max_wait_s=1e9)
    refs = [adapter(name) for name in "xyz"]
    for index in range(10):
        hot(world, refs, index)
        world.step(seconds=0.1)
    world.add("cold", 4, adapter("cold"))
    # 1 s to age; at most one answer of 6 tokens to drain; a load
    assert steps_until_started(world, "cold", refs, 100) <= 10 + 6 + 3
    world.run()
    world.check_ended()


def test_without_ageing_a_hot_arena_starves_it():
    """What the drain is for: the same traffic, and an age limit that is never reached."""
    world = World(arena_pages=3, age_limit_s=1e9, max_wait_s=1e9)
    refs = [adapter(name) for name in "xyz"]
    for index in range(10):
        hot(world, refs, index)
        world.step(seconds=0.1)
    world.add("cold", 4, adapter("cold"))
    assert steps_until_started(world, "cold", refs, 200) == 200
    world.run()
    world.check_ended()


def test_a_large_adapter_gets_the_room_of_several():
    world = World(arena_pages=4, age_limit_s=1.0, max_wait_s=1e9)
    refs = [adapter(name) for name in "wxyz"]
    for index in range(10):
        hot(world, refs, index)
        world.step(seconds=0.1)
    world.add("large", 4, adapter("large", pages=4), max_tokens=2)
    assert steps_until_started(world, "large", refs, 400) <= 10 + 4 * 8
    for index in range(40):
        hot(world, refs, 5000 + index)
        world.step(seconds=0.1)
    assert world.ended["large"] == "length"
    world.run()
    world.check_ended()


def test_the_one_that_is_idle_soonest_drains():
    world = World(arena_pages=2, age_limit_s=1.0, max_wait_s=1e9)
    long, short = adapter("long"), adapter("short")
    world.add("long", 4, long, max_tokens=50), world.add("short", 4, short, max_tokens=30)
    settle(world, *world.requests.values())
    world.add("cold", 4, adapter("cold"), max_tokens=30)
    world.step(seconds=2.0)
    world.step()
    more_long = world.add("long2", 4, long, max_tokens=2)
    more_short = world.add("short2", 4, short, max_tokens=2)
    world.step(), world.step()
    assert more_long.state is not RequestState.WAITING and more_short.state is RequestState.WAITING
    settle(world, world.requests["cold"])
    assert "long" not in world.ended and more_short.state is RequestState.WAITING
    world.run()
    world.check_ended()


def test_nobody_takes_the_slot_that_was_drained():
    """Smaller newcomers, resident or not, would fit where the starving one does not yet."""
    world = World(arena_pages=3, age_limit_s=1.0, max_wait_s=1e9)
    x = adapter("x", pages=2)
    world.add("x", 4, x, max_tokens=40)
    settle(world, world.requests["x"])
    world.add("big", 4, adapter("big", pages=3))
    world.step(seconds=2.0)
    for index in range(30):
        world.add(f"small{index}", 4, adapter(f"s{index % 3}"))
        world.step(seconds=0.1)
        assert not any(name.startswith("small") for name in world.started)
    world.run_until(lambda: "big" in world.started)
    assert not any(name.startswith("small") for name in world.started)
    world.run()
    world.check_ended()


def test_an_adapter_that_was_loading_comes_in_while_another_starves():
    """Its room is taken already: to hold it back would make both wait for each other."""
    world = World(arena_pages=2, age_limit_s=1.0, max_wait_s=1e9)
    world.add("x", 4, adapter("x"), max_tokens=60)
    settle(world, world.requests["x"])
    first = world.add("first", 4, adapter("y"), max_tokens=4)
    world.step(is_loading=True)
    world.add("second", 4, adapter("z"))
    world.step(is_loading=True, seconds=2.0)
    world.step(is_loading=True)
    world.step()
    assert first.state is not RequestState.WAITING
    world.run()
    world.check_ended()


def test_the_longest_starving_is_served_first():
    world = World(arena_pages=1, age_limit_s=0.5, max_wait_s=1e9, max_num_seqs=8)
    world.add("x", 4, adapter("x"), max_tokens=30)
    settle(world, world.requests["x"])
    for name in "abcd":
        world.add(name, 4, adapter(name), max_tokens=3)
        world.step(seconds=0.3)
    world.run()
    assert world.started == ["x", "a", "b", "c", "d"]
    world.check_ended()


def test_a_starving_request_that_goes_away_ends_the_drain():
    world = World(arena_pages=1, age_limit_s=1.0, max_wait_s=1e9)
    x = adapter("x")
    world.add("x", 4, x, max_tokens=40)
    settle(world, world.requests["x"])
    world.add("cold", 4, adapter("cold"))
    world.step(seconds=2.0), world.step()
    late = world.add("late", 4, x, max_tokens=2)
    world.step()
    assert late.state is RequestState.WAITING
    world.scheduler.abort("cold")
    world.step()
    assert late.state is not RequestState.WAITING
    world.run()
    world.check_ended()


def test_a_drain_leaves_nothing_behind_for_the_next():
    """Who drained the first time is not held back when another drains."""
    world = World(arena_pages=2, age_limit_s=1.0, max_wait_s=1e9)
    x, y = adapter("x"), adapter("y")
    world.add("x", 4, x, max_tokens=58), world.add("y", 4, y, max_tokens=12)
    settle(world, *world.requests.values())
    world.add("cold1", 4, adapter("cold1"), max_tokens=2)
    world.step(seconds=2.0), world.step()
    y2 = world.add("y2", 4, y, max_tokens=59)
    settle(world, y2)
    assert "cold1" in world.ended, "y drained for it"
    world.add("cold2", 4, adapter("cold2"))
    world.step(seconds=2.0), world.step()
    x3, y3 = world.add("x3", 4, x, max_tokens=2), world.add("y3", 4, y, max_tokens=2)
    world.step(), world.step()
    assert x3.state is RequestState.WAITING and y3.state is not RequestState.WAITING
    world.run()
    world.check_ended()


def test_having_been_held_back_once_gives_no_lasting_precedence():
    world = World(arena_pages=1, age_limit_s=1.0, max_wait_s=1e9, max_num_seqs=2, max_step_tokens=32)
    x, y = adapter("x"), adapter("y")
    world.add("y", 4, y, max_tokens=20)
    settle(world, world.requests["y"])
    for index in range(10):
        world.add(f"x{index}", 8, x)
    world.run_until(lambda: "y" in world.ended, seconds=0.1)
    for index in range(10):
        world.add(f"base{index}", 8)
    world.run()
    starts = [name[0] for name in world.started[1:11]]
    assert 4 <= starts.count("x") <= 6, starts
    world.check_ended()


def test_a_full_arena_ends_in_503_after_the_bound():
    world = World(arena_pages=1, max_wait_s=5.0)
    world.add("x", 4, adapter("x"), max_tokens=50)
    settle(world, world.requests["x"])
    world.add("cold", 4, adapter("cold"))
    world.step(seconds=6.0)
    world.step()
    error = world.requests["cold"].error
    assert error is not None and (error.status, error.code) == (503, "overloaded") and error.retry_after_s
    assert "no device memory for adapter 'cold' in 5 s" in error.message
    world.run()
    world.check_ended()


def test_a_preempted_request_waits_for_its_adapter_again():
    """Its image was evicted meanwhile; it keeps its ref, comes back, and its answer is the same."""
    world = World(num_blocks=9, block_size=4, arena_pages=2, has_prefix_cache=False, max_wait_s=1e9)
    x, y = adapter("x"), adapter("y")
    world.add("a", 12, x, max_tokens=16)
    second = world.add("b", 12, y, max_tokens=16)
    world.run_until(lambda: second.num_preemptions > 0)
    assert world.slots.drop(y.image_key)
    world.run()
    assert world.ended["b"] == "length" and second.adapter is y
    world.check_ended()


@pytest.mark.parametrize("num_adapters", [2, 4, 8, 16])
def test_more_hot_adapters_than_slots_load_about_once_a_request(num_adapters):
    """No thrash: an image that was loaded is used before it goes."""
    world = World(arena_pages=4, max_wait_s=1e9, age_limit_s=1.0)
    refs = [adapter(f"a{i}") for i in range(num_adapters)]
    for index in range(64):
        world.add(f"r{index}", 4, refs[index % num_adapters], max_tokens=6)
        world.step(seconds=0.02)
    world.run()
    assert world.slots.loads <= (num_adapters if num_adapters <= 4 else 64)
    world.check_ended()
