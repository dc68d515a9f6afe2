"""The base without its weights: its config, and its modules on the meta device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
)

from server.errors import ModelUnsupported
from server.model.rotary import refusals_of_rope

INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_NAME = "model.safetensors"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def unsupported(path: Path, reasons: list[str]) -> ModelUnsupported:
    """The error that lists why the base at `path` can't be served."""
    return ModelUnsupported(f"{path} can't be served: " + "; ".join(reasons))


def read_config(path: Path) -> PreTrainedConfig:
    """The config of the base at `path`. Raises ModelUnsupported with all that its files alone rule out."""
    raw = _read_json(path / "config.json", path)
    reasons = _refusals_of_files(path, raw)
    if reasons:
        raise unsupported(path, reasons)
    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
    except (StrictDataclassError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise unsupported(path, [f"its config.json is no {raw['model_type']} config: {error}"]) from error
    reasons = _refusals_of_config(config)
    if reasons:
        raise unsupported(path, reasons)
    return config


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that hold the base's weights, sorted: one, or those that the index names."""
    if (path / WEIGHTS_NAME).is_file():
        return [path / WEIGHTS_NAME]
    index = _read_json(path / INDEX_NAME, path)
    return [path / name for name in sorted(set(index["weight_map"].values()))]


def resolve_dtype(config: PreTrainedConfig, dtype: str) -> torch.dtype:
    """The dtype to run in. "auto" is the config's own, or float32 where it names none that is served."""
    if dtype != "auto":
        return DTYPES[dtype]
    own = config.dtype
    return own if own in DTYPES.values() else torch.float32


def build_skeleton(config: PreTrainedConfig, dtype: torch.dtype, attention: str) -> nn.Module:
    """The base's modules on the meta device, in eval mode, with the attention function named `attention`."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    return model.eval()


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of the decoder layers: the outermost list of as many modules as the config has layers."""
    num_layers = model.config.num_hidden_layers
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return path, module
    raise ModelUnsupported(f"{type(model).__name__} has no list of its {num_layers} decoder layers")


def _read_json(file: Path, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise unsupported(path, [f"it has no {file.name}"]) from None
    except ValueError as error:
        raise unsupported(path, [f"{file.name} is not JSON: {error}"]) from None
    if not isinstance(content, dict):
        raise unsupported(path, [f"{file.name} is not a JSON object"])
    return content


def _refusals_of_files(path: Path, raw: dict[str, Any]) -> list[str]:
    """Reasons that need no class of transformers."""
    reasons = []
    if not (path / WEIGHTS_NAME).is_file() and not (path / INDEX_NAME).is_file():
        others = sorted(file.name for file in path.glob("*.bin"))
        has = f" (it has {', '.join(others)}; pickle is never opened)" if others else ""
        reasons.append(f"it has neither {WEIGHTS_NAME} nor {INDEX_NAME}{has}")
    if raw.get("quantization_config"):
        method = raw["quantization_config"].get("quant_method", "of a kind that it doesn't name")
        reasons.append(f"its weights are quantised ({method}); low-bit bases are not served yet")
    model_type = raw.get("model_type")
    if model_type not in CONFIG_MAPPING:
        code = " and its own code is never run" if "auto_map" in raw else ""
        reasons.append(f"transformers has no model type {model_type!r}{code}")
    return reasons


def _refusals_of_config(config: PreTrainedConfig) -> list[str]:
    """Reasons that the config shows; what only the modules show is the probe's."""
    name = type(config).__name__
    if config.is_encoder_decoder:
        return [f"{config.model_type} is an encoder-decoder, not a causal language model"]
    if config.get_text_config() is not config:
        return [f"{config.model_type} is multimodal; only text models are served"]
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return [f"transformers has no causal language model for {name}"]
    reasons = refusals_of_rope(config)
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", None) == "alibi":
        reasons.append("its positions are ALiBi biases, which paged attention doesn't add")
    if getattr(config, "num_kv_shared_layers", 0):
        reasons.append(f"its last {config.num_kv_shared_layers} layers share the KV of others")
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if not getattr(model_class, "_supports_attention_backend", False):
        reasons.append(f"{model_class.__name__} does not call attention through transformers' AttentionInterface")
    return reasons
