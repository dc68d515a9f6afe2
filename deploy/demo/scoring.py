"""Score answers to held-out prompts, whoever gave them: PEFT here, the server in the end-to-end tests."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from deploy.demo.tasks import TASKS, Example, generate, is_correct

DEMO_DIR = Path(__file__).resolve().parent
HELDOUT_PATH = DEMO_DIR / "heldout.jsonl"
HELDOUT_SEED = 1
NUM_HELDOUT = 25  # per task, in heldout.jsonl
MAX_NEW_TOKENS = 64  # the longest right answer has about 50


def heldout_examples(task_name: str, num_examples: int = NUM_HELDOUT) -> list[Example]:
    """The first held-out examples of a task; up to NUM_HELDOUT they are those of heldout.jsonl."""
    return generate(TASKS[task_name], "heldout", num_examples, HELDOUT_SEED)


def read_heldout(path: Path = HELDOUT_PATH) -> list[Example]:
    """The committed held-out examples of all tasks."""
    return [Example(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def write_heldout(path: Path = HELDOUT_PATH) -> None:
    """Write the held-out file anew; the generators decide its content, byte for byte."""
    examples = [example for name in TASKS for example in heldout_examples(name)]
    lines = [json.dumps(asdict(example), ensure_ascii=False) + "\n" for example in examples]
    path.write_text("".join(lines), encoding="utf-8")


def accuracy(examples: Sequence[Example], answers: Sequence[str]) -> float:
    """The share of right answers, 0 to 1."""
    pairs = list(zip(examples, answers, strict=True))
    return sum(is_correct(example, answer) for example, answer in pairs) / len(pairs)
