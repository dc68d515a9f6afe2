"""Two steps in flight: rows that follow a draw not yet collected, and all that may happen meanwhile."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.limits import SchedulerLimits
from server.engine.messages import RequestError
from server.engine.request import NO_PLACE, RequestState
from server.errors import ConfigError
from tests.unit.scheduler_world import EOS, World, adapter, next_token

X, Y = adapter("x"), adapter("y")


def ahead(**options: Any) -> World:
    return World(**({"steps_in_flight": 2} | options))


def prompt_with_eos_at(index: int, image_key: str = "", length: int = 5) -> list[int]:
    """A prompt whose answer has its first EOS at `index`."""
    for first in range(10_000):
        tokens = [first, *range(10, 9 + length)]
        answer = []
        for _ in range(index + 1):
            answer.append(next_token(image_key, "", [*tokens, *answer]))
        if answer.index(EOS) == index if EOS in answer else False:
            return tokens
    raise AssertionError("no such prompt")


def rows(world: World) -> list[tuple[str, int]]:
    """Schedule; (id, start) of what got rows."""
    return [(item.request.request_id, item.start) for item in world.schedule().items]


# --- what goes ahead ----------------------------------------------------------------------------------------


def test_a_row_follows_a_draw_that_is_not_collected():
    world = ahead()
    request = world.add("a", 5, max_tokens=4)
    assert [rows(world), rows(world)] == [[("a", 0)], [("a", 5)]]
    assert (request.length, len(request.token_ids), request.num_scheduled, request.num_computed) == (7, 5, 6, 0)
    assert rows(world) == [], "two steps are in flight"
    world.collect()
    assert rows(world) == [("a", 6)] and len(request.token_ids) == 6
    world.collect()
    assert rows(world) == [("a", 7)]
    world.collect()
    assert rows(world) == [], "its last token by length is being drawn"
    world.collect()
    assert world.ended == {"a": "length"}
    world.check_ended()


@pytest.mark.parametrize("limits", [{"max_tokens": 3}, {"max_model_len": 8, "max_tokens": 50}, {"max_tokens": 0}])
def test_no_row_is_too_many_where_the_end_is_known(limits):
    """As many rows as with one step in flight."""
    counts = []
    for steps_in_flight in (1, 2):
        world = World(steps_in_flight=steps_in_flight, max_model_len=limits.get("max_model_len", 64))
        world.add("a", 5, max_tokens=limits["max_tokens"])
        counts.append(0)
        while world.scheduler.has_work or world.in_flight:
            counts[-1] += sum(world.step().values())
        world.check_ended()
    assert counts[0] == counts[1]


def test_who_draws_by_its_last_token_waits_for_it_and_holds_up_nobody():
    world = ahead()
    world.add("waits", 4, bad_words=((3,), (1, 2))), world.add("runs", 4)
    assert rows(world) == [("waits", 0), ("runs", 0)]
    assert rows(world) == [("runs", 4)]
    world.collect()
    assert rows(world) == [("waits", 4), ("runs", 5)]
    world.run()
    world.check_ended()


def test_what_the_device_can_do_alone_waits_for_nothing():
    world = ahead()
    edits = {"logit_bias": ((1, 2.0),), "bad_words": ((3,),), "allowed_token_ids": (1, 2)}
    penalties = {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": -0.5}
    world.add("a", 4, **edits, **penalties, min_tokens=2, logprobs=2)
    assert rows(world) and rows(world) == [("a", 4)]
    world.run()
    world.check_ended()


def test_a_crossing_of_the_rope_switch_is_not_run_into():
    world = ahead(rope_switch=10, block_size=4)
    request = world.add("a", 8, max_tokens=6)
    starts = []
    while world.scheduler.has_work:
        starts.append(rows(world))
        if len(world.in_flight) == 2 or not starts[-1]:
            world.collect()
    # tokens 9 and 10 are short; the row of the eleventh waits for it, and all KV is computed anew
    assert [found for found in starts if found] == [[("a", start)] for start in (0, 8, 9, 0, 11, 12)]
    assert request.num_preemptions == 1
    world.check_ended()


def test_limits():
    fields = {"max_num_seqs": 2, "max_step_tokens": 4, "max_adapters_per_step": 1, "max_model_len": 8}
    assert SchedulerLimits(**fields).num_places == 2 and SchedulerLimits(**fields, steps_in_flight=2).num_places == 4
    for bad in (0, 3):
        with pytest.raises(ConfigError, match=f"steps_in_flight must be 1 or 2, not {bad}"):
            SchedulerLimits(**fields, steps_in_flight=bad)


# --- ends ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ref", [None, X])
@pytest.mark.parametrize("index", [0, 1, 3])
def test_an_eos_ends_at_once_and_what_it_held_goes_with_the_row_in_flight(index, ref):
    world = ahead(has_prefix_cache=False)
    world.add("warm", 4, ref, max_tokens=1)
    world.run()
    key = ref.image_key if ref else ""
    request = world.add("a", prompt_with_eos_at(index, key), ref, max_tokens=20, ignore_eos=False)
    world.run_until(lambda: "a" in world.ended)
    assert request.state is RequestState.FINISHED and request.is_in_flight and world.answer("a")[-1] == EOS
    assert request.blocks and request.place != NO_PLACE and bool(request.slot) == bool(ref)
    assert ref is None or not world.slots.drop(key), "an image that a step reads stays"
    assert not world.scheduler.has_work
    world.check()
    assert rows(world) == []
    assert world.collect() == [], "the row was one too many"
    assert not request.blocks and request.place == NO_PLACE and not request.slot
    assert ref is None or not world.slots.is_ready(key)
    world.check_ended()


def test_a_failure_ends_at_once_too():
    world = ahead()
    request = world.add("a", 4, max_tokens=20)
    world.step(), world.step(), world.step()
    world.broken.add("a")
    world.run_until(lambda: "a" in world.ended)
    assert world.ended["a"] == "error" and request.is_in_flight and request.error.code == "not_finite"
    world.run()
    world.check_ended()


def test_an_abort_ends_with_the_row_in_flight():
    world = ahead()
    request = world.add("a", 4, max_tokens=20)
    world.step(), world.step()
    world.scheduler.abort("a")
    assert rows(world) == [] and not world.ended
    assert [output.finish_reason for output in world.collect()] == ["abort"]
    assert not request.blocks
    world.check_ended()


def test_an_abort_of_what_has_just_ended_is_nothing():
    world = ahead()
    world.add("a", prompt_with_eos_at(1), max_tokens=20, ignore_eos=False)
    world.run_until(lambda: "a" in world.ended)
    world.scheduler.abort("a")
    world.run()
    assert world.ended == {"a": "stop"}
    world.check_ended()


def test_an_id_may_come_back_while_its_last_row_is_in_flight():
    world = ahead()
    first = world.add("a", prompt_with_eos_at(1), max_tokens=20, ignore_eos=False)
    world.run_until(lambda: "a" in world.ended)
    assert first.is_in_flight
    del world.requests["a"], world.ended["a"], world.outputs["a"]
    second = world.add("a", 6, max_tokens=5)
    assert rows(world) == [("a", 0)]
    assert world.collect() == [] and not first.blocks and second.blocks and len(second.token_ids) == 6
    world.run()
    world.check_ended()


def test_what_the_row_too_many_wrote_is_not_shared():
    """It fills a block whose tokens are known by then; nothing of a request that has ended enters the cache."""
    world = ahead(block_size=4)
    prompt = prompt_with_eos_at(1, length=6)  # the EOS is token 7, the last of its block
    request = world.add("a", prompt, max_tokens=20, ignore_eos=False)
    world.run_until(lambda: "a" in world.ended)
    assert len(request.token_ids) == 8 and request.num_scheduled == 8 and request.num_computed == 7
    world.run()
    world.add("again", [*request.token_ids, 1], max_tokens=1)
    world.run()
    assert world.outputs["again"][0].num_cached_tokens == 4
    world.check_ended()


def test_places_are_not_handed_on_while_a_row_in_flight_uses_them():
    world = ahead(max_num_seqs=1)
    request = world.add("a", prompt_with_eos_at(1), max_tokens=20, ignore_eos=False)
    world.add("b", 4)
    world.run_until(lambda: "a" in world.ended)
    assert request.is_in_flight
    assert rows(world) == [("b", 0)], "it takes no place in the running set any more"
    assert world.requests["b"].place not in (request.place, NO_PLACE)
    world.run()
    world.check_ended()


# --- memory -------------------------------------------------------------------------------------------------


def test_who_has_to_make_way_rests_a_step_first():
    """Everyone is in flight all the time; the elder sits out one step, however long the younger could go on."""
    world = ahead(num_blocks=9, block_size=4, has_prefix_cache=False)
    world.add("elder", 12, max_tokens=16), world.add("younger", 9, max_tokens=16)
    younger = world.requests["younger"]
    history = []
    while not younger.num_preemptions:
        history.append({name for name, _ in rows(world)})
        if len(world.in_flight) == 2 or not history[-1]:
            world.collect()
        world.check()
    assert len(younger.blocks) == 0 and len(younger.token_ids) % 4 in (2, 3), "its block had room for more"
    assert history[-3:] == [{"elder", "younger"}, set(), {"elder"}]
    assert all(step == {"elder", "younger"} for step in history[:-2])
    world.run()
    assert world.requests["elder"].num_preemptions == 0
    world.check_ended()


def test_nobody_makes_way_for_blocks_that_come_with_the_next_collect():
    """Eight blocks. The elder needs its fourth in step 8, when the last row of the one that ended is in flight."""
    world = ahead(num_blocks=9, block_size=4, has_prefix_cache=False)
    world.add("elder", 6, max_tokens=9)
    world.add("ends", prompt_with_eos_at(5), max_tokens=20, ignore_eos=False)
    world.add("younger", 1, max_tokens=10)
    history = [set(world.step()) for _ in range(9)]
    assert history[6:] == [{"elder", "ends", "younger"}, {"younger"}, {"elder", "younger"}]
    world.run()
    assert world.scheduler.num_preemptions == 0
    world.check_ended()


@pytest.mark.parametrize("index", [2, 4, 6])
def test_device_memory_is_not_asked_of_an_adapter_that_a_row_too_many_holds(index):
    """It would make way in vain, and be preempted again. It is idle every other step: its draws wait for tokens."""
    prompt = prompt_with_eos_at(index, X.image_key)
    for quantum in range(1, 40):
        world = ahead(arena_pages=1, age_limit_s=1e9, max_wait_s=1e9, fair_quantum=float(quantum))
        world.add("ends", prompt, X, max_tokens=30, ignore_eos=False)
        goes_on = world.add("goes on", 2, X, max_tokens=30, bad_words=((48, 49),))
        world.run_until(lambda world=world: "ends" in world.started)
        world.add("waits", 3, Y, max_tokens=2)
        world.run_until(lambda world=world: "waits" in world.ended)
        assert goes_on.num_preemptions <= 1, f"quantum {quantum}"
        world.run()
        world.check_ended()


def test_only_as_many_rest_as_are_to_make_way():
    world = ahead(num_blocks=400, max_model_len=200, max_num_seqs=6, fair_quantum=32.0, max_wait_s=1e9)
    for number in range(12):
        world.add(f"r{number}", 4, max_tokens=150)
    for _ in range(30):
        world.step()
    world.finish_loads()
    for number in range(2):
        world.add(f"new{number}", 4, X, max_tokens=4)
    counts = []
    while "new1" not in world.started:
        counts.append(len(world.step()))
    assert 4 <= min(counts) < 6, "two places are wanted"
    assert world.scheduler.num_preemptions == 2
    world.run()
    world.check_ended()


@pytest.mark.parametrize("difference", [0, 1, 2])
@pytest.mark.parametrize("lacking", ["memory", "places"])
def test_two_that_are_ahead_alike_do_not_rest_in_turns(lacking, difference):
    """Who rested is what makes way: else one goes on while the other rests, and is ahead of it by that in the end."""
    limits = {"max_num_seqs": 2} if lacking == "places" else {"arena_pages": 2}
    world = ahead(num_blocks=400, max_model_len=400, age_limit_s=1e9, max_wait_s=1e9, fair_quantum=16.0, **limits)
    for name, prompt, ref in (("x", 4, X), ("y", 4 + difference, Y)):
        world.add(name, prompt, ref, max_tokens=300)
    world.run_until(lambda: {"x", "y"} <= set(world.started))
    world.add("waits", 4, adapter("z") if lacking == "memory" else None, max_tokens=2)
    world.run_until(lambda: "waits" in world.ended, max_steps=60)
    assert world.scheduler.num_preemptions == 1
    world.run()
    world.check_ended()


# --- as with one step ---------------------------------------------------------------------------------------

REFS = [adapter(f"a{i}", pages) for i, pages in enumerate((1, 1, 2, 3))]
COMMON = [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22]


class Storm:
    """Requests of all kinds at random, with aborts, failures, loads that take their time and images that go."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.count = 0
        self.world = ahead(
            num_blocks=rng.randint(7, 24),
            block_size=4,
            arena_pages=4,
            max_slots=5,
            has_prefix_cache=rng.random() < 0.7,
            max_num_seqs=rng.randint(1, 8),
            max_step_tokens=rng.randint(8, 24),
            max_adapters_per_step=rng.randint(1, 4),
            max_mixed_prefill=rng.choice([None, 1, 5]),
            max_model_len=rng.choice([24, 64]),
            rope_switch=rng.choice([None, None, 10]),
            max_wait_s=1e9,
            age_limit_s=rng.choice([0.1, 1.0]),
            fair_quantum=rng.choice([4.0, 30.0, 2048.0]),
            residency_quantum=rng.choice([2.0, 20.0, 512.0]),
        )

    def add(self) -> None:
        rng = self.rng
        self.count += 1
        prompt = COMMON[: rng.randint(0, 12)] + [rng.randint(0, 3) for _ in range(rng.randint(1, 8))]
        self.world.add(
            f"r{self.count}",
            prompt,
            rng.choice([None, *REFS]),
            max_tokens=rng.choice([0, 1, 2, 5, 20, 20, 40]),
            min_tokens=rng.choice([0, 0, 2]),
            ignore_eos=rng.random() < 0.3,
            stop_token_ids=rng.choice([(), (1, 2, 3, 4, 5, 6)]),
            logprobs=rng.choice([None, 0]),
            prompt_logprobs=rng.choice([None, None, None, 0]),
            bad_words=rng.choice([(), (), (), ((1, 2),)]),
            priority=rng.choice([0, 0, 0, -1, 2]),
        )

    def disturb(self) -> None:
        rng, world = self.rng, self.world
        if rng.random() < 0.05:
            world.scheduler.abort(f"r{rng.randint(1, self.count + 1)}")
        if rng.random() < 0.02:
            world.broken.add(f"r{rng.randint(1, self.count + 1)}")
        if rng.random() < 0.05:
            world.slots.drop(rng.choice(REFS).image_key)
        if world.device.pending and rng.random() < 0.5:
            error = OSError("unreadable") if rng.random() < 0.1 else None
            world.device.finish(rng.randrange(len(world.device.pending)), error)

    def run(self, num_requests: int) -> None:
        world = self.world
        for _ in range(5000):
            if self.count == num_requests and not (world.scheduler.has_work or world.in_flight):
                break
            in_line = sum(r.state is RequestState.WAITING for r in world.requests.values())
            if self.count < num_requests and in_line < 6:
                self.add()
            self.disturb()
            world.step(is_loading=True)
            world.check()
        world.schedule()  # the last terminal events
        world.check_ended()


@settings(max_examples=120, deadline=None)
@given(st.randoms(use_true_random=False))
def test_any_storm_gives_what_the_model_says_and_leaves_nothing(rng):
    """Answers are compared with those that the model gives without an engine: so they are those of one step too."""
    Storm(rng).run(num_requests=25)


def test_a_load_that_fails_ends_who_waits_for_it_while_steps_are_in_flight():
    world = ahead()
    world.add("base", 4, max_tokens=20), world.add("a", 4, X)
    world.step(is_loading=True), world.step(is_loading=True)
    world.device.finish(0, OSError("unreadable"))
    world.step(is_loading=True)
    assert world.ended == {"a": "error"} and isinstance(world.requests["a"].error, RequestError)
    world.run()
    world.check_ended()
