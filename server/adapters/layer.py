"""Modules that stand in for the base's projections and embedding and add each row's own delta."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import nn

from kernels.types import AttentionMetadata, Segments, SiteGroup, SlotWeights

PlanName = Literal["body", "head"]


class AdapterOps(Protocol):
    """What the layers need of a kernel backend; see kernels/ops.py."""

    def segmented_lora(
        self, y: torch.Tensor, x: torch.Tensor, weights: SlotWeights, group: SiteGroup, segments: Segments
    ) -> None: ...

    def segmented_embedding(
        self, y: torch.Tensor, ids: torch.Tensor, weights: SlotWeights, row: int, segments: Segments
    ) -> None: ...


@dataclass(slots=True)
class StepState:
    """What the layers of one runner read during a step.

    One object per runner, held by all its layers. `weights` and `ops` are set once, at start; the
    runner sets the rest before each forward pass.
    """

    weights: SlotWeights
    ops: AdapterOps
    segments: Segments | None = None  # over the rows of the batch; None or empty = no adapter in it
    head_segments: Segments | None = None  # over the sampled rows, in the order in which the head sees them
    attention: AttentionMetadata | None = None
    rope_lengths: torch.Tensor | None = None  # int64 [rows], for rotary variants that depend on the length

    def plan(self, name: PlanName) -> Segments | None:
        return self.segments if name == "body" else self.head_segments


class _Adapted(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """A base module with a delta behind it. The base's attributes stay readable (weight, bias, ...)."""

    def __init__(self, base: nn.Module, step: StepState) -> None:
        super().__init__()
        self.base = base
        self.step = step

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


class AdaptedLinear(_Adapted):
    """One projection: y = base(x), then each segment's delta in place."""

    def __init__(self, base: nn.Module, group: SiteGroup, step: StepState, plan: PlanName = "body") -> None:
        super().__init__(base, step)
        self.group = group
        self.plan = plan

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., rows, K] -> [..., rows, N]; all leading dimensions are 1."""
        y = self.base.forward(x)
        _add_delta(y, x, self.group, self.step, self.plan)
        return y


class PackedLinear(nn.Module):  # type: ignore[misc]
    """Projections of one input run as one GEMM, behind the submodules that the model calls one by one.

        q_proj(x) ──▶ y = x [Wq; Wk; Wv]^T + deltas ──▶ y[..., :Nq]
        k_proj(x) ────────────────────────────────────▶ y[..., Nq:Nq+Nk]     x must be the same tensor
        v_proj(x) ────────────────────────────────────▶ y[..., Nq+Nk:]       and y is let go here

    The packed weight replaces the originals; make the stubs with `pack`.
    """

    def __init__(self, bases: Sequence[nn.Linear], group: SiteGroup, step: StepState, plan: PlanName = "body") -> None:
        super().__init__()
        assert [base.out_features for base in bases] == list(group.widths)
        self.weight = nn.Parameter(torch.cat([base.weight.detach() for base in bases]), requires_grad=False)
        self.bias = _packed_bias(bases)
        self.group = group
        self.step = step
        self.plan = plan
        self._input: torch.Tensor | None = None
        self._output: torch.Tensor | None = None
        self._next = 0

    def take(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Slice `index` of the packed output for x. Raises RuntimeError unless asked in order, for one x."""
        if index == 0:
            self._input, self._output, self._next = x, self._run(x), 0
        if x is not self._input or index != self._next or self._output is None:
            raise RuntimeError(
                f"slice {index} of a packed projection was asked for out of turn or with another input "
                f"than slice 0 (next is {self._next}); this model must run unpacked"
            )
        part = self._output.narrow(-1, self.group.offsets[index], self.group.widths[index])
        self._next += 1
        if self._next == len(self.group.widths):
            self._input = self._output = None
        return part

    def _run(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.linear(x, self.weight, self.bias)
        _add_delta(y, x, self.group, self.step, self.plan)
        return y


class PackedSlice(nn.Module):  # type: ignore[misc]
    """Stands where a packed projection stood; weight and bias are views of the packed ones."""

    def __init__(self, packed: PackedLinear, index: int) -> None:
        super().__init__()
        self.index = index
        if index == 0:
            self.packed = packed
        else:  # a plain attribute: the weight appears once in the module tree
            object.__setattr__(self, "packed", packed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., rows, K] -> [..., rows, N of the slice], a view."""
        return self.packed.take(self.index, x)

    @property
    def weight(self) -> torch.Tensor:  # [N, K]
        return self._view(self.packed.weight)

    @property
    def bias(self) -> torch.Tensor | None:  # [N]
        return None if self.packed.bias is None else self._view(self.packed.bias)

    @property
    def in_features(self) -> int:
        return self.packed.group.in_features

    @property
    def out_features(self) -> int:
        return self.packed.group.widths[self.index]

    def _view(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.narrow(0, self.packed.group.offsets[self.index], self.out_features)


def pack(bases: Sequence[nn.Linear], group: SiteGroup, step: StepState, plan: PlanName = "body") -> list[PackedSlice]:
    """One stub per base, in the group's order. Put in the bases' places, they let the originals go."""
    packed = PackedLinear(bases, group, step, plan)
    return [PackedSlice(packed, index) for index in range(len(bases))]


class AdaptedEmbedding(_Adapted):
    """The embedding: y = base(ids), then each segment's delta in place. `row` is its row in the table."""

    def __init__(self, base: nn.Embedding, row: int, step: StepState) -> None:
        super().__init__(base, step)
        self.row = row

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64 [..., rows] -> [..., rows, hidden]; all leading dimensions are 1."""
        y = self.base.forward(ids)
        segments = self.step.segments
        if segments:
            step = self.step
            step.ops.segmented_embedding(y.view(-1, y.shape[-1]), ids.reshape(-1), step.weights, self.row, segments)
        return y


def _add_delta(y: torch.Tensor, x: torch.Tensor, group: SiteGroup, step: StepState, plan: PlanName) -> None:
    """Add the plan's deltas to y [..., N] in place. A step without adapters costs one test here."""
    segments = step.plan(plan)
    if segments:
        rows = x.reshape(-1, group.in_features)  # [rows, K]
        if rows.stride(-1) != 1:
            rows = rows.contiguous()
        # view, never reshape: a copy of y would swallow the delta
        step.ops.segmented_lora(y.view(-1, y.shape[-1]), rows, step.weights, group, segments)


def _packed_bias(bases: Sequence[nn.Linear]) -> nn.Parameter | None:
    """The biases in a row, zeros for a base that has none; None when none has."""
    if all(base.bias is None for base in bases):
        return None
    parts = [base.weight.new_zeros(base.out_features) if base.bias is None else base.bias.detach() for base in bases]
    return nn.Parameter(torch.cat(parts), requires_grad=False)
