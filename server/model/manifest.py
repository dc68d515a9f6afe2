"""BaseManifest from a folder: the base's sites, geometry and identity, without loading its weights."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from adapters_store.manifest import BaseManifest, Site, TensorLocation
from adapters_store.ref import digest_of
from adapters_store.vocabulary import TOKENIZER_FILE, vocabulary_digest
from server.errors import ModelUnsupported
from server.model.attention import ATTENTION_NAME, register_attention
from server.model.skeleton import build_skeleton, decoder_layers, read_config, resolve_dtype, weight_files

logger = logging.getLogger(__name__)

CERTIFIED_TYPES = frozenset({"llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3"})
"""Model types tested token for token against `generate`; their projections are packed (Phi-3's come fused)."""

PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Packed projection -> the projections that its slices stand for, in the order in which models call them."""

EMBEDDING_SITE = "embed_tokens"
HEAD_SITE = "lm_head"
_HASHES_NAME = "base-hashes.json"


def build_manifest(
    model_path: str | Path, dtype: str = "auto", cache_dir: str | Path | None = None
) -> BaseManifest:
    """What the compiler and `inspect` know of the base at `model_path`, which runs in `dtype`.

    Reads config.json, the headers of the safetensors, and their bytes once for the digest; with a
    `cache_dir` the files' hashes are kept there, by path, size and mtime. Raises ModelUnsupported.
    """
    path = Path(model_path)
    config = read_config(path)
    register_attention()
    run_dtype = resolve_dtype(config, dtype)
    model = build_skeleton(config, run_dtype, ATTENTION_NAME)
    files = weight_files(path)
    tokenizer = path / TOKENIZER_FILE
    sites = find_sites(model, Checkpoint(files), run_dtype)
    embedding = model.get_input_embeddings()
    return BaseManifest(
        digest=base_digest([path / "config.json", *files], cache_dir),
        name_or_path=str(model_path),
        model_type=config.model_type,
        dtype=str(run_dtype).removeprefix("torch."),  # type: ignore[arg-type]  # resolve_dtype gives these only
        vocab_size=embedding.weight.shape[0],
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        is_tied=model.get_output_embeddings().weight is embedding.weight,
        tokenizer_digest=vocabulary_digest(tokenizer) if tokenizer.is_file() else "",
        sites=tuple(sites),
        other_modules=tuple(_modules_besides(model, sites)),
    )


class Checkpoint:
    """Names and shapes of the tensors in the base's safetensors files, from their headers."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        for file in files:
            with safe_open(str(file), framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118  # not a mapping
                    self._shapes[key] = tuple(opened.get_slice(key).get_shape())
                    self._files[key] = file

    def locate(self, parameter: str, shape: Sequence[int]) -> TensorLocation | None:
        """Where the model's `parameter` of `shape` lies; None unless exactly one tensor fits.

        Checkpoints name a tensor as the model does, or with another prefix (saved from the model without
        its head, or from inside a larger one): so the name is tried as it is, then without leading parts,
        then as the end of a longer name.
        """
        parts = parameter.split(".")
        for start in range(len(parts) - 1):
            name = ".".join(parts[start:])
            if start and not any(part.isdigit() for part in parts[start:]) and len(parts) - start < 2:
                break
            found = [key for key in self._shapes if key == name] or [
                key for key in self._shapes if start <= 1 and key.endswith("." + name)
            ]
            if len(found) == 1:
                return self._location(found[0], shape)
        return None

    def _location(self, key: str, shape: Sequence[int]) -> TensorLocation | None:
        if self._shapes[key] != tuple(shape):
            return None
        return TensorLocation(str(self._files[key]), key)
