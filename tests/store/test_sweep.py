"""What an earlier compiler left on disk goes at start, and nothing else."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path

import msgspec
import pytest

from adapters_store import sweep
from adapters_store.disk import DiskImages
from adapters_store.image import write_image
from adapters_store.lru import lock_folder
from adapters_store.manifest import write_manifest
from adapters_store.sweep import MANIFEST_SUFFIX, scope_of, sweep_other_compilers
from tests.store.images import compile_folder

NOW, BEFORE = 7, 6


@pytest.fixture(scope="module")
def sites(base, plain_adapter):
    return compile_folder(plain_adapter, base).sites


@pytest.fixture
def cache(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    return tmp_path


def image(cache: Path, sites, base, content: str, compiler: int, used_at: float = 1.0) -> Path:
    key = hashlib.sha256(content.encode()).hexdigest()
    path = cache / "images" / f"{key}.safetensors"
    write_image(path, sites, base.manifest, image_key=key, digest="d", compiler_version=compiler)
    os.utime(path, (used_at, used_at))
    return path


def index(cache: Path, manifest, compiler: int) -> Path:
    """The index of one base and compiler, with one entry."""
    scope = scope_of(manifest.digest, compiler, manifest.dtype)
    (cache / "index" / scope).mkdir(parents=True)
    (cache / "index" / scope / "entry.json").write_text("{}")
    write_manifest(manifest, cache / "index" / f"{scope}{MANIFEST_SUFFIX}")
    return cache / "index" / scope


def test_images_and_indexes_of_another_compiler_go(cache, sites, base):
    old = [image(cache, sites, base, f"old{number}", BEFORE, number) for number in range(3)]
    new = [image(cache, sites, base, f"new{number}", NOW, number) for number in range(3)]
    newer = image(cache, sites, base, "newer", NOW + 1)
    strangers = [cache / "images" / name for name in ("junk.safetensors", f"{'0' * 64}.safetensors", "a.txt")]
    for path in strangers:
        path.write_bytes(b"no image")
    other_base = msgspec.structs.replace(base.manifest, digest="another")
    kept = [index(cache, manifest, NOW) for manifest in (base.manifest, other_base)]
    gone = index(cache, base.manifest, BEFORE)
    unreadable = cache / "index" / f"{'f' * 16}{MANIFEST_SUFFIX}"
    unreadable.write_text("{}")
    assert sweep_other_compilers(cache, NOW) == 4
    assert not any(path.exists() for path in (*old, newer, gone, unreadable))
    assert not Path(f"{gone}{MANIFEST_SUFFIX}").exists()
    assert all(path.exists() for path in (*new, *strangers, *kept)) and all(list(folder.iterdir()) for folder in kept)


@pytest.mark.parametrize("has_quota", [False, True])
def test_nothing_goes_while_another_server_has_the_folder(cache, sites, base, has_quota):
    old = image(cache, sites, base, "old", BEFORE)
    other = DiskImages(cache, 1 << 30 if has_quota else None)
    assert sweep_other_compilers(cache, NOW) == 0 and old.exists()
    other.close()
    assert sweep_other_compilers(cache, NOW) == 1 and not old.exists()
    DiskImages(cache, 1 << 30).close()  # the folder is free again


def test_a_sweep_looks_at_few_images_that_are_to_stay(cache, sites, base, monkeypatch):
    monkeypatch.setattr(sweep, "MAX_IN_A_ROW", 2)
    first = image(cache, sites, base, "first", BEFORE, 1.0)
    images = [image(cache, sites, base, f"new{number}", NOW, 2.0 + number) for number in range(2)]
    late = image(cache, sites, base, "late", BEFORE, 9.0)
    read = []
    monkeypatch.setattr(
        sweep, "read_header", lambda path, header=sweep.read_header: (read.append(path), header(path))[1]
    )
    assert sweep_other_compilers(cache, NOW) == 1
    assert read == [first, *images] and not first.exists() and late.exists()
    monkeypatch.setattr(sweep, "MAX_S", -1.0)
    assert sweep_other_compilers(cache, NOW) == 0


def test_a_folder_that_is_not_there(tmp_path):
    assert sweep_other_compilers(tmp_path / "none", NOW) == 0 and not (tmp_path / "none").exists()


def test_a_server_that_starts_while_another_sweeps_waits_for_it(cache):
    lock = lock_folder(cache, exclusive=True)
    threading.Thread(target=lambda: (time.sleep(0.1), os.close(lock))).start()
    DiskImages(cache).close()
    lock = lock_folder(cache, exclusive=True)
    with pytest.raises(OSError, match="in use by another server"):
        lock_folder(cache, exclusive=False, patience_s=0.05)
    os.close(lock)
