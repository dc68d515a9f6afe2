"""Never another adapter's answer, never stale KV: 2,000 requests under everything at once, and 200 on the demo base."""

from __future__ import annotations

import pytest

from server.demo import ensure_demo_base
from tests.e2e.isolation import Oracle, World, one_thread
from tests.zoo import tiny_base


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny fp32 base, 24 contents, and the oracle's answers."""
    one_thread()
    root = tmp_path_factory.mktemp("isolation")
    base = tiny_base(root / "base", "llama", num_hidden_layers=2)
    oracle = Oracle.build(base, root / "contents", contents=24, prompts=16, num_tokens=24, scale=1.0)
    assert oracle.share_distinct > 0.9
    return base, oracle


def tiny_world(tiny, root, seed, **config) -> World:
    """16 names over an arena for a quarter of them, and KV blocks for about a third of the open requests."""
    base, oracle = tiny
    options = {
        "adapter_memory": 4 * 96 * 1024,
        "block_size": 4,
        "kv_memory": 64 * 4 * (2 * 2 * 2 * 16 * 4),  # 64 blocks of 4 positions: layers, k|v, heads, dim, fp32
        "max_num_seqs": 24,
        "max_step_tokens": 96,
        "max_adapters_per_step": 6,
        "threads": 1,
        **config,
    }
    return World(oracle, base, root, names=16, seed=seed, **options)


def test_two_thousand_requests(tiny, tmp_path):
    world = tiny_world(tiny, tmp_path, seed=1)
    counts = world.run(2000, max_open=32)
    stats = world.driver.core.step().stats
    world.driver.assert_nothing_leaked()
    world.close()
    assert counts.wrong == 0, counts
    # it was the storm it claims to be
    assert counts.compared > 1500 and counts.aborted > 50 and counts.failed < 200, counts
    assert counts.replacements > 20 and counts.unloads > 20 and counts.removals > 5, counts
    assert stats.adapter_evictions > 100 and stats.preemptions > 20 and stats.prefix_hits > 300, stats


def test_demo_base(tmp_path_factory, tmp_path):
    root = tmp_path_factory.mktemp("isolation-demo")
    base = ensure_demo_base()
    oracle = Oracle.build(base, root / "contents", contents=8, prompts=4, num_tokens=6, scale=0.5)
    assert oracle.share_distinct > 0.7
    world = World(
        oracle,
        base,
        tmp_path,
        names=8,
        seed=2,
        adapter_memory=24 << 20,
        kv_memory=24 << 20,
        max_num_seqs=16,
        max_step_tokens=128,
        max_adapters_per_step=4,
    )
    counts = world.run(200, max_open=16)
    stats = world.driver.core.step().stats
    world.driver.assert_nothing_leaked()
    world.close()
    assert counts.wrong == 0, counts
    assert counts.compared > 140 and stats.adapter_evictions > 10 and stats.prefix_hits > 100, (counts, stats)
