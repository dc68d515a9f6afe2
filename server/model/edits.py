"""What a request's fixed parameters do to its logits: allowed tokens, bad words, biases."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch

from server.engine.messages import SamplingParams
from server.engine.request import Request
from server.model.copies import to_device


class LogitEdits:
    """One request's masks and biases as tensors on the device. Lives in Request.logit_edits from its first draw on.

    Ids outside the vocabulary are no tokens: they can be neither drawn nor ruled out.
    """

    def __init__(self, params: SamplingParams, vocab_size: int, device: torch.device) -> None:
        known = range(vocab_size)
        bias = [(token, value) for token, value in params.logit_bias if token in known]
        self._is_restricted = bool(params.allowed_token_ids)
        self._allowed = _ids((token for token in params.allowed_token_ids if token in known), device)
        self._banned = _ids((word[0] for word in params.bad_words if len(word) == 1 and word[0] in known), device)
        self._bias_ids = _ids((token for token, _ in bias), device)
        self._bias = to_device([value for _, value in bias], device, torch.float32)
        self._endings: dict[int, list[tuple[list[int], int]]] = defaultdict(list)  # by the last token of the rest
        for word in params.bad_words:
            if len(word) > 1 and word[-1] in known:
                self._endings[word[-2]].append((list(word[:-1]), word[-1]))

    @classmethod
    def of(cls, request: Request, row: torch.Tensor) -> LogitEdits:
        """The request's edits, made at first use for logits like `row` [V]."""
        edits = request.logit_edits
        if not isinstance(edits, LogitEdits):
            edits = request.logit_edits = cls(request.params, len(row), row.device)
        return edits

    def mask(self, row: torch.Tensor, request: Request) -> None:
        """Rule tokens out of one row of logits, fp32 [V], in place: all but the allowed, then bad words.

        A bad word's last token is ruled out when the output (never the prompt) ends with the rest of it.
        """
        if self._is_restricted:
            kept = row[self._allowed]
            row.fill_(-torch.inf)
            row[self._allowed] = kept
        row.index_fill_(0, self._banned, -torch.inf)
        if self._endings and request.num_output and (completing := self._completing(request)):
            row.index_fill_(0, _ids(completing, row.device), -torch.inf)

    def add_bias(self, row: torch.Tensor) -> None:
        """Add the biases to one row of logits, fp32 [V], in place."""
        row.index_add_(0, self._bias_ids, self._bias)

    def _completing(self, request: Request) -> list[int]:
        """The tokens that would complete a bad word of several tokens now."""
        known, num_output = request.token_ids, request.num_output
        endings = self._endings.get(known[-1], [])
        return [last for rest, last in endings if len(rest) <= num_output and known[-len(rest) :] == rest]


def has_edits(params: SamplingParams) -> bool:
    return bool(params.logit_bias or params.allowed_token_ids or params.bad_words)


def _ids(tokens: Iterable[int], device: torch.device) -> torch.Tensor:
    return to_device(list(tokens), device, torch.int64)
