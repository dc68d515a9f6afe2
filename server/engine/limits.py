"""The scheduler's bounds, resolved at start and frozen."""

from __future__ import annotations

import math
from dataclasses import dataclass

from server.errors import ConfigError

MIN_WEIGHT, MAX_WEIGHT = 0.001, 1000.0  # of an adapter's fair share


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerLimits:
    """What bounds a step, a request and its waiting. Raises ConfigError for limits that can't all hold."""

    max_num_seqs: int
    """requests running at once"""
    max_step_tokens: int
    """rows of a step"""
    max_adapters_per_step: int
    max_model_len: int
    """prompt and output tokens of a request"""
    eos_token_ids: tuple[int, ...] = ()
    max_mixed_prefill: int | None = None
    """rows of prompts in a step that also decodes, so that running answers keep their pace; None = all there are"""
    max_logprob_rows: int | None = None
    """rows of a step whose logits give prompt logprobs, each as wide as the vocabulary; None = all there are"""
    max_wait_s: float = 60.0
    """a request that has not started after so long gets 503"""
    max_pending_s: float = 600.0
    """the same for one whose image is not on disk yet: a backstop, the store has bounds of its own"""
    age_limit_s: float = 1.0
    """an adapter held back by other adapters for so long goes first, and others drain for it"""
    fair_quantum: float = 2048.0
    """cost per weight by which who runs may be ahead of who is in line, before it makes way; see shares.py"""
    residency_quantum: float = 512.0
    """cost per weight by which an adapter on the device may be ahead of one that is not, and still go first"""
    input_cost: float = 1.0
    """of a prompt token that is computed"""
    output_cost: float = 2.0
    """of an output token"""
    retry_after_s: int = 5
    """what a 503 tells the client"""
    rope_switch: int | None = None
    """longrope: requests of more known tokens than this use the long rotary variant"""
    steps_in_flight: int = 1
    """steps dispatched before the oldest is collected. With 2 a request's next row is scheduled before its token is
    known, so that the device need not wait for the host; where the host computes, it would only be a row too many"""

    @property
    def num_places(self) -> int:
        """Requests that own anything at once: those that run, and those that have ended with rows in flight."""
        return self.max_num_seqs * self.steps_in_flight

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_adapters_per_step", "max_model_len"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("fair_quantum", "residency_quantum", "input_cost", "output_cost"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be above 0, not {getattr(self, name)}")
        if self.max_mixed_prefill is not None and self.max_mixed_prefill < 1:
            raise ConfigError(f"max_mixed_prefill must be at least 1, not {self.max_mixed_prefill}")
        if self.max_logprob_rows is not None and self.max_logprob_rows < 1:
            raise ConfigError(f"max_logprob_rows must be at least 1, not {self.max_logprob_rows}")
        if self.steps_in_flight not in (1, 2):
            raise ConfigError(f"steps_in_flight must be 1 or 2, not {self.steps_in_flight}")
        if self.max_step_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_step_tokens is {self.max_step_tokens} and max_num_seqs {self.max_num_seqs}: "
                "a step needs a row for each running request"
            )
