"""Every served option: the image's delta at every site is that of unmerged PEFT, in float64 against float32."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import MontecloraConfig
from safetensors.torch import load_file, save_file

from adapters_store.compile.lower import compile_adapter
from adapters_store.limits import Limits
from tests.store.bases import ALL_LINEAR, make_adapter, make_base, peft_model, quiet
from tests.store.images import compile_folder, files_of, image_of, worst_error

EXACT = 3e-6  # float32 rounding of PEFT's own sum, relative to the largest output of the site

OPTIONS = {
    "all-linear": ("llama", {"target_modules": ALL_LINEAR, "r": 8, "lora_alpha": 16}),
    "rank-1": ("llama", {"target_modules": ["o_proj"], "r": 1}),
    "rank-above-hidden": ("llama", {"target_modules": ["k_proj"], "r": 65}),
    "rslora": ("llama", {"target_modules": ALL_LINEAR, "r": 9, "use_rslora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": ALL_LINEAR,
            "rank_pattern": {"layers.1.mlp.*": 3, "q_proj": 17, r"model\.layers\.\d+\.self_attn\.v_proj": 2},
            "alpha_pattern": {"v_proj": 32, "^model.layers.0.self_attn.o_proj": 1},
        },
    ),
    "patterns-rslora": (
        "llama",
        {"target_modules": ["q_proj"], "rank_pattern": {"0.self_attn.q_proj": 5}, "use_rslora": True},
    ),
    "layers": ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]}),
    "layers-pattern": (
        "llama",
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    ),
    "exclude": ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}),
    "regex-targets": ("llama", {"target_modules": r".*\.layers\.[01]\..*(gate|up)_proj"}),
    "all-linear-word": ("llama", {"target_modules": "all-linear"}),
    "fan-in-fan-out": ("llama", {"target_modules": ["q_proj", "down_proj"], "fan_in_fan_out": True}),
    "lora-bias": ("qwen2", {"target_modules": ALL_LINEAR, "lora_bias": True, "use_rslora": True}),
    "bias-all": ("qwen2", {"target_modules": ["q_proj", "o_proj"], "bias": "all"}),
    "bias-lora-only": ("qwen2", {"target_modules": ["q_proj", "up_proj"], "bias": "lora_only"}),
    "both-biases": ("qwen2", {"target_modules": ["v_proj"], "bias": "all", "lora_bias": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "r": 5}),
    "head": ("llama", {"target_modules": ["lm_head", "q_proj"], "r": 5}),
    "embedding-tied-base": ("llama-tied", {"target_modules": ["embed_tokens"], "use_rslora": True}),
    "head-tied-base": ("llama-tied", {"target_modules": ["lm_head"]}),
    "both-untied-deltas": (
        "llama-tied",
        {"target_modules": ["lm_head", "embed_tokens"], "alpha_pattern": {"lm_head": 1}},
    ),
    "tied-deltas": (
        "llama-tied",
        {"target_modules": ["embed_tokens", "k_proj"], "ensure_weight_tying": True, "alpha_pattern": {"lm_head": 3}},
    ),
    "fused": ("phi3", {"target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}),
    "scaled-embedding": ("gemma3", {"target_modules": ["embed_tokens", "v_proj"]}),
    "gaussian": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", {"target_modules": ["q_proj"], "init_lora_weights": "orthogonal"}),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_delta_is_pefts(option, base_of, tmp_path):
    kind, options = OPTIONS[option]
    base = base_of(kind)
    adapter = make_adapter(base, tmp_path / "adapter", **options)
    compiled = compile_folder(adapter, base)
    image = image_of(compiled, base, tmp_path / "image")
    assert worst_error(peft_model(base, adapter), image, base) < EXACT
    # the delta is not small, so that the comparison could fail
    assert worst_error(peft_model(base, adapter), image_of(_nothing(compiled), base, tmp_path / "none"), base) > 1e-2


def _nothing(compiled):
    return type(compiled)()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapter_files_in_half_precision(dtype, base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", dtype=dtype, target_modules=ALL_LINEAR)
    image = image_of(compile_folder(adapter, base), base, tmp_path / "image")
    assert worst_error(peft_model(base, adapter), image, base) < EXACT


@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 2e-2), ("float16", 3e-3)])
def test_image_in_the_bases_half_precision(dtype, bound, tmp_path):
    """A is rounded once and s·B is rounded once; nothing else is lost."""
    base = make_base(tmp_path / "base", "qwen2", dtype=dtype)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=ALL_LINEAR, bias="all", lora_bias=True)
    compiled = compile_folder(adapter, base)
    image = image_of(compiled, base, tmp_path / "image")
    assert worst_error(peft_model(base, adapter), image, base) < bound
    tensors = load_file(adapter / "adapter_model.safetensors")
    b = tensors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"] * 1.5
    lowered = next(site for site in compiled.sites if site.site.name == "1.up_proj")
    expected = b.to(getattr(torch, dtype)).view(torch.int16).numpy()
    assert (lowered.b.view("int16") == expected).all()


def test_trained_bias_is_taken_from_the_base_as_it_is_served(tmp_path):
    """β replaces the base's bias; the base rounds its own to the serving dtype, and so must the difference."""
    base = make_base(tmp_path / "base", "qwen2", dtype="bfloat16")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], bias="lora_only")
    compiled = compile_folder(adapter, base)
    trained = load_file(adapter / "adapter_model.safetensors")
    for lowered in compiled.sites:
        name = lowered.site.module
        served = base.model().get_submodule(name).bias.bfloat16().float()
        beta = trained[f"base_model.model.{name}.base_layer.bias"]
        expected = (beta - served).detach().bfloat16().view(torch.int16).numpy()
        assert (lowered.bias.view("int16") == expected).all()


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_converted_initialisations_are_plain_lora_of_twice_the_rank(init, use_rslora, base, tmp_path):
    """PEFT changes the base's weights; its conversion gives a LoRA of the base as it was."""
    torch.manual_seed(3)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=ALL_LINEAR, init_lora_weights=init, use_rslora=use_rslora)
    with quiet():
        model = get_peft_model(base.model(), config)
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "initial")
        model.peft_config["default"].init_lora_weights = init
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    compiled = compile_folder(tmp_path / "adapter", base)
    assert {lowered.rank for lowered in compiled.sites} == {8}
    image = image_of(compiled, base, tmp_path / "image")
    assert worst_error(peft_model(base, tmp_path / "adapter"), image, base) < EXACT
    # and that is what was trained on the changed base
    ids = torch.arange(8).reshape(1, -1)
    with torch.no_grad():
        trained, ours = model(input_ids=ids).logits, peft_model(base, tmp_path / "adapter")(input_ids=ids).logits
    torch.testing.assert_close(trained, ours, rtol=1e-3, atol=1e-4)


