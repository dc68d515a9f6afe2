"""Class LR: y += B(Ax) + bias, with every scale folded into B and bias (PEFT tuners/lora/layer.py).

linear, head   s·B (A x) + s·b_lora + (b_trained − b_base)
embedding      c·s·B A[:, id]                        c: what the module multiplies its output by
tied head      s·A_embᵀ (B_embᵀ h)                   ensure_weight_tying, when only the embedding is saved
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from adapters_store.compile.base import BaseWeights
from adapters_store.compile.names import Role
from adapters_store.compile.parse import LoraOptions, Scale
from adapters_store.errors import AdapterInvalid, AdapterMismatch, AdapterTooLarge, AdapterUnsupported
from adapters_store.limits import Limits
from adapters_store.manifest import BaseManifest, Site
from adapters_store.numeric import STORED_AS, Array, F32Array, is_finite, narrow, numpy_dtype, widen
from adapters_store.sources.folder import CONFIG_FILE
from adapters_store.tensorfile import TensorFile, shown


@dataclass(slots=True)
class LoweredSite:
    """The delta of one site in the base's dtype (bfloat16 as uint16), true rank, scales folded."""

    site: Site
    rank: int = 0
    """0 with a bias: a trained bias where no LoRA is"""
    a: Array | None = None  # [rank, K]; an embedding's [V, rank]
    b: Array | None = None  # [N, rank]
    bias: Array | None = None  # [N]

    @property
    def is_absent(self) -> bool:
        return self.rank == 0 and self.bias is None


@dataclass(slots=True)
class SiteTensors:
    """The tensor names that an adapter file has for one site, by role."""

    site: Site
    names: dict[Role, str] = field(default_factory=dict)


