"""The backend "triton": kernels for NVIDIA GPUs, and in Triton's interpreter for any machine.

An op imports triton when it is first asked for. So engines on a CPU never do, though they use what here needs none:
the plans and buffers of steps (plan.py, metadata.py).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import Any

import torch

OPS = {
    "paged_attention": "kernels.triton.attention",
    "segmented_embedding": "kernels.triton.embedding",
    "segmented_lora": "kernels.triton.lora",
    "write_kv": "kernels.triton.kv",
}
"""Where each op is"""

_YES = ("1", "true", "yes", "on", "y", "t")  # as triton reads its variables


def __getattr__(name: str) -> Any:
    if name not in OPS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(OPS[name]), name)
    return found


def is_available() -> bool:
    """Where triton is installed, and there is a device that it can run on or its interpreter does."""
    if importlib.util.find_spec("triton") is None:
        return False
    return bool(torch.cuda.is_available() or is_interpreted())


def is_interpreted() -> bool:
    """Whether the kernels run in triton's interpreter, on the CPU."""
    triton = sys.modules.get("triton")
    if triton is not None:
        return bool(triton.knobs.runtime.interpret)
    return os.environ.get("TRITON_INTERPRET", "").lower() in _YES
