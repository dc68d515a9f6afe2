"""The backend "triton": kernels for NVIDIA GPUs, and in Triton's interpreter for any machine."""

from __future__ import annotations

import importlib.util

import torch

__all__ = ["is_available"]

if importlib.util.find_spec("triton") is not None:
    from kernels.triton.attention import paged_attention
    from kernels.triton.embedding import segmented_embedding
    from kernels.triton.kv import write_kv
    from kernels.triton.lora import segmented_lora

    __all__ += ["paged_attention", "segmented_embedding", "segmented_lora", "write_kv"]


def is_available() -> bool:
    """Where triton imports, and there is a device that it can run on or its interpreter does."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return bool(torch.cuda.is_available() or triton.knobs.runtime.interpret)
