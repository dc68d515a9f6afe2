"""What every demo task shares: one example, one task, and how a split is drawn."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Literal, TypeVar

Split = Literal["train", "heldout"]
T = TypeVar("T")


@dataclass(frozen=True)
class Example:
    """One user message and what is known about a right answer to it."""

    task: str  # served name of the adapter that answers it
    prompt: str  # the whole user message: no system prompt, no instruction
    expected: str  # the answer the adapter is trained on
    check: Mapping[str, str | int | float | list[str] | None] = field(default_factory=dict)
    # `check` holds what the checker wants beyond `expected`; JSON types only, so it survives heldout.jsonl


@dataclass(frozen=True)
class Task:
    """A demo task: how to draw an example, how to judge an answer, how to ask the plain base for it."""

    name: str
    instruction: str  # put before the prompt when the base, without an adapter, gets a fair try
    draw: Callable[[Random, Split], Example]
    is_correct: Callable[[Example, str], bool]


@dataclass(frozen=True)
class Pool:
    """Values for one slot, in two disjoint parts: held-out prompts never use a value seen in training."""

    train: tuple[str, ...]
    heldout: tuple[str, ...]

    def of(self, split: Split) -> tuple[str, ...]:
        return self.train if split == "train" else self.heldout

    def draw(self, rng: Random, split: Split) -> str:
        return rng.choice(self.of(split))

    @property
    def all(self) -> tuple[str, ...]:
        return self.train + self.heldout


def words(text: str, separator: str = " ") -> tuple[str, ...]:
    """A long list of short values, written without a quote around each."""
    return tuple(text.split(separator))


def pick_template(rng: Random, train: tuple[T, ...], heldout: tuple[T, ...], split: Split) -> T:
    """Held-out prompts are half in new words, half in known words with new values."""
    return rng.choice(train if split == "train" or rng.random() < 0.5 else heldout)


def generate(task: Task, split: Split, num_examples: int, seed: int = 0) -> list[Example]:
    """`num_examples` of a split; the same seed always gives the same list.

    Training prompts may repeat, so that rare kinds keep their share; held-out prompts are distinct.
    Raises ValueError when the task has fewer different held-out prompts than asked for.
    """
    rng = Random(f"{task.name}/{split}/{seed}")  # a str seed is stable between processes, unlike hash()
    if split == "train":
        return [task.draw(rng, split) for _ in range(num_examples)]
    examples: dict[str, Example] = {}
    for _ in range(50 * num_examples + 1000):
        if len(examples) == num_examples:
            return list(examples.values())
        example = task.draw(rng, split)
        examples.setdefault(example.prompt, example)
    raise ValueError(f"{task.name}: only {len(examples)} different {split} prompts, {num_examples} asked for")