class LR:
    """Lowers the tensors of one LoRA file, site by site."""

    def __init__(
        self,
        options: LoraOptions,
        scales: Mapping[str, Scale],
        tensors: TensorFile,
        manifest: BaseManifest,
        base: BaseWeights,
        limits: Limits,
    ) -> None:
        self._options = options
        self._scales = scales  # of every module path of the base
        self._tensors = tensors
        self._stored = STORED_AS[manifest.dtype]
        self._base_dtype = manifest.dtype
        self._base = base
        self._limits = limits

    def lower(self, found: SiteTensors) -> LoweredSite:
        """The delta of one site; the first thing wrong with it as an AdapterError."""
        lowered = LoweredSite(found.site)
        a_role, b_role = _factor_roles(found)
        if a_role in found.names or b_role in found.names:
            self._lower_factors(lowered, found, a_role, b_role)
        elif "B.bias" in found.names:
            raise AdapterInvalid(f"tensor {shown(found.names['B.bias'])} has no lora_A and lora_B beside it")
        delta = self._bias(found, lowered.rank)
        if delta is not None and delta.any():
            lowered.bias = self._cast(delta, f"the bias of {found.site.module}")
        return lowered

    def lower_tied_head(self, head: Site, embedding: SiteTensors) -> LoweredSite:
        """The head's delta of an adapter whose embedding LoRA is tied to it (PEFT's ensure_weight_tying)."""
        a, b = self._wide_factors(embedding, "embedding_A", "embedding_B")
        rank = a.shape[0]
        scale = self._scale(head, rank)
        return LoweredSite(head, rank, self._cast(b.T, "lora_embedding_B"), self._cast(a.T * scale, "lora_embedding_A"))

    def is_tied(self, head: SiteTensors, embedding: SiteTensors) -> bool:
        """Whether the head's own factors are the embedding's, transposed."""
        a, b = self._wide_factors(embedding, "embedding_A", "embedding_B")
        head_a, head_b = self._wide_factors(head, "A", "B")
        return np.array_equal(head_a, b.T) and np.array_equal(head_b, a.T)

    def _lower_factors(self, lowered: LoweredSite, found: SiteTensors, a_role: Role, b_role: Role) -> None:
        site = found.site
        a, b = self._factors(found, a_role, b_role)
        lowered.rank = a.shape[0]
        scale = self._scale(site, lowered.rank)
        if site.kind == "embedding":
            a, scale = a.T, scale * np.float32(site.output_scale)
        lowered.a = self._scaled(found.names[a_role], a, np.float32(1))
        lowered.b = self._scaled(found.names[b_role], b, scale)

    def _wide_factors(self, found: SiteTensors, a_role: Role, b_role: Role) -> tuple[F32Array, F32Array]:
        """A [r, K] and B [N, r] as float32, checked."""
        self._factors(found, a_role, b_role)
        return self._read(found.names[a_role]), self._read(found.names[b_role])

    def _factors(self, found: SiteTensors, a_role: Role, b_role: Role) -> tuple[Array, Array]:
        """A [r, K] and B [N, r] as they are stored, checked against the site and the config."""
        site = found.site
        for role, other in ((a_role, b_role), (b_role, a_role)):
            if role not in found.names:
                raise AdapterInvalid(f"tensor {shown(found.names[other])} has no {_LABELS[role]} beside it")
        a_name, b_name = found.names[a_role], found.names[b_role]
        a, b = self._tensors.array(a_name), self._tensors.array(b_name)
        if a.ndim != 2 or a.shape[1] != site.in_features:
            raise _wrong_shape(a_name, a, f"[r, {site.in_features}]", site)
        if b.ndim != 2 or b.shape[0] != site.out_features:
            raise _wrong_shape(b_name, b, f"[{site.out_features}, r]", site)
        if a.shape[0] != b.shape[1]:
            raise AdapterInvalid(
                f"tensors {shown(a_name)} {list(a.shape)} and {shown(b_name)} {list(b.shape)} differ in rank"
            )
        self._check_rank(site, a_name, a.shape[0])
        return a, b

    def _check_rank(self, site: Site, name: str, rank: int) -> None:
        if rank == 0:
            raise AdapterInvalid(f"tensor {shown(name)} is empty: the shards of a ZeRO-3 run were not gathered")
        if rank > self._limits.max_rank:
            raise AdapterTooLarge(
                f"tensor {shown(name)} has rank {rank}; this server's limit is {self._limits.max_rank}"
            )
        scale = self._scales[site.module]
        if scale.rank != rank:
            raise AdapterInvalid(
                f"tensor {shown(name)} has rank {rank}; {CONFIG_FILE} says {scale.rank_from} = {scale.rank}"
            )

    def _scale(self, site: Site, rank: int) -> np.float32:
        with np.errstate(over="ignore"):  # an infinite scale is found where it is applied
            return np.float32(self._options.factor(self._scales[site.module].alpha, rank))

    def _bias(self, found: SiteTensors, rank: int) -> F32Array | None:
        """What the adapter adds to the site's output whatever the input: lora_bias and the trained bias."""
        terms = []
        if "B.bias" in found.names:
            if not self._options.lora_bias:
                raise AdapterInvalid(
                    f"tensor {shown(found.names['B.bias'])} is there, but {CONFIG_FILE} has no lora_bias"
                )
            terms.append(self._vector(found, "B.bias") * self._scale(found.site, rank))
        elif self._options.lora_bias and "B" in found.names:
            raise AdapterInvalid(f"{CONFIG_FILE} has lora_bias, but {shown(found.names['B'])} has no bias beside it")
        if "bias" in found.names:
            served = self._base_bias(found)
            terms.append(self._vector(found, "bias") - served)
        return np.add.reduce(terms, dtype=np.float32) if terms else None

    def _base_bias(self, found: SiteTensors) -> F32Array:
        """The base's bias as it is while serving: rounded to the serving dtype."""
        site = found.site
        if not site.has_bias:
            raise AdapterMismatch(
                f"tensor {shown(found.names['bias'])} is a trained bias; {site.module} has none in the base"
            )
        if site.bias is None:
            raise AdapterUnsupported(
                f"tensor {shown(found.names['bias'])} replaces a base's bias that is in no safetensors file"
            )
        return widen(narrow(self._base.float32(site.bias), self._stored), self._stored)

    def _vector(self, found: SiteTensors, role: Role) -> F32Array:
        name = found.names[role]
        vector = self._read(name)
        if vector.shape != (found.site.out_features,):
            raise _wrong_shape(name, vector, f"[{found.site.out_features}]", found.site)
        return vector

    def _read(self, name: str) -> F32Array:
        array = self._tensors.array(name)
        self._check_finite(name, array)
        return widen(array, self._tensors.header.entry(name).dtype)

    def _check_finite(self, name: str, array: Array) -> None:
        if not is_finite(array, self._tensors.header.entry(name).dtype):
            raise AdapterInvalid(f"tensor {shown(name)} has NaN or infinite values")

    def _scaled(self, name: str, array: Array, scale: np.float32) -> Array:
        """Elements of a tensor times `scale` in the serving dtype, rounded once; the stored ones where that is none.

        AdapterInvalid when they are not finite, or become so there.
        """
        stored = self._tensors.header.entry(name).dtype
        if stored == self._stored and scale == 1:
            self._check_finite(name, array)
            return array
        values = widen(array, stored)
        cast = narrow(values if scale == 1 else values * scale, self._stored)
        if not is_finite(cast, self._stored):
            self._check_finite(name, array)
            raise self._overflow(f"tensor {shown(name)}" + ("" if scale == 1 else f" times its scale {scale:g}"))
        return cast.astype(numpy_dtype(self._stored), copy=False)

    def _cast(self, values: F32Array, what: str) -> Array:
        """Round once to the serving dtype; AdapterInvalid when a value becomes infinite there."""
        cast = narrow(values, self._stored)
        if not is_finite(cast, self._stored):
            raise self._overflow(what)
        return cast.astype(numpy_dtype(self._stored), copy=False)

    def _overflow(self, what: str) -> AdapterInvalid:
        return AdapterInvalid(f"{what} has values that {self._base_dtype} can't hold")


_LABELS: dict[Role, str] = {
    "A": "lora_A",
    "B": "lora_B",
    "embedding_A": "lora_embedding_A",
    "embedding_B": "lora_embedding_B",
}


def _factor_roles(found: SiteTensors) -> tuple[Role, Role]:
    """The two roles that fit the kind of site; AdapterMismatch when the file has the other kind's."""
    linear: tuple[Role, Role] = ("A", "B")
    embedding: tuple[Role, Role] = ("embedding_A", "embedding_B")
    ours, others = (embedding, linear) if found.site.kind == "embedding" else (linear, embedding)
    for role in (*others, *(("B.bias",) if ours is embedding else ())):
        if role in found.names:
            raise AdapterMismatch(
                f"tensor {shown(found.names[role])} does not fit {found.site.module}, "
                f"which is {'an embedding' if ours is embedding else 'a linear layer'} in the base"
            )
    return ours


def _wrong_shape(name: str, array: Array | F32Array, expected: str, site: Site) -> AdapterMismatch:
    return AdapterMismatch(
        f"tensor {shown(name)} has shape {list(array.shape)}; the base's {site.module} takes {expected}"
    )
