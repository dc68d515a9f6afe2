"""Built libraries that nobody opens go after a while; those that are in use, and a build under way, stay."""

from __future__ import annotations

import os
import shutil

from kernels.cpu import build
from kernels.kept import KEPT_S, LEFT_S, MAX_GONE, note_use, sweep

NOW = 2e9


def library(cache, name: str, age_s: float) -> list:
    files = [cache / f"{name}.{ending}" for ending in ("so", "sha256", "lock")]
    for path in files:
        path.write_bytes(b"")
        os.utime(path, (NOW - age_s,) * 2)
    return files


def test_what_nobody_opened_for_long_goes(tmp_path):
    old, young, used = (
        library(tmp_path, "old", KEPT_S + 1),
        library(tmp_path, "new", KEPT_S - 1),
        library(tmp_path, "used", 9e9),
    )
    note_use(used[0], NOW)
    for name, age_s in (("build-left", LEFT_S + 1), ("build-now", LEFT_S - 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "unit.o").write_bytes(b"")
        os.utime(tmp_path / name, (NOW - age_s,) * 2)
    (tmp_path / "notes.txt").write_bytes(b"")
    os.utime(tmp_path / "notes.txt", (0, 0))
    assert sweep(tmp_path, NOW) == 1
    assert not any(path.exists() for path in old) and all(path.exists() for path in (*young, *used))
    assert {path.name for path in tmp_path.iterdir() if path.suffix not in (".so", ".sha256", ".lock")} == {
        "build-now",
        "notes.txt",
    }


def test_one_sweep_is_bounded(tmp_path):
    for number in range(MAX_GONE + 3):
        library(tmp_path, f"old{number}", KEPT_S + 1)
    assert [sweep(tmp_path, NOW) for _ in range(3)] == [MAX_GONE, 3, 0]


def test_a_library_that_is_opened_is_in_use(tmp_path):
    """Opened anew it stays, whatever its age; the library beside it that nobody opened goes."""
    sources, cache = tmp_path / "csrc", tmp_path / "cache"
    sources.mkdir()
    for name in ("team.h", "team.cpp"):
        shutil.copy(build.SOURCES / name, sources)
    first = build.open_library("portable", cache, sources).path
    other = shutil.copy(first, cache / "other.so")
    for path in (first, other):
        os.utime(path, (0, 0))
    assert build.open_library("portable", cache, sources).path == first
    assert first.exists() and not other.exists()


def test_a_library_that_is_opened_without_a_compiler_is_in_use_too(tmp_path, monkeypatch):
    opened = build.open_library("portable", tmp_path)
    os.utime(opened.path, (0, 0))
    monkeypatch.setenv("CXX", "no-such-compiler")
    for _ in range(2):
        assert build.open_library("portable", tmp_path).path == opened.path


def test_a_folder_that_is_not_there(tmp_path):
    assert sweep(tmp_path / "none", NOW) == 0
    note_use(tmp_path / "none" / "a.so", NOW)
