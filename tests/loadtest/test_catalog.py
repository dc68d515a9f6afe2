"""The catalog bench: which scenarios, where adapters were found, the ratios, and the command over a tiny base."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from loadtest.catalog import (
    _parser,
    claim,
    main,
    medians,
    read_counters,
    run_scenario,
    scenarios_of,
    summary,
    tier_figures,
)
from loadtest.popularity import parse_popularity
from tests.e2e.tiny_server import World, tiny_server


def scenarios(*arguments):
    return scenarios_of(_parser().parse_args(arguments))


def test_each_part_has_its_scenarios():
    assert [s.name for s in scenarios("--parts", "catalog")] == ["32 registered", "1,000 registered"]
    assert [s.registered for s in scenarios("--parts", "mixes")] == [32, 32, 32]
    assert len(scenarios()) == 5


def test_the_mixes_are_what_their_names_say():
    base_only, one, mostly_base = scenarios("--parts", "mixes")
    assert (base_only.base_share, one.base_share, mostly_base.base_share) == (1.0, 0.0, 0.9)
    names = [f"c{index}" for index in range(one.registered)]
    drawn = parse_popularity(one.popularity, names)(20_000, np.random.default_rng(0))
    assert 0.89 < (drawn == 0).mean() < 0.91 and len(set(drawn.tolist())) == 32


COUNTERS = (
    *(f"multilora_adapter_{name}_total" for name in ("acquires", "loads", "host_hits", "compiles")),
    *(f"multilora_tier_{name}:{tier}" for name in ("evictions_total", "adapters", "bytes") for tier in
      ("disk", "host", "device")),
    "multilora_adapter_capacity_bytes",
)  # fmt: skip


def test_hits_are_counted_where_adapters_were_found():
    before = dict.fromkeys(COUNTERS, 100.0)
    grown = {
        "multilora_adapter_acquires_total": 50.0,
        "multilora_adapter_loads_total": 20.0,
        "multilora_adapter_host_hits_total": 5.0,
        "multilora_tier_evictions_total:device": 7.0,
    }
    found = tier_figures(before, {name: value + grown.get(name, 0.0) for name, value in before.items()})
    assert [found[f"hit_share_{tier}"] for tier in ("device", "host", "disk")] == [0.6, 0.1, 0.3]
    assert (found["acquires"], found["compiles"], found["evictions_device"]) == (50, 0, 7)
    assert (found["evictions_disk"], found["adapters_disk"]) == (0, 100)


def test_without_an_adapter_there_are_no_shares():
    before = dict.fromkeys(COUNTERS, 1.0)
    assert tier_figures(before, before)["hit_share_device"] is None


def a_run(p50, p90, rate):
    tiers = {
        **{f"hit_share_{tier}": 0.5 for tier in ("device", "host", "disk")},
        **dict.fromkeys(("evictions_device", "compiles", "adapters_device", "device_capacity_bytes"), 0.0),
    }
    return {
        "p50_ttft_ms": p50,
        "p90_ttft_ms": p90,
        "p99_ttft_ms": 1.0,
        "output_throughput": rate,
        **dict.fromkeys(("p50_tpot_ms", "p50_itl_ms", "p99_itl_ms", "p99_send_lag_ms"), None),
        "tiers": tiers,
    }


def test_ratios_are_of_the_same_round_and_medians_of_them():
    few = [a_run(10.0, 100.0, 50.0), a_run(10.0, 200.0, 50.0), a_run(10.0, 300.0, 50.0)]
    many = [a_run(20.0, 110.0, 50.0), a_run(20.0, 240.0, 25.0), a_run(20.0, 900.0, 50.0)]
    lines = summary({"32 registered": few, "1,000 registered": many}, scenarios("--parts", "catalog"))
    assert list(lines.values()) == [2.0, pytest.approx(1.2), 1.0]
    assert "1,000 registered over 32 registered (1.100, 1.200, 3.000, goal 1.25)" in list(lines)[1]
    assert medians(many)["p90_ttft_ms"] == 240.0
    assert medians(many)["p50_itl_ms"] is None


def test_mixes_are_set_beside_the_base_alone():
    runs = {s.name: [a_run(1.0 + number, 2.0, 3.0)] for number, s in enumerate(scenarios("--parts", "mixes"))}
    lines = summary(runs, scenarios("--parts", "mixes"))
    assert [value for name, value in lines.items() if name.startswith("p50")] == [2.0, 3.0]


def test_counters_are_read_from_a_real_server(tmp_path):
    world = World.make(tmp_path, num_adapters=1)
    with tiny_server(world) as server:
        assert set(COUNTERS) <= set(read_counters(server.url))


def test_a_size_that_makes_no_sense_ends_with_status_2(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--registered", "32", "8"])
    assert ended.value.code == 2 and "smaller first" in capsys.readouterr().err


@pytest.mark.parametrize(("warmup", "asked"), [(0, [1, 9]), (3, [1, 3, 9])])
def test_every_adapter_is_asked_once_before_the_warm_up(monkeypatch, warmup, asked):
    options = _parser().parse_args(["--warmup", str(warmup), "--num-requests", "9", "--highest-id", "200"])
    seen = []

    class Bench:
        names = ["c0000"]

        @contextmanager
        def server(self, registered):
            yield SimpleNamespace(url="")

        def ask(self, server, spec, names, console):
            seen.append(spec.num_requests)
            return {}

    bench = Bench()
    bench.options = options
    monkeypatch.setattr("loadtest.catalog.read_counters", lambda url: dict.fromkeys(COUNTERS, 1.0))
    run_scenario(bench, scenarios()[0], 5.0, 0, None)
    assert seen == asked


def test_a_folder_of_another_base_or_other_ranks_is_refused_by_name(tmp_path, monkeypatch):
    mine, other = (SimpleNamespace(name_or_path=f"/bases/{name}", digest=name * 64) for name in "ab")
    folder = tmp_path / "kept"
    claim(folder, mine)
    claim(folder, mine)
    with pytest.raises(ValueError, match=r"kept: its adapters are for /bases/a \(aaaa.* not for /bases/b \(bbbb"):
        claim(folder, other)
    monkeypatch.setattr("loadtest.catalog.RANKS", (4, 16))
    with pytest.raises(ValueError, match=r"\[4, 5, 6, 7, 8\].*\[4, 16\]"):
        claim(folder, mine)
    (tmp_path / "old" / "first-32").mkdir(parents=True)
    with pytest.raises(ValueError, match="unknown base"):
        claim(tmp_path / "old", mine)


def test_the_command_over_a_tiny_base(tmp_path):
    """Three servers: adapters are compiled once, in the first; every run finds them on disk or nearer."""
    World.make(tmp_path, num_adapters=0)
    sizes = ["--registered", "2", "5", "--num-requests", "6", "--warmup", "2", "--repeats", "1", "--rate", "50"]
    lengths = ["--prompt-tokens", "8", "--output-tokens", "3"]
    room = "--kv-memory 16MiB --adapter-memory 16MiB"
    files = ["--folder", tmp_path / "kept", "--json", tmp_path / "figures.json", "--out", tmp_path / "runs"]
    command = ["--model", tmp_path / "base", "--parts", "catalog", *sizes, *lengths, "--flags", room, *files]
    subprocess.run(
        [sys.executable, "-m", "loadtest.bench", "catalog", *map(str, command)],
        check=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert set(figures["scenarios"]) == {"2 registered", "5 registered"}
    for name in ("2-registered-1", "5-registered-1"):
        run = json.loads((tmp_path / "runs" / f"{name}.json").read_text())
        tiers = run["tiers"]
        assert (run["completed"], run["failed"], tiers["compiles"], tiers["acquires"]) == (6, 0, 0, 6)
        assert sum(tiers[f"hit_share_{tier}"] for tier in ("device", "host", "disk")) == pytest.approx(1)
        assert 0 < tiers["adapters_device"] <= int(name[0])
    assert any("goal 1.25" in label for label in figures["summary"])
