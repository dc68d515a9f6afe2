"""Random PEFT adapters for measurements: real files, no training."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from adapters_store.manifest import BaseManifest, Site

_CONFIG = (
    '{"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": %d, "lora_alpha": %d, '
    '"target_modules": "all-linear", "base_model_name_or_path": "%s"}\n'
)


def write_random_adapter(path: Path, manifest: BaseManifest, rank: int, seed: int) -> int:
    """An all-linear LoRA of `rank` in PEFT's layout, bf16, non-zero A and B. Returns its bytes."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for site in manifest.sites:
        if site.kind == "linear":
            tensors |= _pair(site, rank, generator)
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(_CONFIG % (rank, 2 * rank, manifest.name_or_path))
    save_file(tensors, str(path / "adapter_model.safetensors"))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _pair(site: Site, rank: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    prefix = f"base_model.model.{site.module}"
    a = torch.randn(rank, site.in_features, generator=generator) / site.in_features**0.5
    b = torch.randn(site.out_features, rank, generator=generator) * 0.02
    return {
        f"{prefix}.lora_A.weight": a.to(torch.bfloat16),
        f"{prefix}.lora_B.weight": b.to(torch.bfloat16),
    }
