"""The host tier: one verified read, a byte budget, and damage that is found."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.errors import AdapterCorrupt, AdapterUnavailable
from adapters_store.host import HostCache, allocate_pageable, read_image
from adapters_store.image import checksum_of
from adapters_store.ref import AdapterRef

OFFSET = 4096


def image(path: Path, key: str, num_bytes: int = 1000) -> AdapterRef:
    """Any file will do: this tier knows where the data section is and what its checksum is."""
    data = random.Random(key).randbytes(num_bytes)
    file = path / f"{key}.image"
    file.write_bytes(b"h" * OFFSET + data)
    return AdapterRef(
        name=f"name-{key}",
        version="v",
        digest="d",
        image_key=key,
        image_path=str(file),
        data_offset=OFFSET,
        data_bytes=num_bytes,
        checksum=checksum_of(data),
        max_rank=8,
    )


def contents(ref: AdapterRef) -> bytes:
    return Path(ref.image_path).read_bytes()[OFFSET:]


def test_read_into_a_given_buffer(tmp_path):
    ref = image(tmp_path, "a")
    room = np.zeros(2000, np.uint8)
    read_image(ref, room[500:1500])
    assert bytes(room[500:1500]) == contents(ref)
    assert not room[:500].any()
    assert not room[1500:].any()
    with pytest.raises(ValueError, match="999 bytes"):
        read_image(ref, room[:999])


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        (lambda file: os.truncate(file, OFFSET + 999), AdapterCorrupt),
        (lambda file: file.write_bytes(file.read_bytes() + b"x"), AdapterCorrupt),
        (lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\x00"), AdapterCorrupt),
        (lambda file: file.unlink(), AdapterUnavailable),
    ],
)
def test_damage_is_found_and_not_remembered(damage, error, tmp_path):
    ref = image(tmp_path, "k")
    file = Path(ref.image_path)
    sound = file.read_bytes()
    cache = HostCache(10_000)
    damage(file)
    with pytest.raises(error, match="name-k"):
        cache.get(ref)
    assert cache.bytes_used == 0
    file.write_bytes(sound)
    assert bytes(cache.get(ref)) == contents(ref)


def test_the_second_get_reads_nothing(tmp_path):
    ref = image(tmp_path, "a")
    cache = HostCache(10_000)
    first = cache.get(ref)
    Path(ref.image_path).unlink()
    assert cache.get(ref) is first
    assert (cache.reads, cache.hits) == (1, 1)
    cache.drop("a")
    assert (cache.bytes_used, "a" in cache) == (0, False)
    with pytest.raises(AdapterUnavailable):
        cache.get(ref)


def test_least_recently_used_leaves_and_its_holder_keeps_it(tmp_path):
    refs = {key: image(tmp_path, key) for key in "abc"}
    cache = HostCache(2500)
    held = cache.get(refs["a"])
    cache.get(refs["b"])
    cache.get(refs["a"])
    cache.get(refs["c"])
    assert [key in cache for key in "abc"] == [True, False, True]
    cache.drop("a")
    assert bytes(held) == contents(refs["a"])


@pytest.mark.parametrize("budget", [0, 999])
def test_what_does_not_fit_is_read_and_not_kept(budget, tmp_path):
    ref = image(tmp_path, "a")
    cache = HostCache(budget)
    assert bytes(cache.get(ref)) == bytes(cache.get(ref)) == contents(ref)
    assert (cache.reads, cache.bytes_used, cache.evictions) == (2, 0, 0)


def test_many_threads_share_one_read(tmp_path):
    ref = image(tmp_path, "a", 100_000)
    started, reading = threading.Barrier(8), threading.Event()

    def slow_allocate(num_bytes: int) -> np.ndarray:
        reading.wait(0.2)
        return allocate_pageable(num_bytes)

    cache = HostCache(1 << 20, slow_allocate)
    got: list[object] = []

    def get() -> None:
        started.wait()
        got.append(cache.get(ref))

    threads = [threading.Thread(target=get) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(got) == 8
    assert all(buffer is got[0] for buffer in got)
    assert cache.reads == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans()), max_size=40), st.integers(0, 4000))
def test_the_budget_holds_and_bytes_are_right(tmp_path_factory, steps, budget):
    folder = tmp_path_factory.getbasetemp() / "host"
    folder.mkdir(exist_ok=True)
    refs = {key: image(folder, key, 300 * (index + 1)) for index, key in enumerate("abcdef")}
    cache = HostCache(budget)
    told: set[str] = set()
    for key, is_drop in steps:
        if is_drop:
            cache.drop(key)
        else:
            assert bytes(cache.get(refs[key])) == contents(refs[key])
        held = [key for key in refs if key in cache]
        assert cache.bytes_used == sum(refs[key].data_bytes for key in held) <= budget
        for image_key, is_held in cache.take_changes():
            assert is_held != (image_key in told), "told twice"
            told = told | {image_key} if is_held else told - {image_key}
        assert told == set(held)
