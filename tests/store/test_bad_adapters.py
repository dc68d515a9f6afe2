"""Adapters that can't be served: a typed error that names the file, tensor or option. None is served in part."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters_store.errors import (
    AdapterCorrupt,
    AdapterError,
    AdapterInvalid,
    AdapterMismatch,
    AdapterTooLarge,
    AdapterUnsupported,
)
from adapters_store.limits import Limits
from tests.store.bases import Base, make_adapter, manifest_of, tokenizer_json
from tests.store.images import compile_folder, problems_of

PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"


class Edited:
    """A copy of a sound adapter, to be spoiled."""

    def __init__(self, source: Path, path: Path) -> None:
        shutil.copytree(source, path)
        self.path = path
        self.weights = path / "adapter_model.safetensors"

    def config(self, **changes: object) -> Edited:
        file = self.path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        return self

    def tensors(self, changes: dict[str, torch.Tensor | None]) -> Edited:
        tensors = load_file(self.weights) | changes
        save_file({name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}, self.weights)
        return self


@pytest.fixture
def edited(plain_adapter, tmp_path) -> Edited:
    return Edited(plain_adapter, tmp_path / "edited")


def refusal(path: Path, base, error: type[AdapterError], *words: str, limits: Limits | None = None) -> str:
    """Compiling raises exactly that class, and the message has every word."""
    with pytest.raises(AdapterError) as raised:
        compile_folder(path, base, limits)
    assert type(raised.value) is error, raised.value
    for word in words:
        assert word in raised.value.message
    return raised.value.message


# --- options --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1, 2]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("alora_invocation_tokens", [5, 6]),
        ("arrow_config", {"top_k": 3}),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("kasa_config", {"beta": 1e-4}),
        ("enable_lora", [True, False, True]),
        ("task_type", "SEQ_CLS"),
        ("some_future_option", 3),
    ],
)
def test_options_are_refused_by_name(option, value, edited, base):
    refusal(edited.config(**{option: value}).path, base, AdapterUnsupported, option)


@pytest.mark.parametrize("option", ["use_dora", "modules_to_save", "arrow_config", "some_future_option"])
@pytest.mark.parametrize("value", [None, False, []])
def test_inactive_options_are_fine(option, value, edited, base):
    assert compile_folder(edited.config(**{option: value}).path, base).sites


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga"])
def test_initialisations_that_changed_the_base_say_how_to_convert(init, edited, base):
    words = (init, "path_initial_model_for_weight_conversion")
    refusal(edited.config(init_lora_weights=init).path, base, AdapterUnsupported, *words)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_other_initialisations_are_served(init, edited, base):
    assert compile_folder(edited.config(init_lora_weights=init).path, base).sites


@pytest.mark.parametrize("family", ["IA3", "VERA", "LOHA", "PROMPT_TUNING", "ADALORA", "nonsense"])
def test_other_families_are_named(family, edited, base):
    refusal(edited.config(peft_type=family).path, base, AdapterUnsupported, family.upper())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("r", "8"),
        ("r", 0),
        ("lora_alpha", "sixteen"),
        ("lora_alpha", 1e999),
        ("use_rslora", "yes"),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"(": 4}),
        ("alpha_pattern", {"(?P<": 4}),
        ("target_modules", 5),
        ("target_modules", "(q_proj"),
        ("bias", "some"),
        ("peft_type", None),
    ],
)
def test_options_of_a_wrong_type_or_value_are_named(option, value, edited, base):
    expected = AdapterCorrupt if value == 1e999 else AdapterInvalid  # json writes Infinity, which is no JSON
    words = () if value == 1e999 else (option,)
    refusal(edited.config(**{option: value}).path, base, expected, *words)


@pytest.mark.parametrize(
    "options",
    [
        {"rank_pattern": {"([a-z_.0-9]+)+!": 16}},
        {"alpha_pattern": {"(.*)*!": 16}},
        {"target_modules": "([a-z_.0-9]+)+!"},
        {"exclude_modules": "([a-z_.0-9]+)+!"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_patterns_that_backtrack_for_ever_are_given_up(options, edited, base):
    refusal(edited.config(**options).path, base, AdapterInvalid, *options, "take longer than 2 s")


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"peft_type": "LORA"', "\x00", "[" * 100_000])
def test_a_config_that_is_no_json_object(text, edited, base):
    (edited.path / "adapter_config.json").write_text(text)
    refusal(edited.path, base, AdapterCorrupt, "adapter_config.json")


# --- files ----------------------------------------------------------------------------------------------


def test_pickle_only(edited, base):
    edited.weights.unlink()
    (edited.path / "adapter_model.bin").write_bytes(b"\x80\x04K\x01.")
    refusal(edited.path, base, AdapterUnsupported, "adapter_model.bin", "pickle")


def test_no_weights(edited, base):
    edited.weights.unlink()
    refusal(edited.path, base, AdapterInvalid, "adapter_model.safetensors", "missing")


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 1500, -1])
def test_truncated_weights(keep, edited, base):
    edited.weights.write_bytes(edited.weights.read_bytes()[:keep])
    refusal(edited.path, base, AdapterCorrupt, "adapter_model.safetensors")


def test_another_vocabulary(edited, base):
    (edited.path / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    assert compile_folder(edited.path, base).sites
    (edited.path / "tokenizer.json").write_text(json.dumps(tokenizer_json({"<tool>": 62})))
    refusal(edited.path, base, AdapterMismatch, "tokenizer.json", "vocabulary")


def test_added_tokens_beyond_the_base(edited, base):
    (edited.path / "added_tokens.json").write_text(json.dumps({"<pad>": 0}))
    assert compile_folder(edited.path, base).sites
    (edited.path / "added_tokens.json").write_text(json.dumps({"<tool>": 64}))
    refusal(edited.path, base, AdapterMismatch, "added_tokens.json", "<tool>", "64")
    (edited.path / "tokenizer.json").write_text("{}")
    refusal(edited.path, base, AdapterCorrupt, "tokenizer.json")


# --- tensors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_one_factor_alone(part, edited, base):
    edited.tensors({f"{PREFIX}.{part}.weight": None})
    other = "lora_B" if part == "lora_A" else "lora_A"
    refusal(edited.path, base, AdapterInvalid, f"{PREFIX}.{other}.weight", part)


@pytest.mark.parametrize(
    ("part", "shape", "expected"),
    [
        ("lora_A", (4, 33), "[r, 32]"),
        ("lora_B", (31, 4), "[32, r]"),
        ("lora_A", (4, 32, 1), "[r, 32]"),
        ("lora_B", (32,), "[32, r]"),
    ],
)
def test_wrong_shapes_name_tensor_shape_and_base(part, shape, expected, edited, base):
    name = f"{PREFIX}.{part}.weight"
    edited.tensors({name: torch.zeros(shape)})
    words = (name, str(list(shape)), expected, "model.layers.0.self_attn.q_proj")
    refusal(edited.path, base, AdapterMismatch, *words)


def test_factors_of_different_rank(edited, base):
    edited.tensors({f"{PREFIX}.lora_A.weight": torch.zeros(5, 32)})
    refusal(edited.path, base, AdapterInvalid, PREFIX, "[5, 32]", "[32, 4]")


def test_rank_that_the_config_denies(edited, base):
    message = refusal(edited.config(rank_pattern={"q_proj": 6}).path, base, AdapterInvalid, PREFIX, "rank 4")
    assert "rank_pattern['q_proj'] = 6" in message
    assert "r = 9" in refusal(edited.config(rank_pattern={}, r=9).path, base, AdapterInvalid, "rank 4")


def test_rank_above_the_limit(edited, base):
    refusal(edited.path, base, AdapterTooLarge, "rank 4", "limit is 3", limits=Limits(max_rank=3))
    assert compile_folder(edited.path, base, Limits(max_rank=4)).max_rank == 4


def test_rank_513_is_above_the_default_limit(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], r=513)
    refusal(adapter, base, AdapterTooLarge, "513", "512")


def test_image_above_the_limit(edited, base):
    refusal(edited.path, base, AdapterTooLarge, "limit is 1000", limits=Limits(max_image_bytes=1000))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_no_numbers(value, dtype, edited, base):
    tensor = torch.zeros(32, 4, dtype=dtype)
    tensor[31, 3] = value
    edited.tensors({f"{PREFIX}.lora_B.weight": tensor})
    refusal(edited.path, base, AdapterInvalid, f"{PREFIX}.lora_B.weight", "NaN or infinite")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_no_numbers_in_a_tensor_that_is_served_as_it_is(value, dtype, edited, base):
    tensor = torch.zeros(4, 32, dtype=dtype)
    tensor[3, 31] = value
    same = Base(base.path, manifest_of(base.path, base.model(), str(dtype).removeprefix("torch.")))
    edited.tensors({f"{PREFIX}.lora_A.weight": tensor})
    refusal(edited.path, same, AdapterInvalid, f"{PREFIX}.lora_A.weight", "NaN or infinite")


def test_a_scale_that_overflows_the_bases_dtype(edited, base_of, base):
    half = Base(base.path, manifest_of(base.path, base.model(), "float16"))
    edited.tensors({f"{PREFIX}.lora_B.weight": torch.full((32, 4), 60_000.0)}).config(lora_alpha=8)
    refusal(edited.path, half, AdapterInvalid, f"{PREFIX}.lora_B.weight", "float16")
    assert compile_folder(edited.path, base).sites


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn])
def test_dtypes_that_are_not_served(dtype, edited, base):
    edited.tensors({f"{PREFIX}.lora_A.weight": torch.zeros(4, 32).to(dtype)})
    refusal(edited.path, base, AdapterUnsupported, f"{PREFIX}.lora_A.weight", "dtype")


@pytest.mark.parametrize(
    ("name", "error", "word"),
    [
        ("base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight", AdapterMismatch, "does not have"),
        ("base_model.model.model.layers.0.self_attn.w_proj.lora_A.weight", AdapterMismatch, "does not have"),
        ("base_model.model.vision.q_proj.lora_A.weight", AdapterMismatch, "does not have"),
        ("base_model.model.model.norm.lora_A.weight", AdapterUnsupported, "takes no LoRA"),
        ("base_model.model.model.norm.weight", AdapterUnsupported, "modules_to_save"),
        ("base_model.model.lm_head.modules_to_save.weight", AdapterUnsupported, "modules_to_save"),
        (f"{PREFIX}.lora_magnitude_vector", AdapterUnsupported, "use_dora"),
        (f"{PREFIX}.lora_diag", AdapterUnsupported, "kasa_config"),
        ("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", AdapterUnsupported, "trainable"),
        (f"{PREFIX}.lora_A", AdapterInvalid, "nothing would use it"),
        (f"{PREFIX}.lora_C.weight", AdapterInvalid, "nothing would use it"),
        ("base_model.model.model.layers.0.self_attn.q_proj.vera_lambda_b", AdapterInvalid, "nothing would use it"),
        ("weight", AdapterInvalid, "nothing would use it"),
        ("", AdapterInvalid, "nothing would use it"),
        (f"{PREFIX}.bias", AdapterMismatch, "has none in the base"),
        ("base_model.model.lm_head.lora_embedding_A", AdapterMismatch, "linear layer"),
        ("base_model.model.model.embed_tokens.lora_A.weight", AdapterMismatch, "embedding"),
        (f"{PREFIX}.lora_monteclora_sampler.std_prior", AdapterInvalid, "nothing would use it"),
    ],
)
def test_every_tensor_must_be_used(name, error, word, edited, base):
    edited.tensors({name: torch.zeros(4, 32)})
    refusal(edited.path, base, error, name, word)


def test_names_in_messages_are_escaped_and_bounded(edited, base):
    edited.tensors({"x\n\x1b[31m" + "y" * 10_000: torch.zeros(1)})
    message = refusal(edited.path, base, AdapterInvalid, "nothing would use it")
    assert message.isprintable()
    assert len(message) < 400


def test_two_tensors_for_one_factor(edited, base):
    edited.tensors({f"{PREFIX.replace('model.model.model', 'model.model')}.lora_A.weight": torch.zeros(4, 32)})
    refusal(edited.path, base, AdapterInvalid, f"{PREFIX}.lora_A.weight", "both")


def test_several_adapters_in_one_file(edited, base):
    tensors = load_file(edited.weights)
    renamed = {name: tensor for name, tensor in tensors.items() if "down_proj" not in name} | {
        name.replace(".weight", ".second.weight" if "layers.1" in name else ".first.weight"): tensor
        for name, tensor in tensors.items()
        if "down_proj" in name
    }
    save_file(renamed, edited.weights)
    refusal(edited.path, base, AdapterInvalid, "several adapters", "first", "second")


def test_lora_bias_and_config_must_agree(edited, base_of, base, tmp_path):
    edited.tensors({f"{PREFIX}.lora_B.bias": torch.zeros(32)})
    refusal(edited.path, base, AdapterInvalid, f"{PREFIX}.lora_B.bias", "lora_bias")
    edited.tensors({f"{PREFIX}.lora_B.bias": None}).config(lora_bias=True)
    refusal(edited.path, base, AdapterInvalid, "lora_B.weight", "lora_bias")


def test_empty_factors_of_ungathered_shards(edited, base):
    edited.tensors({f"{PREFIX}.lora_A.weight": torch.zeros(0, 32), f"{PREFIX}.lora_B.weight": torch.zeros(32, 0)})
    refusal(edited.path, base, AdapterInvalid, f"{PREFIX}.lora_A.weight", "ZeRO-3")


def test_a_file_without_tensors(edited, base):
    save_file({}, edited.weights)
    refusal(edited.config(target_modules=None).path, base, AdapterInvalid, "no tensor that adapts")


# --- targets --------------------------------------------------------------------------------------------


def test_a_target_the_base_lacks(edited, base):
    edited.config(target_modules=["q_proj", "down_proj", "query_key_value"])
    refusal(edited.path, base, AdapterMismatch, "query_key_value", "target_modules")


def test_a_target_without_tensors(edited, base):
    edited.config(target_modules=["q_proj", "down_proj", "v_proj"])
    refusal(edited.path, base, AdapterInvalid, "v_proj", "no tensor")


def test_some_layers_without_tensors_are_a_warning(edited, base):
    edited.tensors({f"{PREFIX}.{part}.weight": None for part in ("lora_A", "lora_B")})
    compiled = compile_folder(edited.path, base)
    assert len(compiled.sites) == 5
    assert any("model.layers.0.self_attn.q_proj" in warning for warning in compiled.warnings)


def test_tensors_outside_the_targets_are_a_warning(edited, base):
    compiled = compile_folder(edited.config(target_modules=["q_proj"]).path, base)
    assert len(compiled.sites) == 6
    assert any("down_proj" in warning for warning in compiled.warnings)


def test_an_adapter_of_a_larger_base(base_of, base, tmp_path):
    adapter = make_adapter(base_of("phi3"), tmp_path / "adapter", target_modules=["qkv_proj"])
    refusal(adapter, base, AdapterMismatch, "qkv_proj", "does not have")


# --- copies of base layers ------------------------------------------------------------------------------


def test_a_changed_copy_of_the_embedding_is_a_modules_to_save(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens"])
    edited = Edited(adapter, tmp_path / "edited")
    name = "base_model.model.model.embed_tokens.base_layer.weight"
    copy = load_file(edited.weights)[name]
    copy[63, 31] += 1e-3
    refusal(edited.tensors({name: copy}).path, base, AdapterUnsupported, name, "modules_to_save")
    refusal(edited.tensors({name: torch.zeros(65, 32)}).path, base, AdapterMismatch, name, "[65, 32]", "[64, 32]")


def test_a_tied_head_that_is_not_the_embeddings(base_of, tmp_path):
    base = base_of("llama-tied")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens"], ensure_weight_tying=True)
    edited = Edited(adapter, tmp_path / "edited")
    head = load_file(edited.weights)["base_model.model.lm_head.lora_A.weight"]
    edited.tensors({"base_model.model.lm_head.lora_A.weight": head + 1})
    refusal(edited.path, base, AdapterInvalid, "ensure_weight_tying", "lm_head")


# --- all of them ----------------------------------------------------------------------------------------


def test_every_problem_is_collected(edited, base):
    edited.config(use_dora=True, bias="some", target_modules=["q_proj", "down_proj", "nowhere"])
    edited.tensors({"stray": torch.zeros(1), f"{PREFIX}.lora_A.weight": torch.zeros(4, 33)})
    problems = [error.message for error in problems_of(edited.path, base).problems]
    for word in ("use_dora", "bias", "stray", "[4, 33]", "nowhere"):
        assert sum(word in problem for problem in problems) == 1, (word, problems)
