"""How the shrink and the expand are launched: tiles, parts and grids, from integers known when a plan is made.

              tile   products       parts of K             columns of a program
    few       1, 4   summed         256, at most 16        one block
    decode    16     tensor cores   256, at most 16        1 to 4 blocks
    prefill   64     tensor cores   1, 2 or 8 of them      1 to 16 blocks

So a row's sums have one order whatever else is in the batch. It changes with the form, which the step's padded
rows decide, with the bucket of the largest rank in use, and in prefill with the power of two above the rows.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from kernels.triton.plan import DeviceSegments, power_above
from kernels.types import SiteGroup, SlotWeights

MAX_PARTS = 4  # programs that share the ranks of one slice
DECODE_BLOCK_K = 256
MAX_DECODE_SPLITS = 16
PREFILL_BLOCK_K = 64
PREFILL_SPLITS = (8, 2)  # the first that gives no more than four programs a processor; else 1


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel with all that it is launched with; apart from the launching, so that it can also just be compiled."""

    kernel: Any
    grid: tuple[int, int]
    args: tuple[Any, ...]
    sizes: dict[str, Any]  # compile-time arguments
    options: dict[str, int]  # num_warps, num_stages, maxnreg

    def __call__(self) -> None:
        self.kernel[self.grid](*self.args, **self.sizes, **self.options)


@dataclass(frozen=True, slots=True)
class ShrinkShape:
    """Compile-time sizes of the shrink, and how many programs."""

    parts: int  # 0: all slices in one program
    block_r: int
    block_k: int
    num_k: int  # blocks of a part of K
    splits: int  # parts of K
    grid: tuple[int, int]
    warps: int
    stages: int
    few: bool


@dataclass(frozen=True, slots=True)
class ExpandShape:
    """Compile-time sizes of the expand, and how many programs."""

    block_n: int
    block_r: int
    span: int  # blocks of a program
    grid: tuple[int, int]
    warps: int
    stages: int
    few: bool


@dataclass(frozen=True, slots=True)
class Gpu:
    """What the shapes depend on of a device."""

    processors: int
    capability: int  # 80, 90, ...


INTERPRETED = Gpu(processors=2, capability=90)


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    if device.type != "cuda":
        return INTERPRETED
    found = torch.cuda.get_device_properties(device)
    return Gpu(found.multi_processor_count, 10 * found.major + found.minor)


def shrink_shape(plan: DeviceSegments, in_features: int, num_slices: int, gpu: Gpu) -> ShrinkShape:
    """For the shrink of one packed projection."""
    bucket, is_prefill, few = plan.rank_bucket, plan.form == "prefill", plan.form == "few"
    is_joined = is_prefill and num_slices > 1 and num_slices * bucket <= 64
    if is_joined:
        parts, block_r = 0, power_above(num_slices * bucket)
    else:
        block_r = min(bucket, 64) if is_prefill else 16
        parts = min(-(-bucket // block_r), MAX_PARTS)
    across = num_slices * parts or 1
    block_k = PREFILL_BLOCK_K if is_prefill else DECODE_BLOCK_K
    blocks = -(-in_features // block_k)
    if is_prefill:
        programs = plan.usual_tiles * across
        wanted = next((splits for splits in PREFILL_SPLITS if programs * splits <= 4 * gpu.processors), 1)
    else:
        wanted = MAX_DECODE_SPLITS
    num_k = -(-blocks // wanted)
    splits = -(-blocks // num_k)
    stages = 1 if num_k == 1 else 3 if plan.form == "decode" else 4
    grid = (splits * across, _at_once(plan.max_entries, splits * across, gpu))
    warps = 8 if is_prefill and block_r == 64 else 4
    return ShrinkShape(parts, block_r, block_k, num_k, splits, grid, warps, stages, few)


def expand_shape(plan: DeviceSegments, widths: tuple[int, ...], gpu: Gpu) -> ExpandShape:
    """For the expand of one packed projection, or of an embedding."""
    is_prefill, few = plan.form == "prefill", plan.form == "few"
    block_r = min(plan.rank_bucket, 64)
    block_n = 64 if is_prefill else 32 if few and block_r > 16 else 128
    blocks = plan.usual_tiles * sum(-(-width // block_n) for width in widths)
    if few:
        span = 1
    else:  # in prefill a program for every processor and some; in decode, where most is waiting, eight
        span = min(power_above(blocks // (gpu.processors * (2 if is_prefill else 8))), 16 if is_prefill else 4)
    spans = sum(-(-width // (span * block_n)) for width in widths)
    warps = 8 if is_prefill and block_r > 16 else 4
    stages = 1 if span == 1 else 2 if warps == 8 else 3
    grid = (spans, _at_once(plan.max_tiles, spans, gpu))
    return ExpandShape(block_n, block_r, span, grid, warps, stages, few)


def options_of(plan: DeviceSegments, gpu: Gpu, warps: int, stages: int) -> dict[str, int]:
    """The registers of a thread are bounded by hand: left alone, ptxas would rather spill one than take a few more.

    Few programs, those of sets, and those for older GPUs may have as many as they need; of the others as many
    programs as possible must fit a processor.
    """
    if plan.form == "few" or plan.has_sets or gpu.capability < 90:
        registers = 255
    else:
        registers = 128 if plan.form == "decode" or warps == 8 else 168
    return {"num_warps": warps, "num_stages": stages, "maxnreg": registers}


def geometry_of(group: SiteGroup, weights: SlotWeights) -> torch.Tensor:
    """int32 [slices, (table row, offset, width)] on the arena's device, made at the group's first use.

    That must not be during a graph's capture: warm up before.
    """
    kept = weights.scratch.setdefault("triton geometry", {})
    assert isinstance(kept, dict)
    found = kept.get(group)
    if found is None:
        rows = list(zip(group.rows, group.offsets, group.widths, strict=True))
        found = kept[group] = torch.tensor(rows, dtype=torch.int32).to(weights.arena.device)
    assert isinstance(found, torch.Tensor)
    return found


def is_aligned(group: SiteGroup) -> bool:
    return all(number % 16 == 0 for number in (*group.offsets, *group.widths))


def _at_once(most: int, across: int, gpu: Gpu) -> int:
    """Entries or tiles that the grid has programs for.

    All of `most` while that is at most 16 programs a processor, which take their turns by themselves; more
    would cost a plan with few tiles, whose other programs only see that there is nothing for them. Then eight
    a processor, each with as many of the tiles as the others.
    """
    if most * across <= 16 * gpu.processors:
        return most
    at_once = max(1, 8 * gpu.processors // across)
    return -(-most // -(-most // at_once))
