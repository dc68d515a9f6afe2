"""What is asked of a server: drawn whole from a seed before the first request is sent.

Each property has its own random stream, so another popularity leaves times, lengths and prompts as they were.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from loadtest.arrivals import Arrivals, parse_arrivals
from loadtest.lengths import parse_lengths
from loadtest.popularity import parse_popularity

_MAX_ID = 2**31  # of `highest_id`
# Words that are mostly one token each in the usual vocabularies, for prompts sent as text.
_WORDS = "time people way water word number part place year line day fact house point hand side work life"


@dataclass(frozen=True)
class WorkloadSpec:
    """Everything that decides the requests but the names of a server's models: two runs with equal specs are alike."""

    seed: int = 0
    num_requests: int = 100
    arrivals: str = "closed:8"
    popularity: str = "uniform"
    num_adapters: int = 0
    base_share: float = 0.0  # of the requests go to the base, the others by `popularity`; without adapters all do
    prompt_tokens: str = "128"
    output_tokens: str = "64"
    prompt_kind: str = "ids"  # "ids", or "text": words, about one token each
    lowest_id: int = 100  # of random prompts: below are special tokens
    highest_id: int = 30_000
    ignore_eos: bool = True
    temperature: float = 0.0
    strict: bool = False  # only OpenAI's own fields are sent
    extra_body: Mapping[str, object] = field(default_factory=dict)  # goes into every body

    def as_json(self) -> dict[str, object]:
        """Plain data, for result files."""
        return asdict(self)


@dataclass(frozen=True)
class Request:
    """One request; `adapter` is an index into the adapters' names, None for the base."""

    index: int
    at_s: float  # from the start; 0 in a closed loop
    adapter: int | None
    prompt: list[int] | str
    prompt_tokens: int  # asked for; what a server counts of a text may differ
    max_tokens: int


def draw(spec: WorkloadSpec, names: Sequence[str]) -> tuple[Arrivals, list[Request]]:
    """The requests of a spec. Errors: ValueError for a spec that says nothing that can be drawn."""
    _check(spec, names)
    arrivals = parse_arrivals(spec.arrivals)
    streams = [np.random.Generator(np.random.PCG64(child)) for child in np.random.SeedSequence(spec.seed).spawn(5)]
    times = arrivals.times(spec.num_requests, streams[0])
    adapters = _draw_adapters(spec, names, streams[1])
    prompts = parse_lengths(spec.prompt_tokens)(spec.num_requests, streams[2])
    outputs = parse_lengths(spec.output_tokens)(spec.num_requests, streams[3])
    requests = [
        Request(index, float(times[index]), adapters[index], _prompt(spec, length, streams[4]), length, output)
        for index, (length, output) in enumerate(zip(prompts.tolist(), outputs.tolist(), strict=True))
    ]
    return arrivals, requests


def expand_names(text: str) -> list[str]:
    """Names divided by commas; `bench-[000-031]` is 32 of them, with leading zeros as written. Errors: ValueError."""
    parts = text.split(",") if text else []
    if not all(parts):
        raise ValueError(f"names {text!r}: one is empty")
    return [name for part in parts for name in _expand(part)]


def _expand(part: str) -> list[str]:
    """Every range in it, the last one's numbers changing fastest."""
    found = re.fullmatch(r"(.*?)\[(\d+)-(\d+)\](.*)", part)
    if not found:
        return [part]
    before, low, high, after = found.groups()
    if int(low) > int(high):
        raise ValueError(f"names {part!r}: {low} is above {high}")
    numbers = [f"{number:0{len(low)}d}" for number in range(int(low), int(high) + 1)]
    return [before + number + rest for number in numbers for rest in _expand(after)]


def _check(spec: WorkloadSpec, names: Sequence[str]) -> None:
    if spec.num_requests < 1:
        raise ValueError(f"{spec.num_requests} requests: at least 1")
    if not 0 <= spec.base_share <= 1:
        raise ValueError(f"base share {spec.base_share}: a number from 0 to 1")
    if not 0 <= spec.temperature < math.inf:
        raise ValueError(f"temperature {spec.temperature}: a number from 0 up")
    if spec.num_adapters != len(names):
        raise ValueError(f"{len(names)} adapter names for {spec.num_adapters} adapters")
    if spec.prompt_kind not in ("ids", "text"):
        raise ValueError(f"prompt kind {spec.prompt_kind!r}: ids or text")
    if not 0 <= spec.lowest_id < spec.highest_id <= _MAX_ID:
        raise ValueError(
            f"--lowest-id {spec.lowest_id} and --highest-id {spec.highest_id}: from 0, the first below the second, "
            f"which is at most {_MAX_ID}"
        )


def _draw_adapters(spec: WorkloadSpec, names: Sequence[str], rng: np.random.Generator) -> list[int | None]:
    draw_names = parse_popularity(spec.popularity, names)  # what is wrong is refused without adapters too
    if not names:
        return [None] * spec.num_requests
    to_base = rng.random(spec.num_requests) < spec.base_share
    drawn = draw_names(spec.num_requests, rng)
    return [None if base else int(index) for base, index in zip(to_base, drawn, strict=True)]


def _prompt(spec: WorkloadSpec, length: int, rng: np.random.Generator) -> list[int] | str:
    if spec.prompt_kind == "ids":
        ids: list[int] = rng.integers(spec.lowest_id, spec.highest_id, size=length).tolist()
        return ids
    return " ".join(rng.choice(_WORDS.split(), size=length).tolist())
