"""Real PEFT adapters of every served option for any base, and the oracle: unmerged PEFT, one at a time."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
ALL_LINEAR = ATTENTION + MLP

# Ragged on purpose: below, at and above multiples of the padding unit.
RANKS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 24, 31, 32, 48, 64)

TARGETS: tuple[tuple[str, list[str]], ...] = (
    ("all", ALL_LINEAR),
    ("attention", ATTENTION),
    ("qv", ["q_proj", "v_proj"]),
    ("mlp", MLP),
    ("down", ["down_proj"]),
    ("k-up", ["k_proj", "up_proj"]),
    ("embed", ["embed_tokens", "q_proj"]),
    ("head", ["lm_head", "o_proj"]),
)


@dataclass(frozen=True)
class ZooAdapter:
    """One adapter of the zoo: its name and folder."""

    name: str
    path: Path


def option_of(index: int, num_layers: int, rank: int) -> dict[str, object]:
    """The LoRA options of adapter `index`; eight kinds in turn."""
    options: tuple[dict[str, object], ...] = (
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": max(1, rank // 2), "layers.0.down_proj": rank + 3}},
        {"alpha_pattern": {"v_proj": 5, "gate_proj": 9}},
        {"layers_to_transform": list(range(0, num_layers, 2))},
        {"lora_bias": True},
        {"rank_pattern": {"layers.1.*": rank + 1}, "alpha_pattern": {"o_proj": 3}, "use_rslora": True},
        {"layers_to_transform": [num_layers - 1]},
    )
    return dict(options[index % len(options)])


def lora_config(index: int, num_layers: int, max_rank: int = 64) -> LoraConfig:
    """The config of adapter `index`: rank, targets and options all cycle at different lengths."""
    ranks = [rank for rank in RANKS if rank <= max_rank]
    rank = ranks[(index * 5) % len(ranks)]
    kind, targets = TARGETS[(index * 3 + index // 8) % len(TARGETS)]
    options = option_of(index, num_layers, rank)
    if kind in ("embed", "head"):  # PEFT: no lora_bias on embeddings, layer subsets don't cover them
        options.pop("lora_bias", None)
        options.pop("layers_to_transform", None)
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, lora_dropout=0.0, **options)


def save_adapter(
    base: PreTrainedModel, config: LoraConfig, path: Path, seed: int, *, scale: float, dtype: torch.dtype
) -> None:
    """Make an adapter with random non-zero A and B and save it as PEFT does. Leaves `base` untouched."""
    torch.manual_seed(seed)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                fan = parameter.shape[-1] if parameter.ndim > 1 else 1
                parameter.normal_(0.0, scale / max(1.0, fan) ** 0.5)
                parameter.copy_(parameter.to(dtype).to(parameter.dtype))
    model.save_pretrained(str(path), save_embedding_layers=False)
    model.unload()
    # get_peft_model leaves its config on the base, which PEFT would then warn about
    if hasattr(base, "peft_config"):
        del base.peft_config


def make_zoo(
    base: PreTrainedModel, root: Path, count: int, *, scale: float = 1.0, max_rank: int = 64
) -> list[ZooAdapter]:
    """`count` adapters under `root`, with file values rounded to fp32, fp16 and bf16 in turn."""
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    zoo = []
    for index in range(count):
        path = root / f"zoo-{index:02d}"
        config = lora_config(index, base.config.num_hidden_layers, max_rank)
        save_adapter(base, config, path, seed=1000 + index, scale=scale, dtype=dtypes[index % 3])
        zoo.append(ZooAdapter(path.name, path))
    return zoo


@contextmanager
def peft_oracle(base: PreTrainedModel, adapter: ZooAdapter | None) -> Iterator[torch.nn.Module]:
    """`base` with `adapter` unmerged on it (or as it is), restored afterwards."""
    if adapter is None:
        yield base
        return
    model = PeftModel.from_pretrained(base, str(adapter.path), autocast_adapter_dtype=False).eval()
    try:
        yield model
    finally:
        model.unload()
        if hasattr(base, "peft_config"):
            del base.peft_config


def greedy_tokens(model: torch.nn.Module, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """What unmodified `generate` answers, greedy, never stopping early."""
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
            eos_token_id=None,
            pad_token_id=0,
        )
    return out[0, len(prompt) :].tolist()


def tiny_base(path: Path, model_type: str, *, seed: int = 0, **overrides: object) -> Path:
    """A random fp32 base of `model_type` saved at `path`; wide initial weights, so that answers are diverse."""
    fields: dict[str, object] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **overrides,
    }
    torch.manual_seed(seed)
    config = AutoConfig.for_model(model_type, **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(str(path), safe_serialization=True)
    return path


def load_oracle_base(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The unmodified transformers model at `path`."""
    return AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype, attn_implementation="eager").eval()


def random_prompts(count: int, vocab_size: int, *, seed: int, lengths: tuple[int, int] = (3, 40)) -> list[list[int]]:
    """`count` prompts of random token ids (special ids below 3 left out)."""
    source = random.Random(seed)
    return [[source.randrange(3, vocab_size) for _ in range(source.randint(*lengths))] for _ in range(count)]


def fresh_copy(base: PreTrainedModel) -> PreTrainedModel:
    """A deep copy, for oracles that must not share state."""
    return copy.deepcopy(base)
