"""`multilora bench store replace`: the hottest adapter of a bucket is replaced again and again under load.

Before the load each of its versions answers each prompt alone, under a name of its own: that is the oracle, found by
the image key that every answer's header names. Then clients ask, one request after the other, half of them for the
hottest adapter, while its file in the bucket becomes the next version every --every seconds. Counted are

    failed        answers with an error
    wrong         answers that are not, letter for letter, what the version in their header says alone
    unknown       answers of a version that their name never had
    stale         answers of a version that had been replaced for longer than the poll interval (and --grace) when
                  they were asked for

and the longest time in which no client got a token. Any of the first four is status 1.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from adapters_store.sources.folder import WEIGHTS_FILE
from loadtest.options import count, lora_rank, positive
from loadtest.outcome import Outcome, read_outcome
from loadtest.s3 import S3Server, s3_server
from loadtest.server_process import running_server
from loadtest.store import BUCKET, part_parser, run_part, source_flags
from loadtest.wire import Target, exchange, resolve

HOT = "hot"
_OTHERS = [f"other-{number}" for number in range(3)]
_SPREAD = 4.0  # factors so large that versions answer differently
_TIMEOUT_S = 60.0
_IMAGE_KEY = re.compile(rb"x-multilora-image-key: ([0-9a-f]{64})", re.IGNORECASE)

Oracle = Mapping[tuple[str, int], str]
"""By image key and number of the prompt: the text that an answer has"""


@dataclass(frozen=True)
class Replaced:
    """The bucket's file of the hottest adapter became another; times by `time.perf_counter`."""

    began: float
    ended: float  # when the bucket had said so
    image_key: str  # of the version that it became


@dataclass(frozen=True)
class Answered:
    """One request and what came of it."""

    name: str
    prompt: int
    image_key: str  # as its header has it; "" without
    outcome: Outcome


@dataclass
class Verdict:
    """How many answers were right, and what the others were."""

    right: int = 0
    right_of: dict[str, int] = field(default_factory=dict)  # by image key
    failed: list[str] = field(default_factory=list)
    wrong: int = 0
    unknown: int = 0
    stale: int = 0
    longest_stale_s: float = 0.0  # that a version had been replaced when an answer of it was asked for

    @property
    def faults(self) -> int:
        return len(self.failed) + self.wrong + self.unknown + self.stale


def judge(
    answers: Sequence[Answered],
    history: Sequence[Replaced],
    oracle: Oracle,
    keys: Mapping[str, str],
    allowed_s: float,
) -> Verdict:
    """Hold each answer against the oracle, and its version against the time.

    `history`: of the hottest adapter, its first version included. `keys`: image key of each other name. A version may
    answer from when its file was put until `allowed_s` after the next one was there.
    """
    verdict = Verdict()
    for answer in answers:
        outcome, key = answer.outcome, answer.image_key
        if outcome.error:
            verdict.failed.append(outcome.error)
            continue
        began = outcome.stamps[0]
        ages = [0.0] if keys.get(answer.name) == key else []
        if answer.name == HOT:
            ages = [*_ages(history, key, outcome.begun, began)]
        age = min(ages, default=None)
        if age is None:
            verdict.unknown += 1
        elif outcome.text != oracle[key, answer.prompt]:
            verdict.wrong += 1
        elif age > allowed_s:
            verdict.stale += 1
        else:
            verdict.right += 1
            verdict.right_of[key] = verdict.right_of.get(key, 0) + 1
        verdict.longest_stale_s = max(verdict.longest_stale_s, age or 0.0)
    return verdict


def longest_silence(answers: Sequence[Answered]) -> float:
    """The longest time between two tokens of whichever streams, in seconds."""
    stamps = np.sort(np.concatenate([answer.outcome.stamps for answer in answers]))
    return float(np.diff(stamps).max())


