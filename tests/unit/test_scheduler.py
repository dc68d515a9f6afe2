"""The scheduler, one behaviour at a time: steps, memory, prefix cache, ends. Adapters: test_scheduler_adapters."""

from __future__ import annotations

import pytest

from server.engine.batch import StepResult
from server.engine.limits import SchedulerLimits
from server.engine.request import FinishReason, RequestState
from server.errors import ConfigError
from tests.unit.scheduler_world import EOS, VOCAB, World, adapter, next_token

# --- a step ------------------------------------------------------------------------------------------------


def test_one_request_from_prompt_to_end():
    world = World()
    request = world.add("a", 5, max_tokens=3)
    assert [world.step() for _ in range(3)] == [{"a": 5}, {"a": 1}, {"a": 1}]
    assert world.ended == {"a": "length"} and len(world.answer("a")) == 3
    assert request.num_computed == 7, "the last token is never computed"
    world.check_ended()


def test_a_long_prompt_goes_in_chunks_and_samples_at_its_end():
    world = World(max_step_tokens=10)
    world.add("a", 25)
    assert [world.step() for _ in range(4)] == [{"a": 10}, {"a": 10}, {"a": 5}, {"a": 1}]
    assert len(world.answer("a")) == 2
    world.run()
    world.check_ended()


def test_decodes_come_first_and_prefills_take_what_is_left():
    world = World(max_step_tokens=10)
    world.add("a", 4, max_tokens=20)
    world.step()
    world.add("b", 12, max_tokens=20)
    plan = world.schedule()
    assert [(i.request.request_id, i.num_tokens, i.is_decode) for i in plan.items] == [
        ("a", 1, True),
        ("b", 9, False),
    ]
    world.collect()
    world.add("c", 20)
    assert world.step() == {"a": 1, "b": 3, "c": 6}, "running prefills before admissions"
    world.run()
    world.check_ended()


def test_prompts_take_less_of_a_step_that_decodes():
    world = World(max_step_tokens=20, max_mixed_prefill=8)
    world.add("a", 4, max_tokens=20)
    world.step()
    world.add("b", 5, max_tokens=20)
    world.add("long", 50)
    assert world.step() == {"a": 1, "b": 5, "long": 3}
    assert world.step() == {"a": 1, "b": 1, "long": 8}
    world.run()
    world.check_ended()
    world.add("alone", 30)
    assert world.step() == {"alone": 20}, "nobody waits for a token"
    world.run()
    world.check_ended()


def test_running_requests_are_bounded():
    world = World(max_num_seqs=2, max_step_tokens=32)
    for name in "abc":
        world.add(name, 4)
    assert world.step() == {"a": 4, "b": 4}
    stats = world.scheduler.stats()
    assert (stats.num_running, stats.num_waiting) == (2, 1)
    world.run()
    world.check_ended()


def test_rows_are_ordered_by_phase_slot_and_request():
    world = World()
    x, y = adapter("x"), adapter("y")
    for name, ref in [("a", y), ("b", None), ("c", x), ("d", y), ("e", None)]:
        world.add(name, 4, ref, max_tokens=9)
    world.step(), world.step()  # loads, then prefills
    for name, ref in [("f", y), ("g", x), ("h", None)]:
        world.add(name, 6, ref)
    plan = world.schedule()
    slots = [(item.is_decode, item.request.slot) for item in plan.items]
    assert slots == sorted(slots, key=lambda pair: (not pair[0], pair[1]))
    assert [i.request.request_id for i in plan.items if i.is_decode and not i.request.slot] == ["b", "e"]
    world.collect()
    world.run()
    world.check_ended()


def test_two_steps_in_flight_overlap_chunks_but_never_an_unknown_token():
    world = World(max_step_tokens=10)
    request = world.add("a", 25)
    plans = [world.schedule(), world.schedule()]
    assert [(p.items[0].start, p.items[0].num_tokens) for p in plans] == [(0, 10), (10, 10)]
    assert (request.num_scheduled, request.num_computed) == (20, 0)
    world.collect()
    assert (request.num_scheduled, request.num_computed, request.is_in_flight) == (20, 10, True)
    world.schedule()
    assert not world.schedule().items, "its next token is not known yet"
    world.collect(), world.collect()
    assert world.schedule().items[0].start == 25
    world.collect()
    world.run()
    world.check_ended()