def test_tied_head_is_derived_when_only_the_embedding_is_saved(base_of, tmp_path):
    base = base_of("llama-tied")
    adapter = make_adapter(
        base, tmp_path / "adapter", target_modules=["embed_tokens"], ensure_weight_tying=True, use_rslora=True
    )
    oracle = peft_model(base, adapter)
    file = adapter / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if "lm_head" not in name}, file)
    compiled = compile_folder(adapter, base)
    assert [lowered.site.name for lowered in compiled.sites] == ["embed_tokens", "lm_head"]
    assert worst_error(oracle, image_of(compiled, base, tmp_path / "image"), base) < EXACT


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.replace("base_model.model.model.", "base_model.model."),  # drops model.
        lambda name: name.replace("base_model.model.model.", "base_model.model.model.model."),  # doubles it
        lambda name: name.removeprefix("base_model.model."),  # no prefix at all
        lambda name: name.replace(".weight", ".default.weight"),  # a raw state dict keeps the adapter's name
    ],
)
def test_names_of_other_exporters(rename, base, plain_adapter, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_bytes((plain_adapter / "adapter_config.json").read_bytes())
    tensors = load_file(plain_adapter / "adapter_model.safetensors")
    save_file({rename(name): tensor for name, tensor in tensors.items()}, adapter / "adapter_model.safetensors")
    image = image_of(compile_folder(adapter, base), base, tmp_path / "image")
    assert worst_error(peft_model(base, plain_adapter), image, base) < EXACT


def test_copies_of_base_layers_beside_an_embedding_lora_are_dropped_and_reported(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens", "lm_head"])
    names = load_file(adapter / "adapter_model.safetensors")
    copies = sorted(name for name in names if name.endswith("base_layer.weight"))
    assert len(copies) == 2
    compiled = compile_folder(adapter, base)
    assert sorted(compiled.dropped) == [f"{name}: equal to the base's" for name in copies]


def test_copies_in_another_dtype_are_compared_after_the_cast(tmp_path):
    """A bf16 base trained in fp32 saves fp32 copies, a fp32 base trained in bf16 saves bf16 ones."""
    for saved, trained in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        base = make_base(tmp_path / f"base-{saved}", "llama", saved=saved)
        adapter = make_adapter(base, tmp_path / f"adapter-{saved}", dtype=trained, target_modules=["embed_tokens"])
        assert len(compile_folder(adapter, base).dropped) == 1


def test_equal_trained_biases_are_dropped(base_of, tmp_path):
    base = base_of("qwen2")

    def untrain(model):
        for name, parameter in model.named_parameters():
            if name.endswith(".bias") and "k_proj" in name:
                original = base.model().get_submodule(name.removeprefix("base_model.model.").rpartition(".")[0])
                parameter.data.copy_(original.bias)

    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], bias="all", prepare=untrain)
    compiled = compile_folder(adapter, base)
    assert {lowered.site.name.split(".")[1] for lowered in compiled.sites} == {"q_proj", "v_proj"}
    assert len(compiled.dropped) == 3


def test_training_only_tensors_are_dropped_and_reported(base, tmp_path):
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["q_proj"], monteclora_config=MontecloraConfig())
    compiled = compile_folder(adapter, base)
    assert compiled.dropped
    assert all("monteclora" in dropped for dropped in compiled.dropped)
    image = image_of(compiled, base, tmp_path / "image")
    assert worst_error(peft_model(base, adapter), image, base) < EXACT


def test_another_bases_name_is_a_warning(base, plain_adapter):
    assert compile_folder(plain_adapter, base).warnings == []
    files = files_of(plain_adapter)
    config = json.loads(bytes(files["adapter_config.json"])) | {"base_model_name_or_path": "other/Llama"}
    files["adapter_config.json"] = memoryview(json.dumps(config).encode())
    warnings = compile_adapter(files, base.manifest, Limits()).warnings
    assert len(warnings) == 1
    assert "other/Llama" in warnings[0]
