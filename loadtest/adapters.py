"""Random PEFT adapters for measurements: real files, no training."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save, save_file

from adapters_store.manifest import BaseManifest, Site
from adapters_store.sources.folder import CONFIG_FILE, WEIGHTS_FILE

_CONFIG = (
    '{"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": %d, "lora_alpha": %d, '
    '"target_modules": "all-linear", "base_model_name_or_path": "%s"}\n'
)


def write_random_adapter(path: Path, manifest: BaseManifest, rank: int, seed: int) -> int:
    """An all-linear LoRA of `rank` in PEFT's layout, bf16, non-zero A and B. Returns its bytes."""
    tensors = _random_tensors(manifest, rank, seed, spread=1.0)
    path.mkdir(parents=True, exist_ok=True)
    (path / CONFIG_FILE).write_text(_config(manifest, rank))
    save_file(tensors, str(path / WEIGHTS_FILE))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def random_adapter(manifest: BaseManifest, rank: int, seed: int, spread: float = 1.0) -> dict[str, bytes]:
    """The files of such an adapter by name, for a bucket. `spread` multiplies B: more of it, other answers."""
    weights = save(_random_tensors(manifest, rank, seed, spread))
    return {WEIGHTS_FILE: weights, CONFIG_FILE: _config(manifest, rank).encode()}


def _config(manifest: BaseManifest, rank: int) -> str:
    return _CONFIG % (rank, 2 * rank, manifest.name_or_path)


def _random_tensors(manifest: BaseManifest, rank: int, seed: int, spread: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for site in manifest.sites:
        if site.kind == "linear":
            tensors |= _pair(site, rank, generator, 0.02 * spread)
    return tensors


def _pair(site: Site, rank: int, generator: torch.Generator, deviation: float) -> dict[str, torch.Tensor]:
    prefix = f"base_model.model.{site.module}"
    a = torch.randn(rank, site.in_features, generator=generator) / site.in_features**0.5
    b = torch.randn(site.out_features, rank, generator=generator) * deviation
    return {
        f"{prefix}.lora_A.weight": a.to(torch.bfloat16),
        f"{prefix}.lora_B.weight": b.to(torch.bfloat16),
    }