def test_plans_are_collected_once_and_in_order():
    world = World(max_step_tokens=10)
    world.add("a", 25)
    first, second = world.schedule(), world.schedule()
    with pytest.raises(AssertionError, match="in the order"):
        world.scheduler.collect(second, StepResult(), world.now)
    world.collect(), world.collect()
    with pytest.raises(AssertionError, match="collected twice"):
        world.scheduler.collect(first, StepResult(), world.now)


def test_the_first_output_tells_cached_tokens_and_phases():
    world = World()
    world.add("a", 8)
    world.now += 2.0
    world.step(seconds=0.5)
    world.step()
    first, second = world.outputs["a"]
    assert first.num_cached_tokens == 0
    assert first.phases == {"queue_s": 2.0, "adapter_wait_s": 0.0, "prefill_s": 0.5}
    assert second.num_cached_tokens is None and second.phases is None


# --- ends --------------------------------------------------------------------------------------------------


def stops(**params):
    """(tokens, finish reason, stop id) of a request whose model says 10, 11, 12, ... and EOS at index 3."""
    world = World()
    request = world.add("a", 4, **{"max_tokens": 8, "ignore_eos": False, **params})
    while request.state is not RequestState.FINISHED:
        plan = world.scheduler.schedule(world.now)
        token = EOS if request.num_output == 3 else 10 + request.num_output
        world.outputs["a"] += world.scheduler.collect(plan, StepResult({"a": token}), world.now)
    world.scheduler.check_integrity()
    assert all(o.finish_reason is None for o in world.outputs["a"][:-1])
    last = world.outputs["a"][-1]
    return world.answer("a"), last.finish_reason, last.stop_token_id


def test_an_eos_ends_and_is_in_the_output():
    assert stops() == ([10, 11, 12, EOS], "stop", None)


def test_an_eos_can_be_ignored():
    assert stops(ignore_eos=True) == ([10, 11, 12, EOS, 14, 15, 16, 17], "length", None)


def test_a_stop_id_of_the_client_is_named():
    assert stops(stop_token_ids=(99, 11)) == ([10, 11], "stop", 11)
    assert stops(stop_token_ids=(EOS,)) == ([10, 11, 12, EOS], "stop", None)
    assert stops(stop_token_ids=(EOS,), ignore_eos=True) == ([10, 11, 12, EOS], "stop", EOS)


@pytest.mark.parametrize(("min_tokens", "ends_at_eos"), [(2, True), (3, True), (4, False)])
def test_nothing_stops_before_min_tokens(min_tokens, ends_at_eos):
    tokens, reason, _ = stops(min_tokens=min_tokens)
    assert (len(tokens), reason) == ((4, "stop") if ends_at_eos else (8, "length"))
    assert stops(min_tokens=3, stop_token_ids=(11, 14))[0] == [10, 11, 12, EOS]


def test_max_tokens_and_the_context_length_end_with_length():
    assert stops(max_tokens=1) == ([10], "length", None)
    world = World(max_model_len=10)
    world.add("a", 7, max_tokens=100)
    world.run()
    assert world.ended == {"a": "length"} and len(world.answer("a")) == 3
    world.check_ended()


def test_a_prompt_that_leaves_no_room_is_refused_at_once():
    world = World(max_model_len=10)
    request = world.add("a", 10)
    assert request.state is RequestState.FINISHED and request.finish_reason is FinishReason.ERROR
    assert request.error is not None
    assert (request.error.status, request.error.code) == (400, "context_length_exceeded")
    assert "This model's maximum context length is 10 tokens" in request.error.message
    assert not world.scheduler.has_work
    world.add("b", 9)
    world.run()
    world.check_ended()


def test_a_pool_smaller_than_the_context_bounds_it():
    """Else a request that outgrows all blocks preempts itself for ever."""
    world = World(num_blocks=4, block_size=4, max_model_len=64)
    request = world.add("a", 12)
    assert request.error is not None and "KV memory" in request.error.message
    world.add("b", 11, max_tokens=50)
    world.run(max_steps=10)
    assert world.ended["b"] == "length" and len(world.answer("b")) == 1
    world.check_ended()


