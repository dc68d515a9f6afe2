"""The isolation world: an arena for a quarter of the adapters, and everything that can go wrong, at random.

Every answer is compared with what unmerged PEFT says for the adapter *content* that its name pointed to
when the request arrived.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from adapters_store.errors import AdapterError
from adapters_store.ref import SourceVersion
from server.engine.messages import SamplingParams
from tests.driver import Driver
from tests.zoo import (
    ZooAdapter,
    greedy_tokens,
    load_oracle_base,
    make_zoo,
    peft_oracle,
    random_prompts,
)


@dataclass
class Oracle:
    """Greedy answers of every (content, prompt), computed once by unmodified transformers and PEFT."""

    contents: list[ZooAdapter]
    prompts: list[list[int]]
    answers: dict[tuple[str | None, int], list[int]]
    num_tokens: int

    @classmethod
    def build(
        cls,
        base: Path,
        root: Path,
        *,
        contents: int,
        prompts: int,
        num_tokens: int,
        scale: float,
        stem_tokens: int = 32,
    ) -> Oracle:
        model = load_oracle_base(base)
        zoo = make_zoo(model, root, contents, scale=scale, max_rank=32)
        texts = shared_prefix_prompts(prompts, model.config.vocab_size, stem_tokens)
        answers: dict[tuple[str | None, int], list[int]] = {}
        for content in [None, *zoo]:
            with peft_oracle(model, content) as oracle:
                for index, prompt in enumerate(texts):
                    key = content.name if content else None
                    answers[key, index] = greedy_tokens(oracle, prompt, num_tokens)
        return cls(zoo, texts, answers, num_tokens)

    def alone(self, base: Path, cache: Path, **config: object) -> Oracle:
        """The same with our own engine's answers in `config`, one request at a time and nothing kept between them.

        For the native bf16 pass, whose bits don't depend on the batch: a storm may change no token of it.
        """
        driver = Driver(base, self.contents[0].path.parent, cache, enable_prefix_cache=False, **config)
        params = SamplingParams(max_tokens=self.num_tokens, temperature=0.0, ignore_eos=True)
        answers = {}
        for content, prompt in self.answers:
            request = driver.submit(self.prompts[prompt], content, params)
            answers[content, prompt] = driver.finish([request])[request].token_ids
        driver.close()
        return replace(self, answers=answers)

    def agreement(self, other: Oracle) -> float:
        """The share of answers whose first token is the other's too."""
        return sum(answer[0] == other.answers[key][0] for key, answer in self.answers.items()) / len(self.answers)

    @property
    def share_distinct(self) -> float:
        """How many of the answers differ from the base's: an oracle that can't tell adapters apart shows nothing."""
        pairs = [(key, index) for key, index in self.answers if key is not None]
        return sum(self.answers[pair] != self.answers[None, pair[1]] for pair in pairs) / len(pairs)


