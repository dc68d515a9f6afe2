"""The hottest adapter replaced in its bucket under load, in real processes: `multilora bench store replace`, short.

The command ends with status 1 for any answer that is not, letter for letter, what a version in its time says alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.e2e.tiny_server import World

MINUTES, EVERY_S = 1 / 3, 2.0


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World.make(tmp_path_factory.mktemp("replaced"), num_adapters=0)


def replace(world: World, folder, *arguments):
    figures = folder / "figures.json"
    command = ["--model", world.root / "base", "--json", figures, "--flags", "--kv-memory 16MiB --threads 1"]
    pace = ["--minutes", MINUTES, "--every", EVERY_S, "--poll-interval", 0.5, "--grace", 2.5]
    sizes = ["--rank", 8, "--versions", 5, "--clients", 6, "--output-tokens", 24]
    done = subprocess.run(
        [sys.executable, "-m", "loadtest.bench", "store", "replace", *map(str, (*command, *pace, *sizes, *arguments))],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return done, json.loads(figures.read_text()) if figures.exists() else {}


def test_no_answer_is_of_the_wrong_version(world, tmp_path):
    done, figures = replace(world, tmp_path)
    assert done.returncode == 0, done.stderr
    assert figures["replacements"] >= 0.8 * MINUTES * 60 / EVERY_S
    assert figures["versions that answered"] == 5
    assert [figures[fault] for fault in ("failed", "wrong", "unknown", "stale")] == [0, 0, 0, 0]
    assert figures["of the hottest adapter"] >= 50


def test_a_server_that_never_looks_again_is_found_out(world, tmp_path):
    """The check itself: with a poll interval of an hour the first version answers for ever."""
    slow = ["--minutes", 0.15, "--flags", "--kv-memory 16MiB --threads 1 --adapter-poll-interval 3600"]
    done, figures = replace(world, tmp_path, *slow)
    assert done.returncode == 1 and not figures
    assert "'stale': 0" not in done.stderr and "stale" in done.stderr, done.stderr
