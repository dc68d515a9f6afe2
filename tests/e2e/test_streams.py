"""2,000 open streams: readers that are slow, that stop reading or that leave cost nobody but themselves."""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import signal
import socket
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.tiny_server import TinyServer, World, tiny_server

NUM_READING, NUM_SLOW, NUM_STALLED, NUM_LEAVING = 1400, 200, 100, 300
NUM_STREAMS = NUM_READING + NUM_SLOW + NUM_STALLED + NUM_LEAVING
NUM_GONE = NUM_LEAVING // 10  # of the leaving, those that go before anything came
NUM_FILES = 4 * NUM_STREAMS
PROMPTS = ["f", "d", "b", "j"]  # one token each: a step has as many rows as requests
MAX_TOKENS = 400  # of a stalled stream: with 20 logprobs more bytes than all buffers on the way hold
WAIT_S = 120.0


@pytest.fixture
def many_files() -> Iterator[None]:
    """Sockets for all streams, here and in the server, which inherits the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < NUM_FILES:
        pytest.fail(f"needs {NUM_FILES} open files, and the hard limit is {hard}: raise it (ulimit -Hn)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, NUM_FILES), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@dataclass
class Stream:
    """One client's connection and all that it has read; `expected` is the whole answer's tokens."""

    port: int
    body: dict
    expected: list[int]
    sock: socket.socket = field(default_factory=lambda: socket.socket(socket.AF_INET))
    received: bytearray = field(default_factory=bytearray)

    async def ask(self, *, has_small_buffers: bool) -> None:
        """Connect and send the request. Small segments keep the server's side of the buffers small too."""
        self.sock.setblocking(False)
        if has_small_buffers:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(self.sock, ("127.0.0.1", self.port))
        body = json.dumps(self.body).encode()
        fields = ["host: x", "connection: close", "content-type: application/json", f"content-length: {len(body)}"]
        head = "\r\n".join(["POST /v1/completions HTTP/1.1", *fields, "", ""]).encode()
        await loop.sock_sendall(self.sock, head + body)

    async def read(self, *, num_bytes: float = float("inf"), piece: int = 65536, pause_s: float = 0.0) -> None:
        """Read `piece` by `piece` to the end, or until `num_bytes` are there."""
        loop = asyncio.get_running_loop()
        while len(self.received) < num_bytes and (data := await loop.sock_recv(self.sock, piece)):
            self.received += data
            if pause_s:
                await asyncio.sleep(pause_s)

    async def read_and_leave(self, num_bytes: int, *, resets: bool) -> None:
        await self.read(num_bytes=num_bytes)
        self.leave(resets=resets)

    def leave(self, *, resets: bool = False) -> None:
        """Close; with a reset if asked for, or if there is something unread."""
        if resets:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def assert_whole(self) -> None:
        """Exactly the expected tokens, one finish_reason, [DONE], and the response's end."""
        body, is_ended = self._body()
        *events, done, rest = body.split(b"\n\n")
        assert is_ended and (done, rest) == (b"data: [DONE]", b""), body[-500:]
        token_ids, reasons = content(events)
        assert token_ids == self.expected
        assert reasons == [None] * (len(reasons) - 1) + ["length"], reasons

    def assert_beginning(self) -> None:
        """No other tokens than the expected ones, and no end."""
        body, is_ended = self._body()
        token_ids, reasons = content(body.split(b"\n\n")[:-1])
        assert not is_ended and set(reasons) <= {None}, reasons
        assert token_ids == self.expected[: len(token_ids)]

    def assert_merged(self) -> None:
        """What the engine did while nobody read waited as one event, not as hundreds."""
        events = self._body()[0].split(b"\n\n")[:-2]
        assert max(len(content([event])[0]) for event in events) > 1

    def _body(self) -> tuple[bytes, bool]:
        head, _, rest = bytes(self.received).partition(b"\r\n\r\n")
        assert not head or head.startswith(b"HTTP/1.1 200 "), bytes(self.received)
        return dechunked(rest)


