"""Tensor names of a LoRA file: which module of the base, and which role there.

base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight
└── prefix ────┘ └── module ────────────────────┘ └ role ┘└ infix ┘
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from adapters_store.manifest import BaseManifest, Site

Role = Literal["A", "B", "B.bias", "embedding_A", "embedding_B", "bias", "copy"]

_LORA = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B)"
    r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.(?P<leaf>weight|bias))?"
)
_ROLES: dict[tuple[str, str | None], Role] = {
    ("lora_A", "weight"): "A",
    ("lora_B", "weight"): "B",
    ("lora_B", "bias"): "B.bias",
    ("lora_embedding_A", None): "embedding_A",
    ("lora_embedding_B", None): "embedding_B",
}
_PLAIN = re.compile(r"(?P<module>.+?)(?:\.base_layer)?\.(?P<leaf>weight|bias)")

# parts of a name that mean a feature: part of the name -> the option that makes PEFT save it
REFUSED_PARTS = {
    "lora_magnitude_vector": "use_dora",
    "modules_to_save": "modules_to_save",
    "trainable_tokens_delta": "trainable_token_indices",
    "lora_diag": "kasa_config",
}
TRAINING_PARTS = {
    "lora_monteclora_sampler": "monteclora_config",
    "lora_velora_embed": "velora_config",
}
"""Tensors that PEFT reads in training only (tuners/lora/variants.py)."""


class TensorName(NamedTuple):
    """A tensor name taken apart. `module` still has whatever prefix the file gave it."""

    module: str
    role: Role
    adapter: str | None = None
    """the adapter name that a raw state dict keeps, e.g. "default" """


def parse_name(name: str) -> TensorName | None:
    """Take a tensor name apart; None for one that no LoRA file has."""
    match = _LORA.fullmatch(name)
    if match is not None:
        role = _ROLES.get((match["part"], match["leaf"]))
        return None if role is None else TensorName(match["module"], role, match["adapter"])
    match = _PLAIN.fullmatch(name)
    if match is None or "lora_" in name:
        return None
    return TensorName(match["module"], "copy" if match["leaf"] == "weight" else "bias")


def feature_of(name: str) -> str | None:
    """The option behind a tensor of a feature that is not served, e.g. use_dora."""
    return _feature(name, REFUSED_PARTS)


def training_feature_of(name: str) -> str | None:
    """The option behind a tensor that only training reads."""
    return _feature(name, TRAINING_PARTS)


def _feature(name: str, features: dict[str, str]) -> str | None:
    return next((features[part] for part in name.split(".") if part in features), None)


class SiteMatcher:
    """Finds the site that a module of an adapter file names.

    PEFT writes `base_model.model.` before the base's own module path. Some exports drop or double a
    leading `model.`, or have no prefix at all; those match when only one site can be meant.
    """

    def __init__(self, manifest: BaseManifest) -> None:
        self._exact = {site.module: site for site in manifest.sites}
        self._others = {_bare(module) for module in manifest.other_modules}
        self._loose: dict[str, Site | None] = {}
        for site in manifest.sites:
            bare = _bare(site.module)
            self._loose[bare] = None if bare in self._loose else site
        self.num_loose = 0
        """names matched only by leaving out leading `model.` parts"""

    def site(self, module: str) -> Site | None:
        """The site of a module as the file names it, or None."""
        path = without_prefix(module)
        if path in self._exact:
            return self._exact[path]
        site = self._loose.get(_bare(path))
        self.num_loose += site is not None
        return site

    def is_other_module(self, module: str) -> bool:
        """Whether the base has the module but takes no delta there (norms, ...)."""
        return _bare(without_prefix(module)) in self._others


def without_prefix(module: str) -> str:
    """A module path without PEFT's prefix."""
    for prefix in ("base_model.model.", "base_model."):
        if module.startswith(prefix):
            return module.removeprefix(prefix)
    return module


def _bare(module: str) -> str:
    while module.startswith("model."):
        module = module.removeprefix("model.")
    return module
