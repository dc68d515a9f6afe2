"""An adapter's files to what an image is written from, with everything that is wrong on the way."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from adapters_store.compile.base import BaseWeights
from adapters_store.compile.lora import LR, LoweredSite, SiteTensors
from adapters_store.compile.names import SiteMatcher, feature_of, parse_name, training_feature_of
from adapters_store.compile.parse import LoraOptions, Problems, family_of, parse_config, read_config
from adapters_store.compile.patience import bounded_matching
from adapters_store.compile.targets import check_targets
from adapters_store.errors import (
    AdapterError,
    AdapterInvalid,
    AdapterMismatch,
    AdapterTooLarge,
    AdapterUnsupported,
)
from adapters_store.image import image_data_bytes
from adapters_store.limits import Limits
from adapters_store.manifest import BaseManifest, Site
from adapters_store.sources.folder import CONFIG_FILE, PICKLE_FILE, WEIGHTS_FILE
from adapters_store.tensorfile import TensorFile, shown
from adapters_store.vocabulary import check_vocabulary

COMPILER_VERSION = 2
"""Raised when the same files give another image."""

MAX_PROBLEMS = 100


@dataclass(slots=True)
class CompiledAdapter:
    """What the compiler made of an adapter, or why not; with problems, `sites` may lack some."""

    family: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    options: LoraOptions | None = None
    sites: list[LoweredSite] = field(default_factory=list)  # in manifest order
    problems: Problems = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    """tensors that need not be served, each with the reason"""

    @property
    def max_rank(self) -> int:
        return max((site.rank for site in self.sites), default=0)


def compile_adapter(
    files: dict[str, memoryview], manifest: BaseManifest, limits: Limits, base: BaseWeights | None = None
) -> CompiledAdapter:
    """Lower an adapter for the base. Raises the first problem, as an AdapterError.

    `files` has the content of those of READ_FILES that exist; a pickle is given by name with no content.
    """
    compiled = examine_adapter(files, manifest, limits, base)
    if compiled.problems:
        raise compiled.problems[0]
    return compiled


def examine_adapter(
    files: dict[str, memoryview], manifest: BaseManifest, limits: Limits, base: BaseWeights | None = None
) -> CompiledAdapter:
    """Like `compile_adapter`, but collects every problem instead of raising the first."""
    compiled = CompiledAdapter()
    try:
        _examine(compiled, files, manifest, limits, base or BaseWeights())
    except AdapterError as error:
        compiled.problems.append(error)
    return compiled


def _examine(
    compiled: CompiledAdapter,
    files: dict[str, memoryview],
    manifest: BaseManifest,
    limits: Limits,
    base: BaseWeights,
) -> None:
    if CONFIG_FILE not in files:
        raise AdapterInvalid(f"{CONFIG_FILE} is missing")
    compiled.config = read_config(files[CONFIG_FILE])
    compiled.family = family_of(compiled.config)
    if compiled.family != "LORA":
        raise AdapterUnsupported(f"{CONFIG_FILE}: peft_type {shown(compiled.family)} is not served yet; LORA is")
    with bounded_matching():
        options = compiled.options = parse_config(compiled.config, compiled.problems)
        scales = {site.module: options.scale_of(site.module) for site in manifest.sites}
    check_vocabulary(files, manifest, compiled.problems, compiled.warnings)
    _check_base_name(options, manifest, compiled.warnings)
    tensors = _open_weights(files)
    found = _Grouping(compiled, tensors, manifest, base).group()
    lowering = LR(options, scales, tensors, manifest, base, limits)
    _lower_sites(compiled, found, lowering, manifest)
    adapted = {name for name, tensors_of in found.items() if _has_lora(tensors_of)}
    adapted |= {lowered.site.name for lowered in compiled.sites if lowered.rank}
    with bounded_matching():
        check_targets(options, manifest, adapted, compiled.problems, compiled.warnings)
    _check_whole(compiled, limits, manifest)


def _check_base_name(options: LoraOptions, manifest: BaseManifest, warnings: list[str]) -> None:
    theirs, ours = options.base_model_name_or_path or "", manifest.name_or_path
    if theirs and theirs.rstrip("/").rpartition("/")[2].lower() != ours.rstrip("/").rpartition("/")[2].lower():
        warnings.append(f"the adapter was trained on {shown(theirs)}, the base is {shown(ours)}; the shapes match")


def _open_weights(files: dict[str, memoryview]) -> TensorFile:
    if WEIGHTS_FILE in files:
        return TensorFile(WEIGHTS_FILE, files[WEIGHTS_FILE])
    if PICKLE_FILE in files:
        raise AdapterUnsupported(
            f"the weights are only in {PICKLE_FILE}, a pickle, which this server never opens; "
            f"save them as {WEIGHTS_FILE} (PEFT: save_pretrained with safe_serialization=True)"
        )
    raise AdapterInvalid(f"{WEIGHTS_FILE} is missing")


def _has_lora(found: SiteTensors) -> bool:
    return any(role in found.names for role in ("A", "B", "embedding_A", "embedding_B"))


class _Grouping:
    """Gives every tensor of the file to a site, to what is dropped, or to the problems."""

    def __init__(
        self, compiled: CompiledAdapter, tensors: TensorFile, manifest: BaseManifest, base: BaseWeights
    ) -> None:
        self._compiled = compiled
        self._tensors = tensors
        self._manifest = manifest
        self._base = base
        self._matcher = SiteMatcher(manifest)
        self._adapters: set[str] = set()
        self._found: dict[str, SiteTensors] = {}

    def group(self) -> dict[str, SiteTensors]:
        """The tensors of each site, by site name."""
        for name in self._tensors.entries:
            if len(self._compiled.problems) >= MAX_PROBLEMS:  # of a header with a million names, say
                break
            try:
                self._place(name)
            except AdapterError as error:
                self._compiled.problems.append(error)
        if self._matcher.num_loose:
            self._compiled.warnings.append(
                f"{self._matcher.num_loose} tensor names drop or double a 'model.' of the base's module paths"
            )
        if len(self._adapters) > 1:
            names = ", ".join(shown(adapter) for adapter in sorted(self._adapters))
            self._compiled.problems.append(AdapterInvalid(f"{WEIGHTS_FILE} holds several adapters: {names}"))
        return self._found

    def _place(self, name: str) -> None:
        feature = feature_of(name)
        if feature is not None:
            raise AdapterUnsupported(f"tensor {shown(name)} belongs to {feature}, which is not served yet")
        feature = training_feature_of(name)
        if feature is not None and self._compiled.config.get(feature):
            self._compiled.dropped.append(f"{name}: read in training only ({feature})")
            return
        parsed = parse_name(name)
        if parsed is None:
            raise AdapterInvalid(f"tensor {shown(name)} is none that a LoRA adapter has: nothing would use it")
        if parsed.adapter is not None:
            self._adapters.add(parsed.adapter)
        site = self._matcher.site(parsed.module)
        if site is None:
            raise self._no_site(name, parsed.module, parsed.role)
        if parsed.role == "copy":
            self._compare_copy(name, site)
            return
        names = self._found.setdefault(site.name, SiteTensors(site)).names
        if parsed.role in names:
            raise AdapterInvalid(f"tensors {shown(names[parsed.role])} and {shown(name)} are both for {site.module}")
        names[parsed.role] = name

    def _no_site(self, name: str, module: str, role: str) -> AdapterError:
        if role in ("copy", "bias") and self._matcher.is_other_module(module):
            return AdapterUnsupported(
                f"tensor {shown(name)} replaces a weight of the base (modules_to_save): not served yet"
            )
        if self._matcher.is_other_module(module):
            return AdapterUnsupported(f"tensor {shown(name)}: the base's {shown(module)} takes no LoRA here")
        return AdapterMismatch(f"tensor {shown(name)} is for a module that the base does not have")

    def _compare_copy(self, name: str, site: Site) -> None:
        """A copy of a base layer, as beside an embedding LoRA: dropped when equal, else a modules_to_save."""
        location = site.weight
        if location is None and site.kind == "head" and self._manifest.is_tied:
            location = next((other.weight for other in self._manifest.sites if other.kind == "embedding"), None)
        if location is None:
            raise AdapterUnsupported(
                f"tensor {shown(name)} is a copy of a base layer that is in no file to compare it with"
            )
        copy, ours = self._tensors.array(name), self._base.shape(location)
        if copy.shape != ours:
            raise AdapterMismatch(f"tensor {shown(name)} has shape {list(copy.shape)}; the base's has {list(ours)}")
        if not self._base.equals(location, copy, self._tensors.header.entry(name).dtype):
            raise AdapterUnsupported(
                f"tensor {shown(name)} is a copy of {site.module} with other values than the base's "
                "(modules_to_save), which is not served yet"
            )
        self._compiled.dropped.append(f"{name}: equal to the base's")


def _lower_sites(
    compiled: CompiledAdapter, found: dict[str, SiteTensors], lowering: LR, manifest: BaseManifest
) -> None:
    for site in manifest.sites:
        if site.name not in found:
            continue
        try:
            lowered = lowering.lower(found[site.name])
        except AdapterError as error:
            compiled.problems.append(error)
            continue
        if lowered.is_absent:
            compiled.dropped.append(f"{found[site.name].names['bias']}: equal to the base's")
        else:
            compiled.sites.append(lowered)
    if compiled.options is not None and compiled.options.ensure_weight_tying and manifest.is_tied:
        try:
            _tie_head(compiled, found, lowering, manifest)
        except AdapterError as error:
            compiled.problems.append(error)


def _tie_head(compiled: CompiledAdapter, found: dict[str, SiteTensors], lowering: LR, manifest: BaseManifest) -> None:
    """ensure_weight_tying: the head's delta is the embedding's transposed, saved beside it or not."""
    head = next((site for site in manifest.sites if site.kind == "head"), None)
    embedding = next((found[s.name] for s in manifest.sites if s.kind == "embedding" and s.name in found), None)
    if head is None or embedding is None or not _has_lora(embedding):
        return
    if head.name not in found or not _has_lora(found[head.name]):
        compiled.sites.append(lowering.lower_tied_head(head, embedding))
        rows = manifest.site_rows
        compiled.sites.sort(key=lambda lowered: rows[lowered.site.name])
    elif not lowering.is_tied(found[head.name], embedding):
        raise AdapterInvalid(
            f"{CONFIG_FILE} has ensure_weight_tying, but the LoRA of {head.module} is not the embedding's"
        )


def _check_whole(compiled: CompiledAdapter, limits: Limits, manifest: BaseManifest) -> None:
    if not compiled.sites and not compiled.problems:
        compiled.problems.append(AdapterInvalid(f"{WEIGHTS_FILE} has no tensor that adapts the base"))
    size = image_data_bytes(compiled.sites, manifest)
    if limits.max_image_bytes is not None and size > limits.max_image_bytes:
        compiled.problems.append(
            AdapterTooLarge(f"the adapter takes {size} bytes; this server's limit is {limits.max_image_bytes}")
        )
    del compiled.problems[MAX_PROBLEMS:]
