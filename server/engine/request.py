"""One request inside the engine: token ids, what is computed, what it holds. No torch."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from adapters_store.ref import AdapterRef
from server.engine.messages import RequestError, SamplingParams, TokenLogprobs

NOT_FINITE = -1
"""In place of a sampled id: the row's logits were NaN or infinite, so there was nothing to draw from."""

NO_TOKEN = -2
"""In place of a sampled id: the request's own masks and bans left no token to draw."""

NO_PLACE = -1
"""In place of an index into the device's table of last tokens: the host knows the token."""


class RequestState(enum.Enum):
    PENDING = "pending"  # its adapter's image is not on disk yet
    WAITING = "waiting"  # may be scheduled when there is room
    RUNNING = "running"  # owns blocks and, with an adapter, a ref on its slot
    FINISHED = "finished"  # its terminal event was produced


class FinishReason(enum.StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(slots=True, eq=False)
class Request:
    """State of one request.

        token_ids:  [ prompt ................ | output ...... ] num_draws more are being drawn
                      num_computed ──────▶ (KV is written and collected up to here)
                      num_scheduled ─────────────▶ (… plus what is dispatched but not collected)

    Set at arrival and never changed: request_id, num_prompt, params, cache_salt, arrival_s, pending_key,
    priority.
    Set by the scheduler: everything else, unless a field says otherwise.
    """

    request_id: str
    token_ids: list[int]
    num_prompt: int
    params: SamplingParams
    cache_salt: str = ""
    arrival_s: float = 0.0  # engine's monotonic clock
    pending_key: str | None = None
    priority: int = 0  # lower goes first
    adapter: AdapterRef | None = None  # set once, at arrival or by AdapterReady; kept to the end

    state: RequestState = RequestState.WAITING
    num_computed: int = 0
    num_scheduled: int = 0
    num_draws: int = 0  # rows in flight that draw a token: it will come, the host does not know it yet
    blocks: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)  # of full blocks, kept by the block pool
    slot: int = 0  # device slot while it holds a ref; 0 = base
    place: int = NO_PLACE  # in the device's table of last tokens, while it owns blocks
    num_charged: int = 0  # positions below it were counted in its adapter's fair share
    num_cached: int = 0  # prompt tokens found in the prefix cache at first admission
    num_preemptions: int = 0
    is_in_flight: bool = False  # rows of it are in a dispatched, not yet collected step
    abort_requested: bool = False
    finish_reason: FinishReason | None = None
    error: RequestError | None = None
    adapter_wait_s: float = 0.0  # when it was first held back by LOADING/FULL (0 = never)
    first_scheduled_s: float = 0.0
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # of prompt tokens 1, 2, ...; kept on preemption
    penalty_state: object | None = None  # the sampler's own, made at first use
    logit_edits: object | None = None  # the same, of what is fixed: bias, allowed and banned tokens

    @property
    def num_output(self) -> int:
        return len(self.token_ids) - self.num_prompt

    @property
    def length(self) -> int:
        """Its tokens once all that is in flight was collected, if none of them ends it."""
        return len(self.token_ids) + self.num_draws

    @property
    def num_remaining(self) -> int:
        """Tokens, those being drawn included, that are neither computed nor dispatched."""
        return self.length - self.num_scheduled

    @property
    def draw_index(self) -> int:
        """Where in the output the token stands that is drawn by the last of its rows that were scheduled."""
        return self.num_output + max(0, self.num_draws - 1)

    @property
    def lacks_last_token(self) -> bool:
        """Whether, when its last row was scheduled, the token before that draw was being drawn itself."""
        return self.num_draws > 1

    @property
    def reads_last_token(self) -> bool:
        """Whether its draws need all tokens before them on the host: a bad word of several may be about to end."""
        return any(len(word) > 1 for word in self.params.bad_words)

    @property
    def lacks_prompt_logprobs(self) -> bool:
        """Whether it wants logprobs of prompt tokens that were not collected yet."""
        return self.params.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt - 1

    def prompt_logprob_positions(self, start: int, count: int) -> range:
        """The positions in start : start + count whose logits give prompt logprobs that are still missing.

        Position p gives those of prompt token p + 1, so the last prompt token's position gives none.
        """
        if self.params.prompt_logprobs is None:
            return range(0)
        first = max(start, len(self.prompt_logprobs))
        return range(first, max(first, min(start + count, self.num_prompt - 1)))

    @property
    def adapter_key(self) -> str:
        """Image key; "" for the base."""
        return self.adapter.image_key if self.adapter is not None else ""


def priority_of(request: Request) -> int:
    """Sort key that leaves requests of equal priority in their order."""
    return request.priority
