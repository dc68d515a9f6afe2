"""The base's modules read as a DecoderSpec: what the native forward pass runs instead of them.

adapted modules ──decoder_spec──▶ DecoderSpec ──kernels.cpu.forward.Decoder──▶ logits
                     └─ a reason, where the native pass does not compute what they do: the modules run
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from adapters_store.manifest import BaseManifest
from kernels.cpu.forward import ACTIVATIONS, DecoderSpec, Layer, Projection, Rotary
from server.adapters.layer import AdaptedLinear, PackedLinear, PackedSlice
from server.model.kv import KVCache
from server.model.loader import LoadedBase
from server.model.manifest import CERTIFIED_TYPES
from server.model.rotary import PerRowRotary

logger = logging.getLogger(__name__)

_GEMMA_TYPES = frozenset({"gemma2", "gemma3_text"})
_WINDOW_IN_CONFIG = frozenset({"mistral", "phi3"})  # one window for all layers; elsewhere each layer has its own
_MIN_MULTIPLE = 16  # of head_dim: what the native attention takes


def refusal(base: LoadedBase) -> str | None:
    """Why `base` can't run natively; None when it can."""
    config = base.config
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if config.model_type not in CERTIFIED_TYPES:
        return f"{config.model_type} is not a certified model type"
    if base.dtype != torch.bfloat16:
        return f"it runs in {str(base.dtype).removeprefix('torch.')}, not bfloat16"
    if activation not in ACTIVATIONS:
        return f"its activation is {activation}, not one of {', '.join(ACTIVATIONS)}"
    if base.kv_shape.head_dim % _MIN_MULTIPLE:
        return f"its head dimension {base.kv_shape.head_dim} is no multiple of {_MIN_MULTIPLE}"
    if any(size % 2 for size in (config.hidden_size, config.intermediate_size)):
        return "its hidden or intermediate size is odd"
    return None


def decoder_spec(base: LoadedBase, manifest: BaseManifest, kv: KVCache) -> DecoderSpec:
    """The spec of an adapted base (surgery.adapt) that has no `refusal`."""
    config = base.config
    decoder: Any = base.model.model
    rotaries, rotary_of = _rotaries(decoder.rotary_emb)
    layers = [
        _layer(layer, config, keys, values, rotary_of(getattr(layer.self_attn, "layer_type", None)))
        for layer, keys, values in zip(decoder.layers, kv.keys, kv.values, strict=True)
    ]
    embedding = next(site for site in manifest.sites if site.kind == "embedding")
    attention = decoder.layers[0].self_attn
    return DecoderSpec(
        layers=layers,
        rotaries=rotaries,
        embedding=decoder.embed_tokens.weight,
        embedding_row=manifest.site_rows[embedding.name],
        final_norm=decoder.norm.weight,
        head=_projection(base.model.lm_head),
        num_heads=config.num_attention_heads,
        num_kv_heads=base.kv_shape.num_kv_heads,
        head_dim=base.kv_shape.head_dim,
        eps=config.rms_norm_eps,
        norm="gemma" if config.model_type in _GEMMA_TYPES else "llama",
        activation=getattr(config, "hidden_activation", None) or config.hidden_act,
        attention_scale=attention.scaling,
        # Gemma 3 keeps the field in its config and never uses it
        attention_softcap=config.attn_logit_softcapping if config.model_type == "gemma2" else None,
        logits_softcap=getattr(config, "final_logit_softcapping", None),
        embedding_scale=embedding.output_scale,
    )


def _layer(layer: Any, config: Any, keys: torch.Tensor, values: torch.Tensor, rotary: int) -> Layer:
    attention, mlp = layer.self_attn, layer.mlp
    is_gemma = config.model_type in _GEMMA_TYPES
    q_norm, k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    return Layer(
        qkv=_projection(getattr(attention, "qkv_proj", None) or attention.q_proj),
        out=_projection(attention.o_proj),
        gate_up=_projection(getattr(mlp, "gate_up_proj", None) or mlp.gate_proj),
        down=_projection(mlp.down_proj),
        input_norm=layer.input_layernorm.weight,
        mlp_norm=(layer.pre_feedforward_layernorm if is_gemma else layer.post_attention_layernorm).weight,
        keys=keys,
        values=values,
        q_norm=None if q_norm is None else q_norm.weight,
        k_norm=None if k_norm is None else k_norm.weight,
        post_attention_norm=layer.post_attention_layernorm.weight if is_gemma else None,
        post_mlp_norm=layer.post_feedforward_layernorm.weight if is_gemma else None,
        window=config.sliding_window if config.model_type in _WINDOW_IN_CONFIG else _own_window(attention),
        rotary=rotary,
    )


def _own_window(attention: nn.Module) -> int | None:
    window: int | None = getattr(attention, "sliding_window", None)
    return window


def _projection(module: nn.Module) -> Projection:
    """Of an adapted linear, or of the packed one that the first slice stands for."""
    if isinstance(module, PackedSlice):
        packed: PackedLinear = module.packed
        return Projection(packed.weight, packed.bias, packed.group)
    assert isinstance(module, AdaptedLinear), f"{type(module).__name__} is no adapted linear"
    return Projection(module.base.weight, module.base.bias, module.group)


def _rotaries(module: nn.Module) -> tuple[list[Rotary], Any]:
    """The frequency sets of a rotary module, and which one a layer type uses."""
    if isinstance(module, PerRowRotary):
        short, long = module.short, module.long
        return [Rotary(short.inv_freq, short.attention_scaling, long.inv_freq, module.switch)], lambda _: 0
    if hasattr(module, "inv_freq"):
        return [Rotary(module.inv_freq, module.attention_scaling)], lambda _: 0
    kinds: list[str] = list(module.layer_types)
    sets = [Rotary(getattr(module, f"{kind}_inv_freq"), getattr(module, f"{kind}_attention_scaling")) for kind in kinds]
    return sets, kinds.index
