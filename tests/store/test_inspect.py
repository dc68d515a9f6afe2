"""`inspect`: what it says of sound and of broken adapters, for a person to read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters_store.errors import AdapterNotFound, AdapterTooLarge
from adapters_store.inspect import inspect_adapter
from adapters_store.limits import Limits
from tests.store.bases import ALL_LINEAR, make_adapter
from tests.store.images import compile_folder, image_of


def test_a_sound_adapter(base_of, tmp_path):
    base = base_of("qwen2")
    adapter = make_adapter(
        base,
        tmp_path / "adapter",
        target_modules=[*ALL_LINEAR, "embed_tokens"],
        rank_pattern={"q_proj": 9},
        use_rslora=True,
        bias="all",
    )
    report = inspect_adapter(adapter, base.manifest)
    assert report.is_served
    assert report.family == "LORA"
    assert report.targets == {"embed_tokens": 1} | dict.fromkeys(ALL_LINEAR, 3)
    assert report.ranks == {4: 19, 9: 3}
    assert report.file_bytes == sum((adapter / name).stat().st_size for name in _READ)
    image = image_of(compile_folder(adapter, base), base, tmp_path / "image")
    assert report.image_bytes == image.header.data_bytes
    assert len(report.dropped) == 1
    text = report.render()
    for word in (
        "LoRA",
        "q_proj (3 layers)",
        "9 (3x)",
        "sqrt",
        "trained biases (all)",
        "dropped",
        "KiB",
        "verdict       served",
    ):
        assert word in text, text


_READ = ("adapter_config.json", "adapter_model.safetensors")


def test_every_problem_is_in_the_report(base, plain_adapter, tmp_path):
    adapter = tmp_path / "bad"
    shutil.copytree(plain_adapter, adapter)
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    weights = adapter / "adapter_model.safetensors"
    save_file(load_file(weights) | {"stray": torch.zeros(1)}, weights)
    report = inspect_adapter(adapter, base.manifest)
    assert not report.is_served
    assert report.image_bytes == 0
    text = report.render()
    assert "refused: 2 problems" in text
    for word in ("1. ", "2. ", "use_dora", "stray", "[adapter_unsupported]", "[adapter_invalid]", "q_proj (3 layers)"):
        assert word in text, text


@pytest.mark.parametrize("content", [b"", b"{", b'{"peft_type": "IA3"}', b'{"r": 8}'])
def test_what_is_no_lora(content, base, tmp_path):
    (tmp_path / "adapter_config.json").write_bytes(content)
    report = inspect_adapter(tmp_path, base.manifest)
    assert [error.code for error in report.problems]
    assert "refused: 1 problem" in report.render()


def test_a_pickle(base, plain_adapter, tmp_path):
    shutil.copy(plain_adapter / "adapter_config.json", tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    assert "adapter_model.bin" in inspect_adapter(tmp_path, base.manifest).render()


def test_limits(base, plain_adapter):
    for limits in (
        Limits(max_file_bytes=100),
        Limits(max_json_bytes=9),
        Limits(max_rank=2),
        Limits(max_image_bytes=100),
    ):
        assert inspect_adapter(plain_adapter, base.manifest, limits).problems[0].code == AdapterTooLarge.code


def test_links_to_elsewhere_are_read_and_mentioned(base, plain_adapter, tmp_path):
    for name in _READ:
        (tmp_path / name).symlink_to(plain_adapter / name)
    report = inspect_adapter(tmp_path, base.manifest)
    assert report.is_served
    assert any("is a link to" in warning for warning in report.warnings)


def test_no_adapter_folder(base, tmp_path):
    for path in (tmp_path, tmp_path / "nowhere", Path(__file__)):
        with pytest.raises(AdapterNotFound, match="no adapter folder"):
            inspect_adapter(path, base.manifest)
