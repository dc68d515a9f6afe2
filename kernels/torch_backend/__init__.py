"""The portable backend: plain torch calls, any device, no compiler. Contracts in kernels/ops.py."""

from kernels.torch_backend.attention import paged_attention, write_kv
from kernels.torch_backend.lora import segmented_embedding, segmented_lora

__all__ = ["paged_attention", "segmented_embedding", "segmented_lora", "write_kv"]
