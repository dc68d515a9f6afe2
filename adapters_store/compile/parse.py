"""adapter_config.json of PEFT's LORA: every field is served, inert, or refused by name when it is active.

The fields are those of peft.LoraConfig (tuners/lora/config.py, 0.21) plus what older versions and other
trainers are known to write.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec

from adapters_store.errors import AdapterCorrupt, AdapterError, AdapterInvalid, AdapterUnsupported
from adapters_store.sources.folder import CONFIG_FILE
from adapters_store.tensorfile import shown

Problems = list[AdapterError]

INERT = {
    "auto_mapping": "how PEFT finds the base's class",
    "peft_version": "information",
    "revision": "revision of the base on the Hub",
    "inference_mode": "training only",
    "lora_dropout": "training only",
    "megatron_config": "placement in training",
    "megatron_core": "placement in training",
    "runtime_config": "placement",
    "loftq_config": "read with init_lora_weights only",
    "eva_config": "initialisation",
    "corda_config": "read with init_lora_weights only",
    "lora_ga_config": "read with init_lora_weights only",
    "qalora_group_size": "read with use_qalora only",
    "velora_config": "compresses activations in training only",
    "monteclora_config": "samples in training only",
    # older versions and other trainers
    "merge_weights": "how the first versions of PEFT ran an adapter",
    "lora_dtype": "ms-swift: dtype in training",
    "lorap_lr_ratio": "ms-swift: learning rate",
    "lorap_emb_lr": "ms-swift: learning rate",
    "model_key_mapping": "ms-swift: information",
    "unsloth_fixed": "Unsloth: information",
}

REFUSED = {
    "use_dora": "DoRA is not served yet",
    "modules_to_save": "private copies of whole modules are not served yet",
    "trainable_token_indices": "trained token embeddings are not served yet",
    "target_parameters": "LoRA on bare parameters (experts) is not served yet",
    "layer_replication": "an adapter that replicates layers changes the base's layer schedule",
    "alora_invocation_tokens": "activated LoRA is not served yet",
    "arrow_config": "Arrow routing is not served yet",
    "use_qalora": "QALoRA is not served yet",
    "use_bdlora": "block-diagonal LoRA is not served yet",
    "kasa_config": "KaSA is not served yet",
    "enable_lora": "partly enabled merged projections of the first PEFT versions are not served",
}

PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
"""Initialisations that leave the base's weights alone."""
CHANGED_BASE_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that subtract from the base's weights: the tensors alone are no LoRA of the base."""
TASKS = (None, "CAUSAL_LM", "FEATURE_EXTRACTION")


class Scale(NamedTuple):
    """What the config says of one site."""

    rank: int
    rank_from: str
    """the field that the rank is from, for messages"""
    alpha: float


class LoraOptions(msgspec.Struct, kw_only=True):
    """What of an adapter_config.json bears on serving."""

    r: int = 8
    lora_alpha: float = 8.0
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    use_rslora: bool = False
    lora_bias: bool = False
    bias: str = "none"
    fan_in_fan_out: bool = False
    ensure_weight_tying: bool = False
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    init_lora_weights: bool | str = True
    base_model_name_or_path: str | None = None
    task_type: str | None = None

    def scale_of(self, module: str) -> Scale:
        """Rank and alpha of a module path: for each of the two, the first pattern that matches wins."""
        rank_key = _first_match(self.rank_pattern, module)
        alpha_key = _first_match(self.alpha_pattern, module)
        rank = self.r if rank_key is None else self.rank_pattern[rank_key]
        alpha = self.lora_alpha if alpha_key is None else self.alpha_pattern[alpha_key]
        source = "r" if rank_key is None else f"rank_pattern[{shown(rank_key)}]"
        return Scale(rank, source, alpha)

    def factor(self, alpha: float, rank: int) -> float:
        """The scale s of s·B(Ax): alpha/r, or alpha/sqrt(r) with rsLoRA (PEFT tuners/lora/layer.py)."""
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank


def read_config(content: bytes | memoryview) -> dict[str, Any]:
    """adapter_config.json as a JSON object; AdapterCorrupt when it is none."""
    try:
        return msgspec.json.decode(content, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeError, RecursionError, ValueError) as error:
        raise AdapterCorrupt(f"{CONFIG_FILE} is not a JSON object: {error}") from error


def family_of(config: Mapping[str, Any]) -> str:
    """The PEFT family by name, e.g. LORA; AdapterInvalid when the config does not say."""
    family = config.get("peft_type")
    if not isinstance(family, str) or not family:
        raise AdapterInvalid(f"{CONFIG_FILE} has no peft_type: it is no PEFT adapter")
    return family.upper()


