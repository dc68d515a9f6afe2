"""`multilora inspect`: reports on adapter folders against a base that isn't running."""

from __future__ import annotations

from pathlib import Path

from adapters_store.inspect import AdapterReport, inspect_adapter
from adapters_store.limits import Limits
from adapters_store.sources.local import LocalSource
from server.errors import ConfigError
from server.model.manifest import build_manifest


def inspect_path(path: Path, model: Path, dtype: str, max_rank: int, cache_dir: Path) -> list[AdapterReport]:
    """The reports on `path`, an adapter folder or one with adapter folders below.

    Raises ConfigError when there is no adapter, or when `model` can't be served.
    """
    if not path.is_dir():
        raise ConfigError(f"{path}: no such folder")
    if (path / "adapter_config.json").exists():
        folders = [path]
    else:
        folders = [path / name for name in sorted(LocalSource(path).names())]
    if not folders:
        raise ConfigError(f"{path}: no adapter_config.json here or in any folder below")
    manifest = build_manifest(model, dtype, cache_dir)
    return [inspect_adapter(folder, manifest, Limits(max_rank=max_rank)) for folder in folders]
