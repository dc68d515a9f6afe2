"""Never another adapter's answer where a device runs the steps: graphs, copies beside the steps, two steps in flight.

The device is a stand-in (tests/device.py): its graphs know nothing of Python, its copies happen as late as they may.
"""

from __future__ import annotations

import pytest
import torch

from server.adapters import memory
from server.engine.messages import StepStats
from server.model.graphs import GraphForward
from tests.device import StandIn
from tests.e2e.isolation import Counts, Oracle, World, one_thread
from tests.zoo import tiny_base


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    one_thread()
    root = tmp_path_factory.mktemp("isolation-device")
    base = tiny_base(root / "base", "llama", num_hidden_layers=2)
    oracle = Oracle.build(base, root / "contents", contents=10, prompts=8, num_tokens=14, scale=1.0)
    assert oracle.share_distinct > 0.9
    return base, oracle


def world_of(tiny, root, seed: int, **config) -> World:
    """12 names over an arena for a few of them, and KV blocks for a third of the open requests."""
    base, oracle = tiny
    options = {
        "backend": "triton",
        "adapter_memory": 2 * 96 * 1024,
        "block_size": 4,
        "kv_memory": 28 * 4 * (2 * 2 * 2 * 16 * 4),  # 28 blocks of 4 positions: layers, k|v, heads, dim, fp32
        "max_num_seqs": 20,
        "max_step_tokens": 96,
        "max_adapters_per_step": 6,
        "max_lora_rank": 64,
        "max_queue_wait_s": 600.0,  # a busy machine is no fault here
        "threads": 1,
        **config,
    }
    return World(oracle, base, root, names=12, seed=seed, **options)


def check(counts: Counts, stats: StepStats) -> None:
    print(counts, stats)
    assert counts.wrong == 0, counts
    # it was the storm it claims to be
    assert counts.compared > 140 and counts.aborted > 5 and counts.failed < 30, counts
    assert stats.adapter_evictions > 10 and stats.preemptions > 0, stats


@pytest.mark.parametrize(("steps_in_flight", "host_memory"), [(2, 0), (1, 6 * 96 * 1024)])
def test_a_storm_over_graphs(tiny, tmp_path, monkeypatch, steps_in_flight, host_memory):
    """Loads, evictions, moves, replacements, preemptions and aborts between replays: 0 wrong, 0 races."""
    monkeypatch.setattr(memory, "STAGING_BYTES", 20_000)
    monkeypatch.setattr(memory, "SCRATCH_BYTES", 8192)
    device = StandIn(monkeypatch)
    options = {"steps_in_flight": steps_in_flight, "host_memory": host_memory, "open_device": device.open}
    world = world_of(tiny, tmp_path, 6 + steps_in_flight, **options)
    core = world.driver.core
    assert isinstance(core._runner._forward, GraphForward)
    device.watch(core)
    counts = world.run(600, max_open=28)
    stats = core.step().stats
    device.streams.drain()
    world.driver.assert_nothing_leaked()
    world.close()
    check(counts, stats)
    assert core.slots.moved_bytes > 0 and (stats.host_hits > 10) == bool(host_memory), stats
    assert device.replays > 100 and device.streams.given.count("load") > 30, device.replays


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs where torch sees an NVIDIA GPU")
@pytest.mark.parametrize("host_memory", [0, 6 * 96 * 1024])
def test_a_storm_on_a_gpu(tiny, tmp_path, host_memory):
    """The same with real streams, graphs and kernels."""
    world = world_of(tiny, tmp_path, 9, device="cuda", host_memory=host_memory)
    core = world.driver.core
    assert isinstance(core._runner._forward, GraphForward)
    counts = world.run(400, max_open=28)
    stats = core.step().stats
    world.driver.assert_nothing_leaked()
    world.close()
    check(counts, stats)
