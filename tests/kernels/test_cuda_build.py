"""Building the CUDA C++ kernels: both architectures without a spill where nvcc is, and what is said where it isn't."""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.cpu.build import find_compiler
from kernels.cuda import build
from kernels.native_build import BuildError

ROOT = Path(__file__).parents[2]


def has_nvcc() -> bool:
    try:
        return bool(build.find_nvcc())
    except BuildError:
        return False


def checked(**environment: str) -> tuple[int, str]:
    """Status and output of the command that `make check` runs."""
    command = [sys.executable, "-m", "kernels.cuda.build", "--check"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=280, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.timeout(300)
def test_both_architectures_compile_and_nothing_spills():
    """Every variant of the kernel, where there is nvcc; where there is none, the command says so."""
    status, said = checked()
    assert status == 0, said
    if has_nvcc():
        assert [said.count(f"  {name} ") for name in build.ARCHITECTURES] == [8, 8]
        for variant in ("<Bf16, 16, aligned>", "<Bf16, 64, any>", "<Fp16, 64, aligned>"):
            assert said.count(variant) == 2
    else:
        assert "not compiled here, no nvcc" in said and len(said.splitlines()) == 1


def test_without_nvcc_the_check_says_so_in_a_line(monkeypatch, capsys):
    def none() -> str:
        raise BuildError("no nvcc found")

    monkeypatch.setattr(build, "find_nvcc", none)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert build.main(["--check"]) == 0
    assert capsys.readouterr().out == "CUDA C++ kernels: not compiled here, no nvcc found\n"


def test_a_folder_of_cuda_that_is_named_and_has_no_nvcc_is_an_error_of_the_check(tmp_path):
    status, said = checked(CUDA_HOME=str(tmp_path))
    assert status == 1
    assert said.splitlines() == [
        f"CUDA C++ kernels: not compiled here, no nvcc: CUDA_HOME='{tmp_path}' has no bin/nvcc; correct or unset it"
    ]


SAID = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN2ml4_GLOBAL__N_14loraINS_4Bf16ELi16ELb1EEEvNS_8LoraArgsE' for 'sm_90a'
ptxas info    : Function properties for _ZN2ml4_GLOBAL__N_14loraINS_4Bf16ELi16ELb1EEEvNS_8LoraArgsE
    {stack} bytes stack frame, {stack} bytes spill stores, {stack} bytes spill loads
ptxas info    : Used 120 registers, used 1 barriers, 6144 bytes smem
"""


@pytest.fixture
def nvcc(tmp_path, monkeypatch):
    """A stand-in in $CUDA_HOME that makes a library of nothing and notes its calls; it says what `says` holds."""
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    script = home / "bin" / "nvcc"
    script.write_text(
        "#!/bin/sh\n"
        f'[ "$1" = --version ] && {{ cat {home}/version; exit; }}\n'
        f'echo "$@" >> {home}/calls; cat {home}/says >&2\n'
        'while [ "$1" != -o ]; do shift; done\n'
        f'exec {shlex.join(find_compiler())} -shared -fPIC -o "$2" {home}/nothing.cpp\n'
    )
    (home / "nothing.cpp").write_text('extern "C" int ml_nothing() { return 7; }\n')
    script.chmod(0o755)
    for name, text in (("version", "release 13.0\n"), ("calls", ""), ("says", "")):
        (home / name).write_text(text)
    monkeypatch.setenv("CUDA_HOME", str(home))
    return home


def test_a_spill_fails_the_check(nvcc, capsys):
    (nvcc / "says").write_text(SAID.format(stack=0))
    (kernel, *_) = build.check("sm_90a")
    assert kernel == build.Kernel("lora<Bf16, 16, aligned>", 120, 0, 6144)
    (nvcc / "says").write_text(SAID.format(stack=24))
    with pytest.raises(BuildError, match=r"sm_90a spills registers: lora<Bf16, 16, aligned> 24 bytes"):
        build.check("sm_90a")
    assert build.main(["--check"]) == 1 and "spills" in capsys.readouterr().out
    (nvcc / "says").write_text("")
    with pytest.raises(BuildError, match="no kernels"):
        build.check("sm_80")


def test_the_check_treats_warnings_as_errors(nvcc):
    (nvcc / "says").write_text(SAID.format(stack=0))
    build.check("sm_80")
    build.open_library("sm_80", nvcc / "cache")
    first, second = (nvcc / "calls").read_text().splitlines()
    assert "-Werror all-warnings" in first and "-gencode=arch=compute_80,code=sm_80" in first
    assert "-Werror" not in second  # a newer compiler's warnings must not take the kernels from a user


def test_a_library_is_built_once_for_each_architecture_and_compiler(nvcc, tmp_path):
    cache = tmp_path / "cache"
    hopper = build.load((9, 0), cache)
    assert hopper.level == "sm_90a" and hopper.function("ml_nothing")() == 7
    assert build.load((9, 0), cache).path == hopper.path
    assert build.load((8, 6), cache).level == "sm_80"
    (nvcc / "version").write_text("release 13.1\n")
    assert build.load((9, 0), cache).path != hopper.path
    assert len((nvcc / "calls").read_text().splitlines()) == 3


def test_a_library_from_elsewhere_serves_without_a_compiler(nvcc, tmp_path, monkeypatch, caplog):
    cache = tmp_path / "cache"
    path = build.load((9, 0), cache).path
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with caplog.at_level(logging.INFO, "kernels.cuda.build"):
        assert build.load((9, 0), cache).path == path
    assert "has no bin/nvcc" in caplog.text and "in the cache is used" in caplog.text
    caplog.clear()
    assert build.load((8, 0), cache) is None
    assert "use triton" in caplog.text and "has no bin/nvcc" in caplog.text


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [((8, 0), "sm_80"), ((8, 9), "sm_80"), ((9, 0), "sm_90a"), ((7, 5), None), ((10, 0), None), ((12, 0), None)],
)
def test_what_a_capability_runs(nvcc, tmp_path, caplog, capability, architecture):
    assert build.architecture_of(capability) == architecture
    found = build.load(capability, tmp_path / "cache")
    if architecture is None:
        major, minor = capability
        assert found is None and f"compute capability {major}.{minor} is not supported" in caplog.text
    else:
        assert found.level == architecture


def test_an_error_ends_with_the_compilers_words(nvcc, tmp_path, caplog):
    (nvcc / "bin" / "nvcc").write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\nfor i in $(seq 40); do echo "line $i" >&2; done\nexit 3\n'
    )
    assert build.load((9, 0), tmp_path / "cache") is None
    assert "exit status 3" in caplog.text and "line 40" in caplog.text and "line 12" not in caplog.text
    assert not list((tmp_path / "cache").glob("*.so"))


def test_nvcc_is_looked_for_in_the_path_then_under_usr_local(nvcc, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", f"{nvcc / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_HOME")
    assert build.find_nvcc() == str(nvcc / "bin" / "nvcc")
    folders = [tmp_path / name / "bin" for name in ("cuda-9.2", "cuda-13.0", "cuda-12.8")]
    assert sorted(folders, key=build._version)[-1] == folders[1]
