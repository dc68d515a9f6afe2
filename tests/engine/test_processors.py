"""The engine process binds the threads of its steps, each to a processor of its own, and no other thread."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kernels.cpu import library
from server.engine.processors import bind_team
from tests.zoo import tiny_base

ROOT = Path(__file__).parents[2]

ENGINE = """
import json, os, sys, threading
import msgspec, torch
from server.config import EngineConfig
from server.engine.start import build_core

def allowed():
    return {thread: sorted(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")}

config = EngineConfig(model=sys.argv[1], cache_dir=sys.argv[2], threads=int(sys.argv[3]), backend=sys.argv[4],
                      kv_memory=1 << 20, adapter_memory=1 << 20, host_memory=1 << 20)
core = build_core(msgspec.json.encode(config))
names = {str(thread.native_id): thread.name for thread in threading.enumerate()}
print(json.dumps({"main": str(threading.main_thread().native_id), "names": names, "allowed": allowed()}))
core.close()
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_base(folder / "model", "llama")
    return folder


def threads_of(base, *arguments, cpus):
    command = [sys.executable, "-c", ENGINE, str(base / "model"), str(base / "cache"), *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, preexec_fn=lambda: os.sched_setaffinity(0, cpus)
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def two_cpus():
    cpus = sorted(os.sched_getaffinity(0))[:2]
    assert len(cpus) == 2, "these tests need two processors"
    assert library() is not None, "these tests need a C++ compiler"
    return cpus


def test_a_processor_for_each_thread_of_the_team_and_all_for_the_others(base, two_cpus):
    found = threads_of(base, 2, "auto", cpus=two_cpus)
    main = found["main"]
    bound = {thread: cpus for thread, cpus in found["allowed"].items() if len(cpus) == 1}
    assert bound[main] == two_cpus[:1]
    assert sorted(bound.values()) == [[cpu] for cpu in two_cpus]
    ours = [thread for thread in found["names"] if thread != main]
    assert {found["names"][thread] for thread in ours} >= {"adapter-loader", "touch-ahead"}
    assert all(found["allowed"][thread] == two_cpus for thread in ours)


@pytest.mark.parametrize(("threads", "backend"), [(1, "auto"), (2, "torch")])
def test_fewer_threads_than_processors_and_torchs_own_kernels_are_left_to_the_system(base, two_cpus, threads, backend):
    found = threads_of(base, threads, backend, cpus=two_cpus)
    assert all(cpus == two_cpus for cpus in found["allowed"].values())


def test_a_single_processor_is_nothing_to_choose_from(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    assert not bind_team()
