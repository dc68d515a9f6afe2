"""The thrash bench: a GPU's proportions, the throttled device, the ratios, and the command over a tiny base."""

from __future__ import annotations

import json
from concurrent.futures import Future

import pytest

from adapters_store.ref import AdapterRef
from loadtest.thrash import (
    FITTING,
    THRASHING,
    Kind,
    Run,
    ThrottledDevice,
    _parser,
    figures_of,
    kinds_of,
    main,
    steps_of_load,
    summary,
)
from server.engine.messages import RequestError, RequestOutput, StepOutputs, StepStats
from tests.unit.byte_device import PAGE, ByteDevice, make_ref
from tests.zoo import tiny_base


def test_a_load_is_as_many_steps_as_on_the_gpu_server():
    assert steps_of_load(80, 25, 10) == pytest.approx(0.32)  # 3.2 ms of a step of 10 ms
    kinds = kinds_of(_parser().parse_args(["--gpu-mb", "80", "336", "--gpu-gb-per-s", "50"]))
    assert [(kind.name, kind.goal) for kind in kinds] == [("real", 1.3), ("GPU, 80 MB", 3.0), ("GPU, 336 MB", 3.0)]
    assert [kind.steps for kind in kinds] == [None, pytest.approx(0.16), pytest.approx(0.672)]


def throttled(bytes_per_s: float) -> tuple[ThrottledDevice, ByteDevice, list[float], list[AdapterRef]]:
    now = [100.0]
    device = ByteDevice(bytearray(4 * PAGE))
    return ThrottledDevice(device, bytes_per_s, lambda: now[0]), device, now, [make_ref(k, PAGE) for k in "ab"]


def test_loads_take_their_bytes_one_after_the_other():
    slow, device, now, (a, b) = throttled(PAGE / 2.0)  # 2 s each
    first, second = slow.load(a, 1, 0), slow.load(b, 2, PAGE)
    device.finish(0), device.finish(0)
    done = []
    for _ in range(5):
        done.append((first.done(), second.done()))
        now[0] += 1.0
    assert done == [(False, False), (False, False), (True, False), (True, False), (True, True)]
    assert first.exception() is None
    slow.commit(a, 1, 0)
    assert device.commits == ["a"]


def test_a_load_that_is_slow_by_itself_is_not_done_before_it_is():
    slow, device, now, (a, _) = throttled(1e12)
    future: Future[None] = slow.load(a, 1, 0)
    now[0] += 50.0
    assert not future.done()
    device.finish(0, OSError("unreadable"))
    assert future.done() and isinstance(future.exception(), OSError)


def step(*outputs: RequestOutput) -> StepOutputs:
    return StepOutputs(outputs=list(outputs), stats=StepStats(num_running=len(outputs), rows=len(outputs), step_s=0.02))


class _Core:
    """What figures_of reads of an engine."""

    class slots:
        loads, evictions = 7, 5

    class scheduler:
        num_preemptions = 1


def test_the_first_token_is_timed_from_the_scheduled_arrival():
    run = Run()
    run.take(step(RequestOutput(request_id="a", token_ids=[1], num_cached_tokens=0)), 1.5)
    run.take(step(RequestOutput(request_id="a", token_ids=[2], finish_reason="length")), 2.0)
    found = figures_of(run, {"a": 1.2}, _Core)
    assert found["time to first token p50, ms"] == pytest.approx(300)
    assert found["output tokens/s"] == pytest.approx(2 / 2.0) and found["loads"] == 7
    assert found["decode step, ms"] == pytest.approx(20)


def test_a_failed_request_fails_the_run():
    run = Run()
    error = RequestError(503, "overloaded", "no device memory")
    run.take(step(RequestOutput(request_id="a", finish_reason="error", error=error)), 1.5)
    with pytest.raises(RuntimeError, match="1 of 1 requests failed: no device memory"):
        figures_of(run, {"a": 1.2}, _Core)


def test_ratios_are_of_the_same_round():
    def runs(*values):
        keys = ("time to first token p50, ms", "p90", "p99", "output tokens/s")
        return [dict.fromkeys(keys, value) for value in values]

    lines = summary(
        {"real": {FITTING: runs(100.0, 200.0, 100.0), THRASHING: runs(120.0, 220.0, 300.0)}}, [Kind("real", 1.3)]
    )
    assert lines["real: time to first token p50, ms, thrashing over fitting (1.200, 1.100, 3.000, goal 1.3)"] == 1.2


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_base(tmp_path_factory.mktemp("base") / "base", "llama", num_hidden_layers=2)


def test_the_command_measures_both_sizes(base, tmp_path, capsys):
    options = ["--model", str(base), "--fit", "2", "--rank", "4", "--num-requests", "12", "--repeats", "1"]
    options += ["--prompt-tokens", "8", "--output-tokens", "4", "--concurrency", "4", "--gpu-mb", "80"]
    main([*options, "--folder", str(tmp_path / "kept"), "--json", str(tmp_path / "out.json")])
    results = json.loads((tmp_path / "out.json").read_text())
    assert set(results["kinds"]) == {"real", "GPU, 80 MB"} and results["rate, requests/s"] > 0
    for columns in results["kinds"].values():
        assert columns[FITTING]["loads"] == 0 and columns[THRASHING]["loads"] > 0
        assert columns[THRASHING]["evictions"] > 0 and columns[FITTING]["time to first token p50, ms"] > 0
    assert "thrashing over fitting" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--fit", "0"], ["--load", "-1"], ["--model", "/nowhere"], ["--gpu-mb", "x"]])
def test_what_cant_be_asked_ends_with_status_2(arguments):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
