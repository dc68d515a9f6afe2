"""The running set: what each request in it owns, block tables and slot refs, and how it gives them up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol

from adapters_store.ref import AdapterRef
from server.adapters.slots import Acquire
from server.engine.blocks import BlockPool, KvNamespace
from server.engine.limits import SchedulerLimits
from server.engine.request import NO_PLACE, Request, RequestState, priority_of


class Slots(Protocol):
    """What the scheduler asks of the device arena; see server/adapters/slots.py."""

    def acquire(self, ref: AdapterRef) -> tuple[Acquire, int]: ...

    def release(self, slot: int) -> None: ...

    def prefetch(self, ref: AdapterRef) -> None: ...

    def want(self, image_key: str, is_wanted: bool) -> None: ...

    def is_ready(self, image_key: str) -> bool: ...

    def makes_room(self, image_key: str, ref: AdapterRef) -> bool: ...


class RunningSet:
    """Running requests in order of admission. Owns their blocks, their places in the device's table of last tokens
    and, with an adapter, a ref on its slot.

    Nothing is given up while rows of the request are in flight: a step may be reading it. Who ends before that is
    out of the set and *leaving*: what it holds goes when the last of its rows was collected.
    """

    def __init__(self, blocks: BlockPool, slots: Slots, limits: SchedulerLimits) -> None:
        self._blocks = blocks
        self._slots = slots
        self._rope_switch = limits.rope_switch
        self._requests: dict[str, Request] = {}
        self._leaving: dict[int, Request] = {}  # by id(): a client may use a request's id again once it has ended
        self._num_places = limits.num_places
        self._free_places = list(range(self._num_places))

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def leaving(self) -> Iterable[Request]:
        """Those that have ended and hold what they had until their last rows are collected."""
        return self._leaving.values()

    def __iter__(self) -> Iterator[Request]:
        """In order of admission."""
        return iter(self._requests.values())

    def find_prefix(self, request: Request) -> list[int]:
        """The cached blocks that a request can start from. Takes nothing.

        None for one that lacks prompt logprobs: a cached position has KV but no logits.
        """
        if request.lacks_prompt_logprobs:
            return []
        known = len(request.token_ids)
        self._extend_hashes(request, known)
        return self._blocks.match_prefix(request.block_hashes, known)

    def can_start(self, request: Request, prefix: list[int]) -> bool:
        """Whether there are blocks for all its known tokens, and one for each running request to grow."""
        missing = self._blocks.blocks_for(len(request.token_ids)) - len(prefix)
        return self._blocks.can_allocate(missing + len(self), reuse=prefix)

    def start(self, request: Request, prefix: list[int], slot: int) -> None:
        """Take in a request, with a ref on `slot` that the caller acquired, and the blocks of its tokens."""
        missing = self._blocks.blocks_for(len(request.token_ids)) - len(prefix)
        request.blocks = self._blocks.allocate(missing, reuse=prefix)
        request.num_computed = request.num_scheduled = len(prefix) * self._blocks.block_size
        request.slot = slot
        request.place = self._free_places.pop()
        request.state = RequestState.RUNNING
        self._requests[request.request_id] = request
        if request.num_preemptions == 0:
            request.num_cached = request.num_computed
            if not request.lacks_prompt_logprobs:
                self._blocks.record_match(request.num_prompt, request.num_cached)

    def give_up(self, request: Request) -> None:
        """Out of the set: what it holds goes, at once or, with rows in flight, when they are collected."""
        del self._requests[request.request_id]
        if request.is_in_flight:
            self._leaving[id(request)] = request
        else:
            self._release(request)

    def let_go(self, request: Request) -> None:
        """The last rows in flight of one that is leaving were collected."""
        assert not request.is_in_flight, f"request {request.request_id!r} has rows in flight"
        del self._leaving[id(request)]
        self._release(request)

    def _release(self, request: Request) -> None:
        self._free_places.append(request.place)
        request.place = NO_PLACE
        self._blocks.free(request.blocks)
        request.blocks = []
        if request.slot:
            self._slots.release(request.slot)
            request.slot = 0

    def grow(self, request: Request) -> bool:
        """Give a request the block of its last token, if it lacks it and there is one."""
        if request.length <= len(request.blocks) * self._blocks.block_size:
            return True  # all but one step in a block's length
        missing = self._blocks.blocks_for(request.length) - len(request.blocks)
        if not self._blocks.can_allocate(missing):
            return False
        request.blocks += self._blocks.allocate(missing)
        return True

    def victim_for(self, request: Request) -> Request | None:
        """Whose blocks `request` may have: the one of least priority, of equals the latest admitted; those without
        rows in flight before the others; itself at the last. So the first in this order never has to go.

        None: who is leaving gives up blocks with the next collect.
        """
        if self._leaving:
            return None
        in_order = sorted(self, key=priority_of)
        behind = in_order[: in_order.index(request) : -1]
        idle = (candidate for candidate in behind if not candidate.is_in_flight)
        return next(idle, behind[0] if behind else request)

    def least_of_priority(self, priority: int) -> list[Request]:
        """Those of the least priority that runs, in order of admission; none if even the least is above `priority`.

        Without who is about to end: what it holds is not to be taken, but to be waited for.
        """
        least = max((request.priority for request in self), default=priority)
        if least < priority:
            return []
        return [request for request in self if request.priority == least and not request.abort_requested]

    def cache_full_blocks(self, request: Request, start: int) -> None:
        """Make the blocks findable that were filled by computing positions start : num_computed."""
        size, end = self._blocks.block_size, request.num_computed
        if not self._blocks.has_prefix_cache or start // size == end // size:
            return
        self._extend_hashes(request, end)
        for index in range(start // size, end // size):
            self._blocks.cache(request.blocks[index], request.block_hashes[index])

    def is_rope_crossed(self, num_tokens: int) -> bool:
        """Whether the last of so many tokens makes a request too long for the rotary variant of its KV."""
        return self._rope_switch is not None and num_tokens == self._rope_switch + 1

    def _extend_hashes(self, request: Request, num_tokens: int) -> None:
        if len(request.block_hashes) < num_tokens // self._blocks.block_size:
            namespace = self._namespace(request)
            self._blocks.extend_hashes(request.block_hashes, namespace, request.token_ids, num_tokens)

    def _namespace(self, request: Request) -> KvNamespace:
        members = ((request.adapter_key, 1.0),) if request.adapter is not None else ()
        rope = ""
        if self._rope_switch is not None:
            rope = "long" if len(request.token_ids) > self._rope_switch else "short"
        return KvNamespace(members=members, cache_salt=request.cache_salt, rope=rope)

    def check_integrity(self) -> None:
        """Assert that exactly the running and the leaving own blocks, a place, and a slot if they have an adapter."""
        owners = [*self, *self._leaving.values()]
        self._blocks.check_integrity(request.blocks for request in owners)
        places = sorted([*self._free_places, *(request.place for request in owners)])
        assert places == list(range(self._num_places)), f"places lost or doubled: {places}"
        for request in self:
            assert request.state is RequestState.RUNNING
        for request in self._leaving.values():
            assert request.state is RequestState.FINISHED and request.is_in_flight, "it could have gone"
        for request in owners:
            assert (request.slot != 0) == (request.adapter is not None), "a running adapter needs a slot"
            held = len(request.blocks) * self._blocks.block_size
            assert request.num_computed <= request.num_scheduled <= min(held, request.length)
            assert request.is_in_flight == (request.num_computed < request.num_scheduled)
            assert 0 <= request.num_draws <= request.num_scheduled - request.num_computed
