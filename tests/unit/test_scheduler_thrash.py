"""More hot adapters than the arena holds: one load serves several, the next are loaded ahead, nobody waits for ever."""

from __future__ import annotations

import pytest

from server.engine.request import RequestState
from tests.unit.scheduler_load import Costs, run_load
from tests.unit.scheduler_world import World, adapter

# --- in virtual time ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps_of_a_load", "most"),
    [(0.32, 1.3), (1.34, 3.0)],  # 80 and 336 MB over PCIe at 25 GB/s, of steps of 10 ms
)
def test_twice_as_many_as_fit_cost_little_at_60_percent(steps_of_a_load, most):
    costs = Costs(load_s=steps_of_a_load * 0.020)
    fitting = run_load(hot=32, room=32, rate=3.3, costs=costs)
    thrashing = run_load(hot=32, room=16, rate=3.3, costs=costs)
    assert thrashing.loads > 3 * fitting.loads, "it is no thrash"
    assert thrashing.percentile(50) <= most * fitting.percentile(50)
    assert thrashing.percentile(90) <= 2 * most * fitting.percentile(90)


@pytest.mark.parametrize(("age_limit_s", "share"), [(1e9, 0.7), (1.0, 0.95)])
def test_in_overload_one_load_serves_several(age_limit_s, share):
    """Four places, two requests' cost of precedence; ageing undoes some of it."""
    overload = {"hot": 32, "room": 8, "rate": 50.0, "num_requests": 200, "max_num_seqs": 4, "age_limit_s": age_limit_s}
    shared, each = run_load(**overload), run_load(**overload, residency_quantum=1e-9)
    assert shared.loads < share * each.loads and shared.seconds < 1.02 * each.seconds
    assert len(shared.first_s) == len(each.first_s) == 200 and not shared.num_errors


# --- step by step ------------------------------------------------------------------------------------------


def test_who_is_on_the_device_goes_first_within_a_quantum():
    world = World(arena_pages=1, max_slots=2, max_num_seqs=1, age_limit_s=1e9, residency_quantum=30.0, max_wait_s=1e9)
    x, y = adapter("x"), adapter("y")
    world.add("x0", 4, x, max_tokens=3)
    world.run_until(lambda: "x0" in world.started)
    world.add("y0", 4, y, max_tokens=3)
    for index in range(1, 10):
        world.add(f"x{index}", 4, x, max_tokens=3)
    world.run()
    # each costs 4 + 2 x 3; y came when x had 4 + 2, and x goes before it until it is 30 ahead
    assert world.started.index("y0") == 4
    assert world.slots.loads == 3
    world.check_ended()


def test_who_is_overtaken_for_too_long_goes_first():
    world = World(arena_pages=1, max_slots=2, max_num_seqs=1, age_limit_s=1.0, residency_quantum=1e6, max_wait_s=1e9)
    x, y = adapter("x"), adapter("y")
    for index in range(50):
        world.add(f"x{index}", 4, x, max_tokens=3)
    world.run_until(lambda: "x0" in world.started)
    world.add("y0", 4, y, max_tokens=3)
    start = world.now
    world.run_until(lambda: "y0" in world.started, seconds=0.1)
    assert world.now - start <= 1.0 + 8 * 0.1  # the limit, and the answers that run when it begins and ends
    world.run()
    world.check_ended()


def test_the_next_in_line_is_loaded_while_others_run():
    """When a place is free it can begin at once."""
    world = World(arena_pages=2, max_num_seqs=1, max_wait_s=1e9)
    world.add("x", 4, adapter("x"), max_tokens=20)
    world.run_until(lambda: "x" in world.started)
    world.slots.prefetch = lambda ref: None  # not at arrival
    y = adapter("y")
    world.add("y", 4, y, max_tokens=2)
    del world.slots.prefetch
    world.step(is_loading=True)
    assert [load.ref for load in world.device.pending] == [y]
    world.finish_loads()
    world.run_until(lambda: "x" in world.ended)
    assert set(world.step(is_loading=True)) == {"y"}
    world.run()
    world.check_ended()


def test_a_newcomers_prefetch_does_not_evict_what_is_wanted():
    world = World(arena_pages=2, max_num_seqs=1, max_wait_s=1e9)
    x, y, z = adapter("x"), adapter("y"), adapter("z")
    for ref in (x, y):
        world.add(f"{ref.name}-early", 4, ref, max_tokens=1)
    world.run()
    world.now += 10.0
    world.add("x", 4, x, max_tokens=20)
    world.run_until(lambda: "x" in world.started)
    world.add("y", 4, y, max_tokens=2)
    world.now += 10.0  # beyond any soft pin
    world.add("z", 4, z, max_tokens=2)
    assert world.slots.is_ready(y.image_key) and not world.device.pending
    world.run()
    assert world.slots.loads == 3
    world.check_ended()


def test_what_nobody_waits_for_goes_before_what_is_wanted():
    """Though it was used later."""
    world = World(arena_pages=2, max_wait_s=1e9, max_num_seqs=1)
    wanted, idle = adapter("wanted"), adapter("idle")
    for ref in (wanted, idle):
        world.add(ref.name, 4, ref, max_tokens=1)
        world.run()
    world.now += 10.0
    world.slots.want(wanted.image_key, True)
    world.add("new", 4, adapter("new"), max_tokens=1)
    world.run()
    assert world.slots.is_ready(wanted.image_key) and not world.slots.is_ready(idle.image_key)
    world.slots.want(wanted.image_key, False)
    world.check_ended()


def test_what_is_wanted_is_known_exactly():
    world = World(arena_pages=4, max_num_seqs=2, num_blocks=9, block_size=4, has_prefix_cache=False, max_wait_s=1e9)
    refs = [adapter(name) for name in "xyz"]
    for index in range(12):
        world.add(f"r{index}", 12, refs[index % 3], max_tokens=14)
    while world.scheduler.has_work:
        world.step()
        in_line = {r.adapter_key for r in world.requests.values() if r.state is RequestState.WAITING}
        assert world.slots._wanted == in_line
    assert not world.slots._wanted
    world.check_ended()
