"""The client against canned servers: what they send is what is counted, and their delays are what is measured."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import json
from collections import Counter

import pytest

from loadtest.canned import event, paced, port_of, start_canned
from loadtest.client import Progress, http_sender, run
from loadtest.dialects import Dialect
from loadtest.report import make_report
from loadtest.wire import resolve
from loadtest.workload import WorkloadSpec, draw

DONE = b"data: [DONE]\n\n"


async def drive(script, spec=None, adapters=(), dialect="openai", goals=None, timeout_s=20.0, max_concurrency=None):
    """Run a spec against a canned server: (outcomes, report)."""
    spec = spec or WorkloadSpec(num_requests=1, prompt_tokens="4", output_tokens="3")
    server = await start_canned(script)
    try:
        target, asked = resolve(f"http://127.0.0.1:{port_of(server)}"), Dialect(dialect, "base", adapters)
        arrivals, requests = draw(spec, adapters)
        encoded = {r.index: target.encode(asked.path, asked.body(r, spec)) for r in requests}
        sender, progress = http_sender(target, encoded, timeout_s), Progress(len(requests))
        done = await run(sender, arrivals, requests, progress, max_concurrency)
    finally:
        server.close()
    assert progress.num_sent == progress.num_ended == len(requests)
    return done.outcomes, make_report(done, requests, spec, arrivals, adapters, goals or {}, {"label": "canned"})


def says(*pieces, status=200, pause_s=0.0):
    """Every request gets these pieces."""

    async def answer():
        for piece in pieces:
            yield piece
            await asyncio.sleep(pause_s)

    return lambda body: (status, answer())


def text(text, **fields):
    return event({"choices": [{"index": 0, "text": text, **fields}]})


async def test_known_delays_give_the_known_figures():
    """Lower bounds are exact: nothing arrives before it was written. Upper ones are the server's own clock."""
    spec = WorkloadSpec(num_requests=12, arrivals="closed:4", prompt_tokens="4", output_tokens="6")
    outcomes, report = await drive(paced(first_s=0.05, gap_s=0.02), spec)
    for outcome in outcomes:
        written = [float(stamp) for stamp in outcome.text.split(";")[:-1]]
        assert len(written) == len(outcome.stamps) == outcome.output_tokens == 6
        assert all(stamp >= at for stamp, at in zip(outcome.stamps, written, strict=True))
        assert outcome.ttft_s >= 0.05
        assert outcome.tpot_s == pytest.approx(sum(outcome.itls_s) / 5)
        assert outcome.e2el_s >= outcome.ttft_s + sum(outcome.itls_s)
    assert report["completed"] == 12
    assert report["total_output_tokens"] == 72
    assert report["total_input_tokens"] == 48
    assert report["output_throughput"] == pytest.approx(72 / report["duration"])
    assert report["duration"] >= 3 * 0.15
    assert report["max_concurrent_requests"] == 4
    assert report["tokens_per_event"] == 1
    assert report["p50_ttft_ms"] >= 50
    assert report["mean_tpot_ms"] == pytest.approx(sum(o.tpot_s for o in outcomes) / 12 * 1e3)


async def test_an_event_of_several_tokens_counts_them_all():
    (outcome,), report = await drive(
        paced(0.0, 0.03, tokens_per_event=3),
        WorkloadSpec(num_requests=1, prompt_tokens="4", output_tokens="7"),
    )
    assert outcome.output_tokens == len(outcome.stamps) == 7
    assert [gap == 0 for gap in outcome.itls_s] == [True, True, False, True, True, False]
    assert report["tokens_per_event"] == pytest.approx(7 / 3)


@pytest.mark.parametrize("cut", [1, 5, 17])
async def test_however_the_bytes_are_cut(cut):
    """Chunks that are cut across events, characters and lines."""
    whole = text("é", token_ids=[1]) + b": a comment\r\n\r\n" + text("b", token_ids=[2, 3], finish_reason="stop") + DONE
    pieces = [whole[at : at + cut] for at in range(0, len(whole), cut)]
    (outcome,), _ = await drive(says(*pieces))
    assert (outcome.error, outcome.text, outcome.output_tokens, len(outcome.stamps)) == ("", "éb", 3, 3)


@pytest.mark.parametrize("is_chunked", [True, False])
async def test_an_answer_ends_although_the_connection_stays_open(is_chunked):
    """Byte by byte, so that the last chunk's mark is in pieces."""
    body = text("a", token_ids=[1], finish_reason="stop") + DONE
    framing = b"Transfer-Encoding: chunked" if is_chunked else b"Content-Length: %d" % len(body)
    sent = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if is_chunked else body

    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n\r\n")
        for position in range(len(sent)):
            writer.write(sent[position : position + 1])
            await asyncio.sleep(0.001)
        await reader.read()  # until the client leaves
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    target = resolve(f"http://127.0.0.1:{port_of(server)}")
    arrivals, requests = draw(WorkloadSpec(num_requests=1), [])
    done = await run(http_sender(target, {0: target.encode("/", b"")}, 10), arrivals, requests, Progress(1))
    server.close()
    assert (done.outcomes[0].error, done.outcomes[0].text) == ("", "a")


