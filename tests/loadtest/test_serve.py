"""The command, whole: against a canned server, and against ours in its own processes."""

from __future__ import annotations

import asyncio
import json
import threading
from contextlib import contextmanager

import pytest

from loadtest.canned import paced, port_of, start_canned
from loadtest.compare import group
from loadtest.compare import main as compare
from loadtest.outputs import check_writable
from loadtest.serve import main as serve
from tests.e2e.tiny_server import World, tiny_server


@contextmanager
def canned(script):
    """A canned server in a thread of its own: its address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(start_canned(script), loop).result(30)
    try:
        yield f"http://127.0.0.1:{port_of(server)}"
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)


def test_repeats_are_written_numbered_with_seeds_of_their_own(tmp_path, capsys):
    asked = []

    def script(body):
        asked.append(body)
        return paced(0.0, 0.0)(body)

    flags = ["--model", "m", "--adapters", "a-[0-3]", "--num-requests", "6", "--output-tokens", "3", "--warmup", "2"]
    files = ["--out", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.svg"), "--goodput", "ttft:60000"]
    with canned(script) as url:
        serve(["--url", url, "--repeats", "2", "--seed", "5", "--warm-adapters", *flags, *files])
    results = [json.loads((tmp_path / f"r-{number}.json").read_text()) for number in (1, 2)]
    assert [result["workload"]["seed"] for result in results] == [5, 6]
    assert [(result["completed"], result["failed"]) for result in results] == [(6, 0)] * 2
    assert [result["slo_attainment"] for result in results] == [1, 1]
    assert len(asked) == 2 * (2 + 4 + 6)  # warm-ups, one for each adapter, and only six are counted
    assert [body["model"] for body in asked[2:6]] == ["a-0", "a-1", "a-2", "a-3"]
    prompts = [tuple(body["prompt"]) for body in asked]
    assert len(set(prompts)) == len(prompts)
    assert (tmp_path / "r.svg").read_text().startswith("<svg")
    assert "output tokens/s" in capsys.readouterr().out


def test_without_details_a_file_is_small_and_still_compares(tmp_path, capsys):
    with canned(paced(0.0, 0.0)) as url:
        for label in ("one", "two"):
            out = ["--label", label, "--out", str(tmp_path / f"{label}.json"), "--no-details"]
            serve(["--url", url, "--model", "m", "--num-requests", "3", "--output-tokens", "2", *out])
    assert {"ttfts", "itls", "errors"}.isdisjoint(json.loads((tmp_path / "one.json").read_text()))
    compare([str(tmp_path / "one.json"), str(tmp_path / "two.json")])
    assert "two (1)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        (["--arrivals", "poisson"], 2, "arrivals"),
        (["--goodput", "itl:5"], 2, "itl:5"),
        (["--backend", "openai-chat"], 2, "text"),
        (["--extra-body", "{"], 2, "extra-body"),
        (["--extra-body", "x"], 2, "--extra-body: 'x': a JSON object"),
        (["--num-requests", "0"], 2, "--num-requests: '0' is not a whole number from 1 up"),
        (["--repeats", "0"], 2, "--repeats: '0' is not a whole number from 1 up"),
        (["--max-concurrency", "-2"], 2, "--max-concurrency: '-2' is not a whole number from 1 up"),
        (["--seed", "-1"], 2, "--seed: '-1' is not a whole number from 0 up"),
        (["--warmup", "-1"], 2, "--warmup: '-1' is not a whole number from 0 up"),
        (
            ["--highest-id", "99999999999"],
            2,
            "--highest-id 99999999999: from 0, the first",
        ),
        (["--lowest-id", "9", "--highest-id", "9"], 2, "--lowest-id 9 and --highest-id 9: from 0"),
        (["--temperature", "inf"], 2, "temperature inf: a number from 0 up"),
        (["--timeout", "nan"], 2, "--timeout: 'nan' is not a number above 0"),
        (["--base-share", "nan"], 2, "base share nan: a number from 0 to 1"),
        (["--api-key", "a\r\nb"], 2, "--api-key: printable ASCII only"),
        (["--goodput", "ttft:5", "ttft:6"], 2, "ttft:6"),
        (["--prompt-tokens", "uniform:1:1e30"], 2, "--prompt-tokens: lengths 'uniform:1:1e30'"),
        (["--arrivals", "gamma:1000:1e160"], 2, "--arrivals: arrivals 'gamma:1000:1e160': CV from 0.01 to 100"),
        (["--adapters", "a[3-1]"], 2, "--adapters: names 'a[3-1]': 3 is above 1"),
        (["--popularity", "zipf"], 2, "popularity 'zipf'"),
        ([], 1, "no warm-up request was answered"),
        (["--warmup", "0"], 1, "not one request of seed 0 was answered"),
    ],
)
def test_what_cannot_be_run_ends_with_a_status_and_says_why(flags, status, said, capsys):
    with pytest.raises(SystemExit) as ended:
        serve(["--url", "http://127.0.0.1:9", "--model", "m", *flags])
    assert ended.value.code == status
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("url", ["http://127.0.0.1:abc", "http://[::1"])
def test_an_address_that_is_none_is_refused_before_the_server_is_asked_for_names(url, capsys):
    with pytest.raises(SystemExit) as ended:
        serve(["--url", url])
    assert ended.value.code == 2
    assert url in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--out", "--plot"])
@pytest.mark.parametrize("name", ["", "missing/r"])
@pytest.mark.parametrize("repeats", ["1", "2"])
def test_what_cannot_be_written_is_refused_before_the_run(tmp_path, capsys, flag, name, repeats):
    asked = []
    with canned(asked.append) as url, pytest.raises(SystemExit) as ended:
        serve(["--url", url, "--model", "m", "--repeats", repeats, flag, str(tmp_path / name)])
    assert (ended.value.code, asked) == (2, [])
    assert "can't be written" in capsys.readouterr().err


def test_a_path_that_can_be_written_is_left_as_it_was(tmp_path):
    (tmp_path / "kept").write_text("x")
    for name in ("kept", "new"):
        check_writable(tmp_path / name)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("kept", "x")]


def test_a_closed_loop_within_a_bound_is_written_as_it_ran(tmp_path):
    flags = ["--model", "m", "--num-requests", "6", "--output-tokens", "1", "--out", str(tmp_path / "r.json")]
    found = []
    with canned(paced(0.02, 0.0)) as url:
        for bounds in (["closed:2", "--max-concurrency", "4"], ["closed:4", "--max-concurrency", "2"], ["closed:2"]):
            serve(["--url", url, "--strict", "--extra-body", '{"n": 1}', *flags, "--arrivals", *bounds])
            found.append(json.loads((tmp_path / "r.json").read_text()))
    for result in found:
        assert (result["workload"]["arrivals"], result["max_concurrency"]) == ("closed:2", 2)
        assert result["max_concurrent_requests"] == 2
        assert (result["workload"]["strict"], result["workload"]["extra_body"]) == (True, {"n": 1})
    assert len(group([(str(number), result) for number, result in enumerate(found)])) == 1


def test_our_server_answers_every_token_that_is_asked_for(tmp_path):
    """Names are the server's own; each adapter is asked; what is counted is what the server says it made."""
    flags = ["--num-requests", "24", "--arrivals", "poisson:40", "--popularity", "distinct", "--base-share", "0.25"]
    lengths = ["--prompt-tokens", "uniform:3:20", "--output-tokens", "uniform:1:12", "--highest-id", "250"]
    world = World.make(tmp_path, 3)
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (tmp_path / "base" / "chat_template.jinja").write_text(template)
    results = []
    with tiny_server(world) as server:
        for kind in ([], ["--backend", "openai-chat", "--prompt-kind", "text"]):
            out = ["--out", str(tmp_path / "r.json")]
            serve(["--url", server.url, "--adapters", "auto", *out, *flags, *lengths, *kind])
            results.append(json.loads((tmp_path / "r.json").read_text()))
    for result in results:
        assert (result["completed"], result["failed"], result["error_counts"]) == (24, 0, {})
        assert (result["tokens_without_stamp"], result["answers_of_another_length"]) == (0, 0)
        assert set(result["adapters"]) == {"", "a0", "a1", "a2"}
        assert [1 + len(gaps) for gaps in result["itls"]] == result["output_lens"]
    assert all(3 <= length <= 20 for length in results[0]["input_lens"])
