"""The store benches: what their judges say of made-up answers, their arithmetic, and the commands over a tiny base."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from loadtest.adapters import random_adapter, write_random_adapter
from loadtest.outcome import Outcome
from loadtest.s3 import s3_server
from loadtest.store import main
from loadtest.store_catalog import predict, table
from loadtest.store_cold import Sizes, gaps_within, plain_image, ranged_get, spread
from loadtest.store_replace import HOT, Answered, Replaced, judge, longest_silence, oracle_of
from server.model.manifest import build_manifest
from tests.e2e.tiny_server import World

A, B, C = (letter * 64 for letter in "abc")
OTHER = "d" * 64
ORACLE = {(key, 0): f"says {key[0]}" for key in (A, B, C, OTHER)}
# A at first, B put in [10, 11], C in [20, 21], A again in [30, 31]
HISTORY = [Replaced(0, 0, A), Replaced(10, 11, B), Replaced(20, 21, C), Replaced(30, 31, A)]


def answered(key: str, asked: float, began: float, text: str | None = None, name: str = HOT, error: str = ""):
    outcome = Outcome(0, None, 4, due=asked, begun=asked, ended=began + 1, error=error, stamps=[began, began + 1])
    outcome.text = ORACLE.get((key, 0), "") if text is None else text
    return Answered(name, 0, key, outcome)


def verdict(*answers):
    return judge(answers, HISTORY, ORACLE, {"other": OTHER}, allowed_s=3.0)


@pytest.mark.parametrize(
    ("key", "asked", "began"),
    [
        (A, 5, 6),
        (A, 10.5, 12),  # the old version while the new one is being put
        (B, 9.9, 10.1),  # asked before it was put, answered when it was there
        (A, 13.9, 40),  # within what is allowed, however late the answer began
        (B, 15, 16),
        (A, 30.5, 31),  # its second turn
        (C, 33.9, 34),
        (OTHER, 50, 51),
    ],
)
def test_an_answer_of_a_version_in_its_time_is_right(key, asked, began):
    found = verdict(answered(key, asked, began, name="other" if key == OTHER else HOT))
    assert (found.right, found.faults, found.right_of) == (1, 0, {key: 1})


@pytest.mark.parametrize(
    ("answer", "fault", "stale_s"),
    [
        (answered(A, 14.1, 15), "stale", 3.1),
        (answered(A, 29, 29.5), "stale", 18.0),  # the second turn is yet to come
        (answered(B, 50, 51), "stale", 29.0),
        (answered(B, 5, 6), "unknown", 0.0),  # before it was put
        (answered(C, 9, 19.9), "unknown", 0.0),
        (answered(OTHER, 5, 6), "unknown", 0.0),  # another name's
        (answered(A, 5, 6, name="other"), "unknown", 0.0),
        (answered("", 5, 6), "unknown", 0.0),
        (answered(A, 5, 6, text="says b"), "wrong", 0.0),
        (answered(A, 5, 6, text="says"), "wrong", 0.0),
        (answered(A, 5, 6, error="503"), "failed", 0.0),
    ],
)
def test_every_fault_is_counted_as_what_it_is(answer, fault, stale_s):
    found = verdict(answer, answered(A, 5, 6))
    counts = {"failed": len(found.failed), "wrong": found.wrong, "unknown": found.unknown, "stale": found.stale}
    assert counts == {**dict.fromkeys(counts, 0), fault: 1}
    assert (found.right, found.faults, found.longest_stale_s) == (1, 1, pytest.approx(stale_s))


def test_the_longest_silence_is_over_all_streams():
    one, two = answered(A, 0, 1), answered(B, 0, 1)
    one.outcome.stamps, two.outcome.stamps = [1.0, 2.0, 9.0], [3.0, 5.5, 12.0]
    assert longest_silence([one, two]) == 3.5
    assert longest_silence([one]) == 7.0


def test_versions_that_answer_alike_are_no_oracle():
    alone = [answered(A, 0, 1, name="version-0"), answered(B, 0, 1, name="version-1")]
    assert oracle_of(alone) == ({(A, 0): "says a", (B, 0): "says b"}, {"version-0": A, "version-1": B})
    with pytest.raises(RuntimeError, match="version-0 and version-1 say the same to prompt 0"):
        oracle_of([alone[0], answered(B, 0, 1, text="says a", name="version-1")])
    with pytest.raises(RuntimeError, match="version-1 alone: 404"):
        oracle_of([alone[0], answered(B, 0, 1, name="version-1", error="404")])


def test_the_floor_is_the_sum_of_its_medians():
    cold = [{"total_s": total} for total in (0.1, 0.2, 0.9)]
    row = Sizes(20_000_000, cold, fetch=[0.02, 0.04, 0.06], image=[0.01, 0.03, 0.01], prefill=[0.05, 0.05, 0.04]).row()
    assert (row["cold, ms"], row["floor, ms"], row["ratio"]) == pytest.approx((200.0, 100.0, 2.0))
    assert (row["MB"], row["fetch, MB/s"], row["floor's image, ms"]) == pytest.approx((20.0, 500.0, 10.0))


def test_gaps_are_those_that_ended_in_the_window():
    one, two = answered(A, 0, 1), answered(B, 0, 1)
    one.outcome.stamps, two.outcome.stamps = [0.0, 1.0, 3.0, 6.0, 10.0], [2.5, 3.0]
    assert gaps_within([one.outcome, two.outcome], 1.0, 6.0) == [1.0, 2.0, 0.5]
    assert spread([0.001] * 98 + [0.1, 0.2])["longest"] == pytest.approx(200.0)
    with pytest.raises(RuntimeError, match="no tokens in time"):
        spread([])


def run_of(throughput, requests, host, disk):
    tiers = {"hit_share_device": 1 - host - disk, "hit_share_host": host, "hit_share_disk": disk, "compiles": 0.0}
    latencies = dict.fromkeys(("p50_ttft_ms", "p90_ttft_ms", "p50_itl_ms", "p99_itl_ms"), 1.0)
    return {"output_throughput": throughput, "request_throughput": requests, "tiers": tiers, **latencies}


def test_a_prediction_adds_what_finds_in_slower_tiers_cost():
    few, many = run_of(640.0, 10.0, 0.0, 0.0), run_of(500.0, 7.8, 0.5, 0.2)
    flat = [{**run, **run["tiers"]} for run in (few, many)]
    costs = {"host": 0.01, "disk": 0.1}
    assert predict(*flat, costs) == pytest.approx(64 / (0.1 + 0.005 + 0.02))
    assert predict(flat[0], flat[0], costs) == pytest.approx(640.0)
    rows = table([(few, many), (few, run_of(600.0, 9.0, 0.5, 0.2))], costs)
    assert rows["output tokens/s"] == {
        "few": 640.0,
        "all": 550.0,
        "ratio": pytest.approx(550 / 640),
        "rounds": "0.781, 0.938",
    }
    assert rows["tokens/s that the finds predict"]["ratio"] == pytest.approx(0.8)
    assert rows["found host"] == {"few": 0.0, "all": 0.5}


def test_an_unknown_part_ends_with_status_2(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["catalogue"])
    assert ended.value.code == 2 and "'catalogue'; there are catalog, cold, replace" in capsys.readouterr().err


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World.make(tmp_path_factory.mktemp("store"), num_adapters=0)


def test_a_bucket_has_the_adapter_that_a_folder_has(world, tmp_path):
    manifest = build_manifest(world.root / "base")
    write_random_adapter(tmp_path / "one", manifest, 4, seed=3)
    files = random_adapter(manifest, 4, seed=3)
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert random_adapter(manifest, 4, seed=3, spread=2.0) != files != random_adapter(manifest, 4, seed=4)


def test_the_floors_parts_do_their_work(world, tmp_path, monkeypatch):
    """The ranged reads bring the object, the script writes every tensor, scaled."""
    monkeypatch.setattr("loadtest.store_cold.PART_BYTES", 1000)
    files = random_adapter(build_manifest(world.root / "base"), 4, seed=3)
    weights = files["adapter_model.safetensors"]
    with s3_server(tmp_path) as server:
        server.put("bench", "one", files)
        _, content = asyncio.run(
            ranged_get(server.store("bench"), "one/adapter_model.safetensors", num_bytes=len(weights))
        )
    assert content == weights
    (tmp_path / "object").write_bytes(content)
    assert plain_image(tmp_path / "object", tmp_path / "image") > 0
    data = weights[8 + int.from_bytes(weights[:8], "little") :]
    doubled = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32) * 2
    written = np.fromfile(tmp_path / "image", np.uint16).astype(np.uint32) << 16
    assert sorted(written.view(np.float32)) == sorted(doubled)


def figures_of(world, tmp_path, part, *arguments):
    flags = "--kv-memory 16MiB --threads 1"
    command = [part, "--model", world.root / "base", "--flags", flags, "--json", tmp_path / "figures.json", *arguments]
    subprocess.run(
        [sys.executable, "-m", "loadtest.bench", "store", *map(str, command)],
        check=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return json.loads((tmp_path / "figures.json").read_text())


def test_cold_over_a_tiny_base(world, tmp_path):
    sizes = ["--rank", "4", "8", "--num-adapters", "2"]
    together = ["--at-once", "12", "--streams", "3", "--stream-tokens", "300", "--quiet", "1"]
    figures = figures_of(world, tmp_path, "cold", *sizes, *together)
    rows = figures["first token, against its floor"]
    assert set(rows) == {"rank 4", "rank 8"} and rows["rank 4"]["MB"] < rows["rank 8"]["MB"]
    assert all(row["ratio"] > 1 for row in rows.values())
    phases = figures["by phase, ms"]
    assert all(phases[f"{phase}_s"]["rank 8"] > 0 for phase in ("resolve", "fetch", "compile", "load_host"))
    assert figures["12 cold adapters at once: streams beside them"] == 3
    assert figures["12 cold adapters at once: others' p99 gap meanwhile, ms"] > 0


def test_catalog_over_a_tiny_base(world, tmp_path):
    """The second run finds bucket and images."""
    room = ["--adapters", "12", "--few", "3", "--host", "4", "--folder", tmp_path / "kept"]
    load = ["--num-requests", "24", "--concurrency", "3", "--warmup", "4", "--repeats", "1"]
    tokens = ["--alphas", "0.3", "--prompt-tokens", "8", "--output-tokens", "3"]
    for _ in range(2):
        figures = figures_of(world, tmp_path, "catalog", *room, *load, *tokens)
        rows = figures["power law 0.3"]
        assert rows["compiles"] == {"few": 0.0, "all": 0.0}
        assert rows["found device"]["few"] == 1.0 and rows["found device"]["all"] < 1.0
        assert sum(rows[f"found {tier}"]["all"] for tier in ("device", "host", "disk")) == pytest.approx(1)
        assert rows["tokens/s that the finds predict"]["ratio"] <= 1
        assert figures["a load from disk, ms"] > 0 and figures["a load from host, ms"] > 0
