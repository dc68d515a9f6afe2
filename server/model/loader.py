"""Loading the base: what can't be served is refused with all reasons before any weight is read."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from server.errors import ConfigError, ModelUnsupported
from server.model.attention import ATTENTION_NAME, register_attention
from server.model.kv import KVShape
from server.model.probe import probe
from server.model.rotary import rope_switch_of
from server.model.skeleton import read_config, resolve_dtype, unsupported

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class LoadedBase:
    """The base with its weights, before surgery. Made by `load_base`; nothing in it changes afterwards."""

    model: nn.Module
    config: PreTrainedConfig
    dtype: torch.dtype
    device: torch.device
    kv_shape: KVShape
    eos_token_ids: tuple[int, ...]  # every id that ends a request: generation_config's, then config's
    max_model_len: int
    rope_switch: int | None  # see rotary.rope_switch_of
    weights_bytes: int


def load_base(
    path: str | Path, dtype: str = "auto", device: str = "cpu", max_model_len: int | None = None
) -> LoadedBase:
    """Load the safetensors folder at `path`.

    dtype: "auto" (the checkpoint's own), "float32", "bfloat16" or "float16". Raises ModelUnsupported with
    every reason found, and ConfigError for a max_model_len above the model's own.
    """
    path = Path(path)
    config = read_config(path)
    run_dtype = resolve_dtype(config, dtype)
    limit = _resolve_max_model_len(path, config, max_model_len)
    kv_shape, reasons = probe(config, run_dtype)
    if kv_shape is None:
        raise unsupported(path, reasons)
    model = _load_weights(path, run_dtype, torch.device(device))
    return LoadedBase(
        model=model,
        config=config,
        dtype=run_dtype,
        device=torch.device(device),
        kv_shape=kv_shape,
        eos_token_ids=eos_token_ids(path, config),
        max_model_len=limit,
        rope_switch=rope_switch_of(config),
        weights_bytes=sum(parameter.nbytes for parameter in model.parameters()),
    )


def eos_token_ids(path: Path, config: PreTrainedConfig) -> tuple[int, ...]:
    """The ids that end a request: those of generation_config.json (often several), then the config's."""
    found = [config.eos_token_id]
    if (path / "generation_config.json").is_file():
        found.insert(0, GenerationConfig.from_pretrained(str(path), local_files_only=True).eos_token_id)
    lists = [value if isinstance(value, list) else [value] for value in found if value is not None]
    return tuple(dict.fromkeys(token for ids in lists for token in ids))


def _resolve_max_model_len(path: Path, config: PreTrainedConfig, asked: int | None) -> int:
    own: int | None = getattr(config, "max_position_embeddings", None)
    if own is None:
        if asked is None:
            raise ModelUnsupported(f"{path}: its config has no max_position_embeddings; give --max-model-len")
        return asked
    if asked is not None and asked > own:
        raise ConfigError(f"--max-model-len {asked} exceeds the model's own limit of {own} positions")
    return own if asked is None else asked


def _load_weights(path: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The model on `device`, its weights in our own memory, each read once."""
    register_attention()
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(path),
            dtype=dtype,
            attn_implementation=ATTENTION_NAME,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported in `info`, and refused below by name
        )
    except (SafetensorError, OSError) as error:
        raise unsupported(path, [f"its weights can't be read: {error}"]) from error
    reasons = [f"its files lack {name}" for name in sorted(info["missing_keys"])]
    reasons += [
        f"{name} has shape {list(stored)}, its config says {list(expected)}"
        for name, stored, expected in sorted(info["mismatched_keys"])
    ]
    if reasons:
        raise unsupported(path, reasons)
    if info["unexpected_keys"]:
        logger.warning("%s: weights that the model does not use: %s", path, sorted(info["unexpected_keys"]))
    model.requires_grad_(False)
    return _out_of_files(model, device).eval()


def _out_of_files(model: nn.Module, device: torch.device) -> nn.Module:
    """Copy the weights out of the mapped files: one that is replaced while serving must change nothing."""
    if device.type != "cpu":
        return model.to(device)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return model
