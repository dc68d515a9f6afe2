"""The backend "cuda": CUDA C++ where it has fewer launches than Triton, Triton for all else. For compute 8.x and 9.0.

`is_available` builds the library for the current device, or says in a log line why there is none.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, cast

import torch

from kernels import triton
from kernels.cuda.check import is_right
from kernels.cuda.lora import Lora
from kernels.ops import Backend
from kernels.types import Segments, SiteGroup, SlotWeights

log = logging.getLogger(__name__)


@functools.cache
def lora(is_early: bool = True) -> Lora | None:
    """The kernel on the current device, its library loaded (or built) at the first call; None where there is none.

    is_early: where the device has it, a launch may begin while the one before it ends (csrc/lora.cu).
    """
    if not torch.cuda.is_available() or not triton.is_available():
        log.debug("CUDA C++ kernels: no CUDA device here, or no triton for what they leave to it")
        return None
    from kernels.cuda.build import load  # here, so that the module also runs as a command

    capability = torch.cuda.get_device_capability()
    library = load(capability)
    if library is None:
        return None
    found = Lora(library, cast(Backend, triton), is_early=is_early and capability[0] >= 9)
    if not is_right(found, torch.device("cuda", torch.cuda.current_device())):
        log.error("CUDA C++ kernels: they compute wrongly on this device; use triton")
        return None
    return found


def is_available() -> bool:
    return lora() is not None


def segmented_lora(
    y: torch.Tensor, x: torch.Tensor, weights: SlotWeights, group: SiteGroup, segments: Segments
) -> None:
    """See kernels/ops.py."""
    found = lora()
    if found is None:
        raise RuntimeError("the backend 'cuda' has no kernels on this machine; the backend 'triton' needs none")
    found.segmented_lora(y, x, weights, group, segments)


def __getattr__(name: str) -> Any:
    """The other ops are Triton's, and come here when they are first asked for, as they do there."""
    if name not in triton.OPS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(triton, name)
