"""Collector and Streams: merging, exactly one terminal event, aborts of readers that leave."""

from __future__ import annotations

import asyncio
import gc
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.messages import Abort, AddRequest, RequestError, RequestOutput, TokenLogprobs
from server.engine.streams import CHUNK, Collector, Streams
from server.errors import BadRequest, EngineDead
from tests.engine.scripted_core import make_request

DEAD = RequestError(503, "engine_dead", "gone")


def token_output(request_id: str, token_id: int, finish_reason: str | None = None) -> RequestOutput:
    return RequestOutput(request_id=request_id, token_ids=[token_id], finish_reason=finish_reason)


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.booleans())
@settings(max_examples=200, deadline=None)
def test_merging_loses_nothing_whenever_the_reader_comes(reads, has_logprobs):
    """After each put the reader may or may not read; what it sees concatenates to what was sent."""

    async def scenario() -> None:
        collector = Collector()
        seen: list[RequestOutput] = []
        sent: list[RequestOutput] = []
        for i, is_read in enumerate(reads):
            is_first, is_last = i == 0, i == len(reads) - 1
            output = RequestOutput(
                request_id="a",
                token_ids=[i, -i],
                finish_reason="stop" if is_last else None,
                stop_token_id=7 if is_last else None,
                num_cached_tokens=3 if is_first else None,
                phases={"host": 1.0} if is_first else None,
                logprobs=[TokenLogprobs(i, -1.0, 1), TokenLogprobs(-i, -2.0, 2)] if has_logprobs else None,
                prompt_logprobs=[TokenLogprobs(5, -3.0, 4)] if is_first and has_logprobs else None,
            )
            sent.append(output)
            collector.put(output)
            if is_read or is_last:
                seen.append(await collector.get())
        assert [t for o in seen for t in o.token_ids] == [t for i in range(len(reads)) for t in (i, -i)]
        assert [o.num_cached_tokens for o in seen] == [3] + [None] * (len(seen) - 1)
        assert [o.phases for o in seen] == [{"host": 1.0}] + [None] * (len(seen) - 1)
        assert [o.finish_reason for o in seen] == [None] * (len(seen) - 1) + ["stop"]
        assert seen[-1].stop_token_id == 7
        tokens_told = [p.token_id for o in seen for p in o.logprobs or []]
        assert tokens_told == ([t for o in seen for t in o.token_ids] if has_logprobs else [])
        assert [o.prompt_logprobs is not None for o in seen] == [has_logprobs] + [False] * (len(seen) - 1)
        if has_logprobs:
            assert all(len(o.logprobs) == len(o.token_ids) for o in seen), "a token without its logprob"
            assert all(len(o.logprobs) == 2 for o in sent), "the sender's lists changed"
        assert [o.token_ids for o in sent] == [[i, -i] for i in range(len(reads))], "the sender's lists changed"

    asyncio.run(scenario())


def test_every_field_of_an_output_has_a_merge_rule():
    """A new field of RequestOutput: give it a rule in Collector._merge, test it above, then add it here."""
    first_only, concatenated = {"num_cached_tokens", "phases", "prompt_logprobs"}, {"token_ids", "logprobs"}
    from_the_newest = {"request_id", "finish_reason", "stop_token_id", "error"}
    assert set(RequestOutput.__struct_fields__) == first_only | concatenated | from_the_newest


async def test_an_unread_stream_holds_one_output():
    collector = Collector()
    for i in range(10_000):
        collector.put(token_output("a", i))
    assert (await collector.get()).token_ids == list(range(10_000))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(collector.get(), 0.01)


class Sent:
    """Streams, and what they sent."""

    def __init__(self) -> None:
        self.messages: list[object] = []
        self.streams = Streams(self.messages.append)


async def test_the_request_is_registered_before_it_is_sent_and_sent_at_the_first_read():
    request = make_request("a")
    open_at_send: list[list[str]] = []
    streams = Streams(lambda _: open_at_send.append(streams.open_ids))
    stream = streams.stream(request)
    assert open_at_send == []
    reading = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    assert open_at_send == [["a"]]
    await streams.deliver([token_output("a", 1, "stop")])
    assert (await reading).token_ids == [1]
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def _reading(sent: Sent, request: AddRequest):
    """A stream whose first output was read."""
    stream = sent.streams.stream(request)
    reading = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    await sent.streams.deliver([token_output(request.request_id, 1)])
    await reading
    return stream


@pytest.mark.parametrize("how", ["aclose", "cancel", "forget"])
async def test_a_reader_that_leaves_sends_one_abort(how):
    sent = Sent()
    request = make_request("a")
    stream = await _reading(sent, request)
    if how == "aclose":
        await stream.aclose()
    elif how == "cancel":
        reading = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.sleep(0)
    else:
        del stream
        gc.collect()
        await asyncio.sleep(0.01)
    assert sent.messages == [request, Abort(["a"])]
    assert sent.streams.open_ids == []


