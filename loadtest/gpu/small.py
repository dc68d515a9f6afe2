"""The ops between a decoder's products: norms, rotary embedding, SwiGLU. By torch; small_triton.py has Triton's."""

from __future__ import annotations

from typing import Protocol

import torch
from torch.nn.functional import silu

from loadtest.gpu.machine import Machine

EPS = 1e-5
ROPE_BASE = 500_000.0


class SmallOps(Protocol):
    """Row by row, in the tensors' dtype, computed in fp32."""

    def add_norm(self, residual: torch.Tensor, x: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
        """residual += x, in place; its RMS norm times the weight. All [rows, hidden]."""

    def rope(self, heads: torch.Tensor, positions: torch.Tensor, angles: torch.Tensor) -> None:
        """Rotate [rows, heads, head_dim] in place, halves as pairs, by angles [positions, head_dim / 2, cos | sin]."""

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[rows, 2 n] -> [rows, n]."""


class TorchOps:
    """A few kernels each."""

    def add_norm(self, residual: torch.Tensor, x: torch.Tensor | None, weight: torch.Tensor) -> torch.Tensor:
        if x is not None:
            residual += x
        wide = residual.float()
        return (wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight.float()).to(residual.dtype)

    def rope(self, heads: torch.Tensor, positions: torch.Tensor, angles: torch.Tensor) -> None:
        cos, sin = angles[positions][:, None].unbind(-1)
        first, second = heads.float().chunk(2, -1)
        heads.copy_(torch.cat([first * cos - second * sin, second * cos + first * sin], -1))

    def swiglu(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.float().chunk(2, -1)
        return (silu(gate) * up).to(gate_up.dtype)


def small_ops(machine: Machine) -> SmallOps:
    """Triton's where there is a GPU."""
    if not machine.is_cuda:
        return TorchOps()
    from loadtest.gpu.small_triton import TritonOps

    return TritonOps()


def rope_angles(max_positions: int, head_dim: int, device: torch.device) -> torch.Tensor:
    """fp32 [max_positions, head_dim / 2, 2]: cosine and sine."""
    speeds = ROPE_BASE ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float64) / head_dim)
    turned = torch.arange(max_positions, device=device, dtype=torch.float64)[:, None] * speeds
    return torch.stack([turned.cos(), turned.sin()], -1).float()
