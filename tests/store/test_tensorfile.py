"""The safetensors reader: reads what safetensors writes, and turns any other bytes into an AdapterError."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from adapters_store.errors import AdapterCorrupt, AdapterError
from adapters_store.numeric import is_finite, narrow, numpy_dtype, widen
from adapters_store.tensorfile import TensorFile

SOUND = save({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)}, {"format": "pt"})


def encoded(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_reads_what_safetensors_writes():
    file = TensorFile("f", SOUND)
    assert file.header.metadata == {"format": "pt"}
    np.testing.assert_array_equal(file.float32("a"), [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(file.float32("b"), np.ones(5))


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "truncated"),
        (b"\x00" * 7, "truncated"),
        (b"\xff" * 8, "header would take"),
        ((200_000_000).to_bytes(8, "little"), "header would take"),
        ((100).to_bytes(8, "little") + b"{}", "truncated"),
        (encoded(b"[]"), "no valid"),
        (encoded(b"{"), "no valid"),
        (encoded(b'{"a": ' + b"[" * 50_000), "no valid"),
        (encoded({"a": 1}), "tensor 'a' is invalid"),
        (encoded({"a": {"dtype": "F32", "shape": [1]}}), "tensor 'a' is invalid"),
        (encoded({"a": entry(0, 4, [-1])}, b"1234"), "tensor 'a' is invalid"),
        (encoded({"a": entry(0, 4, [1]) | {"more": 1}}, b"1234"), "tensor 'a' is invalid"),
        (encoded({"a": entry(0, 4, [1], "F33")}, b"1234"), "unknown dtype 'F33'"),
        (encoded({"a": entry(0, 4, [2])}, b"1234"), "needs 8 bytes"),
        (encoded({"a": entry(4, 0, [1])}, b"1234"), "needs 4 bytes"),
        (encoded({"a": entry(0, 4, [2**62, 2**62])}, b"1234"), "needs"),
        (encoded({"a": entry(0, 4, [1] * 100)}, b"1234"), "100 dimensions"),
        (encoded({"a": entry(0, 4, [1]), "b": entry(2, 6, [1])}, b"123456"), "tensor 'b' overlaps"),
        (encoded({"a": entry(0, 4, [1]), "b": entry(0, 4, [1])}, b"1234"), "overlaps"),
        (encoded({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, b"1" * 12), "tensor 'b' leaves a gap"),
        (encoded({"a": entry(4, 8, [1])}, b"12345678"), "tensor 'a' leaves a gap"),
        (encoded({"a": entry(0, 4, [1])}, b"123"), "truncated"),
        (encoded({"a": entry(0, 4, [1])}, b"12345"), "1 bytes after"),
        (encoded({"__metadata__": {"a": 1}}), "no valid"),
    ],
)
def test_what_is_wrong_is_named(content, word):
    with pytest.raises(AdapterCorrupt) as raised:
        TensorFile("some.safetensors", content)
    assert word in raised.value.message
    assert "some.safetensors" in raised.value.message


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)), min_size=1, max_size=6), st.data())
def test_mutated_bytes_are_read_or_refused(changes, data):
    content = bytearray(SOUND)
    for position, value in changes:
        content[position] = value
    kept = bytes(content[: data.draw(st.integers(0, len(SOUND)))] if data.draw(st.booleans()) else content)
    try:
        file = TensorFile("f", kept)
        for name in file.entries:
            file.float32(name)
    except AdapterError:
        return
    # what we accept, safetensors accepts too
    safetensors.deserialize(kept)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_as_a_header_are_read_or_refused(text):
    try:
        TensorFile("f", encoded(text))
    except AdapterError:
        return
    safetensors.deserialize(encoded(text))


@pytest.mark.parametrize(("stored", "dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_narrow_rounds_as_torch_does(stored, dtype):
    rng = np.random.default_rng(0)
    values = np.concatenate(
        [
            rng.integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32),  # every kind of float there is
            (rng.standard_normal(100_000) * 10.0 ** rng.integers(-8, 6, 100_000)).astype(np.float32),
            np.array([0.0, -0.0, 65504, 65520, 3.3895314e38, 3.4e38, 1 + 2**-8, 1 + 3 * 2**-8], np.float32),
        ]
    )
    values = values[~np.isnan(values)]
    ours = narrow(values, stored).view(np.uint16)
    theirs = torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(ours, theirs)
    back = widen(ours.view(numpy_dtype(stored)), stored)
    np.testing.assert_array_equal(back, torch.from_numpy(values).to(dtype).float().numpy())


@pytest.mark.parametrize("stored", ["F32", "F16", "BF16"])
def test_not_a_number_survives_and_is_found(stored):
    values = np.array([1.0, np.nan], np.float32)
    assert np.isnan(widen(narrow(values, stored), stored)[1])
    every_kind = np.array([0x7F800001, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert np.isnan(widen(narrow(every_kind, stored), stored)).all()
    assert not is_finite(narrow(values, stored), stored)
    assert not is_finite(narrow(np.array([np.inf], np.float32), stored), stored)
    assert is_finite(narrow(values[:1], stored), stored)
