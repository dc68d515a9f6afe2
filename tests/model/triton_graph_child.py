"""Run by test_graphs_triton.py with TRITON_INTERPRET=1: the real kernels behind graphs, token for token.

A replay here calls the pass again with the step's fields as they were at capture, so that the kernels see nothing new
but what lies in memory at fixed addresses.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kernels import triton
from server.adapters.layer import StepState
from server.model.graphs import WITH_SETS
from tests.model.harness import Driver, greedy
from tests.model.test_graphs import fill_in_place, name_sets, serve_graphed, total_delta
from tests.model.test_runner import merged_oracle, with_slot
from tests.zoo import greedy_tokens, load_oracle_base, random_prompts, tiny_base

FIELDS = ("segments", "head_segments", "attention", "rope_lengths")


class RerunGraph:
    def __init__(self, step: StepState) -> None:
        self._step = step
        self.replays = 0

    def capture(self, run: Callable[[], None]) -> None:
        self._run = run
        self._frozen = [getattr(self._step, name) for name in FIELDS]

    def replay(self) -> None:
        self.replays += 1
        now = [getattr(self._step, name) for name in FIELDS]
        self._set(self._frozen)
        self._run()
        self._set(now)

    def _set(self, values: list[object]) -> None:
        for name, value in zip(FIELDS, values, strict=True):
            setattr(self._step, name, value)


def main() -> None:
    torch.set_num_threads(1)
    name_sets(pytest.MonkeyPatch())
    path = tiny_base(Path(tempfile.mkdtemp(dir=sys.argv[1])), "llama", num_hidden_layers=1)
    served = serve_graphed(path, max_seqs=4, max_rank=16, max_members=2, ops=triton, graph_of=RerunGraph)
    deltas = fill_in_place(served)
    slots, lengths = (1, 0, 2, 3), (7, 5, 4, 3)
    prompts = random_prompts(4, 320, seed=4, lengths=(3, 9))
    requests = [
        with_slot(greedy(prompt, str(i), length), slot)
        for i, (prompt, slot, length) in enumerate(zip(prompts, slots, lengths, strict=True))
    ]
    answers = Driver(served, row_budget=30, stagger=0).run(requests)
    oracles = {slot: merged_oracle(path, served, total_delta(served, deltas, slot)) for slot in (1, 2, 3)}
    oracles[0] = load_oracle_base(path)
    for answer, prompt, slot, length in zip(answers, prompts, slots, lengths, strict=True):
        expected = greedy_tokens(oracles[slot], prompt, length)
        assert answer == expected, (slot, answer, expected)
    replays = {key: captured.graph.replays for key, captured in served.runner._forward._graphs.items()}
    assert all(replays[key] for key in ((1, 16), (2, 16), (4, 16), (4, WITH_SETS))), replays
    print("right", replays)


if __name__ == "__main__":
    main()
