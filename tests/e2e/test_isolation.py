"""Never another adapter's answer, never stale KV: 2,000 requests under everything at once, and 250 on the demo base."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters_store.cpus import available_cpus
from server.demo import ensure_demo_base
from server.engine.messages import SamplingParams
from server.model.forward import NativeForward
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
    """16 names over an arena for less than a quarter of them, and KV blocks for about a third of the open requests."""
    base, oracle = tiny
    options = {
        "adapter_memory": 5 * 48 * 1024,
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
    counts = world.run(2000, max_open=32, disturbances=0.1)
    stats = world.driver.core.step().stats
    world.driver.assert_nothing_leaked()
    world.close()
    print(counts, stats)
    assert counts.wrong == 0, counts
    # it was the storm it claims to be
    assert counts.compared > 1500 and counts.aborted > 50 and counts.failed < 200, counts
    assert counts.replacements > 20 and counts.unloads > 20 and counts.removals > 5, counts
    assert stats.adapter_evictions > 100 and stats.preemptions > 20 and stats.prefix_hits > 300, stats


def test_with_a_step_scheduled_while_another_runs(tiny, tmp_path):
    """The same storm where rows follow draws that are not collected, as on a GPU."""
    world = tiny_world(tiny, tmp_path, seed=5, steps_in_flight=2, kv_memory=48 * 4 * (2 * 2 * 2 * 16 * 4))
    counts = world.run(700, max_open=32, disturbances=0.1)
    stats = world.driver.core.step().stats
    world.driver.assert_nothing_leaked()
    world.close()
    print(counts, stats)
    assert counts.wrong == 0, counts
    assert counts.compared > 500 and counts.aborted > 15 and counts.replacements > 5 and counts.unloads > 5, counts
    assert stats.adapter_evictions > 30 and stats.preemptions > 5 and stats.prefix_hits > 100, stats


def test_two_thousand_requests_in_bf16(tiny, tmp_path):
    """The native pass: each answer bit for bit what the same request gets alone, which is PEFT's but for near-ties."""
    base, exact = tiny
    config = {"dtype": "bfloat16", "threads": 1, "backend": "cpu"}
    oracle = exact.alone(base, tmp_path / "alone", **config)
    assert oracle.agreement(exact) > 0.9 and oracle.share_distinct > 0.9
    halves = {"adapter_memory": 5 * 24 * 1024, "kv_memory": 64 * 4 * (2 * 2 * 2 * 16 * 2)}
    world = tiny_world((base, oracle), tmp_path, seed=4, **config, **halves)
    assert isinstance(world.driver.core._runner._forward, NativeForward)
    counts = world.run(2000, max_open=32, disturbances=0.1)
    stats = world.driver.core.step().stats
    world.driver.assert_nothing_leaked()
    world.close()
    print(counts, stats)
    assert counts.wrong == 0, counts
    assert counts.compared > 1500 and counts.aborted > 50 and counts.failed < 200, counts
    assert counts.replacements > 20 and counts.unloads > 20 and counts.removals > 5, counts
    assert stats.adapter_evictions > 100 and stats.preemptions > 20 and stats.prefix_hits > 300, stats


@pytest.mark.timeout(900)
def test_demo_base(tmp_path_factory, tmp_path):
    torch.set_num_threads(available_cpus())
    root = tmp_path_factory.mktemp("isolation-demo")
    base = ensure_demo_base()
    oracle = Oracle.build(base, root / "contents", contents=8, prompts=4, num_tokens=8, scale=0.5, stem_tokens=8)
    assert oracle.share_distinct > 0.7
    world = World(
        oracle,
        base,
        tmp_path,
        names=8,
        seed=2,
        adapter_memory=16 << 20,  # less than half of the contents
        kv_memory=2 << 20,
        block_size=2,
        max_num_seqs=16,
        max_step_tokens=128,
        max_adapters_per_step=4,
        max_queue_wait_s=600.0,  # a busy machine is no fault here
    )
    counts = world.run(250, max_open=32, disturbances=0.2)
    stats = world.driver.core.step().stats
    world.driver.assert_nothing_leaked()
    world.close()
    print(counts, stats)
    assert counts.wrong == 0, counts
    assert counts.compared > 175 and counts.aborted > 5 and counts.replacements > 5, counts
    assert stats.adapter_evictions > 10 and stats.prefix_hits > 50 and stats.preemptions > 0, stats


def test_an_overflowing_adapter_fails_alone(tiny, tmp_path):
    """Weights that become infinite on the way: that request ends with an error, its neighbours with their answers."""
    _, oracle = tiny
    world = tiny_world(tiny, tmp_path, seed=3)
    folder = world.served / "overflow"
    shutil.copytree(oracle.contents[0].path, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name: tensor.float().fill_(3e37) for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    driver = world.driver
    params = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    ids = [driver.submit(oracle.prompts[0], name, params) for name in (None, "overflow", None, world.names[0])]
    answers = driver.finish(ids)
    failed = answers[ids[1]]
    assert failed.finish_reason == "error" and failed.error.code == "not_finite" and not failed.token_ids
    own = oracle.answers[world.content_of[world.names[0]].name, 0][:6]
    assert [answers[i].token_ids for i in (ids[0], ids[2], ids[3])] == [oracle.answers[None, 0][:6]] * 2 + [own]
    again = driver.submit(oracle.prompts[0], None, params)  # in the blocks that held NaN
    assert driver.finish([again])[again].token_ids == oracle.answers[None, 0][:6]
    driver.assert_nothing_leaked()
    world.close()
