"""One forward pass without weights that shows what a base asks of attention, before anything is served.

The class of a model says only that it calls attention through the interface. Whether paged attention gives
the same result also depends on the masks it makes (chunks, prefixes, both directions), on layers that mix
tokens by other means (convolutions, state spaces) and on arguments it passes. So the base runs once on the
meta device under a recording attention function and a recording mask function, and each layer's mask is
compared with causal attention in the window that the layer declares.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

from server.adapters.layer import StepState
from server.model.attention import refusals
from server.model.kv import KVShape
from server.model.rotary import replace_rotary
from server.model.skeleton import build_skeleton, decoder_layers

PROBE_NAME = "multilora_probe"
_NUM_ROWS = 8
_KEPT_ROWS = (2, 7)
# what a model's own code raises when it meets the meta device or arguments that it was not written for
_MODEL_ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, LookupError)


@dataclass(slots=True)
class _Mask:
    """What a model gets for a mask while it is probed: the rule (batch, head, query, key) -> allowed."""

    rule: Callable[..., torch.Tensor]


@dataclass(slots=True)
class _Call:
    """One call of attention: which layer, KV heads and head sizes, the mask rule and the declared window."""

    layer: int | None
    num_kv_heads: int
    head_dims: tuple[int, int, int]  # of query, key, value
    mask: _Mask | None
    window: int | None
    problems: list[str]


@dataclass(slots=True)
class _Recorder:
    calls: list[_Call] = field(default_factory=list)


def probe(config: PreTrainedConfig, dtype: torch.dtype) -> tuple[KVShape | None, list[str]]:
    """(the KV that a position keeps, reasons why the base can't be served): one is empty, None or []."""
    _register()
    recorder = _Recorder()
    try:
        model = build_skeleton(config, dtype, PROBE_NAME)
        reasons = _refusals_of_modules(model)
        if reasons:
            return None, reasons
        replace_rotary(model, config, _meta_step())
        kept = _run(model, recorder)
    except _MODEL_ERRORS as error:
        return None, [f"a {config.model_type} model does not run on flat rows of tokens: {error}"]
    reasons = _refusals_of_calls(recorder.calls, config.num_hidden_layers)
    reasons += _refusals_of_masks(recorder.calls, getattr(config, "max_position_embeddings", None) or 4096)
    if kept != len(_KEPT_ROWS):
        reasons.append("it computes logits for more rows than it is asked for")
    if reasons:
        return None, reasons
    first = recorder.calls[0]
    return KVShape(config.num_hidden_layers, first.num_kv_heads, first.head_dims[0]), []


def _register() -> None:
    AttentionInterface.register(PROBE_NAME, _record)
    AttentionMaskInterface.register(PROBE_NAME, _keep_rule)


def _keep_rule(*, mask_function: Callable[..., torch.Tensor], **_: Any) -> _Mask:
    return _Mask(mask_function)


def _record(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: _Mask | torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    *,
    step: _Recorder,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The arguments of `attention.paged_attention_forward`; the result has the right shape and no values."""
    mask = attention_mask if isinstance(attention_mask, _Mask) else None
    problems = refusals(module, None if mask is not None else attention_mask, dropout, kwargs)
    dims = (query.shape[-1], key.shape[-1], value.shape[-1])
    layer = getattr(module, "layer_idx", None)
    step.calls.append(_Call(layer, key.shape[1], dims, mask, sliding_window, problems))
    out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])  # [1, rows, heads, head_dim]
    return out, None


def _meta_step() -> StepState:
    """A StepState for the rotary alone: lengths on the meta device."""
    lengths = torch.ones(_NUM_ROWS, dtype=torch.int64, device="meta")
    return StepState(weights=None, ops=None, rope_lengths=lengths)  # type: ignore[arg-type]  # no layer reads them


def _run(model: nn.Module, recorder: _Recorder) -> int:
    """Run the skeleton on a few rows; returns for how many of them it made logits."""
    with torch.device("meta"), torch.inference_mode():
        out = model(
            input_ids=torch.zeros(1, _NUM_ROWS, dtype=torch.int64),
            position_ids=torch.arange(_NUM_ROWS)[None],
            # without one, transformers looks for packed sequences in the values of position_ids
            attention_mask=torch.ones(1, _NUM_ROWS, dtype=torch.int64),
            use_cache=False,
            logits_to_keep=torch.tensor(_KEPT_ROWS),
            step=recorder,
        )
    return int(out.logits.shape[1])


def _refusals_of_modules(model: nn.Module) -> list[str]:
    _, layers = decoder_layers(model)
    experts = {type(module).__name__ for name, module in layers.named_modules() if _is_expert(name, module)}
    if experts:
        return [f"it is a mixture of experts ({', '.join(sorted(experts))}), which can't be adapted yet"]
    return []


def _is_expert(name: str, module: nn.Module) -> bool:
    kind = type(module).__name__
    return name.rpartition(".")[2] == "experts" or "Experts" in kind or "SparseMoe" in kind


def _refusals_of_calls(calls: list[_Call], num_layers: int) -> list[str]:
    reasons = sorted({problem for call in calls for problem in call.problems})
    layers = [call.layer for call in calls]
    if sorted(layer for layer in layers if layer is not None) != list(range(num_layers)) or None in layers:
        silent = sorted(set(range(num_layers)) - set(layers))
        reasons.append(
            f"{len(calls)} attention calls for {num_layers} layers (no call from layers {silent}): "
            "every layer must attend exactly once and mix tokens in no other way"
        )
    shapes = {(call.num_kv_heads, *call.head_dims) for call in calls}
    if len(shapes) > 1 or any(len(set(call.head_dims)) > 1 for call in calls):
        reasons.append(f"its layers' keys and values have several shapes (heads and sizes {sorted(shapes)})")
    return reasons


def _refusals_of_masks(calls: list[_Call], max_length: int) -> list[str]:
    """Layers whose mask is not causal attention within the declared window."""
    verdicts: dict[tuple[int, int | None], str | None] = {}
    reasons: dict[str, list[int | None]] = {}
    for call in calls:
        if call.mask is None:
            continue
        key = (id(call.mask), call.window)
        if key not in verdicts:
            verdicts[key] = _refusal_of_mask(call.mask, call.window, max_length)
        verdict = verdicts[key]
        if verdict is not None:
            reasons.setdefault(verdict, []).append(call.layer)
    return [f"layers {layers}: {verdict}" for verdict, layers in reasons.items()]


def _refusal_of_mask(mask: _Mask, window: int | None, max_length: int) -> str | None:
    points = _positions(window, max_length)
    query, key = points[:, None], points[None, :]
    expected = key <= query
    if window is not None:
        expected &= key > query - window
    zero = torch.zeros((), dtype=torch.int64)
    try:
        allowed = torch.as_tensor(mask.rule(zero, zero, query, key)).expand_as(expected)
        wrong = (allowed != expected).nonzero()
    except _MODEL_ERRORS as error:
        return f"its attention mask depends on more than positions ({error})"
    if len(wrong) == 0:
        return None
    q, k = (int(points[place]) for place in wrong[0])
    declared = "causal" if window is None else f"causal within {window}"
    return f"the mask is not {declared}, as the attention call says (query {q}, key {k})"


def _positions(window: int | None, max_length: int) -> torch.Tensor:
    """Positions at which masks that differ would show it: around powers of two and the window's edges."""
    centres = [2**power for power in range(max_length.bit_length() + 1)]
    if window is not None:
        centres += [window, 2 * window, 3 * window]
    near = {centre + shift for centre in centres for shift in (-2, -1, 0, 1)}
    return torch.tensor(sorted(place for place in near | {0} if 0 <= place < max(max_length, 4)))
