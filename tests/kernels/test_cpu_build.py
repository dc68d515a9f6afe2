"""The native library: built once, rebuilt when it must be, absent with one clear line, one pool of threads."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.cpu import build
from kernels.cpu.build import BuildError


@pytest.fixture
def sources(tmp_path):
    """A small copy of the sources: the team alone."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    for name in ("team.h", "team.cpp"):
        shutil.copy(build.SOURCES / name, folder)
    return folder


@pytest.fixture
def compiler_calls(tmp_path, monkeypatch):
    """CXX is a script that notes its arguments, then compiles; the returned function gives the units compiled."""
    notes, script = tmp_path / "calls", tmp_path / "noting-c++"
    script.write_text(f'#!/bin/sh\necho "$@" >> {notes}\nexec {build.find_compiler()} "$@"\n')
    script.chmod(0o755)
    notes.touch()
    monkeypatch.setenv("CXX", str(script))
    return lambda: [line for line in notes.read_text().splitlines() if " -c " in line]


def replace(path: Path, content: bytes) -> None:
    """A new file in the path's place; one that is mapped already stays as it is."""
    path.unlink()
    path.write_bytes(content)


def test_a_second_load_compiles_nothing(sources, tmp_path, compiler_calls):
    first = build.open_library("portable", tmp_path / "cache", sources)
    assert len(compiler_calls()) == 1
    second = build.open_library("portable", tmp_path / "cache", sources)
    assert second.path == first.path and len(compiler_calls()) == 1


@pytest.mark.parametrize("name", ["team.h", "team.cpp"])
def test_a_changed_source_is_built_again(sources, tmp_path, compiler_calls, name):
    first = build.open_library("portable", tmp_path / "cache", sources)
    with (sources / name).open("a") as file:
        file.write("// changed\n")
    second = build.open_library("portable", tmp_path / "cache", sources)
    assert second.path != first.path and len(compiler_calls()) == 2


def test_levels_have_libraries_of_their_own(sources, tmp_path):
    levels = [level for level in build.LEVELS if build.is_supported(level)]
    paths = {build.open_library(level, tmp_path / "cache", sources).path for level in levels}
    assert len(paths) == len(levels)


@pytest.mark.parametrize("damage", ["truncated", "empty", "one byte", "no checksum"])
def test_a_damaged_library_is_built_again(sources, tmp_path, compiler_calls, damage):
    path = build.open_library("portable", tmp_path / "cache", sources).path
    whole = path.read_bytes()
    if damage == "no checksum":
        path.with_suffix(".sha256").unlink()
    else:
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        replace(path, {"truncated": whole[:middle], "empty": b"", "one byte": flipped}[damage])
    library = build.open_library("portable", tmp_path / "cache", sources)
    assert len(compiler_calls()) == 2
    assert library.function("ml_team_size")() >= 1


def test_no_compiler_is_one_warning_and_no_library(sources, tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.INFO, "kernels.cpu.build"):
        assert build.load("portable", tmp_path / "cache", sources) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "no C++ compiler found (looked for c++, g++, clang++)" in record.getMessage()
    assert "torch's kernels are used" in record.getMessage()


def test_an_error_ends_with_the_compilers_words(sources, tmp_path, caplog):
    (sources / "broken.cpp").write_text("int broken( { return undeclared_name; }\n")
    with pytest.raises(BuildError, match=r"broken\.cpp(.|\n)*error"):
        build.open_library("portable", tmp_path / "cache", sources)
    assert build.load("portable", tmp_path / "cache", sources) is None
    assert not list((tmp_path / "cache").glob("*.so")) and not list((tmp_path / "cache").glob("build-*"))


def test_an_undefined_function_is_an_error_of_the_build(sources, tmp_path):
    (sources / "more.cpp").write_text('void nowhere(); extern "C" void ml_more() { nowhere(); }\n')
    with pytest.raises(BuildError, match="nowhere"):
        build.open_library("portable", tmp_path / "cache", sources)


