"""Logprobs of the model's own logits: of one token a row, its rank, and the most likely ones."""

from __future__ import annotations

from typing import NamedTuple

import torch

from server.engine.messages import TokenLogprobs

_CHUNK_ELEMENTS = 1 << 20  # temporaries of a chunk of rows: 4 MiB in fp32, 8 MiB for the keys


class RowLogprobs(NamedTuple):
    """Of R rows, on the device. NaN throughout for a row that is not finite."""

    token_ids: torch.Tensor  # int64 [R]
    chosen: torch.Tensor  # fp32 [R]
    ranks: torch.Tensor  # int64 [R], 1 = the most likely
    top_ids: torch.Tensor  # int64 [R, k], best first
    top: torch.Tensor  # fp32 [R, k]

    def to_host(self, num_top: list[int]) -> list[TokenLogprobs]:
        """One struct a row, with so many of the most likely tokens each. Where the tensors are not on the host it
        waits for each of them."""
        chosen = zip(self.token_ids.tolist(), self.chosen.tolist(), self.ranks.tolist(), strict=True)
        best = zip(self.top_ids.tolist(), self.top.tolist(), num_top, strict=True)
        return [
            TokenLogprobs(token, logprob, rank, list(zip(ids[:count], values[:count], strict=True)))
            for (token, logprob, rank), (ids, values, count) in zip(chosen, best, strict=True)
        ]


def row_logprobs(logits: torch.Tensor, rows: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> RowLogprobs:
    """Of `rows` [R] of logits [S, V] and a token each [R], with the num_top most likely (at most V).

    Tokens are ordered by logit, the lower id first on ties, so ranks and lists do not depend on a sort's
    whims, on num_top, or on other rows; the token of rank r is the r-th of the list.
    """
    num_top = min(num_top, logits.shape[-1])
    size = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    parts = [
        _chunk_logprobs(logits[some].float(), tokens, num_top)
        for some, tokens in zip(rows.split(size), token_ids.split(size), strict=True)
    ]
    chosen, ranks, top_ids, top = (torch.cat(found) for found in zip(*parts, strict=True))
    return RowLogprobs(token_ids, chosen, ranks, top_ids, top)


def _chunk_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_top: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """chosen, ranks, top_ids and top of fp32 logits [R, V]; see RowLogprobs."""
    logprobs = logits.log_softmax(dim=-1)  # one NaN or +inf makes all of its row NaN
    own = token_ids[:, None]
    own_logits = logits.gather(1, own)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    ranks = (logits > own_logits).sum(dim=-1) + ((logits == own_logits) & (ids < own)).sum(dim=-1) + 1
    top_ids = _order(logits, ids).topk(num_top, dim=-1).indices if num_top else own[:, :0]
    return logprobs.gather(1, own)[:, 0], ranks, top_ids, logprobs.gather(1, top_ids)


def _order(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """int64 [R, V]: keys without ties that are larger for a larger logit, and for a lower id among equals."""
    keys = ordered_bits(logits).long()
    keys <<= 32
    keys -= ids
    return keys


def ordered_bits(logits: torch.Tensor) -> torch.Tensor:
    """int32 of fp32: the bits of an IEEE float, with those below the sign flipped for a negative one, order as integers
    like the floats do; -0 is made 0 first."""
    bits = (logits + 0.0).view(torch.int32)
    bits ^= (bits >> 31) & 0x7FFFFFFF  # the shift gives 0, or all ones for a negative one
    return bits
