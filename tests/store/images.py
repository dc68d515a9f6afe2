"""An adapter through the compiler to an image, and the image's delta in float64, for comparison with PEFT."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel

from adapters_store.compile.lower import COMPILER_VERSION, CompiledAdapter, compile_adapter, examine_adapter
from adapters_store.image import ImageHeader, write_image
from adapters_store.limits import Limits
from adapters_store.manifest import BaseManifest, Site
from adapters_store.numeric import ITEM_BYTES, STORED_AS, numpy_dtype, widen
from adapters_store.sources.folder import PICKLE_FILE, READ_FILES
from tests.store.bases import VOCAB, Base


def files_of(path: Path) -> dict[str, memoryview]:
    """An adapter folder as the compiler is given it."""
    found = {name: path / name for name in (*READ_FILES, PICKLE_FILE) if (path / name).exists()}
    return {name: memoryview(b"" if name == PICKLE_FILE else file.read_bytes()) for name, file in found.items()}


def compile_folder(path: Path, base: Base, limits: Limits | None = None) -> CompiledAdapter:
    return compile_adapter(files_of(path), base.manifest, limits or Limits())


def problems_of(path: Path, base: Base, limits: Limits | None = None) -> CompiledAdapter:
    return examine_adapter(files_of(path), base.manifest, limits or Limits())


@dataclass(frozen=True)
class Image:
    """An image read back from its file with nothing but the site table."""

    header: ImageHeader
    data: bytes
    manifest: BaseManifest

    def delta(self, site: Site, x: np.ndarray) -> np.ndarray:
        """What the image adds to the site's output for rows x [rows, K] (ids [rows] at the embedding)."""
        found = [entry for entry in self.header.sites if entry.site == site.name]
        y = np.zeros((len(x), site.out_features))
        for entry in found:
            if entry.rank:
                b = self.array(entry.b_offset, (site.out_features, entry.stride))
                if site.kind == "embedding":
                    hidden = self.array(entry.a_offset, (site.in_features, entry.stride))[x]
                else:
                    hidden = x @ self.array(entry.a_offset, (entry.stride, site.in_features)).T
                y += hidden[:, : entry.rank] @ b[:, : entry.rank].T
            if entry.bias_offset >= 0:
                y += self.array(entry.bias_offset, (site.out_features,))
        return y

    def array(self, offset: int, shape: tuple[int, ...]) -> np.ndarray:
        stored = STORED_AS[self.manifest.dtype]
        end = offset + int(np.prod(shape)) * ITEM_BYTES[stored]
        flat = np.frombuffer(self.data[offset:end], dtype=numpy_dtype(stored))
        return widen(flat, stored).astype(np.float64).reshape(shape)


def image_of(compiled: CompiledAdapter, base: Base, path: Path) -> Image:
    header = write_image(
        path, compiled.sites, base.manifest, image_key="k", digest="d", compiler_version=COMPILER_VERSION
    )
    return Image(header, path.read_bytes()[header.data_offset :], base.manifest)


def worst_error(model: PeftModel, image: Image, base: Base) -> float:
    """Largest difference, over all sites of the base, of image and PEFT, relative to the site's output range.

    Each site is given the input that PEFT's own forward gives it; its base output is float64 math.
    """
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    inner = model.base_model.model
    hooks = [
        inner.get_submodule(site.module).register_forward_hook(
            lambda _module, args, output, name=site.name: seen.update({name: (args[0], output)})
        )
        for site in base.manifest.sites
    ]
    ids = torch.arange(VOCAB).reshape(2, -1)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    for hook in hooks:
        hook.remove()
    pristine = base.model().double()
    return max(_site_error(site, *seen[site.name], pristine, image) for site in base.manifest.sites)


def _site_error(
    site: Site, x: torch.Tensor, peft_output: torch.Tensor, pristine: torch.nn.Module, image: Image
) -> float:
    rows = x.reshape(-1) if site.kind == "embedding" else x.reshape(-1, x.shape[-1]).double()
    with torch.no_grad():
        expected_base = pristine.get_submodule(site.module)(rows).double().numpy()
    ours = expected_base + image.delta(site, rows.numpy())
    theirs = peft_output.reshape(ours.shape).double().numpy()
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
