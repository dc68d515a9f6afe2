"""Repetition, presence and frequency penalties, from counts that each request keeps and grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

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


def apply_penalties(logits: torch.Tensor, requests: Sequence[Request], last_tokens: torch.Tensor | None = None) -> None:
    """Penalise the rows of logits, fp32 [S, V], whose requests ask for it, in place.

    Repetition first, over prompt and output (divide where positive, multiply where negative: Keskar et al.,
    CTRL); then frequency * count and presence, over the output alone, as OpenAI's API defines them.
    `last_tokens` int64 [S], on the device: each row's last token, for the requests whose last the host lacks.
    """
    rows = [row for row, request in enumerate(requests) if has_penalties(request.params)]
    if not rows:
        return
    seen = _seen_tokens(rows, requests, logits.device)
    lacking = [row for row in rows if requests[row].lacks_last_token]
    if lacking:
        assert last_tokens is not None, "a request's last token is on the device, and nobody says where"
        seen = _with_last(seen, to_device(lacking, logits.device, torch.int64), last_tokens)
    params = [request.params for request in requests]
    columns = [
        [p.repetition_penalty for p in params],
        [p.frequency_penalty for p in params],
        [p.presence_penalty for p in params],
    ]
    repetition, frequency, presence = to_device(columns, logits.device, torch.float32)[:, seen.rows]  # [tokens] each
    values = logits[seen.rows, seen.ids]
    values = torch.where(values < 0, values * repetition, values / repetition)
    values -= frequency * seen.in_output + presence * (seen.in_output > 0)
    logits[seen.rows, seen.ids] = values


class _Seen(NamedTuple):
    """The distinct tokens of all penalised rows, int64 [tokens] each."""

    rows: torch.Tensor
    ids: torch.Tensor
    in_output: torch.Tensor  # how often in the row's output


def _seen_tokens(rows: Sequence[int], requests: Sequence[Request], device: torch.device) -> _Seen:
    """What the host knows."""
    counts = [TokenCounts.of(requests[row]) for row in rows]
    lengths = [len(one.ids) for one in counts]
    arrays = (
        np.repeat(np.array(rows, np.int64), lengths),
        np.concatenate([one.ids for one in counts]),
        np.concatenate([one.output_counts for one in counts]),
    )
    return _Seen(*(to_device(array, device, torch.int64) for array in arrays))


def _with_last(seen: _Seen, lacking: torch.Tensor, last_tokens: torch.Tensor) -> _Seen:
    """With the last token of each row of `lacking` counted too.

    One that was seen before is there twice then, with the same count: what is written for it twice is the same.
    """
    is_lacking = torch.zeros_like(last_tokens, dtype=torch.bool).index_fill_(0, lacking, True)
    is_last = is_lacking[seen.rows] & (seen.ids == last_tokens[seen.rows])
    before = torch.zeros_like(last_tokens).index_add_(0, seen.rows, seen.in_output * is_last)
    return _Seen(
        torch.cat([seen.rows, lacking]),
        torch.cat([seen.ids, last_tokens[lacking]]),
        torch.cat([seen.in_output + is_last, before[lacking] + 1]),
    )
