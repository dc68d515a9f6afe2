"""Fair shares: what is charged, the bound between adapters in line, and who makes way for whom."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.ref import AdapterRef
from server.engine.limits import MAX_WEIGHT, MIN_WEIGHT
from server.engine.request import RequestState
from tests.unit.scheduler_world import World, adapter

LONG = {"num_blocks": 2000, "max_model_len": 1000, "max_wait_s": 1e9}


class Busy(World):
    """One that forgets what has ended, so that a step costs no more in the end than at the start."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.count = 0

    def top_up(self, ref: AdapterRef | None, number: int, **request) -> None:
        """Keep so many requests of an adapter in line."""
        key = ref.image_key if ref is not None else ""
        in_line = sum(len(queue.waiting) for queue in self.scheduler._queues if queue.key == key)
        for _ in range(number - in_line):
            self.count += 1
            self.add(f"r{self.count}", ref=ref, **request)

    def _note_started(self) -> None:
        """Lines are checked elsewhere, at a cost that grows with their square."""

    def _end(self, request_id: str, reason: str) -> None:
        del self.requests[request_id]


class Ledger:
    """The service of each adapter by the test's own count: prompt rows computed first, and tokens drawn."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.cost: dict[str, float] = defaultdict(float)  # by name; "" is the base
        self.weights: dict[str, float] = {}
        self._seen: Counter[str] = Counter()  # positions of each request that were rows once

    def set_weight(self, name: str, weight: float) -> None:
        self.weights[name] = weight
        self.world.scheduler.set_weight(name, weight)

    def step(self) -> None:
        self.world.finish_loads()
        plan = self.world.schedule()
        for item in plan.items:
            request, end = item.request, item.start + item.num_tokens
            new = max(0, min(end, request.num_prompt) - max(item.start, self._seen[request.request_id]))
            self._seen[request.request_id] = max(end, self._seen[request.request_id])
            self.cost[name_of(request.adapter)] += new * self.world.limits.input_cost
        self.world.now += 0.01
        in_flight = self.world.in_flight
        if in_flight and (len(in_flight) >= self.world.limits.steps_in_flight or not plan.items):
            adapters = {item.request.request_id: item.request.adapter for item in in_flight[0][0].items}
            for output in self.world.collect():
                name = name_of(adapters[output.request_id])
                self.cost[name] += len(output.token_ids) * self.world.limits.output_cost

    def share(self, name: str) -> float:
        return self.cost[name] / self.weights.get(name, 1.0)


def name_of(ref: AdapterRef | None) -> str:
    return ref.name if ref is not None else ""


# --- what is charged ---------------------------------------------------------------------------------------


def served(world: World, ref: AdapterRef | None = None) -> float:
    return world.scheduler._queues[ref.image_key if ref is not None else ""].served


def test_a_prompts_rows_and_the_tokens_drawn_are_charged():
    world = World(input_cost=1.0, output_cost=2.0)
    world.add("a", 6, max_tokens=3)
    world.step()
    assert served(world) == 6 + 2
    world.step()
    assert served(world) == 6 + 2 + 2


def test_a_weight_divides_the_cost():
    world = World()
    x = adapter("x")
    world.scheduler.set_weight("x", 4.0), world.scheduler.set_weight("", 0.5)
    world.add("a", 6, x), world.add("b", 6)
    world.step(), world.step()
    assert (served(world, x), served(world)) == (pytest.approx(10 / 4), pytest.approx(10 / 0.5))


def test_cached_prompt_tokens_cost_nothing():
    world = World()
    prompt = list(range(10, 26))
    world.add("a", prompt, max_tokens=1)
    world.step()
    world.add("other", 1, max_tokens=60)  # keeps the counters
    before = served(world)
    world.add("b", [*prompt, 5], max_tokens=1)
    world.step()
    assert served(world) - before == (1 + 2) + (1 + 2)


def test_what_is_computed_again_is_not_charged():
    world = World(num_blocks=9, block_size=4, has_prefix_cache=False)
    ledger = Ledger(world)
    x, y = adapter("x"), adapter("y")
    world.add("a", 12, x, max_tokens=16), world.add("b", 12, y, max_tokens=16)
    counters = {}
    while world.scheduler.has_work:
        ledger.step()
        counters |= {queue.name: queue.served for queue in world.scheduler._queues}
    assert world.requests["b"].num_preemptions
    assert counters == ledger.cost == {"x": 12 + 32, "y": 12 + 32}
    world.check_ended()


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf"), MIN_WEIGHT / 2, MAX_WEIGHT * 2])
def test_a_weight_has_bounds(weight):
    with pytest.raises(ValueError, match="the weight of adapter 'x' is"):
        World().scheduler.set_weight("x", weight)


def test_names_of_one_image_pay_by_their_own_weights():
    world = World()
    first, second = adapter("x"), adapter("x")
    second = type(second)(**{**{f: getattr(second, f) for f in second.__struct_fields__}, "name": "y"})
    world.scheduler.set_weight("y", 2.0)
    world.add("a", 4, first), world.add("b", 4, second)
    world.step(), world.step()
    assert served(world, first) == (4 + 4) + (4 + 4) / 2


# --- the bound ---------------------------------------------------------------------------------------------

sizes = st.tuples(st.integers(1, 24), st.integers(1, 40))  # prompt and output tokens of an adapter's requests


@settings(max_examples=25, deadline=None)
@given(
    of=st.lists(st.tuples(sizes, st.sampled_from([0.5, 1.0, 1.0, 2.0, 3.0])), min_size=2, max_size=4),
    has_base=st.booleans(),
    num_blocks=st.sampled_from([24, 300]),
    has_prefix_cache=st.booleans(),
    late=st.sampled_from([0, 7, 200]),
    steps_in_flight=st.integers(1, 2),
)
def test_the_difference_of_weighted_service_is_bounded(
    of, has_base, num_blocks, has_prefix_cache, late, steps_in_flight
):
    """All have requests in line all the time; the last comes `late` steps after the others, and starts at no less."""
    world = Busy(
        num_blocks=num_blocks, has_prefix_cache=has_prefix_cache, max_num_seqs=6, max_step_tokens=24,
        fair_quantum=64.0, residency_quantum=16.0, max_wait_s=1e9, steps_in_flight=steps_in_flight,
    )  # fmt: skip
    ledger = Ledger(world)
    refs = [None if has_base and index == 0 else adapter(f"a{index}") for index in range(len(of))]
    for ref, (_, weight) in zip(refs, of, strict=True):
        ledger.set_weight(name_of(ref), weight)
    names = [name_of(ref) for ref in refs]
    limits = world.limits
    most_step = limits.max_step_tokens * limits.output_cost
    bound = 2 * limits.fair_quantum + (world.max_len + most_step) / min(weight for _, weight in of)
    start: dict[str, float] = {}
    for step in range(late + 200):
        for ref, ((prompt, output), _) in zip(refs, of, strict=True):
            if ref is not refs[-1] or step >= late:
                world.top_up(ref, 8, prompt=prompt, max_tokens=output)
        ledger.step()
        if step == late:
            start = {name: ledger.share(name) for name in names}
        if step >= late:
            given = [ledger.share(name) - start[name] for name in names]
            # a late one may begin behind by the bound already, so the difference of both is at most twice it
            assert max(given) - min(given) <= (2 if late else 1) * bound, (step, dict(zip(names, given, strict=True)))
    world.scheduler.check_integrity()


def test_weights_are_the_shares_in_the_long_run():
    world = Busy(max_num_seqs=8, max_step_tokens=64, fair_quantum=64.0, max_wait_s=1e9, num_blocks=300)
    ledger = Ledger(world)
    x, y = adapter("x"), adapter("y")
    ledger.set_weight("x", 3.0)
    for _ in range(600):
        world.top_up(x, 9, prompt=8, max_tokens=8), world.top_up(y, 9, prompt=4, max_tokens=24)
        ledger.step()
    assert ledger.cost["x"] / ledger.cost["y"] == pytest.approx(3.0, rel=0.1)


# --- who makes way -----------------------------------------------------------------------------------------


def steps_to_first_token(world: World, request_id: str, most: int) -> int:
    for step in range(1, most + 1):
        world.step()
        if world.answer(request_id):
            return step
    return most + 1


def crowded(num_seqs: int, **limits) -> World:
    """All places taken by long answers of one adapter, and a thousand more in line."""
    world = World(**LONG, max_num_seqs=num_seqs, max_step_tokens=64, **limits)
    crowd = adapter("crowd")
    for index in range(1000):
        world.add(f"crowd{index}", 8, crowd, max_tokens=900)
    for _ in range(40):
        world.step()
    assert world.scheduler.stats().num_running == num_seqs
    return world


@pytest.mark.parametrize("steps_in_flight", [1, 2])
@pytest.mark.parametrize("ref", [None, adapter("alone")], ids=["base", "adapter"])
def test_a_crowd_of_long_answers_makes_way_within_a_quantum(ref, steps_in_flight):
    world = crowded(8, fair_quantum=128.0, steps_in_flight=steps_in_flight)
    world.add("alone", 8, ref, max_tokens=4)
    # the quantum, and what is computed again of the victim (8 + at most 100 tokens), at 8 x 2 a step; then a prompt
    most = (128 + 108) // 16 + 3
    most += 2 * (steps_in_flight - 1)  # the victim's row in flight, and the first token's own
    assert steps_to_first_token(world, "alone", most) <= most
    world.run_until(lambda: "alone" in world.ended)
    assert world.scheduler.num_preemptions == 1, "one place was enough"
    world.check()


@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_who_asks_for_as_much_gets_as_many_places(steps_in_flight):
    world = crowded(8, fair_quantum=128.0, steps_in_flight=steps_in_flight)
    for index in range(20):
        world.add(f"y{index}", 8, adapter("y"), max_tokens=900)
    for _ in range(60):
        world.step()
    running = Counter(r.adapter.name for r in world.requests.values() if r.state is RequestState.RUNNING and r.adapter)
    assert running == {"crowd": 4, "y": 4}
    for _ in range(200):
        world.step()
    assert world.scheduler.num_preemptions <= 4 + 2 * 4, "places don't go to and fro"
    world.check()


@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_blocks_make_way_too(steps_in_flight):
    limits = {"max_num_seqs": 8, "fair_quantum": 32.0, "max_model_len": 160, "max_wait_s": 1e9}
    world = World(num_blocks=41, block_size=4, steps_in_flight=steps_in_flight, **limits)
    world.add("long", 4, adapter("x"), max_tokens=130)
    world.run_until(lambda: len(world.answer("long")) > 20)
    alone = world.add("alone", 140, adapter("y"), max_tokens=4)
    world.run_until(lambda: alone.state is RequestState.RUNNING)
    assert "long" not in world.ended and world.requests["long"].num_preemptions
    world.run()
    world.check_ended()


@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_device_memory_makes_way_too(steps_in_flight):
    """Where an adapter would hold the arena for as long as its answer takes."""
    world = World(**LONG, arena_pages=1, age_limit_s=1e9, fair_quantum=64.0, steps_in_flight=steps_in_flight)
    world.add("long", 8, adapter("x"), max_tokens=300)
    world.run_until(lambda: "long" in world.started)
    world.add("alone", 8, adapter("y"), max_tokens=4)
    world.run_until(lambda: "alone" in world.ended, max_steps=100)
    assert len(world.answer("long")) < 100
    world.run()
    world.check_ended()


@pytest.mark.parametrize("steps_in_flight", [1, 2])
@pytest.mark.parametrize("obstacle", ["pinned", "small", "priority"])
def test_nobody_makes_way_in_vain(obstacle, steps_in_flight):
    """Where it would not help, or would help one of less priority, it goes on undisturbed."""
    world = World(
        **LONG,
        arena_pages=2,
        max_slots=3 if obstacle == "small" else 2,
        age_limit_s=1e9,
        fair_quantum=64.0,
        max_num_seqs=4,
        steps_in_flight=steps_in_flight,
    )
    x, y, pinned = adapter("x"), adapter("y", pages=2 if obstacle == "small" else 1), adapter("pinned")
    if obstacle == "pinned":
        world.slots.pin(x)
    if obstacle == "small":
        world.slots.pin(pinned)
    world.add("long", 8, x, max_tokens=300)
    world.run_until(lambda: "long" in world.started)
    world.add("alone", 8, y, max_tokens=4, priority=int(obstacle == "priority"))
    for _ in range(200):
        world.step()
    assert not world.scheduler.num_preemptions and world.requests["alone"].state is RequestState.WAITING
    world.slots.drop(x.image_key), world.slots.drop(pinned.image_key)
    world.run()
    world.check_ended()


def test_a_long_prompt_of_one_ahead_waits_for_a_short_one():
    """Its rows would be all that a step has, for as many steps as it takes."""
    world = World(**LONG, max_step_tokens=16, fair_quantum=48.0)
    world.add("long", 900, adapter("x"), max_tokens=4)
    for _ in range(6):
        world.step()
    world.add("short", 8, adapter("y"), max_tokens=4)
    assert steps_to_first_token(world, "short", 5) <= 5
    assert not world.answer("long")
    world.run()
    world.check_ended()
