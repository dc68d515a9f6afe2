"""The native library: built once, rebuilt when it must be, absent with one clear line, one pool of threads."""

from __future__ import annotations

import logging
import os
import shlex
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
    script.write_text(f'#!/bin/sh\necho "$@" >> {notes}\nexec {shlex.join(build.find_compiler())} "$@"\n')
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


def test_a_whole_library_is_used_where_the_cache_cannot_be_written(sources, tmp_path):
    built = build.open_library("portable", tmp_path / "cache", sources)
    lock = built.path.with_suffix(".lock")
    lock.unlink()
    lock.mkdir()  # now it opens for nobody, not even for a user to whom a folder's mode says nothing
    assert build.open_library("portable", tmp_path / "cache", sources).path == built.path
    built.path.with_suffix(".sha256").unlink()
    with pytest.raises(OSError, match="lock"):
        build.open_library("portable", tmp_path / "cache", sources)


def test_without_a_compiler_the_library_of_another_one_is_used(sources, tmp_path, monkeypatch, caplog):
    built = build.open_library("portable", tmp_path / "cache", sources)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.INFO, "kernels.cpu.build"):
        assert build.load("portable", tmp_path / "cache", sources).path == built.path
    assert "no C++ compiler" in caplog.text and {record.levelno for record in caplog.records} == {logging.INFO}
    with (sources / "team.h").open("a") as file:
        file.write("// changed\n")
    assert build.load("portable", tmp_path / "cache", sources) is None


@pytest.mark.parametrize("damage", ["truncated", "no checksum"])
def test_without_a_compiler_a_damaged_library_is_none(sources, tmp_path, monkeypatch, damage):
    path = build.open_library("portable", tmp_path / "cache", sources).path
    if damage == "truncated":
        replace(path, path.read_bytes()[:1000])
    else:
        path.with_suffix(".sha256").unlink()
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BuildError, match="no C\\+\\+ compiler"):
        build.open_library("portable", tmp_path / "cache", sources)


def test_another_compiler_and_other_arguments_build_anew(sources, tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    (compiler,) = build.find_compiler()
    script = tmp_path / "other c++"
    script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo other && exit\nexec {compiler} "$@"\n')
    script.chmod(0o755)
    paths = set()
    for asked in (compiler, f"{compiler} -O1", shlex.quote(str(script))):
        monkeypatch.setenv("CXX", asked)
        paths.add(build.open_library("portable", tmp_path / "cache", sources).path)
    assert len(paths) == 3 and len({path.name.rpartition("-")[0] for path in paths}) == 1


def test_the_compiler_may_have_arguments(sources, tmp_path, compiler_calls, monkeypatch):
    monkeypatch.setenv("CXX", f"env LANG=C '{os.environ['CXX']}'")
    assert build.open_library("portable", tmp_path / "cache", sources).function("ml_team_size")() >= 1
    assert len(compiler_calls()) == 1


@pytest.mark.parametrize(("asked", "told"), [("no-such-c++ -O1", "names 'no-such-c++'"), ("'g++", "is no command")])
def test_a_compiler_that_is_not_there_is_named_and_replaced_by_no_other(
    sources, tmp_path, monkeypatch, caplog, asked, told
):
    monkeypatch.setenv("CXX", asked)
    assert build.load("portable", tmp_path / "cache", sources) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and f"CXX={asked!r}" in record.getMessage() and told in record.getMessage()
    monkeypatch.delenv("CXX")
    built = build.open_library("portable", tmp_path / "cache", sources)
    monkeypatch.setenv("CXX", asked)
    caplog.clear()
    assert build.load("portable", tmp_path / "cache", sources).path == built.path
    assert told in caplog.text and "WARNING" in caplog.text


def test_a_compiler_that_makes_nothing_is_told_of(sources, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "true")
    with pytest.raises(BuildError, match=r"true .*team\.cpp.* ended with exit status 0 and made no team\.o"):
        build.open_library("portable", tmp_path / "cache", sources)


def test_the_openmp_runtime_is_found_in_a_path_with_spaces(tmp_path):
    row = "7f00-7f01 r-xp 00000000 fe:00 131                        "
    maps = tmp_path / "maps"
    maps.write_text(
        f"{row}/my venv/torch.libs/libgomp-98b.so.1\n{row}/libgomp/libother.so\n7f02-7f03 rw-p 0 00:00 0 \n"
    )
    assert build._openmp(maps) == [Path("/my venv/torch.libs/libgomp-98b.so.1")]
    maps.write_text("7f02-7f03 rw-p 00000000 00:00 0 \n")
    assert build._openmp(maps) == ["-lgomp"]


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
    with pytest.raises(ValueError, match=r"MULTILORA_CPU_KERNELS: .*avx9.*portable, avx512, amx, .*none"):
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
    assert os.access(build.find_compiler()[0], os.X_OK)
