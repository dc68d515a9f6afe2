"""Tiny random bases saved as real checkpoints, their manifests, and real PEFT adapters for them."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from adapters_store.manifest import BaseManifest, Site, TensorLocation
from adapters_store.numeric import BaseDtype
from adapters_store.vocabulary import vocabulary_digest

VOCAB = 64
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


def _llama(is_tied: bool) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=is_tied))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: _llama(False),
    "llama-tied": lambda: _llama(True),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=False)),  # biases on q, k, v
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SMALL, tie_word_embeddings=False)),  # fused projections
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, head_dim=8)),  # scaled, tied embedding
}


@dataclass(frozen=True)
class Base:
    """A base on disk and what the compiler knows of it."""

    path: Path
    manifest: BaseManifest

    def model(self) -> PreTrainedModel:
        with quiet():
            return AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32).eval()

    def site(self, name: str) -> Site:
        return self.manifest.sites[self.manifest.row(name)]


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def make_base(path: Path, kind: str, *, saved: torch.dtype = torch.float32, dtype: BaseDtype = "float32") -> Base:
    """A tiny random base of `kind`, saved in `saved` and served in `dtype`, with a small tokenizer.json."""
    torch.manual_seed(7)
    model = MODELS[kind]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.5)
    model.to(saved).save_pretrained(path)
    (path / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    return Base(path, manifest_of(path, model, dtype))


def tokenizer_json(added: dict[str, int] | None = None) -> dict[str, object]:
    tokens = [{"id": number, "content": token, "special": True} for token, number in (added or {}).items()]
    return {
        "version": "1.0",
        "added_tokens": [{"id": 0, "content": "<pad>", "special": True}, *tokens],
        "model": {"type": "BPE", "vocab": {f"t{n}": n for n in range(1, VOCAB - 2)}, "merges": []},
    }


def manifest_of(path: Path, model: PreTrainedModel, dtype: BaseDtype) -> BaseManifest:
    """Written for these tests; server/model/manifest.py has the real builder."""
    file = str(path / "model.safetensors")
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    sites, others = [], []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            sites.append(_site(name, module, model, file, is_tied))
        elif next(module.parameters(recurse=False), None) is not None:
            others.append(name)
    return BaseManifest(
        digest=hashlib.sha256(Path(file).read_bytes()).hexdigest(),
        name_or_path=str(path),
        model_type=model.config.model_type,
        dtype=dtype,
        vocab_size=VOCAB,
        hidden_size=model.config.hidden_size,
        num_layers=model.config.num_hidden_layers,
        is_tied=is_tied,
        tokenizer_digest=vocabulary_digest(path / "tokenizer.json"),
        sites=tuple(sites),
        other_modules=tuple(others),
    )


def _site(name: str, module: nn.Linear | nn.Embedding, model: PreTrainedModel, file: str, is_tied: bool) -> Site:
    parts = name.split(".")
    layer = next((part for part in parts if part.isdecimal()), None)
    short = parts[-1] if layer is None else f"{layer}.{parts[-1]}"
    is_embedding = isinstance(module, nn.Embedding)
    is_head = module is model.get_output_embeddings()
    owner = "model.embed_tokens" if is_head and is_tied else name
    bias = None if is_embedding else module.bias
    scale = getattr(module, "embed_scale", None)
    return Site(
        name=short,
        module=name,
        kind="embedding" if is_embedding else "head" if is_head else "linear",
        in_features=module.num_embeddings if is_embedding else module.in_features,
        out_features=module.embedding_dim if is_embedding else module.out_features,
        group=short,
        slice=0,
        offset=0,
        has_bias=bias is not None,
        output_scale=1.0 if scale is None else float(scale),
        weight=TensorLocation(file, f"{owner}.weight"),
        bias=None if bias is None else TensorLocation(file, f"{name}.bias"),
    )


def make_adapter(
    base: Base,
    path: Path,
    *,
    dtype: torch.dtype = torch.float32,
    prepare: Callable[[PeftModel], None] | None = None,
    save: dict[str, object] | None = None,
    **options: object,
) -> Path:
    """A PEFT adapter with random factors and biases, saved by PEFT itself."""
    torch.manual_seed(11)
    config = LoraConfig(task_type="CAUSAL_LM", **({"r": 4, "lora_alpha": 6} | options))
    with quiet():
        model = get_peft_model(base.model(), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name or (parameter.requires_grad and name.endswith(".bias")):
                    parameter.add_(0.3 * torch.randn_like(parameter))
        if prepare is not None:
            prepare(model)
        model.to(dtype).save_pretrained(path, **(save or {}))
    return path


def peft_model(base: Base, path: Path) -> PeftModel:
    """The oracle: PEFT, unmerged, in float32."""
    with quiet():
        return PeftModel.from_pretrained(base.model(), path).eval()