async def test_tokens_without_text_are_tokens_and_a_role_is_none():
    role = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
    held = event({"choices": [{"index": 0, "delta": {"content": ""}, "token_ids": [5]}]})
    shown = event({"choices": [{"index": 0, "delta": {"content": "é"}, "token_ids": [6], "finish_reason": "stop"}]})
    (outcome,), _ = await drive(says(role, held, shown, DONE))
    assert (outcome.output_tokens, outcome.num_events, outcome.text) == (2, 2, "é")


async def test_llama_cpp_counts_tokens_in_timings():
    pieces = [
        event({"choices": [{"text": "a"}], "timings": {"predicted_n": 1}}),
        event({"choices": [{"text": "bc"}], "timings": {"predicted_n": 4}}),
        event({"choices": [{"text": "", "finish_reason": "length"}], "usage": {"completion_tokens": 4}}),
    ]
    (outcome,), _ = await drive(says(*pieces), dialect="llamacpp")
    assert (outcome.error, outcome.output_tokens, len(outcome.stamps)) == ("", 4, 4)


async def test_where_events_do_not_say_the_usage_does():
    usage = event({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 5}})
    (outcome,), report = await drive(says(text("a"), text("bc"), text("", finish_reason="length"), usage, DONE))
    assert (outcome.output_tokens, len(outcome.stamps)) == (5, 2)
    assert (report["tokens_without_stamp"], report["total_input_tokens"]) == (3, 9)


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        ([DONE], "the stream ended without a token"),
        ([text("", finish_reason="stop"), DONE], "the stream ended without a token"),
        ([event({"choices": [], "usage": {"completion_tokens": 0}}), DONE], "the stream ended without a token"),
        ([b'{"error": {"message": "no such model"}}'], "no such model"),
        ([b'{"choices": []}'], "the stream ended before its end"),
        ([text("a"), event({"choices": [], "usage": {"completion_tokens": -1}}), DONE], "completion_tokens"),
        ([text("a"), event({"choices": [], "usage": {"prompt_tokens": -9}}), DONE], "prompt_tokens"),
    ],
)
async def test_an_answer_without_tokens_or_with_impossible_counts_has_failed(pieces, error):
    (outcome,), report = await drive(says(*pieces))
    assert error in outcome.error
    assert (report["completed"], report["failed"]) == (0, 1)


async def test_errors_are_counted_and_averaged_into_nothing():
    good = paced(0.0, 0.0)
    answers = {
        "a": says(b'{"error": {"message": "no such model 17"}}', status=404),
        "b": says(b'{"object": "error", "message": "full"}', status=503),
        "c": says(text("x", token_ids=[1]), event({"error": {"message": "the engine died"}}), DONE),
        "d": says(text("x", token_ids=[1])),
        "e": says(b"data: nonsense\n\n"),
    }
    spec = WorkloadSpec(
        num_requests=60, num_adapters=5, base_share=0.3, prompt_tokens="1", output_tokens="2", arrivals="closed:10"
    )
    outcomes, report = await drive(lambda body: answers.get(body["model"], good)(body), spec, list("abcde"))
    asked = Counter(outcome.adapter for outcome in outcomes)
    counts = report["error_counts"]
    assert counts["404 no such model #"] == asked[0]
    assert counts["503 full"] == asked[1]
    assert counts["200 the engine died"] == asked[2]
    assert counts["200 the stream ended before its end"] == asked[3]
    assert sum(counts.values()) == report["failed"] == 60 - asked[None]
    assert report["completed"] == asked[None]
    assert report["total_output_tokens"] == 2 * asked[None]
    assert [bool(error) for error in report["errors"]] == [outcome.adapter is not None for outcome in outcomes]
    assert report["adapters"]["a"]["completed"] == 0
    assert report["adapters"]["a"]["median_ttft_ms"] is None


async def test_a_run_of_errors_only_has_no_latency():
    _, report = await drive(says(b"", status=500), goals={"ttft": 1e9})
    assert (report["completed"], report["failed"], report["mean_ttft_ms"], report["slo_attainment"]) == (0, 1, None, 0)
    assert report["error_counts"] == {"500 an empty body": 1}


async def test_a_server_that_is_not_there_and_one_that_never_answers():
    server = await start_canned(says())
    port = port_of(server)
    server.close()
    await server.wait_closed()
    target = resolve(f"http://127.0.0.1:{port}")
    arrivals, requests = draw(WorkloadSpec(num_requests=1), [])
    gone = await run(http_sender(target, {0: b"x"}, 5), arrivals, requests, Progress(1))
    assert gone.outcomes[0].error.startswith("connection failed")
    (outcome,), _ = await drive(says(b"", pause_s=5), timeout_s=0.2)
    assert outcome.error == "nothing more within 0.2 s"


