"""BaseManifest from a folder: the base's sites, geometry and identity, without loading its weights."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapters_store.manifest import BaseManifest, Site, TensorLocation
from adapters_store.ref import digest_of
from adapters_store.vocabulary import TOKENIZER_FILE, vocabulary_digest
from server.errors import ModelUnsupported
from server.model.attention import ATTENTION_NAME, register_attention
from server.model.skeleton import build_skeleton, decoder_layers, read_config, resolve_dtype, weight_files

logger = logging.getLogger(__name__)

CERTIFIED_TYPES = frozenset({"llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3_text", "phi3"})
"""Model types tested token for token against `generate`; they run packed (Phi-3's projections come fused)."""

PACKED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Packed projection -> the projections that its slices stand for, in the order in which models call them."""

EMBEDDING_SITE = "embed_tokens"
HEAD_SITE = "lm_head"
_HASHES_NAME = "base-hashes.json"


def build_manifest(model_path: str | Path, dtype: str = "auto", cache_dir: str | Path | None = None) -> BaseManifest:
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
            try:
                with safe_open(str(file), framework="pt") as opened:
                    for key in opened.keys():  # noqa: SIM118  # not a mapping
                        self._shapes[key] = tuple(opened.get_slice(key).get_shape())
                        self._files[key] = file
            except (SafetensorError, OSError) as error:
                raise ModelUnsupported(f"{file} can't be read as safetensors: {error}") from error

    def locate(self, parameter: str, shape: Sequence[int]) -> TensorLocation | None:
        """Where the model's `parameter` of `shape` lies; None unless exactly one tensor can be it.

        A checkpoint names a tensor as the model does, or without the model's first part (saved from the
        model without its head), or with parts before it (saved from inside a larger model).
        """
        names = [name for name in (parameter, parameter.partition(".")[2]) if "." in name]
        exact = [name for name in names if name in self._shapes]
        keys = exact or [key for name in names for key in self._shapes if key.endswith("." + name)]
        distinct = set(keys[:1] if exact else keys)
        if len(distinct) != 1:
            return None
        key = distinct.pop()
        return TensorLocation(str(self._files[key]), key) if self._shapes[key] == tuple(shape) else None


def find_sites(model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype) -> list[Site]:
    """The sites of `model` in slot-table order: embedding, each layer's projections, head."""
    is_packed = model.config.model_type in CERTIFIED_TYPES
    prefix, layers = decoder_layers(model)
    sites = [_embedding_site(model, checkpoint, dtype)]
    for number, layer in enumerate(layers):
        linears = [
            _linear_site(path, module, f"{prefix}.{number}.{path}", number, checkpoint)
            for path, module in layer.named_modules()
            if isinstance(module, nn.Linear | Conv1D)
        ]
        linears = _unambiguous(linears, number)
        sites += _in_groups(linears, number) if is_packed else linears
    return [*sites, _head_site(model, checkpoint)]


def _linear_site(path: str, module: nn.Module, full_path: str, layer: int, checkpoint: Checkpoint) -> Site:
    """The site of a projection inside a decoder layer, by its last name."""
    is_transposed = isinstance(module, Conv1D)
    shape = tuple(module.weight.shape)
    in_features, out_features = shape if is_transposed else shape[::-1]
    name = f"{layer}.{path.rpartition('.')[2]}"
    return Site(
        name=name,
        module=full_path,
        kind="linear",
        in_features=in_features,
        out_features=out_features,
        group=name,
        slice=0,
        offset=0,
        has_bias=module.bias is not None,
        transposed=is_transposed,
        weight=checkpoint.locate(f"{full_path}.weight", shape),
        bias=checkpoint.locate(f"{full_path}.bias", (out_features,)) if module.bias is not None else None,
    )


def _unambiguous(sites: list[Site], layer: int) -> list[Site]:
    """Sites whose names clash within the layer get their parent's name too: "0.mlp.c_proj"."""
    counts = Counter(site.name for site in sites)
    renamed = []
    for site in sites:
        if counts[site.name] > 1:
            name = f"{layer}." + ".".join(site.module.split(".")[-2:])
            site = msgspec.structs.replace(site, name=name, group=name)
        renamed.append(site)
    assert len({site.name for site in renamed}) == len(renamed), f"ambiguous projections in layer {layer}"
    return renamed


