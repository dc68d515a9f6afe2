"""Random requests, aborts, adapter events, loads and steps over small pools; everything checked after each.

The world checks in each step that rows read only KV of their own adapter, tenant and tokens, that slots hold
the adapter of their rows, and that bounds and lines are kept; see scheduler_world.py.
"""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from server.engine.messages import RequestError
from server.engine.request import RequestState
from tests.unit.scheduler_world import World, adapter

REFS = [adapter(f"a{i}", pages) for i, pages in enumerate((1, 1, 1, 2, 3))]
TOO_LARGE = adapter("huge", 50)
KEYS = ["p0", "p1", "p2"]  # pending keys; p<i> becomes REFS[i]
FAILED = RequestError(404, "model_not_found", "no such adapter")
COMMON = [11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22]  # prompts begin alike, so prefixes are shared

prompts = st.builds(
    lambda shared, own: COMMON[:shared] + own,
    st.integers(0, 12),
    st.lists(st.integers(0, 3), min_size=1, max_size=14),
)


class SchedulerMachine(RuleBasedStateMachine):
    """Up to `depth` steps in flight; `runs_ahead`: rows follow draws that are not collected."""

    @initialize(
        num_blocks=st.integers(7, 18),
        depth=st.integers(1, 2),
        runs_ahead=st.booleans(),
        limits=st.fixed_dictionaries(
            {
                "max_num_seqs": st.integers(1, 6),
                "max_step_tokens": st.integers(6, 24),
                "max_adapters_per_step": st.integers(1, 4),
                "max_mixed_prefill": st.sampled_from([None, 1, 5]),
                "max_wait_s": st.sampled_from([3.0, 1e9, 1e9]),
                "max_pending_s": st.sampled_from([5.0, 1e9, 1e9]),
                "rope_switch": st.sampled_from([None, 10]),
                "max_model_len": st.sampled_from([24, 64]),
                "max_logprob_rows": st.sampled_from([None, 1, 3]),
                "fair_quantum": st.sampled_from([4.0, 30.0, 2048.0]),
                "residency_quantum": st.sampled_from([2.0, 20.0, 512.0]),
            }
        ),
        has_prefix_cache=st.sampled_from([True, True, False]),
    )
    def begin(
        self, num_blocks: int, depth: int, runs_ahead: bool, limits: dict[str, Any], has_prefix_cache: bool
    ) -> None:
        self.world = World(
            num_blocks=num_blocks,
            block_size=4,
            arena_pages=4,
            max_slots=5,
            has_prefix_cache=has_prefix_cache,
            steps_in_flight=1 + runs_ahead,
            **limits,
        )
        self.depth = depth
        self.count = 0

    # --- requests ----------------------------------------------------------------------------------------

    @rule(
        prompt=prompts,
        wanted=st.sampled_from([None, None, None, *REFS, *REFS, *KEYS, TOO_LARGE]),
        salt=st.sampled_from(["", "", "s", "image-a0"]),
        max_tokens=st.integers(0, 20),
        min_tokens=st.integers(0, 3),
        ignore_eos=st.booleans(),
        stop_token_ids=st.sampled_from([(), (1, 2, 3)]),
        bad_words=st.sampled_from([(), (), (), ((1, 2),)]),
        logprobs=st.sampled_from([None, None, 0]),
        prompt_logprobs=st.sampled_from([None, None, 0]),
        priority=st.sampled_from([0, 0, 0, -1, 2]),
        copies=st.integers(1, 4),
    )
    def add(self, prompt: list[int], wanted: object, salt: str, copies: int, **params: Any) -> None:
        for _ in range(copies):
            self.count += 1
            ref = None if isinstance(wanted, str) else wanted
            key = wanted if isinstance(wanted, str) else None
            self.world.add(f"r{self.count}", prompt, ref, pending=key, salt=salt, **params)  # type: ignore[arg-type]

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        """Any id: alive, in flight, ended or never heard of."""
        self.world.scheduler.abort(f"r{data.draw(st.integers(0, self.count + 1))}")

    @precondition(lambda self: self.count)
    @rule(data=st.data())
    def break_logits(self, data: st.DataObject) -> None:
        """What the model gives for a request is not finite from now on."""
        self.world.broken.add(f"r{data.draw(st.integers(1, self.count))}")

    @rule(index=st.integers(0, len(KEYS) - 1))
    def adapter_ready(self, index: int) -> None:
        self.world.adapter_ready(KEYS[index], REFS[index])

    @rule(key=st.sampled_from(KEYS))
    def adapter_failed(self, key: str) -> None:
        self.world.scheduler.adapter_failed(key, FAILED)

    # --- adapters ----------------------------------------------------------------------------------------

    @precondition(lambda self: self.world.device.pending)
    @rule(data=st.data(), is_good=st.sampled_from([True, True, True, False]))
    def finish_load(self, data: st.DataObject, is_good: bool) -> None:
        index = data.draw(st.integers(0, len(self.world.device.pending) - 1))
        self.world.device.finish(index, None if is_good else OSError("unreadable"))

    @rule(ref=st.sampled_from(REFS))
    def drop_image(self, ref: Any) -> None:
        self.world.slots.drop(ref.image_key)

    # --- steps -------------------------------------------------------------------------------------------

    @rule(name=st.sampled_from(["", *(ref.name for ref in REFS)]), weight=st.sampled_from([0.1, 1.0, 5.0]))
    def set_weight(self, name: str, weight: float) -> None:
        self.world.scheduler.set_weight(name, weight)

    @rule(seconds=st.sampled_from([0.6, 1.1, 6.0]))
    def time_passes(self, seconds: float) -> None:
        self.world.now += seconds

    @precondition(lambda self: len(self.world.in_flight) < self.depth)
    @rule()
    def schedule(self) -> None:
        self.world.schedule()

    @precondition(lambda self: self.world.in_flight)
    @rule()
    def collect(self) -> None:
        self.world.collect()

    @rule(count=st.integers(1, 12), is_loading=st.booleans())
    def steps(self, count: int, is_loading: bool) -> None:
        """Several whole steps, so that runs get far."""
        for _ in range(count):
            if not is_loading:
                self.world.finish_loads()
            if len(self.world.in_flight) < self.depth:
                self.world.schedule()
            if len(self.world.in_flight) == self.depth:
                self.world.collect()
            self.world.now += 0.02

    # --- what must hold ----------------------------------------------------------------------------------

    @invariant()
    def everything_is_in_its_place(self) -> None:
        if hasattr(self, "world"):
            self.world.check()
            in_line = {r.adapter_key for r in self.world.requests.values() if r.state is RequestState.WAITING}
            assert self.world.slots._wanted == in_line - {""}

    def teardown(self) -> None:
        """From any state, all ends in a bounded number of steps, rightly, and leaves nothing behind."""
        if not hasattr(self, "world"):
            return
        world = self.world
        for key, ref in zip(KEYS, REFS, strict=False):
            world.adapter_ready(key, ref)
        live = [r for r in world.requests.values() if r.state is not RequestState.FINISHED]
        for _ in range(300 + 60 * len(live)):
            if not (world.scheduler.has_work or world.in_flight):
                break
            world.finish_loads()
            world.schedule()
            while world.in_flight:
                world.collect()
            world.now += 0.1
        world.schedule()  # the last terminal events
        world.check_ended()


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
