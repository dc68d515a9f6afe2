"""Rotary embeddings that depend on the length of a sequence, made to depend on each row's own request.

transformers picks LongRoPE's short or long frequencies by the longest position in the whole batch
(modeling_rope_utils.longrope_frequency_update), which would leak one request's length into another's logits.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from server.adapters.layer import StepState

LONGROPE = "longrope"


def rope_switch_of(config: PreTrainedConfig) -> int | None:
    """The longest length that still uses the short frequencies; None where length changes nothing.

    A request of known length n (prompt plus output so far, the token being fed included) uses the short
    frequencies for all its positions while n <= switch, and the long ones for all its positions once
    n > switch. Keys are cached after rotation. So a request whose known length grows from switch to
    switch + 1 must recompute its whole KV, as Phi-3's `prepare_inputs_for_generation` does by dropping the
    cache; and KV may be shared only between requests on the same side of the switch.
    """
    switches = {
        int(parameters["original_max_position_embeddings"])
        for parameters in rope_parameters_of(config)
        if parameters.get("rope_type") == LONGROPE
    }
    assert len(switches) <= 1, "refusals_of_rope lets only one through"
    return switches.pop() if switches else None


def refusals_of_rope(config: PreTrainedConfig) -> list[str]:
    """Why the rotary variants of `config` can't be served."""
    all_parameters = list(rope_parameters_of(config))
    kinds = {str(parameters.get("rope_type")) for parameters in all_parameters}
    reasons = [
        f"rotary scaling {kind!r} changes its frequencies with the longest sequence of a batch"
        for kind in sorted(kinds)
        if "dynamic" in kind
    ]
    if LONGROPE in kinds and len(all_parameters) > 1:
        reasons.append("longrope differs by layer type")
    return reasons


def rope_parameters_of(config: PreTrainedConfig) -> Iterator[dict[str, Any]]:
    """The rotary parameters of `config`: one dict, or one for each layer type that has its own."""
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    if "rope_type" not in parameters and nested:
        yield from nested
    else:
        yield parameters


class PerRowRotary(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """LongRoPE by row: each row's cos and sin are those of its own request's length.

    Holds the base's rotary module twice, once with each set of frequencies frozen, and takes every row from
    the one that `step.rope_lengths` says.
    """

    def __init__(self, rotary: nn.Module, config: PreTrainedConfig, switch: int, step: StepState) -> None:
        super().__init__()
        device = rotary.inv_freq.device
        long_frequencies, _ = ROPE_INIT_FUNCTIONS[LONGROPE](config, device, seq_len=switch + 1)
        self.short = _frozen(rotary, rotary.original_inv_freq)
        self.long = _frozen(rotary, long_frequencies)
        self.switch = switch
        self.step = step

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [1, rows, hidden] (for its dtype), position_ids [1, rows] -> cos, sin [1, rows, rotary dim]."""
        assert self.step.rope_lengths is not None, "the runner sets the lengths before the forward pass"
        is_long = (self.step.rope_lengths > self.switch)[None, :, None]
        cos_short, sin_short = self.short(x, position_ids)
        cos_long, sin_long = self.long(x, position_ids)
        return torch.where(is_long, cos_long, cos_short), torch.where(is_long, sin_long, sin_short)


def replace_rotary(model: nn.Module, config: PreTrainedConfig, step: StepState) -> list[str]:
    """Put a PerRowRotary in place of each LongRoPE module of `model`; returns their paths."""
    switch = rope_switch_of(config)
    if switch is None:
        return []
    paths = [path for path, module in model.named_modules() if getattr(module, "rope_type", None) == LONGROPE]
    for path in paths:
        model.set_submodule(path, PerRowRotary(model.get_submodule(path), config, switch, step))
    return paths


def _frozen(rotary: nn.Module, frequencies: torch.Tensor) -> nn.Module:
    """A copy of `rotary` that uses `frequencies` whatever the positions."""
    frozen = copy.deepcopy(rotary)
    frozen.rope_type = "default"  # transformers' update hook leaves default modules alone
    frozen.inv_freq.copy_(frequencies)
    return frozen
