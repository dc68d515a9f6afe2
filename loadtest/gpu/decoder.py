"""A plain Llama-shaped decoder with random weights: torch's products, our attention, KV writes and adapters.

It has the projections, the order of ops and the bytes of the real thing and nothing of the server: no Hugging Face
modules, no scheduler, no sampler beyond the largest logit.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn.functional import linear

from kernels.ops import get_backend
from kernels.types import AttentionMetadata, Segments, SiteGroup, SlotWeights
from loadtest.gpu.machine import Machine
from loadtest.gpu.shapes import Shape
from loadtest.gpu.small import rope_angles, small_ops

BLOCK_SIZE = 16


@dataclass
class Layer:
    """Weights [N, K] by projection, norms before attention and before the MLP, KV caches, table rows."""

    projections: dict[str, torch.Tensor]
    norms: tuple[torch.Tensor, torch.Tensor]
    caches: tuple[torch.Tensor, torch.Tensor]  # [blocks, block size, kv_heads, head_dim]
    groups: dict[str, SiteGroup]


@dataclass
class StepAdapters:
    """What a step adds to the base."""

    weights: SlotWeights
    segments: Segments


class Decoder:
    """Made on the device. `generator` decides all weights."""

    def __init__(
        self,
        machine: Machine,
        backend: str,
        shape: Shape,
        dtype: torch.dtype,
        generator: torch.Generator,
        num_blocks: int,
        max_positions: int,
    ) -> None:
        self.machine, self.shape, self.dtype, self.num_blocks = machine, shape, dtype, num_blocks
        self._ops, self._small, self._generator = get_backend(backend), small_ops(machine), generator
        self.lora: Callable[..., None] = self._ops.segmented_lora  # another one's may stand in its place
        self.embedding = self._draw(shape.vocab, shape.hidden, 1.0)
        self.layers = [self._layer(number) for number in range(shape.layers)]
        self.norm = torch.ones(shape.hidden, dtype=dtype, device=machine.device)
        self.head = self._draw(shape.vocab, shape.hidden, shape.hidden**-0.5)
        self.angles = rope_angles(max_positions, shape.head_dim, machine.device)

    @property
    def num_site_rows(self) -> int:
        return sum(len(group.rows) for layer in self.layers for group in layer.groups.values())

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        meta: AttentionMetadata,
        adapters: StepAdapters | None,
        head_rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [rows or head rows, vocab]. Writes the rows' KV. ids, positions: int64 [rows]."""
        shape, small = self.shape, self._small
        x = self.embedding[ids]
        normed = small.add_norm(x, None, self.layers[0].norms[0])
        for layer, following in itertools.zip_longest(self.layers, self.layers[1:]):
            qkv = self._project(layer, "qkv", normed, adapters).view(len(ids), -1, shape.head_dim)
            rotated = shape.heads + shape.kv_heads
            small.rope(qkv[:, :rotated], positions, self.angles)
            self._ops.write_kv(qkv[:, shape.heads : rotated], qkv[:, rotated:], *layer.caches, meta.slot_mapping)
            attended = self._ops.paged_attention(
                qkv[:, : shape.heads],
                *layer.caches,
                meta,
                scale=shape.head_dim**-0.5,
                sliding_window=None,
                softcap=None,
            )
            normed = small.add_norm(x, self._project(layer, "o", attended.flatten(1), adapters), layer.norms[1])
            acted = small.swiglu(self._project(layer, "gate-up", normed, adapters))
            last = self.norm if following is None else following.norms[0]
            normed = small.add_norm(x, self._project(layer, "down", acted, adapters), last)
        return linear(normed if head_rows is None else normed[head_rows], self.head)

    def _project(self, layer: Layer, name: str, x: torch.Tensor, adapters: StepAdapters | None) -> torch.Tensor:
        y = linear(x, layer.projections[name])
        if adapters is not None:
            self.lora(y, x, adapters.weights, layer.groups[name], adapters.segments)
        return y

    def _layer(self, number: int) -> Layer:
        shape, row = self.shape, itertools.count(7 * number)
        projections, groups = {}, {}
        for name, (k, widths) in shape.projections.items():
            projections[name] = self._draw(sum(widths), k, k**-0.5)
            offsets = (0, *itertools.accumulate(widths[:-1]))
            groups[name] = SiteGroup(tuple(next(row) for _ in widths), offsets, widths, k)
        ones = [torch.ones(shape.hidden, dtype=self.dtype, device=self.machine.device) for _ in range(2)]
        positions = self.num_blocks * BLOCK_SIZE
        k_cache, v_cache = (
            self._draw(positions * shape.kv_heads, shape.head_dim, 1.0).view(
                self.num_blocks, BLOCK_SIZE, shape.kv_heads, shape.head_dim
            )
            for _ in range(2)
        )
        return Layer(projections, (ones[0], ones[1]), (k_cache, v_cache), groups)

    def _draw(self, rows: int, columns: int, scale: float) -> torch.Tensor:
        drawn = torch.empty(rows, columns, dtype=self.dtype, device=self.machine.device)
        return drawn.normal_(0.0, scale, generator=self._generator)
