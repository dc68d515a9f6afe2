"""Figures from outcomes made by hand, and the keys that others' scripts read."""

from __future__ import annotations

import io
import json
import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from rich.console import Console

from loadtest.arrivals import Arrivals, parse_arrivals
from loadtest.client import Run
from loadtest.outcome import Outcome
from loadtest.plot import draw_svg, nice_ticks
from loadtest.report import PERCENTILES, fairness, jain, make_report, parse_goals
from loadtest.table import print_report
from loadtest.workload import WorkloadSpec, draw

# What `vllm bench serve --save-detailed` writes for a run of text generation.
VLLM_KEYS = {
    *("date", "endpoint_type", "backend", "label", "model_id", "tokenizer_id", "num_prompts", "request_rate"),
    *("burstiness", "max_concurrency", "duration", "completed", "failed", "total_input_tokens"),
    *("total_output_tokens", "request_throughput", "request_goodput", "output_throughput", "total_token_throughput"),
    "rtfx",
    *("input_lens", "output_lens", "ttfts", "itls", "latencies", "start_times", "queue_times", "generated_texts"),
    *("errors", "max_output_tokens_per_s", "max_concurrent_requests"),
    *(
        f"{statistic}_{name}_ms"
        for statistic in ("mean", "median", "std", *(f"p{p}" for p in (50, 90, 99)))
        for name in ("ttft", "tpot", "itl", "e2el")
    ),
}
ABOUT = {"backend": "openai", "endpoint_type": "openai", "label": "x", "model_id": "base", "tokenizer_id": None}


def outcome(index, adapter, stamps, due=0.0, error="", max_tokens=4):
    ended = stamps[-1] if stamps else due
    made = Outcome(index, adapter, max_tokens, due, due + 0.001, ended, status=200, error=error, stamps=stamps)
    made.output_tokens = made.num_events = len(stamps)
    return made


def report_of(outcomes, goals=(), adapters=("a", "b"), arrivals="poisson:2"):
    spec = WorkloadSpec(num_requests=5, num_adapters=len(adapters), prompt_tokens="10")
    _, requests = draw(spec, adapters)
    made = Run(outcomes, 0.0, 10.0)
    return make_report(made, requests, spec, parse_arrivals(arrivals), adapters, parse_goals(goals), ABOUT)


@pytest.fixture
def outcomes():
    return [
        outcome(0, 0, [0.1, 0.2, 0.2, 0.5]),
        outcome(1, 0, [1.3, 1.4, 1.5, 1.9], due=1.0),
        outcome(2, 1, [2.5], due=2.0, max_tokens=1),
        outcome(3, None, [3.1, 3.2], due=3.0, error="the engine died"),
        outcome(4, 1, [], due=4.0, error="the engine died"),
    ]


def test_figures(outcomes):
    report = report_of(outcomes)
    assert (report["completed"], report["failed"]) == (3, 2)
    assert (report["total_input_tokens"], report["total_output_tokens"]) == (30, 9)
    assert (report["output_throughput"], report["total_token_throughput"]) == pytest.approx((0.9, 3.9))
    np.testing.assert_allclose(report["median_ttft_ms"], 300)
    np.testing.assert_allclose(report["mean_tpot_ms"], np.mean([400 / 3, 200]))
    np.testing.assert_allclose(report["p90_itl_ms"], np.percentile([100, 0, 300, 100, 100, 400], 90))
    np.testing.assert_allclose(report["p99_e2el_ms"], np.percentile([500, 900, 500], 99))
    np.testing.assert_allclose(report["max_send_lag_ms"], 1.0)
    assert report["max_output_tokens_per_s"] == 4
    assert report["max_concurrent_requests"] == 1
    assert report["error_counts"] == {"200 the engine died": 2}
    assert report["output_lens"] == [4, 4, 1, 0, 0]
    assert list(report["adapters"]) == ["a", "b", ""]
    assert report["adapters"]["b"]["requests"] == 2
    assert report["adapters"]["b"]["output_tokens"] == 1
    assert report["burstiness"] == 1


@pytest.mark.parametrize(
    ("goals", "num_good"),
    [
        (["ttft:400"], 2),
        (["ttft:400", "tpot:150"], 1),
        (["tpot:150"], 2),
        (["e2el:600", "ttft:250"], 1),
        (["ttft:0.001"], 0),
    ],
)
def test_goodput_and_attainment_count_what_failed_as_not_good(outcomes, goals, num_good):
    report = report_of(outcomes, goals)
    assert report["request_goodput"] == pytest.approx(num_good / 10)
    assert report["slo_attainment"] == pytest.approx(num_good / 5)


