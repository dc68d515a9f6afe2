"""The manifest against the model it describes: every site, every location, the digest."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from adapters_store.manifest import BaseManifest, read_manifest, write_manifest
from server.model.manifest import Checkpoint, build_manifest
from tests.model.test_models import CERTIFIED, UNCERTIFIED, build
from tests.zoo import load_oracle_base, tiny_base


@pytest.mark.parametrize("name", [*CERTIFIED, *UNCERTIFIED])
def test_sites_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    """Each site's geometry and stored weight are its module's; sites and other modules are all there is."""
    path = build(tmp_path, *(CERTIFIED | UNCERTIFIED)[name])
    manifest = build_manifest(path)
    model = load_oracle_base(path)
    for site in manifest.sites:
        module = model.get_submodule(site.module)
        shape = (site.in_features, site.out_features)
        stored_forward = site.kind == "embedding" or site.transposed
        assert tuple(module.weight.shape) == (shape if stored_forward else shape[::-1])
        assert site.has_bias == (getattr(module, "bias", None) is not None)
        assert torch.equal(stored(site.weight), module.weight)
        assert not site.has_bias or torch.equal(stored(site.bias), module.bias)
    covered = {site.module for site in manifest.sites} | set(manifest.other_modules)
    with_parameters = {
        path for path, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None
    }
    assert covered == with_parameters
    assert len({site.name for site in manifest.sites}) == len(manifest.sites)


def stored(location) -> torch.Tensor:
    with safe_open(location.file, framework="pt") as opened:
        return opened.get_tensor(location.key)


def test_certified_types_are_packed(tmp_path: Path) -> None:
    manifest = build_manifest(tiny_base(tmp_path, "llama"))
    sites = {site.name: site for site in manifest.sites}
    assert [manifest.sites[0].name, manifest.sites[-1].name] == ["embed_tokens", "lm_head"]
    assert [(s.group, s.slice, s.offset) for s in (sites[f"2.{p}_proj"] for p in "qkv")] == [
        ("2.qkv_proj", 0, 0),
        ("2.qkv_proj", 1, 64),
        ("2.qkv_proj", 2, 96),
    ]
    assert (sites["0.up_proj"].group, sites["0.up_proj"].slice, sites["0.up_proj"].offset) == (
        "0.gate_up_proj",
        1,
        112,
    )
    assert (sites["0.down_proj"].group, sites["0.down_proj"].offset) == ("0.down_proj", 0)
    assert manifest.row("lm_head") == len(manifest.sites) - 1


def test_fused_and_uncertified_projections_are_groups_of_one(tmp_path: Path) -> None:
    phi = build_manifest(tiny_base(tmp_path / "phi", "phi3"))
    assert {"0.qkv_proj", "0.gate_up_proj"} < {site.name for site in phi.sites}
    gpt2 = build_manifest(build(tmp_path / "gpt2", *UNCERTIFIED["gpt2"]))
    names = {site.name for site in gpt2.sites}
    assert {"0.attn.c_proj", "0.mlp.c_proj", "0.c_attn", "0.c_fc"} < names
    assert all(site.transposed for site in gpt2.sites if site.kind == "linear")
    for manifest in (phi, gpt2):
        assert all((site.group, site.slice, site.offset) == (site.name, 0, 0) for site in manifest.sites)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scaled_embeddings(dtype: str, tmp_path: Path) -> None:
    """Gemma3 multiplies by sqrt(hidden), rounded to the dtype; Gemma2 does it outside the module or inside."""
    path = tiny_base(tmp_path, "gemma3_text", hidden_size=96)
    site = build_manifest(path, dtype).sites[0]
    module = load_oracle_base(path, getattr(torch, dtype)).get_input_embeddings()
    ids = torch.arange(9)
    assert site.output_scale == {"float32": 96**0.5, "bfloat16": 9.8125}[dtype] or dtype == "float32"
    torch.testing.assert_close(module(ids), module.weight[ids] * site.output_scale, atol=0, rtol=0)
    assert build_manifest(tiny_base(tmp_path / "llama", "llama")).sites[0].output_scale == 1.0


def test_identity(tmp_path: Path) -> None:
    path = tiny_base(tmp_path, "llama", tie_word_embeddings=True)
    manifest = build_manifest(path, "bfloat16")
    assert manifest.is_tied
    assert manifest.sites[-1].weight == manifest.sites[0].weight
    assert (manifest.dtype, manifest.model_type, manifest.num_layers) == ("bfloat16", "llama", 3)
    assert (manifest.vocab_size, manifest.hidden_size, manifest.tokenizer_digest) == (320, 64, "")
    assert build_manifest(path).dtype == "float32"  # auto: the checkpoint's own
    write_manifest(manifest, tmp_path / "m.json")
    assert read_manifest(tmp_path / "m.json") == manifest


def test_the_digest_is_of_the_bytes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, cache = tiny_base(tmp_path / "base", "llama"), tmp_path / "cache"
    first = build_manifest(path, cache_dir=cache)
    (path / "README.md").write_text("not part of it")
    with caplog.at_level(logging.INFO, logger="server.model.manifest"):
        assert build_manifest(path, cache_dir=cache).digest == first.digest
        assert "hashing" not in caplog.text  # unchanged files are not read again
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"][5, 7] += 1
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    second = build_manifest(path, cache_dir=cache)
    assert second.digest != first.digest
    assert second.digest == build_manifest(path).digest
    (path / "config.json").write_text((path / "config.json").read_text() + " ")
    assert build_manifest(path, cache_dir=cache).digest != second.digest
    (cache / "base-hashes.json").write_text("not JSON")
    assert build_manifest(path, cache_dir=cache).digest != second.digest


def test_sharded_checkpoints(tmp_path: Path) -> None:
    whole = build_manifest(tiny_base(tmp_path / "whole", "llama"))
    model = load_oracle_base(tmp_path / "whole")
    model.save_pretrained(str(tmp_path / "shards"), max_shard_size="100KB")
    sharded = build_manifest(tmp_path / "shards")
    assert len({site.weight.file for site in sharded.sites}) > 2
    assert site_facts(sharded) == site_facts(whole)
    for site in sharded.sites:
        assert torch.equal(stored(site.weight), model.get_submodule(site.module).weight)


def site_facts(manifest: BaseManifest) -> list[tuple[str, str, str]]:
    return [(site.name, site.group, site.weight.key) for site in manifest.sites]


@pytest.mark.parametrize("prefix", ["", "language_model.model.", "backbone."])
def test_other_prefixes_are_found(prefix: str, tmp_path: Path) -> None:
    """Checkpoints saved without the head's prefix, or from inside a larger model."""
    path = tiny_base(tmp_path, "llama", tie_word_embeddings=True)
    manifest = build_manifest(path)
    weights = load_file(path / "model.safetensors")
    renamed = {key.replace("model.", prefix, 1): tensor for key, tensor in weights.items()}
    save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint([path / "model.safetensors"])
    for site in manifest.sites:
        location = checkpoint.locate(site.weight.key, weights[site.weight.key].shape)
        assert location is not None
        assert torch.equal(stored(location), weights[site.weight.key])


def test_locations_are_never_guessed(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a.layers.0.q.weight": torch.zeros(2, 3), "b.layers.0.q.weight": torch.zeros(2, 3)}, file)
    checkpoint = Checkpoint([file])
    assert checkpoint.locate("model.layers.0.q.weight", (2, 3)) is None  # two could be it
    assert checkpoint.locate("a.layers.0.q.weight", (3, 2)) is None  # another shape
    assert checkpoint.locate("lm_head.weight", (2, 3)) is None
    assert checkpoint.locate("a.layers.0.q.weight", (2, 3)) is not None
