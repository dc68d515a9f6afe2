"""Bases that can't be served are refused before a weight is read, with every reason found."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from server.errors import ConfigError, ModelUnsupported
from server.model.loader import load_base
from server.model.manifest import build_manifest
from server.model.probe import _Mask, _refusal_of_mask
from server.model.rotary import refusals_of_rope
from tests.zoo import tiny_base

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def folder_of(path: Path, config: dict[str, object]) -> Path:
    """A folder with a config and an empty weights file."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    save_file({}, path / "model.safetensors")
    return path


@pytest.mark.parametrize(
    ("config", "reasons"),
    [
        ({"model_type": "gptj"}, ["does not call attention"]),
        ({"model_type": "bloom"}, ["does not call attention"]),
        ({"model_type": "mpt"}, ["does not call attention"]),
        ({"model_type": "mamba"}, ["does not call attention"]),
        ({"model_type": "falcon", "alibi": True}, ["ALiBi", "does not call attention"]),
        ({"model_type": "bart"}, ["encoder-decoder"]),
        ({"model_type": "gemma3"}, ["multimodal"]),
        ({"model_type": "vit"}, ["no causal language model"]),
        (
            {**TINY, "model_type": "llama", "quantization_config": {"quant_method": "gptq", "bits": 4}},
            ["quantised (gptq)"],
        ),
        ({"model_type": "strange", "auto_map": {"AutoConfig": "x.Y"}}, ["'strange'", "never run"]),
        (
            {
                **TINY,
                "model_type": "llama",
                "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
            },
            ["'dynamic'", "longest sequence of a batch"],
        ),
        ({**TINY, "model_type": "gemma3n_text", "num_kv_shared_layers": 1}, ["share the KV"]),
        ({**TINY, "model_type": "mixtral", "num_local_experts": 2}, ["mixture of experts (Mixtral"]),
        (
            {**TINY, "model_type": "recurrent_gemma", "block_types": ["recurrent", "attention"]},
            ["every layer must attend exactly once"],
        ),
        ({**TINY, "model_type": "bert", "is_decoder": False}, ["bidirectional", "the mask is not causal"]),
        (
            {**TINY, "model_type": "gemma3_text", "use_bidirectional_attention": True},
            ["bidirectional attention", "the mask is not causal"],
        ),
        (
            {**TINY, "model_type": "minicpm3", "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4},
            ["several shapes"],
        ),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_architectures(config: dict[str, object], reasons: list[str], tmp_path: Path) -> None:
    with pytest.raises(ModelUnsupported) as caught:
        load_base(folder_of(tmp_path, config))
    assert str(tmp_path) in str(caught.value)
    for reason in reasons:
        assert reason in str(caught.value)


def test_the_manifest_refuses_what_the_files_rule_out(tmp_path: Path) -> None:
    with pytest.raises(ModelUnsupported, match="does not call attention"):
        build_manifest(folder_of(tmp_path, {"model_type": "gptj"}))


def test_remote_code_is_never_opened(tmp_path: Path) -> None:
    code = tmp_path / "modeling_evil.py"
    code.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "modeling_evil.C", "AutoModelForCausalLM": "m.M"}}
    with pytest.raises(ModelUnsupported, match="its own code is never run"):
        load_base(folder_of(tmp_path, config))
    known = {**TINY, "model_type": "llama", "auto_map": config["auto_map"]}
    with pytest.raises(ModelUnsupported, match="lack"):  # a known type is loaded with transformers' own class
        load_base(folder_of(tmp_path, known))
    assert not (tmp_path / "ran").exists()


# --- files ----------------------------------------------------------------------------------------------


def test_folders_without_the_right_files(tmp_path: Path) -> None:
    with pytest.raises(ModelUnsupported, match=r"no config\.json"):
        load_base(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelUnsupported, match="not JSON"):
        load_base(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**TINY, "model_type": "llama"}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelUnsupported, match=r"pytorch_model\.bin; pickle is never opened"):
        load_base(tmp_path)


def test_missing_and_misshapen_weights_are_named(tmp_path: Path) -> None:
    path = tiny_base(tmp_path, "llama")
    weights = load_file(path / "model.safetensors")
    weights.pop("model.layers.1.mlp.up_proj.weight")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelUnsupported, match=re.escape("lack model.layers.1.mlp.up_proj.weight")):
        load_base(path)
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 5)
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelUnsupported, match=r"up_proj.weight has shape \[3, 5\], its config says \[112, 64\]"):
        load_base(path)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    path = tiny_base(tmp_path, "llama")
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[:-100])
    for read in (load_base, build_manifest):
        with pytest.raises(ModelUnsupported, match="can't be read"):
            read(path)
    (path / "config.json").write_text(json.dumps({**TINY, "model_type": "llama", "hidden_size": "wide"}))
    with pytest.raises(ModelUnsupported, match="no llama config"):
        load_base(path)


def test_max_model_len(tmp_path: Path) -> None:
    path = tiny_base(tmp_path, "llama", max_position_embeddings=128)
    assert load_base(path).max_model_len == 128
    assert load_base(path, max_model_len=50).max_model_len == 50
    with pytest.raises(ConfigError, match="129 exceeds the model's own limit of 128"):
        load_base(path, max_model_len=129)


# --- masks and rotary -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "window", "served"),
    [
        (causal_mask_function, None, True),
        (causal_mask_function, 4096, False),
        (sliding_window_causal_mask_function(4096), 4096, True),
        (sliding_window_causal_mask_function(4096), None, False),
        (sliding_window_causal_mask_function(4096), 4097, False),
        (sliding_window_causal_mask_function(4095), 4096, False),
        (sliding_window_causal_mask_function(1000), None, False),
        (chunked_causal_mask_function(8192, torch.zeros(1, dtype=torch.int64)), None, False),
        (bidirectional_mask_function, None, False),
    ],
)
def test_masks_are_compared_with_the_declared_window(rule, window: int | None, served: bool) -> None:
    verdict = _refusal_of_mask(_Mask(rule), window, 131072)
    assert (verdict is None) == served


@pytest.mark.parametrize(
    ("parameters", "count"),
    [
        ({"rope_type": "default"}, 0),
        ({"rope_type": "yarn", "factor": 2.0}, 0),
        ({"rope_type": "dynamic", "factor": 2.0}, 1),
        ({"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "dynamic"}}, 1),
        ({"full_attention": {"rope_type": "longrope"}, "sliding_attention": {"rope_type": "default"}}, 1),
        (None, 0),
    ],
)
def test_rotary_kinds(parameters, count: int) -> None:
    config = PreTrainedConfig()
    config.rope_parameters = parameters
    assert len(refusals_of_rope(config)) == count
