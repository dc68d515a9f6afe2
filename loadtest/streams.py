"""What open streams cost the API process: memory of one, CPU time of a token, and that time's share of a step.

The CPU time of a token is the difference between a long run and a short one over the difference in tokens, so
that what a request costs once (connect, parse, tokenize, log) is not in it.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

from loadtest.server_process import RunningServer, resident_bytes, running_server

if TYPE_CHECKING:
    from loadtest.bench import Workload

NUM_MANY, NUM_FEW = 2000, 32
SHORT, LONG = 4, 20  # tokens of a stream in the two runs of NUM_MANY
NUM_FILES = 2 * NUM_MANY + 500
END = b"\r\n0\r\n\r\n"  # of a chunked response
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def measure_streams(workload: Workload, folder: Path) -> dict[str, object]:
    """2,000 streams over a tiny base, where streaming is most of the work; 32 over the workload's."""
    _raise_file_limit()
    tiny = _tiny_base(folder / "tiny")
    (folder / "adapters").mkdir()
    flags = ("--max-num-seqs", str(NUM_MANY), "--max-num-batched-tokens", "4096", "--disable-access-log")
    room = ("--kv-memory", "64MiB", "--max-queue-wait", "600")
    with running_server(tiny, folder / "adapters", folder / "cache", *flags, *room) as server:
        asyncio.run(_wave(server, NUM_FEW, SHORT))  # what is allocated once, however many streams there are
        many = _slope(server, NUM_MANY, SHORT, LONG)
        lone = [_slope(server, NUM_FEW, SHORT, 10 * LONG) for _ in range(workload.repeats)]
    with running_server(workload.model, folder / "adapters", folder / "cache", "--disable-access-log") as server:
        asyncio.run(_wave(server, NUM_FEW, SHORT))
        few = [_slope(server, NUM_FEW, SHORT, workload.output_tokens) for _ in range(workload.repeats)]
    return {
        f"API memory of an open stream, of {NUM_MANY}, kB": many.stream_bytes / 1e3,
        "API CPU of a request but its tokens, us": many.request_s * 1e6,
        **_rows(f"tiny base, {NUM_MANY} streams", [many]),
        **_rows(f"tiny base, {NUM_FEW} streams", lone),
        **_rows(f"{workload.model.name}, {NUM_FEW} streams", few),
    }


def _tiny_base(path: Path) -> Path:
    """A llama of two narrow layers with random weights, and a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=320, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(str(path))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog"], trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    return path


def _rows(name: str, slopes: list[_Slope]) -> dict[str, object]:
    token_s, step_s = (statistics.median(pick) for pick in zip(*((s.token_s, s.step_s) for s in slopes), strict=True))
    rows = slopes[0].num_streams
    return {
        f"{name}: API CPU of a token, us": token_s * 1e6,
        f"{name}: runs": str([round(slope.token_s * 1e6, 1) for slope in slopes]),
        f"{name}: tokens an event": statistics.median(slope.tokens_an_event for slope in slopes),
        f"{name}: mean step, ms": step_s * 1e3,
        f"{name}: share of {rows} tokens in a step": rows * token_s / step_s,
    }


@dataclass(frozen=True)
class _Wave:
    """So many streams at once, from the first connect to the last byte."""

    cpu_s: float  # of the API process
    wall_s: float
    num_steps: float
    num_events: int  # those with tokens
    stream_bytes: float  # what the API process has grown by while all were open, by stream


@dataclass(frozen=True)
class _Slope:
    """What each further token costs."""

    num_streams: int
    token_s: float  # of CPU
    request_s: float  # of CPU, for a request without any token
    step_s: float  # wall time
    tokens_an_event: float
    stream_bytes: float  # of the long run; tells something of a server's first


def _slope(server: RunningServer, num_streams: int, short: int, long: int) -> _Slope:
    high, low = (asyncio.run(_wave(server, num_streams, tokens)) for tokens in (long, short))
    tokens = num_streams * (long - short)
    token_s = (high.cpu_s - low.cpu_s) / tokens
    return _Slope(
        num_streams,
        token_s=token_s,
        request_s=low.cpu_s / num_streams - short * token_s,
        step_s=(high.wall_s - low.wall_s) / (high.num_steps - low.num_steps),
        tokens_an_event=tokens / (high.num_events - low.num_events),
        stream_bytes=high.stream_bytes,
    )


async def _wave(server: RunningServer, num_streams: int, max_tokens: int) -> _Wave:
    """Every stream opened before any is read further; all then read to their ends."""
    before = resident_bytes(server.pid)
    num_steps, cpu_s, started = _num_steps(server), _cpu_s(server.pid), time.monotonic()
    crowd = [_Stream(server, max_tokens) for _ in range(num_streams)]
    await asyncio.gather(*(stream.open() for stream in crowd))
    grown = resident_bytes(server.pid) - before
    await asyncio.gather(*(stream.read() for stream in crowd))
    return _Wave(
        cpu_s=_cpu_s(server.pid) - cpu_s,
        wall_s=time.monotonic() - started,
        num_steps=_num_steps(server) - num_steps,
        num_events=sum(stream.received.count(b'"token_ids":[') for stream in crowd),
        stream_bytes=grown / num_streams,
    )


@dataclass
class _Stream:
    """A plain socket: a client that costs the machine as little as can be."""

    server: RunningServer
    max_tokens: int
    received: bytearray = field(default_factory=bytearray)

    async def open(self) -> None:
        """Send the request and read the first bytes of its answer."""
        host, _, port = self.server.url.removeprefix("http://").partition(":")
        reader, self._writer = await asyncio.open_connection(host, int(port))
        self._reader = reader
        prompt = [3 + id(self) % 251]
        asked = {"model": "base", "prompt": prompt, "max_tokens": self.max_tokens, "stream": True}
        body = json.dumps(asked | {"ignore_eos": True, "return_token_ids": True}).encode()
        fields = ["host: bench", "content-type: application/json", f"content-length: {len(body)}"]
        self._writer.write("\r\n".join(["POST /v1/completions HTTP/1.1", *fields, "", ""]).encode() + body)
        self.received += await reader.read(65536)
        if not self.received.startswith(b"HTTP/1.1 200 "):
            raise RuntimeError(f"the server answered {bytes(self.received)!r}")

    async def read(self) -> None:
        """Read the rest."""
        while not self.received.endswith(END):
            data = await self._reader.read(65536)
            if not data:
                raise RuntimeError("the server closed a stream before its end")
            self.received += data
        self._writer.close()


def _num_steps(server: RunningServer) -> float:
    text = httpx.get(f"{server.url}/metrics", timeout=60).text
    (line,) = [line for line in text.splitlines() if line.startswith("vllm:iteration_tokens_total_count")]
    return float(line.rsplit(" ", 1)[1])


def _cpu_s(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


def _raise_file_limit() -> None:
    """Sockets for all streams, here and in the server, which inherits the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < NUM_FILES:
        raise RuntimeError(f"{NUM_MANY} streams need {NUM_FILES} open files; the hard limit is {hard}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, NUM_FILES), hard))