def shared_prefix_prompts(count: int, vocab_size: int, stem_tokens: int) -> list[list[int]]:
    """Each of a few tails after each of three stems and alone: equal prefixes, and equal blocks after unequal ones."""
    stems = [*random_prompts(3, vocab_size, seed=31, lengths=(stem_tokens, stem_tokens)), []]
    tails = random_prompts(-(-count // 4), vocab_size, seed=32, lengths=(stem_tokens // 2, stem_tokens))
    return [stems[i % 4] + tails[i // 4] for i in range(count)]


@dataclass
class Counts:
    """What happened in a run."""

    requests: int = 0
    compared: int = 0
    wrong: int = 0
    aborted: int = 0
    failed: int = 0
    replacements: int = 0
    unloads: int = 0
    removals: int = 0
    wrong_ids: list[str] = field(default_factory=list)


class World:
    """Submits, steps, replaces, unloads, removes and aborts; then checks every answer."""

    def __init__(self, oracle: Oracle, base: Path, root: Path, *, names: int, seed: int, **config: object) -> None:
        self.oracle = oracle
        self.served = root / "served"
        self.served.mkdir(parents=True)
        self.random = random.Random(seed)
        self.content_of: dict[str, ZooAdapter] = {}
        self.names = [f"team-{index % 3}/tenant-{index}" for index in range(names)]
        self.staging = root / "staging"
        for name in self.names:
            self.put(name)
        self.driver = Driver(base, self.served, root / "cache", **config)
        self.expected: dict[str, tuple[list[int], int]] = {}  # id -> (oracle's tokens, tokens asked for)
        self.open: set[str] = set()
        self.pending: dict[str, SourceVersion] = {}
        self.waiting: dict[str, list[tuple[str, int]]] = {}  # pending key -> (request id, prompt)
        self.counts = Counts()

    def put(self, name: str) -> None:
        """Point `name` at another content: its folder is swapped by a rename."""
        content = self.random.choice(self.oracle.contents)
        shutil.rmtree(self.staging, ignore_errors=True)
        shutil.copytree(content.path, self.staging)
        target = self.served / name
        if target.exists():
            shutil.rmtree(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        self.staging.rename(target)
        self.content_of[name] = content

    def submit(self) -> None:
        """One request at random: base or adapter, image on disk or pending, some with a salt."""
        name = self.random.choice([None, *self.names, *self.names[:3]])
        prompt = self.random.randrange(len(self.oracle.prompts))
        num_tokens = self.random.randint(1, self.oracle.num_tokens)
        params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        fields: dict[str, object] = {"cache_salt": self.random.choice(["", "", "", "", "salt"])}
        content = self.content_of.get(name) if name else None
        if name is not None:
            try:
                version = self.driver.resolve(name)
            except AdapterError as error:
                assert error.code == "model_not_found" and content is None, (name, error)
                return
            assert content is not None
            ref = self.driver.store.lookup(version.key)
            if ref is None or version.key in self.pending:
                fields["pending"] = version.key
                self.pending[version.key] = version
                self.waiting.setdefault(version.key, [])
            else:
                fields["adapter"] = ref
        request_id = self.driver.add(self.oracle.prompts[prompt], params, **fields)
        self.counts.requests += 1
        self.open.add(request_id)
        if "pending" in fields:
            self.waiting[str(fields["pending"])].append((request_id, prompt))
        self.expected[request_id] = (self.oracle.answers[content.name if content else None, prompt], num_tokens)

    def bring_one(self) -> None:
        """Compile one pending version. Files replaced since are read as they are now, and that content answers."""
        if not self.pending:
            return
        key = self.random.choice(sorted(self.pending))
        version = self.pending.pop(key)
        waiting = self.waiting.pop(key)
        if self.driver.bring(version) is not None:
            content = self.content_of.get(version.name)
            for request_id, prompt in waiting if content is not None else ():  # removed: what it was when asked for
                self.expected[request_id] = (self.oracle.answers[content.name, prompt], self.expected[request_id][1])

    def disturb(self) -> None:
        """One of: replace, unload, remove and later restore a name, abort."""
        draw = self.random.random()
        name = self.random.choice(self.names)
        if draw < 0.25:
            self.put(name)
            self.counts.replacements += 1
        elif draw < 0.5:
            residents = list(self.driver.core.slots.residents())
            if residents:
                self.driver.core.slots.drop(self.random.choice(residents)[1].image_key)
                self.counts.unloads += 1
        elif draw < 0.6 and name in self.content_of:
            shutil.rmtree(self.served / name)
            del self.content_of[name]
            self.counts.removals += 1
        elif self.open:
            self.driver.core.abort([self.random.choice(sorted(self.open))])

    def run(self, num_requests: int, max_open: int, disturbances: float = 0.15) -> Counts:
        """Until `num_requests` were sent and all have ended; so many disturbances a step."""
        while self.counts.requests < num_requests or self.open:
            while self.counts.requests < num_requests and len(self.open) < max_open and self.random.random() < 0.7:
                self.submit()
            if self.random.random() < 0.5:
                self.bring_one()
            if self.random.random() < disturbances:
                self.disturb()
            self.driver.step()
            if self.driver.num_steps % 50 == 0:
                self.driver.core.check_integrity()
            self._settle()
        return self.counts

    def _settle(self) -> None:
        for request_id in sorted(self.open):
            answer = self.driver.answers[request_id]
            if not answer.num_terminal:
                continue
            self.open.discard(request_id)
            expected, num_tokens = self.expected[request_id]
            is_right = answer.token_ids == expected[: len(answer.token_ids)]
            if answer.finish_reason == "length":
                is_right &= len(answer.token_ids) == num_tokens
                self.counts.compared += 1
            elif answer.finish_reason == "abort":
                self.counts.aborted += 1
            else:
                assert answer.error is not None and answer.error.code in ("adapter_unavailable", "model_not_found"), (
                    answer
                )
                self.counts.failed += 1
            if not is_right:
                self.counts.wrong += 1
                self.counts.wrong_ids.append(request_id)

    def close(self) -> None:
        self.driver.close()


def image_bytes_of(driver: Driver, names: list[str]) -> int:
    """Bytes of the images of these adapters together."""
    return sum(driver.ref(name).data_bytes for name in names)


def one_thread() -> None:
    """Tiny matrices: a second thread only waits for the first."""
    torch.set_num_threads(1)