def main(arguments: Sequence[str]) -> None:
    """The command."""
    parser = part_parser("replace", __doc__)
    parser.add_argument("--minutes", type=positive, default=10.0)
    parser.add_argument("--every", type=positive, default=10.0, help="seconds between two versions")
    parser.add_argument("--poll-interval", type=positive, default=2.0, help="the server's, in seconds")
    parser.add_argument("--grace", type=positive, default=1.0, help="seconds beyond it in which a version may answer")
    parser.add_argument("--versions", type=count, default=4)
    parser.add_argument("--rank", type=lora_rank, default=16)
    parser.add_argument("--clients", type=count, default=8)
    parser.add_argument("--prompts", type=count, default=4)
    parser.add_argument("--output-tokens", type=count, default=32)
    run_part("replace", parser, arguments, measure)


def measure(options: argparse.Namespace, model: Path, folder: Path) -> dict[str, object]:
    """All figures. Errors: RuntimeError where an answer was not what it should be."""
    from loadtest.adapters import random_adapter
    from server.model.manifest import build_manifest

    manifest = build_manifest(model, "auto", folder / "hashes")
    versions = [random_adapter(manifest, options.rank, seed, _SPREAD) for seed in range(options.versions)]
    others = {name: random_adapter(manifest, 8, seed, _SPREAD) for seed, name in enumerate(_OTHERS, 100)}
    for name in ("s3", "none"):
        (folder / name).mkdir()
    with s3_server(folder / "s3", volume_mb=1024, niceness=10) as bucket:
        for name, files in {
            HOT: versions[0],
            **others,
            **dict(zip(_own_names(options), versions, strict=True)),
        }.items():
            bucket.put(BUCKET, name, files)
        flags = source_flags(options, poll_interval_s=options.poll_interval)
        cache, log = folder / "cache", folder / "server.log"
        with running_server(model, folder / "none", cache, *flags, env=bucket.environment, log=log) as server:
            bench = _Bench(resolve(server.url), bucket, [files[WEIGHTS_FILE] for files in versions], options)
            return asyncio.run(bench.run())


def _own_names(options: argparse.Namespace) -> list[str]:
    return [f"version-{number}" for number in range(options.versions)]