def parse_config(config: Mapping[str, Any], problems: Problems) -> LoraOptions:
    """The options of a LORA config; what is wrong goes to `problems`, a wrong field keeps its default."""
    _check_fields(config, problems)
    options = LoraOptions()
    for name in LoraOptions.__struct_fields__:
        if config.get(name) is not None:
            _set_field(options, name, config[name], problems)
    _check_values(options, problems)
    _check_init(options, problems)
    return options


def _check_fields(config: Mapping[str, Any], problems: Problems) -> None:
    for name, value in config.items():
        if not value or name in LoraOptions.__struct_fields__ or name in INERT or name == "peft_type":
            continue
        if name in REFUSED:
            problems.append(AdapterUnsupported(f"{CONFIG_FILE}: {name} is set, and {REFUSED[name]}"))
        else:
            problems.append(
                AdapterUnsupported(f"{CONFIG_FILE}: {shown(name)} is set, an option this server does not know")
            )


def _set_field(options: LoraOptions, name: str, value: object, problems: Problems) -> None:
    field = next(field for field in msgspec.structs.fields(LoraOptions) if field.name == name)
    try:
        setattr(options, name, msgspec.convert(value, field.type))
    except msgspec.ValidationError as error:
        problems.append(AdapterInvalid(f"{CONFIG_FILE}: {name} has a wrong type: {error}"))


def _check_values(options: LoraOptions, problems: Problems) -> None:
    ranks = {"r": options.r} | {f"rank_pattern[{shown(key)}]": r for key, r in options.rank_pattern.items()}
    alphas = {"lora_alpha": options.lora_alpha}
    alphas |= {f"alpha_pattern[{shown(key)}]": alpha for key, alpha in options.alpha_pattern.items()}
    for where, rank in ranks.items():
        if rank < 1:
            problems.append(AdapterInvalid(f"{CONFIG_FILE}: {where} is {rank}; a rank is at least 1"))
    for where, alpha in alphas.items():
        if not math.isfinite(alpha):
            problems.append(AdapterInvalid(f"{CONFIG_FILE}: {where} is {alpha}"))
    _check_patterns(options, problems)
    if options.bias not in ("none", "all", "lora_only"):
        problems.append(AdapterInvalid(f"{CONFIG_FILE}: bias is {shown(options.bias)}; known: none, all, lora_only"))
    if options.task_type not in TASKS:
        problems.append(
            AdapterUnsupported(
                f"{CONFIG_FILE}: task_type is {shown(str(options.task_type))}; only causal language models are served"
            )
        )


def _check_patterns(options: LoraOptions, problems: Problems) -> None:
    texts = [("rank_pattern", key, suffix_pattern(key)) for key in options.rank_pattern]
    texts += [("alpha_pattern", key, suffix_pattern(key)) for key in options.alpha_pattern]
    for name in ("target_modules", "exclude_modules"):
        value = getattr(options, name)
        if isinstance(value, str):
            texts.append((name, value, value))
    for name, text, pattern in texts:
        if compile_pattern(pattern) is None:
            problems.append(AdapterInvalid(f"{CONFIG_FILE}: {name} has {shown(text)}, which is no regular expression"))


def _check_init(options: LoraOptions, problems: Problems) -> None:
    init = options.init_lora_weights
    if isinstance(init, bool) or init.lower() in PLAIN_INITS:
        return
    if init.lower().startswith(CHANGED_BASE_INITS):
        problems.append(
            AdapterUnsupported(
                f"{CONFIG_FILE}: init_lora_weights is {shown(init)}, which changed the base in training. "
                "Convert the adapter to plain LoRA with PEFT: save_pretrained(path, "
                "path_initial_model_for_weight_conversion=<the adapter saved before training>)"
            )
        )
    else:
        problems.append(
            AdapterUnsupported(f"{CONFIG_FILE}: init_lora_weights is {shown(init)}, which this server does not know")
        )


def _first_match(patterns: Mapping[str, object], module: str) -> str | None:
    """The first key that matches the end of a module path at a dot (PEFT utils/other.py, get_pattern_key)."""
    for key in patterns:
        pattern = compile_pattern(suffix_pattern(key))
        if pattern is not None and pattern.match(module):
            return key
    return None


def suffix_pattern(key: str) -> str:
    """The regular expression of a rank_pattern or alpha_pattern key."""
    return rf"(?:.*\.)?(?:{key})$"


@lru_cache(maxsize=4096)
def compile_pattern(text: str) -> re.Pattern[str] | None:
    """`text` as a regular expression, None when it is none."""
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return None