def dechunked(rest: bytes) -> tuple[bytes, bool]:
    """The body of a chunked response as far as it came, and whether it came to its end."""
    pieces, at = [], 0
    while (end := rest.find(b"\r\n", at)) >= 0:
        size = int(rest[at:end], 16)
        if size == 0:
            assert rest[end:] == b"\r\n\r\n", "something follows the end"
            return b"".join(pieces), True
        pieces.append(rest[end + 2 : end + 2 + size])
        at = end + 2 + size + 2
    return b"".join(pieces), False


def content(events: list[bytes]) -> tuple[list[int], list[str | None]]:
    """The token ids of events, and the finish_reason of each."""
    choices = [json.loads(event.removeprefix(b"data: "))["choices"][0] for event in events]
    token_ids = [token_id for choice in choices for token_id in choice.get("token_ids", [])]
    return token_ids, [choice["finish_reason"] for choice in choices]


class Crowd:
    """All streams, by how their clients behave."""

    def __init__(self, server: TinyServer, answers: dict[tuple[str, str], list[int]]) -> None:
        self.server = server
        self._answers = answers
        self._rng = random.Random(11)
        self.reading = [self._stream(self._rng.randrange(8, 25)) for _ in range(NUM_READING)]
        self.slow = [self._stream(self._rng.randrange(8, 25)) for _ in range(NUM_SLOW)]
        self.stalled = [self._stream(MAX_TOKENS, logprobs=20) for _ in range(NUM_STALLED)]
        self.leaving = [self._stream(MAX_TOKENS) for _ in range(NUM_LEAVING)]

    @property
    def everyone(self) -> list[Stream]:
        return self.reading + self.slow + self.stalled + self.leaving

    def _stream(self, max_tokens: int, **fields: object) -> Stream:
        model, prompt = self._rng.choice(list(self._answers))
        body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "stream": True, **GREEDY, **fields}
        port = int(self.server.url.rpartition(":")[2])
        return Stream(port, body, self._answers[model, prompt][:max_tokens])

    async def open(self) -> None:
        """All of them while the engine stands still: it then has them at once, none has ended before."""
        os.kill(self.server.pid("engine"), signal.SIGSTOP)
        for stream in self.stalled + self.slow:
            await stream.ask(has_small_buffers=True)
        for stream in self.reading + self.leaving:
            await stream.ask(has_small_buffers=False)
        clients = {stream.sock.getsockname()[1] for stream in self.everyone}
        await until(lambda: num_accepted(self.reading[0].port, clients) == NUM_STREAMS)
        for index, stream in enumerate(self.leaving[:NUM_GONE]):
            stream.leave(resets=index % 2 == 0)
        os.kill(self.server.pid("engine"), signal.SIGCONT)

    async def read_all_but_the_stalled(self) -> None:
        """Each to its end, or to a random point, while nothing of the stalled is read."""
        rng = self._rng
        reads = [stream.read() for stream in self.reading]
        reads += [stream.read(piece=512, pause_s=rng.uniform(0.01, 0.1)) for stream in self.slow]
        for index, stream in enumerate(self.leaving[NUM_GONE:]):
            reads.append(stream.read_and_leave(rng.randrange(1, 3000), resets=index % 2 == 0))
        await asyncio.wait_for(asyncio.gather(*reads), WAIT_S)


GREEDY = {"temperature": 0, "ignore_eos": True, "return_token_ids": True}


def greedy_answers(server: TinyServer, world: World) -> dict[tuple[str, str], list[int]]:
    """The tokens of each model after each prompt, unstreamed; of a shorter answer they are the first."""
    answers = {}
    for model in world.names:
        body = {"model": model, "prompt": PROMPTS, "max_tokens": MAX_TOKENS, **GREEDY}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        for prompt, choice in zip(PROMPTS, answer.json()["choices"], strict=True):
            answers[model, prompt] = choice["token_ids"]
    return answers


def num_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def num_accepted(port: int, clients: set[int]) -> int:
    """Of the connections from the ports `clients` to `port`, those that the server has taken."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ports = [[int(address.rpartition(":")[2], 16) for address in row[1:3]] for row in rows]
    return sum(own == port and peer in clients and row[9] != "0" for row, (own, peer) in zip(rows, ports, strict=True))


async def until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline, "not in time"
        await asyncio.sleep(0.05)


def has_idle_engine(server: TinyServer) -> bool:
    """Nothing runs, waits or holds memory in it."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    return not any(server.metric(name) for name in names)