def test_a_compiler_that_hangs_is_stopped(sources, tmp_path, monkeypatch):
    script = tmp_path / "slow-c++"
    script.write_text('#!/bin/sh\n[ "$1" = --version ] && echo slow && exit\nexec sleep 60\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    monkeypatch.setattr(build, "BUILD_TIMEOUT_S", 0.5)
    with pytest.raises(BuildError, match="took more than"):
        build.open_library("portable", tmp_path / "cache", sources)


def test_a_cache_that_cannot_be_written_is_no_library(sources, tmp_path, caplog):
    (tmp_path / "file").touch()
    assert build.load("portable", tmp_path / "file" / "cache", sources) is None
    assert "torch's kernels are used" in caplog.text


def test_two_processes_build_once(sources, tmp_path, compiler_calls):
    program = (
        "import sys; from pathlib import Path; from kernels.cpu.build import open_library;"
        "print(open_library('portable', Path(sys.argv[1]), Path(sys.argv[2])).path)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "cache"), str(sources)]
    root = Path(__file__).parents[2]
    processes = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert outputs[0] == outputs[1] and len(compiler_calls()) == 1


def test_what_was_asked_for_is_what_is_loaded(sources, tmp_path, monkeypatch, caplog):
    with caplog.at_level(logging.INFO, "kernels.cpu.build"):
        monkeypatch.setenv("MULTILORA_CPU_KERNELS", "portable")
        assert build.load(None, tmp_path / "cache", sources).level == "portable"
        assert "building" in caplog.records[0].getMessage()
        assert "level portable" in caplog.records[-1].getMessage()
        monkeypatch.setenv("MULTILORA_CPU_KERNELS", "none")
        assert build.load(None, tmp_path / "cache", sources) is None
        assert "torch's kernels are used" in caplog.records[-1].getMessage()
        assert len(caplog.records) == 3
    monkeypatch.setenv("MULTILORA_CPU_KERNELS", "avx9")
    with pytest.raises(ValueError, match=r"avx9.*portable, avx512, amx, amx-emulated and none"):
        build.load(None, tmp_path / "cache", sources)
    monkeypatch.delenv("MULTILORA_CPU_KERNELS")
    assert build.load(None, tmp_path / "cache", sources).level == build.best_level()


AVX512 = "fpu avx2 fma bmi2 avx512f avx512bw avx512vl avx512dq avx512_bf16"


@pytest.mark.parametrize(
    ("flags", "may_use_tiles", "level"),
    [
        ("fpu sse2", True, "portable"),
        (AVX512.replace(" avx512_bf16", ""), True, "portable"),
        (AVX512, True, "avx512"),
        (AVX512 + " amx_tile amx_bf16", True, "amx"),
        (AVX512 + " amx_tile amx_bf16", False, "avx512"),
        (AVX512 + " amx_tile", True, "avx512"),
    ],
)
def test_the_level_follows_the_processors_features(monkeypatch, tmp_path, flags, may_use_tiles, level):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: other\n")
    features = build.cpu_features(cpuinfo)
    monkeypatch.setattr(build, "cpu_features", lambda: features)
    monkeypatch.setattr(build, "_may_use_tiles", lambda: may_use_tiles)
    monkeypatch.setattr(build.platform, "machine", lambda: "x86_64")
    assert build.best_level() == level
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    assert build.best_level() == "portable"


def test_a_level_that_the_machine_lacks_is_refused_with_a_line(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(build, "cpu_features", set)
    assert build.load("avx512", tmp_path) is None
    assert "does not run level avx512" in caplog.text


def test_the_pool_of_threads_is_torchs(sources, tmp_path):
    library = build.open_library("portable", tmp_path / "cache", sources)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert library.function("ml_team_size")() == count
    finally:
        torch.set_num_threads(threads)
    maps = Path("/proc/self/maps").read_text().splitlines()
    assert len({line.split()[-1] for line in maps if "libgomp" in line}) == 1


def test_this_machine_has_a_compiler():
    """What the other tests of native kernels need: without it they would be missing, not failing."""
    assert os.access(build.find_compiler(), os.X_OK)