async def test_a_reader_that_leaves_after_the_end_sends_nothing():
    sent = Sent()
    request = make_request("a")
    stream = await _reading(sent, request)
    await sent.streams.deliver([token_output("a", 2, "length")])
    await stream.aclose()
    assert sent.messages == [request]


async def test_an_id_stays_taken_until_the_engine_has_let_go_of_it():
    """Else the old request's last tokens would answer the new one."""
    sent = Sent()
    stream = await _reading(sent, make_request("a"))
    with pytest.raises(BadRequest, match="in use"):
        await anext(sent.streams.stream(make_request("a")))
    await stream.aclose()
    with pytest.raises(BadRequest, match="in use"):
        await anext(sent.streams.stream(make_request("a")))
    await sent.streams.deliver([token_output("a", 9), RequestOutput(request_id="a", finish_reason="abort")])
    again = await _reading(sent, make_request("a"))
    await again.aclose()


async def test_only_the_first_terminal_event_counts():
    sent = Sent()
    stream = await _reading(sent, make_request("a"))
    await sent.streams.deliver([token_output("a", 2, "stop"), token_output("a", 3, "length")])
    sent.streams.fail_all(DEAD)
    assert [o async for o in stream] == [token_output("a", 2, "stop")]


async def test_fail_all_keeps_unread_tokens_and_ends_each_stream_once():
    sent = Sent()
    stream = await _reading(sent, make_request("a"))
    await sent.streams.deliver([token_output("a", 2), token_output("a", 3)])
    sent.streams.fail_all(DEAD)
    sent.streams.fail_all(DEAD)
    [last] = [o async for o in stream]
    assert (last.token_ids, last.finish_reason, last.error) == ([2, 3], "error", DEAD)


async def test_refusing_keeps_open_streams_and_raises_for_new_ones():
    sent = Sent()
    stream = await _reading(sent, make_request("a"))
    sent.streams.refuse("why")
    sent.streams.refuse("a later reason")
    with pytest.raises(EngineDead, match="why"):
        await anext(sent.streams.stream(make_request("b")))
    await sent.streams.deliver([token_output("a", 2, "stop")])
    assert [o.finish_reason async for o in stream] == ["stop"]


async def test_delivering_many_outputs_lets_the_loop_turn_between_chunks():
    sent = Sent()
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counter = asyncio.ensure_future(count_turns())
    await sent.streams.deliver([token_output(str(i), 1) for i in range(10 * CHUNK)])
    counter.cancel()
    assert 9 <= turns <= 11


async def test_diverted_outputs_come_in_order_and_only_while_the_reader_waits():
    """Random readiness of both sides: what taker and reader got, in the order they got it, is what was sent."""
    for seed in range(20):
        rng = random.Random(seed)
        sent, got, taken = Sent(), [], []
        stream = await _reading(sent, make_request("a"))

        def take(output: RequestOutput, rng=rng, got=got, taken=taken) -> bool:
            if rng.random() < 0.5:
                return False
            got.extend(output.token_ids)
            taken.append(output)
            return True

        async def read(rng=rng, got=got, stream=stream) -> None:
            async for output in stream:
                got.extend(output.token_ids)
                for _ in range(rng.randrange(3)):
                    await asyncio.sleep(0)

        sent.streams.divert("a", take)
        reading = asyncio.create_task(read())
        for i in range(2, 200):
            await sent.streams.deliver([token_output("a", i)])
        await sent.streams.deliver([token_output("a", 200, "length")])
        await asyncio.wait_for(reading, 5)
        assert got == list(range(2, 201))
        assert 0 < len(taken) < 198
        assert not any(output.finish_reason for output in taken), "the end is the reader's"


async def test_what_a_taker_raises_is_raised_to_the_reader_of_its_stream_alone():
    sent = Sent()
    stream, other = await _reading(sent, make_request("a")), await _reading(sent, make_request("b"))

    def take(output: RequestOutput) -> bool:
        raise ZeroDivisionError("a defect")

    sent.streams.divert("a", take)
    readings = [asyncio.ensure_future(anext(stream)), asyncio.ensure_future(anext(other))]
    await asyncio.sleep(0)
    await sent.streams.deliver([token_output("a", 2), token_output("b", 3)])
    failed, read = await asyncio.gather(*readings, return_exceptions=True)
    assert isinstance(failed, ZeroDivisionError)
    assert read == token_output("b", 3)
    assert sent.messages[2:] == [Abort(["a"])]
    await other.aclose()