def test_limits_that_contradict_each_other_are_refused():
    good = {"max_num_seqs": 4, "max_step_tokens": 4, "max_adapters_per_step": 1, "max_model_len": 8}
    SchedulerLimits(**good)
    for bad, match in [
        ({"max_step_tokens": 3}, "a step needs a row for each running request"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_adapters_per_step": 0}, "max_adapters_per_step"),
        ({"max_mixed_prefill": 0}, "max_mixed_prefill"),
    ]:
        with pytest.raises(ConfigError, match=match):
            SchedulerLimits(**(good | bad))


# --- aborts ------------------------------------------------------------------------------------------------


def test_an_abort_ends_what_waits_with_the_next_plan():
    world = World(max_num_seqs=1, max_step_tokens=32)
    world.add("running"), world.add("waiting"), world.add("pending", pending="p")
    world.step()
    for name in ("waiting", "pending", "unknown"):
        world.scheduler.abort(name)
        world.scheduler.abort(name)
    assert not {"waiting", "pending"} & set(world.ended)
    world.step()
    assert (world.ended["waiting"], world.ended["pending"]) == ("abort", "abort")
    world.run()
    world.check_ended()


def test_an_abort_between_steps_frees_at_once():
    world = World()
    request = world.add("a", 8, adapter("x"), max_tokens=20)
    world.step(), world.step()
    assert request.slot and request.blocks
    world.scheduler.abort("a")
    assert world.blocks.num_free == world.blocks.num_usable and world.scheduler.has_work
    assert world.schedule().ended == [request]
    world.check_ended()


@pytest.mark.parametrize("num_in_flight", [1, 2])
def test_an_abort_in_flight_waits_for_the_last_collect(num_in_flight):
    world = World(max_step_tokens=8)
    x = adapter("x")
    world.add("warm", 4, x, max_tokens=1)
    world.run()
    request = world.add("a", 30, x, max_tokens=20)
    for _ in range(num_in_flight):
        world.schedule()
    world.scheduler.abort("a")
    assert not world.schedule().items, "no more rows for it"
    for left in reversed(range(num_in_flight)):
        assert world.slots.holds(request.slot, x.image_key) and request.blocks
        outputs = world.collect()
        assert [o.finish_reason for o in outputs] == ([] if left else ["abort"])
    assert not request.blocks and not request.slot
    world.check_ended()


# --- memory ------------------------------------------------------------------------------------------------


def test_the_latest_admitted_is_preempted_and_ends_right():
    world = World(num_blocks=9, block_size=4, has_prefix_cache=False)
    first = world.add("first", 8, max_tokens=16)
    second = world.add("second", 8, max_tokens=8)
    steps = [world.step() for _ in range(9)]
    assert steps[0] == {"first": 8, "second": 8}
    assert second.num_preemptions == 0
    world.add("third", 4, max_tokens=16)
    world.run()
    assert first.num_preemptions == 0, "the oldest never has to go"
    world.check_ended()


@pytest.mark.parametrize("is_same_adapter", [True, False])
def test_a_preempted_request_keeps_its_tokens_and_goes_before_newcomers(is_same_adapter):
    # 8 blocks of 4: two prompts of 12 take 6, and each request grows to 7
    world = World(num_blocks=9, block_size=4, has_prefix_cache=False, max_num_seqs=2)
    x = adapter("x")
    first, second = world.add("a", 12, x, max_tokens=16), world.add("b", 12, x, max_tokens=16)
    world.run_until(lambda: first.state is second.state is RequestState.RUNNING)
    third = world.add("c", 24, x if is_same_adapter else None)  # no room beside b
    world.run_until(lambda: second.num_preemptions > 0)
    known = list(second.token_ids)
    assert second.state is RequestState.WAITING and len(known) > 12
    assert not second.blocks and not second.slot and second.num_computed == second.num_scheduled == 0
    assert world.scheduler.stats().preemptions == 1 and first.num_preemptions == 0
    world.run_until(lambda: second.state is RequestState.RUNNING)
    assert third.state is RequestState.WAITING, "a newcomer overtook"
    assert second.token_ids[: len(known)] == known
    world.run()
    assert len(world.answer("b")) == 16
    world.check_ended()


def test_nobody_is_admitted_only_to_be_preempted():
    world = World(num_blocks=6, block_size=4, has_prefix_cache=False)
    world.add("a", 10, max_tokens=8)  # owns three blocks of five, and will take two more
    world.step()
    world.add("b", 8, max_tokens=2)
    assert world.step() == {"a": 1}, "b would fit, and a could not grow"
    world.run()
    assert world.scheduler.stats().preemptions == 0
    world.check_ended()


def test_a_preempted_request_finds_its_own_blocks_again():
    world = World(num_blocks=9, block_size=4)
    world.add("a", 12, max_tokens=16)
    second = world.add("b", 12, max_tokens=9)
    world.run_until(lambda: second.num_preemptions > 0)
    rows = world.run_until(lambda: second.state is RequestState.RUNNING)
    assert 0 < rows["b"] < len(second.token_ids) - 1, "its first blocks were still cached"
    assert second.num_cached == 0, "that was no hit of the prompt's"
    assert world.scheduler.stats().prefix_hits == 0
    world.run()
    world.check_ended()


def test_rows_in_flight_are_never_preempted():
    """An older decode without a block sits out until the rows that hold it are collected."""
    world = World(num_blocks=14, block_size=4, has_prefix_cache=False, max_num_seqs=4, max_step_tokens=4)
    old = world.add("old", 4, max_tokens=30)
    world.run_until(lambda: len(old.token_ids) == 8)
    young = world.add("young", 40, max_tokens=2)
    world.schedule()

    def is_stuck() -> bool:
        return len(old.token_ids) > len(old.blocks) * 4 and not world.blocks.can_allocate(1)

    for _ in range(20):
        if is_stuck():
            break
        world.schedule()  # chunks of young overlap; old's next token is known after its collect
        world.collect()
    assert is_stuck() and young.is_in_flight and young.num_preemptions == 0
    assert "old" not in [item.request.request_id for item in world.schedule().items]
    assert young.num_preemptions == 0 and old.num_preemptions == 0
    while world.in_flight:
        world.collect()
    assert world.schedule().items[0].request is old, "what it needs is taken from young now"
    assert young.num_preemptions == 1
    world.collect()
    world.run()
    world.check_ended()


def test_a_large_request_is_not_overtaken_for_ever():
    world = World(num_blocks=17, block_size=4, has_prefix_cache=False, max_num_seqs=16)
    large = None
    for index in range(60):
        world.add(f"small{index}", 8, max_tokens=6)
        if index == 5:
            large = world.add("large", 50, max_tokens=2)
        world.step()
        if large is not None and "large" in world.ended:
            break
    assert "large" in world.ended and index < 40
    world.run()
    world.check_ended()


# --- prefix cache ------------------------------------------------------------------------------------------


def test_an_equal_prompt_starts_behind_its_cached_blocks():
    world = World(block_size=4)
    prompt = list(range(10, 22))
    for name in ("a", "b"):
        world.add(name, prompt)
        world.run()
    world.add("c", [*prompt, 40])
    assert world.step() == {"c": 1}
    cached = {name: world.outputs[name][0].num_cached_tokens for name in "abc"}
    assert cached == {"a": 0, "b": 8, "c": 12}, "at least one token of a prompt is computed"
    stats = world.scheduler.stats()
    assert (stats.prefix_queries, stats.prefix_hits) == (37, 20)
    world.run()
    world.check_ended()


def test_answers_are_cached_too():
    world = World(block_size=4)
    request = world.add("a", 6, max_tokens=7)
    world.run()
    world.add("b", [*request.token_ids, 1, 2, 3])
    world.run()
    assert world.outputs["b"][0].num_cached_tokens == 12, "13 tokens known, 12 of them computed"
    world.check_ended()


def test_what_is_not_collected_is_not_shared():
    world = World(block_size=4)
    prompt = list(range(10, 22))
    world.add("a", prompt)
    world.schedule()
    world.add("b", prompt)
    assert world.schedule().items[0].start == 0
    world.collect(), world.collect()
    world.run()
    world.check_ended()


def test_running_requests_share_blocks():
    world = World(block_size=4)
    prompt = list(range(10, 22))
    a = world.add("a", prompt, max_tokens=8)
    world.step()
    b = world.add("b", prompt, max_tokens=8)
    world.step()
    assert a.blocks[:2] == b.blocks[:2] and not set(a.blocks[2:]) & set(b.blocks[2:])
    world.run()
    world.check_ended()


def test_tenants_adapters_and_look_alikes_share_nothing():
    world = World(block_size=4)
    prompt = list(range(10, 22))
    x, y = adapter("x"), adapter("y")
    cases = [(None, ""), (x, ""), (y, ""), (None, x.image_key), (None, "s"), (x, "s"), (x, y.image_key)]
    for index, (ref, salt) in enumerate(cases):
        world.add(f"first{index}", prompt, ref, salt=salt)
        world.run()
    for index, (ref, salt) in enumerate(cases):
        world.add(f"again{index}", prompt, ref, salt=salt)
        world.run()
        assert world.outputs[f"first{index}"][0].num_cached_tokens == 0
        assert world.outputs[f"again{index}"][0].num_cached_tokens == 8
    world.check_ended()


def test_a_request_that_crosses_the_rope_switch_is_computed_anew():
    world = World(rope_switch=10, block_size=4)
    request = world.add("a", 8, max_tokens=6)
    rows = [world.step()["a"] for _ in range(6)]
    # tokens known: 8, 9, 10 short; at 11 everything again with the long variant
    assert rows == [8, 1, 1, 11, 1, 1]
    assert request.num_preemptions == 1 and world.scheduler.stats().preemptions == 0
    world.check_ended()


def test_the_rope_variants_share_no_blocks():
    world = World(rope_switch=10, block_size=4)
    prompt = list(range(10, 22))
    world.add("long", prompt)
    world.run()
    world.add("short", prompt[:9], max_tokens=1)
    world.add("again", [*prompt, 5], max_tokens=1)
    world.run()
    assert world.outputs["short"][0].num_cached_tokens == 0
    assert world.outputs["again"][0].num_cached_tokens == 12
    world.check_ended()


# --- fairness and bounded waits ----------------------------------------------------------------------------


def test_a_newcomer_is_not_behind_a_crowd_of_another_adapter():
    world = World(max_num_seqs=2, max_step_tokens=32)
    crowd, alone = adapter("crowd"), adapter("alone")
    for index in range(20):
        world.add(f"crowd{index}", 8, crowd)
    for _ in range(12):
        world.step()
    world.add("alone", 8, alone)
    started = len(world.started)
    world.run()
    assert world.started.index("alone") <= started + 1
    world.check_ended()


def test_equal_demand_gets_equal_rows():
    world = World(max_num_seqs=4, max_step_tokens=64)
    refs = {"x": adapter("x"), "y": adapter("y"), "": None}
    for index in range(60):
        for name, ref in refs.items():  # x asks for twice as much per request
            world.add(f"{name}{index}", 16 if name == "x" else 8, ref, max_tokens=8 if name == "x" else 4)
    rows = dict.fromkeys(refs, 0)
    for _ in range(100):
        for request_id, count in world.step().items():
            rows[request_id.rstrip("0123456789")] += count
    assert max(rows.values()) < 1.25 * min(rows.values()), rows
    world.run()
    world.check_ended()


def test_idleness_saves_up_no_turns():
    world = World(max_num_seqs=1, max_step_tokens=32)
    x, y = adapter("x"), adapter("y")
    world.add("y-early", 4, y)
    world.run()
    for index in range(40):
        world.add(f"x{index}", 8, x)
    world.run_until(lambda: len(world.ended) == 20)
    for index in range(20):
        world.add(f"y{index}", 8, y)
    position = len(world.started)
    world.run()
    ahead = [name[0] for name in world.started[position : position + 10]]
    assert ahead.count("y") <= 6, f"y saved up turns while idle: {ahead}"
    world.check_ended()


def test_who_was_never_started_ends_with_503_after_the_bound():
    world = World(max_num_seqs=1, max_step_tokens=32, max_wait_s=10.0, retry_after_s=7)
    world.add("running", 4, max_tokens=50)
    world.add("waiting", 4)
    world.step()
    world.now += 9.0
    world.step()
    assert "waiting" not in world.ended
    world.now += 2.0
    world.step()
    assert world.ended == {"waiting": "error"}
    error = world.requests["waiting"].error
    assert error is not None and (error.status, error.code, error.retry_after_s) == (503, "overloaded", 7)
    world.run()
    world.check_ended()


def test_who_was_started_is_never_timed_out():
    world = World(num_blocks=9, block_size=4, max_wait_s=1.0, has_prefix_cache=False)
    world.add("a", 12, max_tokens=16), world.add("b", 12, max_tokens=16)
    world.run_until(lambda: "a" in world.ended, seconds=5.0)
    assert world.requests["b"].num_preemptions
    world.run()
    assert world.ended == {"a": "length", "b": "length"}
    world.check_ended()


def test_has_work_until_the_last_terminal_event_is_out():
    world = World()
    assert not world.scheduler.has_work
    world.add("p", pending="key")
    assert not world.scheduler.has_work and world.scheduler.num_pending == 1
    world.scheduler.abort("p")
    assert world.scheduler.has_work
    world.schedule()
    assert not world.scheduler.has_work
    world.check_ended()


def test_ids_in_use_are_an_error():
    world = World()
    world.add("a")
    with pytest.raises(AssertionError, match="in use"):
        world.scheduler.add(world.requests["a"])


def test_the_model_of_these_tests_can_tell_everything_apart():
    tokens = {next_token(key, rope, [1, 2, n]) for key in "ab" for rope in ("", "long") for n in range(50)}
    assert len(tokens) == VOCAB and EOS in tokens