@pytest.mark.parametrize("text", ["itl:5", "ttft", "ttft:x", "ttft:-1", "ttft:0", "ttft:nan", "ttft:inf"])
def test_a_goal_that_makes_no_sense_is_named(text):
    with pytest.raises(ValueError, match=text):
        parse_goals([text])


def test_a_goal_is_given_once():
    with pytest.raises(ValueError, match="tpot:6"):
        parse_goals(["tpot:5", "tpot:6"])


def test_it_has_the_keys_that_vllm_writes_and_is_json(outcomes):
    report = report_of(outcomes, ["ttft:400"], arrivals="closed:2")
    assert set(report) >= VLLM_KEYS
    assert {f"p{p}_ttft_ms" for p in PERCENTILES} <= set(report)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert (report["request_rate"], report["max_concurrency"], report["rtfx"]) == ("inf", 2, 0)
    in_order = [report[key] for key in ("ttfts", "itls", "errors", "input_lens", "start_times")]
    assert {len(values) for values in in_order} == {5}


def test_nothing_completed_is_null_not_zero(outcomes):
    report = report_of(outcomes[3:])
    assert report["mean_ttft_ms"] is None and report["p99_itl_ms"] is None
    assert json.dumps(report, allow_nan=False)


def test_jain():
    assert jain([3, 3, 3]) == pytest.approx(1)
    assert jain([5, 0, 0, 0]) == pytest.approx(1 / 4)
    assert jain([1, 2]) == pytest.approx(9 / 10)
    assert jain([0, 0]) is None


def test_fairness_is_over_models_and_by_what_they_asked_for():
    served = [outcome(0, 0, [1.0] * 4), outcome(1, 0, [1.0] * 4), outcome(2, None, [3.0] * 4)]
    found = fairness(served)
    assert found["models"] == 2
    assert found["jain_served_tokens"] == pytest.approx(jain([8, 4]))
    assert found["jain_served_share"] == pytest.approx(1)
    assert found["jain_mean_ttft"] == pytest.approx(jain([1, 3]))
    starved = fairness([*served, outcome(3, 1, [], error="503")])
    assert starved["jain_served_share"] == pytest.approx(2 / 3)


def test_the_table_names_errors_and_adapters(outcomes):
    console = Console(width=120, record=True, file=io.StringIO())
    print_report(report_of(outcomes, ["ttft:400"]), console)
    shown = console.export_text()
    for expected in ("3 / 2", "the engine died", "(base)", "ttft 400 ms", "time to first token"):
        assert expected in shown


def test_the_picture_is_xml_with_a_line_for_every_panel(outcomes):
    drawn = draw_svg([("ours <1>", report_of(outcomes)), ("nothing", report_of(outcomes[3:]))])
    root = ElementTree.fromstring(drawn)
    lines = [path.get("d") for path in root.iter("{http://www.w3.org/2000/svg}path") if path.get("fill") == "none"]
    assert len(lines) == 4
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "ours <1>" in texts
    numbers = [float(number) for line in lines for number in line.replace("M", "").replace("L", " ").split()]
    assert all(0 <= number <= 440 for number in numbers)


def test_a_picture_needs_details(outcomes):
    with pytest.raises(ValueError, match="details"):
        draw_svg([("x", {"output_throughput": 1})])
    with pytest.raises(ValueError, match="start_times"):
        draw_svg([("x", {key: value for key, value in report_of(outcomes).items() if key != "start_times"})])


def test_a_picture_of_a_file_of_vllm_is_that_of_ours(outcomes):
    """Its start times are by a clock with any zero, and it has no `latencies`: here they end at the last token."""
    report = report_of(outcomes)
    theirs = {**report, "start_times": [time + 524_288.0 for time in report["start_times"]]}
    del theirs["latencies"]
    assert draw_svg([("x", theirs)]) == draw_svg([("x", report)])


@pytest.mark.parametrize("high", [0.0, 0.03, 1.0, 7.0, 999.0, 12345.0])
def test_ticks_are_round_and_reach(high):
    ticks = nice_ticks(high)
    assert ticks[0] == 0 and ticks[-1] >= high * (1 - 1e-9)
    assert 2 <= len(ticks) <= 7
    step = ticks[1] / 10 ** math.floor(math.log10(ticks[1]) + 1e-9)
    assert round(step, 6) in (1, 2, 5)


def test_burstiness_of_equal_gaps_is_written_as_vllm_would():
    assert Arrivals(3.0).burstiness == math.inf
    made = [outcome(0, None, [0.5])]
    assert report_of(made, arrivals="constant:3", adapters=())["burstiness"] == "inf"
    for without_gaps in ("all", "closed:3"):
        assert report_of(made, arrivals=without_gaps, adapters=())["burstiness"] == 1
