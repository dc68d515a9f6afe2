"""BaseManifest: plain data about the base model; all that the compiler and `inspect` know of it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

SiteKind = Literal["linear", "embedding", "head"]


class TensorLocation(msgspec.Struct, frozen=True):
    """Where a weight of the base lies on disk."""

    file: str
    """path of the safetensors file"""
    key: str
    """tensor name in that file"""


class Site(msgspec.Struct, frozen=True):
    """One place of the base where a delta applies. Its index in `BaseManifest.sites` is its row in the slot table."""

    name: str
    """(layer, projection), e.g. "7.q_proj"; "embed_tokens"; "lm_head" """
    module: str
    """module path in the Hugging Face model, e.g. "model.layers.7.self_attn.q_proj" """
    kind: SiteKind
    in_features: int
    """K of a linear; the vocabulary size V of an embedding"""
    out_features: int
    """N of a linear; the hidden size of an embedding"""
    group: str
    """the packed projection it belongs to, e.g. "7.qkv_proj"; its own name where nothing is packed"""
    slice: int
    """index of its slice in the group"""
    offset: int
    """first column of its slice in the group's output"""
    has_bias: bool = False
    output_scale: float = 1.0
    """what the module multiplies its output by after the lookup (Gemma3 embeddings); folded into B"""
    transposed: bool = False
    """the base stores the weight as [in, out] (Conv1D)"""
    weight: TensorLocation | None = None
    bias: TensorLocation | None = None


class BaseManifest(msgspec.Struct, frozen=True):
    """The base as the compiler sees it."""

    digest: str
    name_or_path: str
    model_type: str
    dtype: Literal["float32", "bfloat16", "float16"]
    vocab_size: int
    hidden_size: int
    num_layers: int
    is_tied: bool
    """the head shares the embedding's weight"""
    tokenizer_digest: str
    """sha256 over the vocabulary (token, id) of the base's tokenizer; "" when it has none"""
    sites: tuple[Site, ...]
    other_modules: tuple[str, ...] = ()
    """modules with parameters that exist but are no sites (norms, ...)"""

    def row(self, site_name: str) -> int:
        """The row of a site in the slot table."""
        return self.site_rows[site_name]

    @property
    def site_rows(self) -> dict[str, int]:
        return {site.name: row for row, site in enumerate(self.sites)}


def write_manifest(manifest: BaseManifest, path: Path) -> None:
    """Write `manifest` as JSON, atomically."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(msgspec.json.encode(manifest))
    temporary.replace(path)


def read_manifest(path: Path) -> BaseManifest:
    """Read a manifest written by `write_manifest`."""
    return msgspec.json.decode(path.read_bytes(), type=BaseManifest)
