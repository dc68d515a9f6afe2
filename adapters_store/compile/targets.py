"""What a LoRA config says it trained, against what the file has (PEFT tuners/tuners_utils.py).

The tensors are the truth of what is served. The config is read to notice what is missing.
"""

from __future__ import annotations

from collections.abc import Collection

from adapters_store.compile.parse import LoraOptions, Problems, compile_pattern
from adapters_store.errors import AdapterInvalid, AdapterMismatch
from adapters_store.manifest import BaseManifest, Site
from adapters_store.sources.folder import CONFIG_FILE
from adapters_store.tensorfile import shown

ALL_LINEAR = "all-linear"


def check_targets(
    options: LoraOptions,
    manifest: BaseManifest,
    adapted: Collection[str],
    problems: Problems,
    warnings: list[str],
) -> None:
    """Compare target_modules with the sites (by name) that have LoRA tensors.

    A listed target without any tensor is a problem: the adapter would be served in part. A target of
    which only some layers have tensors is a warning: PEFT serves the others as the base too.
    """
    targets = options.target_modules
    if isinstance(targets, list):
        for target in targets:
            _check_listed(target, options, manifest, adapted, problems)
    expected = [site for site in manifest.sites if is_target(options, site)]
    missing = [site.module for site in expected if site.name not in adapted]
    if adapted and missing:
        warnings.append(
            f"{len(missing)} of {len(expected)} modules that target_modules names have no tensors "
            f"and stay as in the base (first: {missing[0]})"
        )
    expected_names = {site.name for site in expected}
    extra = [site.module for site in manifest.sites if site.name in adapted and site.name not in expected_names]
    if targets and extra and not options.ensure_weight_tying:
        warnings.append(
            f"{len(extra)} modules have tensors but are not named by target_modules; they are served "
            f"(first: {extra[0]})"
        )


def is_target(options: LoraOptions, site: Site) -> bool:
    """Whether PEFT would wrap the module of `site` under this config."""
    if _is_excluded(options, site.module):
        return False
    targets = options.target_modules
    if isinstance(targets, str):
        if targets.lower() == ALL_LINEAR:
            return site.kind == "linear"
        return _full_match(targets, site.module)
    if not targets or not any(_is_named(target, site.module) for target in targets):
        return False
    return _is_in_layers(options, site.module)


def _check_listed(
    target: str, options: LoraOptions, manifest: BaseManifest, adapted: Collection[str], problems: Problems
) -> None:
    named = [site for site in manifest.sites if _is_named(target, site.module)]
    if not named:
        problems.append(
            AdapterMismatch(
                f"{CONFIG_FILE}: target_modules lists {shown(target)}, "
                "which the base does not have as a linear layer or embedding"
            )
        )
        return
    wanted = [site for site in named if is_target(options, site)]
    if wanted and not any(site.name in adapted for site in wanted):
        problems.append(
            AdapterInvalid(f"{CONFIG_FILE}: target_modules lists {shown(target)}, but no tensor of the file is for it")
        )


def _is_named(target: str, module: str) -> bool:
    return module == target or module.endswith(f".{target}")


def _full_match(text: str, module: str) -> bool:
    pattern = compile_pattern(text)
    return pattern is not None and pattern.fullmatch(module) is not None


def _is_excluded(options: LoraOptions, module: str) -> bool:
    excluded = options.exclude_modules
    if isinstance(excluded, str):
        return _full_match(excluded, module)
    return any(_is_named(name, module) for name in excluded or ())


def _is_in_layers(options: LoraOptions, module: str) -> bool:
    layers = options.layers_to_transform
    if layers is None or layers == []:
        return True
    index = _layer_index(options, module)
    return index is not None and (index == layers if isinstance(layers, int) else index in layers)


def _layer_index(options: LoraOptions, module: str) -> int | None:
    """The layer number in a module path: its first numbered part, or the one after a layers_pattern."""
    patterns = options.layers_pattern or []
    names = [patterns] if isinstance(patterns, str) else patterns
    parts = module.split(".")
    for position in range(1, len(parts) - 1):
        is_layer_list = parts[position - 1] in names if names else position >= 2
        if parts[position].isdecimal() and is_layer_list:
            return int(parts[position])
    return None
