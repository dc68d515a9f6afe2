"""The paged KV cache: per layer, keys and values in blocks of a fixed number of positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.memory import lazy_zeros


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one position of one request keeps, for every layer alike."""

    num_layers: int
    num_kv_heads: int
    head_dim: int

    def bytes_per_block(self, block_size: int, dtype: torch.dtype) -> int:
        """Bytes of one block over all layers, keys and values."""
        elements = 2 * self.num_layers * block_size * self.num_kv_heads * self.head_dim
        item_bytes: int = dtype.itemsize
        return elements * item_bytes


class KVCache:
    """One allocation, seen as `keys[layer]` and `values[layer]`: [blocks, block_size, kv_heads, head_dim].

    Block 0 is the dummy, which nobody reads: unused entries of block tables point at it, and rows that pad a captured
    graph write to it. On the CPU the memory is lazy: a block costs nothing until it is first written.
    """

    def __init__(
        self, shape: KVShape, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shape = shape
        self.num_blocks = num_blocks
        self.block_size = block_size
        num_bytes = num_blocks * shape.bytes_per_block(block_size, dtype)
        pool = _zeros(num_bytes, device).view(dtype)
        layers = pool.view(
            shape.num_layers, 2, num_blocks, block_size, shape.num_kv_heads, shape.head_dim
        )  # [layers, k|v, blocks, block_size, kv_heads, head_dim]
        self.keys = [layers[layer, 0] for layer in range(shape.num_layers)]
        self.values = [layers[layer, 1] for layer in range(shape.num_layers)]


def _zeros(num_bytes: int, device: torch.device) -> torch.Tensor:
    """uint8 [num_bytes] of zeros, page-aligned."""
    if device.type != "cpu":
        return torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    return lazy_zeros(num_bytes)
