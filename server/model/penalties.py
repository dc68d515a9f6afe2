"""Repetition, presence and frequency penalties, from counts that each request keeps and grows."""

from __future__ import annotations

import numpy as np
import torch

from server.engine.messages import SamplingParams
from server.engine.request import Request
from server.model.copies import to_device


class TokenCounts:
    """The distinct tokens of one request and how often each stands in its output. Grows with the request.

    Lives in Request.penalty_state from the first draw on, so a step costs the step's one new token.
    """

    def __init__(self, prompt_ids: list[int]) -> None:
        distinct = np.unique(np.array(prompt_ids, np.int64))
        self._place = {token: place for place, token in enumerate(distinct.tolist())}
        self._ids = distinct
        self._counts = np.zeros(len(distinct), np.int64)
        self._num_counted = len(prompt_ids)

    @classmethod
    def of(cls, request: Request) -> TokenCounts:
        """The request's counts, made at first use, up to date with its tokens."""
        counts = request.penalty_state
        if not isinstance(counts, TokenCounts):
            counts = request.penalty_state = cls(request.token_ids[: request.num_prompt])
        counts._count(request.token_ids)
        return counts

    @property
    def ids(self) -> np.ndarray:
        """int64 [distinct]: tokens of prompt and output, each once."""
        return self._ids[: len(self._place)]

    @property
    def output_counts(self) -> np.ndarray:
        """int64 [distinct]: occurrences in the output, of `ids` in the same order."""
        return self._counts[: len(self._place)]

    def _count(self, token_ids: list[int]) -> None:
        for token in token_ids[self._num_counted :]:
            place = self._place.setdefault(token, len(self._place))
            if place == len(self._ids):
                self._grow()
            self._ids[place] = token
            self._counts[place] += 1
        self._num_counted = len(token_ids)

    def _grow(self) -> None:
        spare = np.zeros(max(16, len(self._ids)), np.int64)
        self._ids = np.concatenate([self._ids, spare])
        self._counts = np.concatenate([self._counts, spare])


def has_penalties(params: SamplingParams) -> bool:
    return bool(params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty)


def apply_penalties(row: torch.Tensor, request: Request) -> None:
    """Penalise one row of logits, fp32 [V], in place.

    Repetition first, over prompt and output (divide where positive, multiply where negative: Keskar et al.,
    CTRL); then frequency * count and presence, over the output alone, as OpenAI's API defines them.
    """
    params = request.params
    counts = TokenCounts.of(request)
    ids = to_device(counts.ids, row.device, torch.int64)
    in_output = to_device(counts.output_counts, row.device, torch.int64)  # [distinct]
    logits = row[ids]
    repetition = params.repetition_penalty
    logits = torch.where(logits < 0, logits * repetition, logits / repetition)
    logits -= params.frequency_penalty * in_output + params.presence_penalty * (in_output > 0)
    row[ids] = logits
