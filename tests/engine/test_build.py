"""Putting an engine together: what is refused, and when."""

from __future__ import annotations

import os
import stat
from typing import get_args

import msgspec
import pytest
import torch

import kernels.cpu
import kernels.triton
import server.engine.build
from kernels import ops
from server.config import EngineConfig, KernelBackend
from server.engine.build import _manifest, build
from server.engine.device import Device, open_device
from server.errors import ConfigError
from tests.device import StandIn
from tests.streams import RecordedStreams
from tests.zoo import tiny_base


def test_the_command_line_has_every_backend_and_auto():
    assert set(get_args(KernelBackend)) == {"auto", *ops.MODULES}


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_a_level_that_there_is_not_is_refused_before_the_base_is_looked_at(monkeypatch, tmp_path, backend):
    monkeypatch.setattr(kernels.cpu, "library", kernels.cpu.library.__wrapped__)
    monkeypatch.setenv("MULTILORA_CPU_KERNELS", "bogus")
    with pytest.raises(ConfigError, match="MULTILORA_CPU_KERNELS: unknown level 'bogus'"):
        build(EngineConfig(model=str(tmp_path / "none"), threads=1, backend=backend))


def test_the_cache_folder_is_for_this_user_alone(tmp_path):
    """The folder itself too, whoever makes it first."""
    before = os.umask(0o022)
    try:
        _manifest(EngineConfig(model=str(tiny_base(tmp_path / "base", "llama")), cache_dir=str(tmp_path / "cache")))
    finally:
        os.umask(before)
    folders = [path for path in (tmp_path / "cache", *(tmp_path / "cache").rglob("*")) if path.is_dir()]
    assert len(folders) > 1 and {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o700}


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:-1", "cpu:0", "mps", ""])
def test_devices_that_there_are_not(name):
    with pytest.raises(ConfigError, match=r"there are cpu, cuda and cuda:N"):
        open_device(name)


def test_why_a_gpu_can_not_be_used(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(ConfigError, match=r"--device cuda: this build of torch \(.*\) has no CUDA; .*--device cpu"):
        open_device("cuda")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no NVIDIA device, or no driver"):
        open_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="cuda:2: there are 2 CUDA devices"):
        open_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    with pytest.raises(ConfigError, match=r"Tesla T4 has compute capability 7.5, 8.0 is needed"):
        open_device("cuda:1")


def test_a_device_that_there_is_not_is_refused_before_the_base_is_looked_at(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    with pytest.raises(ConfigError, match="--device cuda"):
        build(EngineConfig(model=str(tmp_path / "none"), device="cuda", threads=1))


def test_backends_that_a_gpu_does_not_run(monkeypatch, tmp_path):
    def on_gpu(name: str) -> Device:
        return Device(torch.device(name))

    config = EngineConfig(model=str(tmp_path / "none"), device="cuda:0", threads=1)
    with pytest.raises(ConfigError, match="--backend cpu does not run on --device cuda:0"):
        build(msgspec.structs.replace(config, backend="cpu"), open_device=on_gpu)
    monkeypatch.setattr(ops, "_is_available", lambda name: name != "triton")
    with pytest.raises(ConfigError, match="--backend triton: "):
        build(config, open_device=on_gpu)


def test_the_cuda_backend_where_it_can_not_be_had(monkeypatch, tmp_path):
    config = EngineConfig(model=str(tmp_path / "none"), threads=1, backend="cuda")
    with pytest.raises(ConfigError, match=r"--backend cuda does not run on --device cpu; .*--device cuda"):
        build(config)
    monkeypatch.setattr(ops, "_is_available", lambda name: name != "cuda")
    on_gpu = Device(torch.device("cuda:0"), streams=RecordedStreams())
    with pytest.raises(ConfigError, match=r"--backend cuda: .*'cuda' does not run on this machine .*log says why"):
        build(msgspec.structs.replace(config, device="cuda:0"), open_device=lambda name: on_gpu)


@pytest.mark.parametrize(
    ("options", "num_graphs"),
    [
        ({"backend": "triton"}, 3 * 3),  # 1, 2 and 4 rows; none, 16 and 64
        ({"backend": "triton", "max_lora_rank": 8}, 3 * 2),
        ({"backend": "triton", "enforce_eager": True}, 0),
        ({"backend": "cuda"}, 3 * 3),
        ({"backend": "torch"}, 0),
    ],
)
def test_what_is_captured_at_start(monkeypatch, tmp_path, options, num_graphs):
    device = StandIn(monkeypatch)
    monkeypatch.setitem(ops.MODULES, "cuda", ops.MODULES["triton"])
    fields = {"max_num_seqs": 4, "max_step_tokens": 8, "max_lora_rank": 64, "kv_memory": 1 << 20, **options}
    base = tiny_base(tmp_path / "base", "llama", num_hidden_layers=1)
    config = EngineConfig(model=str(base), cache_dir=str(tmp_path), adapter_memory=1 << 20, threads=1, **fields)
    core = build(config, open_device=device.open)
    assert len(device.graphs) == num_graphs and all(graph.calls for graph in device.graphs)
    core.check_integrity()
    core.close()


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_gpus_kernels_do_not_run_on_the_cpu(monkeypatch, tmp_path, backend):
    """Also on a machine that has a GPU: the first step would fail."""
    monkeypatch.setattr(kernels.triton, "is_available", lambda: True)
    monkeypatch.setattr(server.engine.build, "is_interpreted", lambda: False)
    config = EngineConfig(model=str(tiny_base(tmp_path, "llama")), threads=1, backend=backend)
    with pytest.raises(ConfigError, match=f"--backend {backend} does not run on --device cpu.*use --device cuda"):
        build(config)