def _in_groups(sites: list[Site], layer: int) -> list[Site]:
    """The same sites, those of a packed projection given their group, slice and offset."""
    by_name = {site.name: site for site in sites}
    for group, parts in PACKED.items():
        members = [by_name[name] for part in parts if (name := f"{layer}.{part}") in by_name]
        if len(members) != len(parts) or len({member.in_features for member in members}) != 1:
            continue
        offset = 0
        for number, member in enumerate(members):
            by_name[member.name] = msgspec.structs.replace(
                member, group=f"{layer}.{group}", slice=number, offset=offset
            )
            offset += member.out_features
    return list(by_name.values())


def _embedding_site(model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype) -> Site:
    module = model.get_input_embeddings()
    path = _path_of(model, module)
    vocab_size, hidden_size = module.weight.shape
    return Site(
        name=EMBEDDING_SITE,
        module=path,
        kind="embedding",
        in_features=vocab_size,
        out_features=hidden_size,
        group=EMBEDDING_SITE,
        slice=0,
        offset=0,
        output_scale=_output_scale(module, dtype),
        weight=checkpoint.locate(f"{path}.weight", (vocab_size, hidden_size)),
    )


def _output_scale(module: nn.Module, dtype: torch.dtype) -> float:
    """What an embedding multiplies its output by, rounded as the model rounds it (Gemma3: to its dtype)."""
    scale: Any = getattr(module, "scalar_embed_scale", None)  # the number behind the buffer `embed_scale`
    if scale is None:
        scale = getattr(module, "embed_scale", 1.0)
    if isinstance(scale, torch.Tensor):
        raise ModelUnsupported(f"{type(module).__name__} keeps its output scale in a tensor only")
    return float(torch.tensor(float(scale), dtype=dtype))


def _head_site(model: nn.Module, checkpoint: Checkpoint) -> Site:
    module = model.get_output_embeddings()
    if not isinstance(module, nn.Linear):
        raise ModelUnsupported(f"the head of {type(model).__name__} is no linear layer")
    path = _path_of(model, module)
    embedding = model.get_input_embeddings()
    source = _path_of(model, embedding) if module.weight is embedding.weight else path
    return Site(
        name=HEAD_SITE,
        module=path,
        kind="head",
        in_features=module.in_features,
        out_features=module.out_features,
        group=HEAD_SITE,
        slice=0,
        offset=0,
        has_bias=module.bias is not None,
        weight=checkpoint.locate(f"{source}.weight", module.weight.shape),
        bias=checkpoint.locate(f"{path}.bias", (module.out_features,)) if module.bias is not None else None,
    )


def _path_of(model: nn.Module, wanted: nn.Module) -> str:
    path: str = next(path for path, module in model.named_modules() if module is wanted)
    return path


def _modules_besides(model: nn.Module, sites: Sequence[Site]) -> Iterator[str]:
    """Modules with parameters of their own that are no sites."""
    adapted = {site.module for site in sites}
    for path, module in model.named_modules():
        if path not in adapted and next(module.parameters(recurse=False), None) is not None:
            yield path


def base_digest(files: Sequence[Path], cache_dir: str | Path | None = None) -> str:
    """sha256 over the sorted (file name, sha256) of `files`; unchanged files' hashes come from the cache."""
    cache = Path(cache_dir) / _HASHES_NAME if cache_dir is not None else None
    known = _read_hashes(cache)
    hashes = {str(file.resolve()): _hash_of(file, known.get(str(file.resolve()))) for file in files}
    if cache is not None and any(known.get(name) != entry for name, entry in hashes.items()):
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
        temporary.write_bytes(msgspec.json.encode(known | hashes))
        temporary.replace(cache)
    return digest_of({Path(name).name: entry.sha256 for name, entry in hashes.items()})


class _FileHash(msgspec.Struct, frozen=True):
    """A file's sha256, valid while size and mtime are these."""

    size: int
    mtime_ns: int
    sha256: str


def _read_hashes(cache: Path | None) -> dict[str, _FileHash]:
    if cache is None or not cache.is_file():
        return {}
    try:
        return msgspec.json.decode(cache.read_bytes(), type=dict[str, _FileHash])
    except msgspec.MsgspecError:
        return {}


def _hash_of(file: Path, known: _FileHash | None) -> _FileHash:
    stat = file.stat()
    if known is not None and (known.size, known.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
        return known
    logger.info("hashing %s (%d bytes)", file, stat.st_size)
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return _FileHash(stat.st_size, stat.st_mtime_ns, digest)
