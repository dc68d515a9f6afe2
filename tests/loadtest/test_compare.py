"""Result files side by side: medians, ratios, and what is refused."""

from __future__ import annotations

import io
import json
import re

import pytest
from rich.console import Console

from loadtest.compare import Incomparable, comparison, group, main, read_result
from loadtest.workload import WorkloadSpec


def result(label, throughput=100.0, ttft=10.0, goals=None, max_concurrency=8, **spec):
    return {
        "label": label,
        "completed": 4,
        "failed": 0,
        "output_throughput": throughput,
        "median_ttft_ms": ttft,
        "workload": WorkloadSpec(**spec).as_json(),
        "goals_ms": goals or {},
        "max_concurrency": max_concurrency,
    }


def rows(files):
    return {row[1]: [cell for cell in row[2:] if cell not in "│┃"] for row in _lines(files)}


def _lines(files):
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(comparison(group(files)))
    lines = [line.split() for line in console.export_text().splitlines()]
    return [line for line in lines if len(line) > 3 and line[0] == "│"]


def test_medians_of_repeats_and_ratios_to_the_first():
    files = [
        *((f"a{seed}", result("ours", rate, seed=seed)) for seed, rate in enumerate((90.0, 300.0, 100.0))),
        *((f"b{seed}", result("theirs", rate, ttft=40.0, seed=seed)) for seed, rate in enumerate((20.0, 50.0, 1.0))),
    ]
    found = rows(files)
    assert found["output_throughput"] == ["100", "20", "×0.2"]
    assert found["median_ttft_ms"] == ["10", "40", "×4"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("arrivals", "poisson:3"),
        ("popularity", "zipf:1"),
        ("num_requests", 7),
        ("num_adapters", 3),
        ("ignore_eos", False),
        ("strict", True),
        ("extra_body", {"top_p": 0.5}),
    ],
)
def test_other_workloads_are_refused_by_name(field, value):
    with pytest.raises(Incomparable, match=f"a and b .*{field}: .* and {re.escape(repr(value))}"):
        group([("a", result("x")), ("b", result("y", **{field: value}))])


def test_other_goals_bounds_and_seeds_are_refused_by_name():
    with pytest.raises(Incomparable, match="goals_ms"):
        group([("a", result("x", goals={"ttft": 5.0})), ("b", result("y"))])
    with pytest.raises(Incomparable, match="max_concurrency"):
        group([("a", result("x")), ("b", result("y", max_concurrency=9))])
    with pytest.raises(Incomparable, match=r"seeds \[0\] and 'y' has \[1\]"):
        group([("a", result("x")), ("b", result("y", seed=1))])


def test_repeats_of_one_label_with_other_workloads_are_refused():
    with pytest.raises(Incomparable, match="prompt_tokens"):
        group([("a", result("x")), ("b", result("x", prompt_tokens="9"))])


def test_files_of_vllm_are_compared_by_what_they_say():
    ours = result("ours") | {"num_prompts": 4, "request_rate": "inf", "burstiness": 1.0, "total_input_tokens": 9}
    theirs = {key: value for key, value in ours.items() if key not in ("workload", "goals_ms", "label")}
    assert [side.label for side in group([("ours.json", ours), ("theirs.json", theirs)])] == ["ours", "theirs"]
    with pytest.raises(Incomparable, match="request_rate"):
        group([("ours.json", ours), ("theirs.json", theirs | {"request_rate": 3.0})])


def test_burstiness_counts_where_there_are_gaps_only():
    fields = {"num_prompts": 4, "total_input_tokens": 9, "burstiness": "inf"}
    ours = result("ours") | fields | {"request_rate": "inf"}
    theirs = {key: value for key, value in ours.items() if key not in ("workload", "label")} | {"burstiness": 1.0}
    assert len(group([("ours.json", ours), ("theirs.json", theirs)])) == 2
    with pytest.raises(Incomparable, match="burstiness"):
        group([("ours.json", ours | {"request_rate": 3.0}), ("theirs.json", theirs | {"request_rate": 3.0})])


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}'])
def test_what_is_no_result_is_refused(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(Incomparable, match=r"x\.json"):
        read_result(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("workload", None),
        ("workload", {}),
        ("label", ["x"]),
        ("output_throughput", "fast"),
        ("ttfts", [1.0, "x"]),
    ],
)
def test_a_damaged_result_is_refused_by_the_key(tmp_path, key, value):
    (tmp_path / "x.json").write_text(json.dumps(result("x") | {key: value}))
    with pytest.raises(Incomparable, match=rf"x\.json is a damaged result: .*{key}"):
        read_result(tmp_path / "x.json")


def test_a_picture_that_cannot_be_written_is_refused(tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps(result("ours")))
    with pytest.raises(SystemExit) as refused:
        main([str(tmp_path / "a.json"), "--plot", str(tmp_path / "missing" / "p.svg")])
    assert refused.value.code == 2
    assert "missing/p.svg can't be written" in capsys.readouterr().err


def test_the_command_refuses_with_status_2(tmp_path, capsys):
    for name, label, seed in (("a", "ours", 0), ("b", "theirs", 0), ("c", "theirs", 3)):
        (tmp_path / f"{name}.json").write_text(json.dumps(result(label, seed=seed)))
    main([str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert "output_throughput" in capsys.readouterr().out
    with pytest.raises(SystemExit) as refused:
        main([str(tmp_path / "a.json"), str(tmp_path / "c.json")])
    assert refused.value.code == 2
    assert "seeds" in capsys.readouterr().err