@dataclass
class _Bench:
    target: Target
    bucket: S3Server
    weights: Sequence[bytes]  # of each version
    options: argparse.Namespace
    answers: list[Answered] = field(default_factory=list)
    history: list[Replaced] = field(default_factory=list)
    is_over: bool = False

    async def run(self) -> dict[str, object]:
        own = _own_names(self.options)
        alone = [await self._ask(name, n) for name in (*own, *_OTHERS) for n in range(self.options.prompts)]
        oracle, keys = oracle_of(alone)
        version_keys = [keys[name] for name in own]
        self.history.append(Replaced(0.0, 0.0, version_keys[0]))
        await self._ask(HOT, 0)
        started = time.perf_counter()
        clients = [asyncio.create_task(self._client(seed)) for seed in range(self.options.clients)]
        await self._replace(version_keys, started + 60 * self.options.minutes)
        self.is_over = True
        await asyncio.gather(*clients)
        allowed_s = self.options.poll_interval + self.options.grace
        verdict = judge(self.answers, self.history, oracle, keys, allowed_s)
        return self._figures(verdict, len(set(version_keys)))

    async def _replace(self, keys: Sequence[str], until: float) -> None:
        """Until then, the next version at its time."""
        store, due = self.bucket.store(BUCKET), time.perf_counter()
        for number in itertools.count(1):
            due += self.options.every
            if due > until:
                await asyncio.sleep(until - time.perf_counter())
                return
            await asyncio.sleep(due - time.perf_counter())
            began, version = time.perf_counter(), number % len(keys)
            await store.put_async(f"{HOT}/{WEIGHTS_FILE}", self.weights[version], use_multipart=False)
            self.history.append(Replaced(began, time.perf_counter(), keys[version]))

    async def _client(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self.is_over:
            name = HOT if rng.random() < 0.5 else rng.choice(_OTHERS)
            self.answers.append(await self._ask(name, rng.randrange(self.options.prompts)))

    async def _ask(self, name: str, prompt: int) -> Answered:
        ids = [100 + (prompt * 31 + position * 7) % 150 for position in range(16)]
        body = {"model": name, "prompt": ids, "max_tokens": self.options.output_tokens, "temperature": 0}
        encoded = json.dumps({**body, "ignore_eos": True, "stream": True, "return_token_ids": True}).encode()
        request = self.target.encode("/v1/completions", encoded)
        done = await exchange(self.target, request, time.perf_counter(), _TIMEOUT_S)
        outcome = Outcome(0, None, self.options.output_tokens, done.due, done.begun, done.ended)
        read_outcome(done, outcome)
        found = _IMAGE_KEY.search(b"".join(data for _, data in done.parts[:2]))
        return Answered(name, prompt, found[1].decode() if found else "", outcome)

    def _figures(self, verdict: Verdict, num_versions: int) -> dict[str, object]:
        """Errors: RuntimeError where there was a fault, or a version that never answered."""
        told = {
            "failed": len(verdict.failed),
            "wrong": verdict.wrong,
            "unknown": verdict.unknown,
            "stale": verdict.stale,
        }
        if verdict.faults:
            raise RuntimeError(f"{verdict.faults} of {len(self.answers)} answers: {told}; {verdict.failed[:1]}")
        hot = [answer for answer in self.answers if answer.name == HOT]
        seen = len({answer.image_key for answer in hot})
        if seen < min(num_versions, len(self.history)):
            raise RuntimeError(f"{seen} versions answered, of {num_versions} in {len(self.history)} turns")
        gaps = [gap for answer in self.answers for gap in answer.outcome.itls_s]
        firsts = [answer.outcome.ttft_s or 0.0 for answer in hot]
        return {
            "replacements": len(self.history) - 1,
            "answers": len(self.answers),
            "of the hottest adapter": len(hot),
            "versions that answered": seen,
            **told,
            "longest that a replaced version still answered, s": verdict.longest_stale_s,
            "longest time without a token from any stream, s": longest_silence(self.answers),
            "longest time without one from the hottest adapter's, s": longest_silence(hot),
            "longest gap within a stream, ms": max(gaps) * 1e3,
            "median gap, ms": float(np.median(gaps)) * 1e3,
            "the hottest adapter's first token, median, ms": float(np.median(firsts)) * 1e3,
            "the same, longest, ms": max(firsts) * 1e3,
        }


def oracle_of(alone: Sequence[Answered]) -> tuple[Oracle, dict[str, str]]:
    """What each version says alone, and the image key of each name.

    Errors: RuntimeError where a request failed, or where two versions answer a prompt alike: who could tell them apart?
    """
    oracle: dict[tuple[str, int], str] = {}
    keys: dict[str, str] = {}
    texts: dict[tuple[int, str], str] = {}
    for answer in alone:
        if answer.outcome.error:
            raise RuntimeError(f"{answer.name} alone: {answer.outcome.error}")
        text = answer.outcome.text
        oracle[answer.image_key, answer.prompt] = text
        keys[answer.name] = answer.image_key
        other = texts.setdefault((answer.prompt, text), answer.name)
        if other != answer.name and not {other, answer.name} & set(_OTHERS):
            raise RuntimeError(f"{other} and {answer.name} say the same to prompt {answer.prompt}")
    return oracle, keys


def _ages(history: Sequence[Replaced], key: str, asked: float, began: float) -> Iterator[float]:
    """For how long each turn of that version had been over when an answer was asked for that began then; 0 if not."""
    for turn, following in itertools.zip_longest(history, history[1:]):
        if turn.image_key == key and turn.began <= began:
            yield max(0.0, asked - following.ended) if following else 0.0