async def test_open_loop_latency_counts_from_when_a_request_was_due():
    """One at a time through a server that takes 50 ms: the k-th of five due at once waits for those before it."""
    spec = WorkloadSpec(num_requests=5, arrivals="all", prompt_tokens="1", output_tokens="1")
    outcomes, report = await drive(paced(0.05, 0.0), spec, max_concurrency=1)
    for position, outcome in enumerate(sorted(outcomes, key=lambda outcome: outcome.ended)):
        assert outcome.ttft_s >= 0.05 * (position + 1)
        assert outcome.begun - outcome.due >= 0.05 * position
    assert report["max_send_lag_ms"] >= 200
    assert report["max_concurrent_requests"] == 1


async def test_closed_loop_latency_counts_from_the_send():
    spec = WorkloadSpec(num_requests=5, arrivals="closed:1", prompt_tokens="1", output_tokens="1")
    outcomes, _ = await drive(paced(0.05, 0.0), spec)
    starts = sorted((outcome.due, outcome.ended) for outcome in outcomes)
    assert all(due >= ended for (_, ended), (due, _) in itertools.pairwise(starts))


@pytest.mark.parametrize(("arrivals", "bound", "expected"), [("closed:2", 9, 2), ("closed:9", 2, 2)])
async def test_of_two_bounds_the_lower_holds(arrivals, bound, expected):
    spec = WorkloadSpec(num_requests=8, arrivals=arrivals, prompt_tokens="1", output_tokens="1")
    _, report = await drive(paced(0.05, 0.0), spec, max_concurrency=bound)
    assert report["max_concurrent_requests"] == expected


async def test_no_more_connections_are_prepared_for_than_there_are_requests(monkeypatch):
    asked = []
    monkeypatch.setattr("loadtest.client.raise_file_limit", asked.append)
    await drive(paced(0.0, 0.0), WorkloadSpec(num_requests=4, arrivals="closed:1000000", output_tokens="1"))
    assert asked == [4]


async def test_an_open_loop_does_not_wait_for_answers():
    """Nothing is answered before all ten have come: a generator that waited would never send the second."""
    num_seen, all_seen = 0, asyncio.Event()

    def script(body):
        nonlocal num_seen
        num_seen += 1
        if num_seen == 10:
            all_seen.set()

        async def pieces():
            await all_seen.wait()
            yield text("a", token_ids=[1], finish_reason="length") + DONE

        return 200, pieces()

    spec = WorkloadSpec(num_requests=10, arrivals="constant:100", prompt_tokens="1", output_tokens="1")
    outcomes, report = await drive(script, spec, timeout_s=5)
    assert report["completed"] == report["max_concurrent_requests"] == 10
    assert [outcome.due - outcomes[0].due for outcome in outcomes] == pytest.approx([k / 100 for k in range(10)])
    assert all(outcome.ended >= outcomes[-1].due for outcome in outcomes)


@pytest.mark.parametrize(
    ("dialect", "adapter", "expected"),
    [
        ("openai", None, {"model": "base", "return_token_ids": True}),
        ("openai", 1, {"model": "b"}),
        ("openai-chat", 1, {"model": "b", "messages": [{"role": "user", "content": "hi"}]}),
        ("llamacpp", 1, {"model": "base", "lora": [{"id": 1, "scale": 1.0}], "timings_per_token": True}),
        ("llamacpp", None, {"lora": [{"id": 0, "scale": 0.0}, {"id": 1, "scale": 0.0}]}),
    ],
)
def test_dialects(dialect, adapter, expected):
    spec = WorkloadSpec(num_requests=1, prompt_kind="text", extra_body={"top_p": 0.5})
    _, (request,) = draw(spec, [])
    request = type(request)(0, 0.0, adapter, "hi", 1, 9)
    body = json.loads(Dialect(dialect, "base", ["a", "b"]).body(request, spec))
    always = {"max_tokens": 9, "stream": True, "ignore_eos": True, "temperature": 0.0, "top_p": 0.5}
    assert (expected | always).items() <= body.items()
    assert ("prompt" in body) == (dialect != "openai-chat")
    strict = json.loads(Dialect("openai", "base", ["a", "b"]).body(request, dataclasses.replace(spec, strict=True)))
    assert {"ignore_eos", "return_token_ids"}.isdisjoint(strict)


def test_a_chat_of_ids_is_refused():
    spec = WorkloadSpec(num_requests=1)
    with pytest.raises(ValueError, match="text"):
        Dialect("openai-chat", "base", []).body(draw(spec, [])[1][0], spec)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://127.0.0.1", "http://", "http://127.0.0.1:abc", "http://[::1"])
def test_what_is_no_address_is_named(url):
    with pytest.raises(ValueError, match="http"):
        resolve(url)
