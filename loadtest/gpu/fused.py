"""The fused CUDA C++ kernel beside Triton's two launches: whether this machine has it, and for which steps it is.

Where it is missing its module says why on standard error, and the tables go on without it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kernels.triton.plan import DECODE_ROWS

NAME, PLAIN = "CUDA", "CUDA, no PDL"
"""As contestants: with programmatic dependent launch where the device has it, and without."""
MAX_RANK = 64

Lora = Callable[..., None]
"""segmented_lora of kernels/ops.py."""


def contestants(backend: str) -> dict[str, Lora]:
    """By name; none beside another backend than Triton, and none where the kernel can't be had."""
    if backend != "triton":
        return {}
    from kernels import cuda

    found = {name: cuda.lora(is_early=is_early) for name, is_early in ((NAME, True), (PLAIN, False))}
    return {name: lora.segmented_lora for name, lora in found.items() if lora is not None}


def backends_beside(backend: str) -> list[str]:
    """Names of kernels/ops.py for what is checked too."""
    return ["cuda"] if contestants(backend) else []


def does(rows: int, max_rank: int, dtype: torch.dtype, has_sets: bool = False) -> bool:
    """Whether such a step is computed by the kernel, and not left to Triton."""
    return rows <= DECODE_ROWS and max_rank <= MAX_RANK and dtype.itemsize == 2 and not has_sets
