"""Random bases in the shape of real models: what speed depends on, without a download."""

from __future__ import annotations

import shutil
from pathlib import Path

MODEL_M: dict[str, object] = {
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
"""Qwen2.5-0.5B's config: 494 million parameters, 988 MB in bf16."""


def model_m(cache_dir: Path) -> Path:
    """Model M in bf16, made once: MODEL_M with random weights and the demo base's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from server.demo import ensure_demo_base

    path = cache_dir / "model-m"
    if (path / "tokenizer.json").exists():
        return path
    demo = ensure_demo_base(cache_dir)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **MODEL_M), dtype=torch.bfloat16)
    model.save_pretrained(str(path))
    for name in ("tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"):
        if (demo / name).exists():
            shutil.copy(demo / name, path / name)
    return path