def num_rows(server: TinyServer) -> float:
    """Tokens that the engine has computed, of prompts and answers."""
    return server.metric("vllm:iteration_tokens_total_sum")


def num_wide_steps(server: TinyServer) -> int:
    """Steps of more than 1,024 streams and at most 2,048."""
    buckets = {
        sample.labels["le"]: int(sample.value)
        for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics", timeout=30).text)
        for sample in family.samples
        if sample.name == "vllm:iteration_tokens_total_bucket"
    }
    return buckets["2048.0"] - buckets["1024.0"]


def lines(server: TinyServer) -> list[dict]:
    """The access log's, of the requests that have ended."""
    return [line for line in server.lines() if line["route"] == "/v1/completions"]


def ends(server: TinyServer) -> Counter[str | None]:
    """How they ended. None: before it was known what for."""
    return Counter(line["finish_reason"] for line in lines(server))


def test_two_thousand_streams(tmp_path, many_files):
    """Whole streams are exact, left ones are aborted, stalled ones hold back nobody; nothing is left of any."""
    world = World.make(tmp_path, num_adapters=4)
    flags = ["--max-num-seqs", str(NUM_STREAMS), "--max-num-batched-tokens", "4096", "--kv-memory", "128MiB"]
    flags += ["--max-queue-len", str(2 * NUM_STREAMS), "--max-queue-wait", "300", "--shutdown-timeout", "3600"]
    with tiny_server(world, *flags) as server:
        answers = greedy_answers(server, world)
        num_before, ends_before = num_files(server.pid("api")), ends(server)
        asyncio.run(_two_thousand_streams(server, answers, ends_before))
        asyncio.run(until(lambda: has_idle_engine(server) and num_files(server.pid("api")) <= num_before))
        assert greedy_answers(server, world) == answers
        server.process.send_signal(signal.SIGTERM)
        assert server.exit_code == 0, "a request that is still counted as open would hold up the drain"


async def _two_thousand_streams(server: TinyServer, answers: dict, ends_before: Counter[str | None]) -> None:
    crowd = Crowd(server, answers)
    rows_before = num_rows(server)
    await crowd.open()
    await crowd.read_all_but_the_stalled()
    for stream in crowd.reading + crowd.slow:
        stream.assert_whole()
    for stream in crowd.leaving:
        stream.assert_beginning()

    # The engine has ended the stalled too, and each of them is held in the API process by its reader alone.
    await until(lambda: has_idle_engine(server))
    num_wanted = sum(len(stream.expected) for stream in crowd.everyone)  # of each answer, a row gave each token
    assert num_rows(server) - rows_before <= num_wanted - NUM_LEAVING, "the left ones are to end in the engine"
    await until(lambda: (ends(server) - ends_before).total() == NUM_STREAMS - NUM_STALLED)
    assert (ends(server) - ends_before)["length"] == NUM_READING + NUM_SLOW
    taken = server.metric("vllm:generation_tokens_total") - sum(line["output_tokens"] or 0 for line in lines(server))
    assert taken < NUM_STALLED * MAX_TOKENS, "the stalled are to fill every buffer"
    assert num_wide_steps(server) >= 4

    half = NUM_STALLED // 2
    for index, stream in enumerate(crowd.stalled[:half]):
        stream.leave(resets=index % 2 == 0)
    await asyncio.wait_for(asyncio.gather(*(stream.read() for stream in crowd.stalled[half:])), WAIT_S)
    for stream in crowd.stalled[half:]:
        stream.assert_whole()
        stream.assert_merged()
    for stream in crowd.reading + crowd.slow + crowd.stalled:
        stream.leave()
    await until(lambda: (ends(server) - ends_before).total() == NUM_STREAMS)
    # a stalled one that has left is an abort, though the engine had ended it long before
    assert (ends(server) - ends_before)["length"] == NUM_READING + NUM_SLOW + NUM_STALLED - half
    assert (ends(server) - ends_before)["abort"] >= half
    assert set(ends(server)) <= {"length", "abort", None}
