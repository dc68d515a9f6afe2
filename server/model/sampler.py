"""The sampler: one token per selected row, by the row's own parameters, whatever else is in the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from server.engine.messages import SamplingParams
from server.engine.request import NO_TOKEN, NOT_FINITE, Request
from server.model.copies import is_near, to_device
from server.model.edits import LogitEdits, has_edits
from server.model.nucleus import NUM_BINS, Ordered, exact_cumsum, floor_by_count, floor_by_mass
from server.model.penalties import apply_penalties, has_penalties
from server.model.philox import uniforms

_CHUNK_ELEMENTS = 1 << 22  # fp64 temporaries of sampled rows stay within 32 MiB each
GREEDY_TEMPERATURE = 1e-5  # and below; vLLM's bound
_NUCLEUS_GUESS = 1024  # top-p looks at this many of the best tokens, then at 8 times as many, ...


def largest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's largest logit and its id, the lowest on ties; NaN where there is one: it wins a maximum."""
    best, tokens = logits.max(dim=-1)
    return best, tokens


Largest = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""logits [S, V] -> the values [S] and ids int64 [S] of `largest`; the id of a row with NaN is any"""


class Sampler:
    """Draws by inverse CDF over the vocabulary in id order, with a number that only (seed, output index) set.

    The order of operations, vLLM's (v1/sample/sampler.py): allowed_token_ids, bad_words, min_tokens,
    logit_bias, penalties, temperature, top-k, top-p, min-p. A masked logit is -inf, which no later step
    raises, so of the first part only "bias before penalties" can be seen: the repetition penalty divides or
    multiplies by the sign of the biased logit. transformers agrees: SequenceBias comes first in
    `_get_logits_processor`, then the penalties, and warpers in the order given here.

    Rows that draw are computed in fp64, each from its own logits alone: neither the batch around a row nor
    a preemption changes its token.
    """

    def __init__(self, eos_token_ids: Sequence[int], find_largest: Largest = largest) -> None:
        self._eos_token_ids = tuple(eos_token_ids)
        self._largest = find_largest

    def sample(
        self, logits: torch.Tensor, requests: Sequence[Request], last_tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """logits [S, V] of any float dtype, one request a row -> int64 [S] on the same device.

        `last_tokens` int64 [S], there too: the token before each draw, if the host lacks one of them.
        A greedy row takes the largest logit, the lowest id on ties. A row with NaN or +inf anywhere, or
        nothing finite, gets NOT_FINITE; one that its request's masks leave nothing of gets NO_TOKEN.
        """
        best, tokens = self._largest(logits)
        is_empty: torch.Tensor | None = None  # bool [S]: masked to the last token
        changed = [row for row, request in enumerate(requests) if self._changes_logits(request)]
        if changed:
            rows = to_device(changed, logits.device, torch.int64)
            last_tokens = None if last_tokens is None else last_tokens[rows]
            adjusted = self._adjusted(logits[rows], [requests[row] for row in changed], last_tokens)
            logits = logits.float().index_copy(0, rows, adjusted)
            adjusted_best, tokens[rows] = adjusted.max(dim=-1)
            adjusted_best.masked_fill_(~best[rows].isfinite(), torch.nan)
            best = best.float().index_copy(0, rows, adjusted_best)
            is_empty = torch.zeros_like(best, dtype=torch.bool).index_copy(0, rows, adjusted_best == -torch.inf)
        drawn = [row for row, request in enumerate(requests) if not is_greedy(request.params)]
        if drawn:
            rows = to_device(drawn, logits.device, torch.int64)
            tokens[rows] = draw(logits, rows, [requests[row] for row in drawn])
        tokens = torch.where(best.isfinite(), tokens, NOT_FINITE)
        return tokens if is_empty is None else torch.where(is_empty, NO_TOKEN, tokens)

    def _changes_logits(self, request: Request) -> bool:
        params = request.params
        return has_edits(params) or has_penalties(params) or request.draw_index < params.min_tokens

    def _adjusted(
        self, logits: torch.Tensor, requests: Sequence[Request], last_tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """fp32 [S, V]: all that comes before the temperature; ends are masked while the output is below min_tokens."""
        logits = logits.float()
        for row, request in zip(logits, requests, strict=True):
            edits = LogitEdits.of(request, row) if has_edits(request.params) else None
            if edits is not None:
                edits.mask(row, request)
            if request.draw_index < request.params.min_tokens:
                endings = self._ending_ids(request, len(row))
                row.index_fill_(0, to_device(endings, row.device, torch.int64), -torch.inf)
            if edits is not None:
                edits.add_bias(row)
        apply_penalties(logits, requests, last_tokens)
        return logits

    def _ending_ids(self, request: Request, vocab_size: int) -> list[int]:
        eos = () if request.params.ignore_eos else self._eos_token_ids
        return [token for token in {*eos, *request.params.stop_token_ids} if token < vocab_size]


def is_greedy(params: SamplingParams) -> bool:
    """Whether the largest logit is taken: top_k 1 and a vanishing temperature mean that too, also where logits tie."""
    return params.temperature < GREEDY_TEMPERATURE or params.top_k == 1


@dataclass(slots=True)
class _Filters:
    """The parameters of the rows of one chunk; [rows, 1] each."""

    temperature: torch.Tensor
    top_k: torch.Tensor  # V where there is none
    top_p: torch.Tensor
    min_p: torch.Tensor
    has_top_k: bool  # some row
    has_top_p: bool

    @classmethod
    def of(cls, requests: Sequence[Request], vocab_size: int, device: torch.device) -> _Filters:
        params = [request.params for request in requests]
        top_k = [min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params]
        floats = [[p.temperature for p in params], [p.top_p for p in params], [p.min_p for p in params]]
        temperature, top_p, min_p = to_device(floats, device, torch.float64)[:, :, None]
        has_top_k, has_top_p = any(k < vocab_size for k in top_k), any(p.top_p < 1.0 for p in params)
        return cls(temperature, to_device(top_k, device, torch.int64)[:, None], top_p, min_p, has_top_k, has_top_p)


def draw(logits: torch.Tensor, rows: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """One token for each of `rows` of logits [S, V], int64 [rows]."""
    vocab_size = logits.shape[-1]
    is_here = is_near(logits.device)
    size = max(1, _CHUNK_ELEMENTS // (vocab_size if is_here else max(vocab_size, NUM_BINS)))
    parts = []
    for start in range(0, len(requests), size):
        chunk = requests[start : start + size]
        weights = filtered_weights(logits[rows[start : start + size]], chunk)
        numbers = uniforms([r.params.seed for r in chunk], [r.draw_index for r in chunk])
        cumulative = weights.cumsum(dim=-1) if is_here else exact_cumsum(weights)  # [rows, V]
        target = to_device(numbers, logits.device, torch.float64)[:, None] * cumulative[:, -1:]
        parts.append(torch.searchsorted(cumulative, target, right=True)[:, 0])
    return torch.cat(parts).clamp_(max=vocab_size - 1)  # only a row of NaN reaches V, and it is NOT_FINITE


def filtered_weights(logits: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """fp64 [rows, V]: unnormalised probabilities after temperature, top-k, top-p and min-p; 0 = filtered out.

    Each filter keeps the tokens from some logit upward, ties of the last one included, so the result does
    not depend on how a sort orders equal logits.
    """
    filters = _Filters.of(requests, logits.shape[-1], logits.device)
    scaled = logits.double()
    scaled -= scaled.amax(dim=-1, keepdim=True)  # before the division: no temperature can overflow a 0
    weights = scaled.div_(filters.temperature).exp_()  # 1 for the best token
    if is_near(weights.device):
        floor = _sorted_floor(weights, filters)
    else:  # whether a sort of some was enough would have to be waited for
        floor = _searched_floor(weights, logits, filters)
    floor = torch.maximum(filters.min_p, floor)
    return weights.masked_fill_(weights < floor, 0.0)


def _searched_floor(weights: torch.Tensor, logits: torch.Tensor, filters: _Filters) -> torch.Tensor:
    """As `_sorted_floor`, of the logits that the weights are made of."""
    floor = torch.zeros_like(filters.top_p)
    if not (filters.has_top_k or filters.has_top_p):
        return floor
    order = Ordered.of(logits)
    if filters.has_top_k:
        floor = torch.where(filters.top_k < weights.shape[-1], floor_by_count(weights, order, filters.top_k), floor)
    if filters.has_top_p:
        kept = weights.masked_fill(weights < floor, 0.0)
        p_floor = torch.where(filters.top_p < 1.0, floor_by_mass(kept, order, filters.top_p), 0.0)
        floor = torch.maximum(floor, p_floor)
    return floor


def _sorted_floor(weights: torch.Tensor, filters: _Filters) -> torch.Tensor:
    """fp64 [rows, 1]: the smallest weight that top-k and then top-p keep; 0 for rows with neither."""
    vocab_size = weights.shape[-1]
    floor = torch.zeros_like(filters.top_p)
    is_needed = (filters.top_k < vocab_size) | (filters.top_p < 1.0)
    pending = is_needed[:, 0].nonzero()[:, 0]
    num_best = min(vocab_size, _NUCLEUS_GUESS)
    while len(pending):
        top_k, top_p = filters.top_k[pending], filters.top_p[pending]
        found, is_settled = _floor_within(weights[pending], top_k, top_p, num_best)
        floor[pending[is_settled]] = found[is_settled]
        pending = pending[~is_settled]
        num_best = min(vocab_size, 8 * num_best)
    return floor


def _floor_within(
    weights: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor, num_best: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The floor of each row by its `num_best` best tokens, [rows, 1]; whether those were enough, [rows]."""
    vocab_size = weights.shape[-1]
    best = weights.topk(num_best, dim=-1).values  # [rows, num_best], descending
    k_floor = best.gather(1, top_k.clamp(max=num_best) - 1)
    k_floor = torch.where(top_k < vocab_size, k_floor, 0.0)
    kept = weights.masked_fill(weights < k_floor, 0.0)
    total = kept.cumsum(dim=-1)[:, -1:]  # a cumsum runs along each row alone; a sum may split a single row
    mass = best.masked_fill(best < k_floor, 0.0).cumsum(dim=-1)
    last = (mass < top_p * total).sum(dim=-1, keepdim=True)  # index of the token that reaches the mass
    p_floor = torch.where(top_p < 1.0, best.gather(1, last.clamp(max=num_best - 1)), 0.0)
    is_k_settled = (top_k <= num_best) | (top_k >= vocab_size)
    is_settled = is_k_settled & ((top_p >= 1.0) | (last < num_best) | (num_best == vocab_size))
    return torch.maximum(k_floor, p_floor), is_settled[:, 0]
