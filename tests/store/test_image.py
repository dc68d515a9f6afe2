"""The image file: layout, determinism, and what its reader refuses."""

from __future__ import annotations

import contextlib
import json

import msgspec
import numpy as np
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.errors import AdapterCorrupt, AdapterError
from adapters_store.image import TABLE_KEY, image_data_bytes, padded_rank, read_header, write_image
from tests.store.bases import ALL_LINEAR, make_adapter, make_base
from tests.store.images import compile_folder

ROLES = {"A": "a_offset", "B": "b_offset", "bias": "bias_offset"}


@pytest.fixture(scope="module", params=["float32", "bfloat16", "float16"])
def written(request, tmp_path_factory):
    """An image with ragged ranks, an embedding, a head, biases with and without a rank."""
    folder = tmp_path_factory.mktemp("image")
    base = make_base(folder / "base", "qwen2", dtype=request.param)
    targets = {"target_modules": [*ALL_LINEAR[3:], "embed_tokens", "lm_head"], "bias": "all"}
    ranks = {"rank_pattern": {"o_proj": 1, "up_proj": 8, "down_proj": 13, "embed_tokens": 3}}
    adapter = make_adapter(base, folder / "adapter", **targets, **ranks)
    compiled = compile_folder(adapter, base)
    path = folder / "image.safetensors"
    header = write_image(path, compiled.sites, base.manifest, image_key="k", digest="d", compiler_version=1)
    return base, compiled, path, header


def test_standard_tools_read_it(written):
    base, compiled, path, _ = written
    with safetensors.safe_open(path, "pt") as file:
        names = set(file.keys())
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in names}
        table = json.loads(file.metadata()[TABLE_KEY])
    expected = {}
    for lowered in compiled.sites:
        name, stride = lowered.site.name, padded_rank(lowered.rank)
        if lowered.rank:
            is_embedding = lowered.site.kind == "embedding"
            k = lowered.site.in_features
            expected[f"{name}.A"] = (k, stride) if is_embedding else (stride, k)
            expected[f"{name}.B"] = (lowered.site.out_features, stride)
        if lowered.bias is not None:
            expected[f"{name}.bias"] = (lowered.site.out_features,)
    assert {name: shape for name, shape in shapes.items() if not name.startswith("pad.")} == expected
    assert table["digest"] == "d"
    assert table["base_digest"] == base.manifest.digest
    assert table["dtype"] == base.manifest.dtype
    assert [site["site"] for site in table["sites"]] == [lowered.site.name for lowered in compiled.sites]


def test_sites_are_in_manifest_order_and_aligned(written):
    base, _, path, header = written
    rows = [base.manifest.row(site.site) for site in header.sites]
    assert rows == sorted(rows)
    offsets = [offset for site in header.sites for offset in (site.a_offset, site.b_offset, site.bias_offset)]
    present = [offset for offset in offsets if offset >= 0]
    assert present == sorted(present)
    assert all(offset % 128 == 0 for offset in present)
    assert header.data_offset % 4096 == 0
    assert header.data_bytes % 128 == 0
    assert path.stat().st_size == header.data_offset + header.data_bytes


def test_ranks_are_padded_with_zeros_and_kept(written):
    _, compiled, path, header = written
    data = path.read_bytes()[header.data_offset :]
    for lowered, site in zip(compiled.sites, header.sites, strict=True):
        assert (site.rank, site.stride) == (lowered.rank, padded_rank(lowered.rank))
        if not lowered.rank:
            assert (site.a_offset, site.b_offset) == (-1, -1)
            assert site.bias_offset >= 0
            continue
        for name, array, offset in (("A", lowered.a, site.a_offset), ("B", lowered.b, site.b_offset)):
            rank_first = name == "A" and lowered.site.kind != "embedding"
            shape = (site.stride, array.shape[1]) if rank_first else (array.shape[0], site.stride)
            stored = np.frombuffer(data, array.dtype, int(np.prod(shape)), offset).reshape(shape)
            true, pad = np.split(stored, [site.rank], axis=0 if rank_first else 1)
            assert (true == array).all()
            assert not pad.any()
    assert {site.rank for site in header.sites} == {0, 1, 3, 4, 8, 13}
    assert header.max_rank == 13


def test_what_is_read_back_is_what_was_written(written):
    base, compiled, path, header = written
    assert read_header(path) == header
    assert header.data_bytes == image_data_bytes(compiled.sites, base.manifest)


def test_the_same_adapter_gives_the_same_bytes(written, tmp_path):
    base, compiled, path, _ = written
    again = tmp_path / "again.safetensors"
    write_image(again, compiled.sites, base.manifest, image_key="k", digest="d", compiler_version=1)
    assert again.read_bytes() == path.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == ["again.safetensors"]  # no temporary left


def test_a_failed_write_leaves_nothing(written, tmp_path):
    base, compiled, _, _ = written
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(OSError, match="taken"):
        write_image(tmp_path / "taken", compiled.sites, base.manifest, image_key="k", digest="d", compiler_version=1)
    assert [file.name for file in tmp_path.iterdir()] == ["taken"]


def test_a_missing_image_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_header(tmp_path / "none")


@pytest.mark.parametrize("keep", [0, 7, 4000, 5000, -1])
def test_a_truncated_image_is_refused(keep, written, tmp_path):
    (tmp_path / "image").write_bytes(written[2].read_bytes()[:keep])
    with pytest.raises(AdapterCorrupt):
        read_header(tmp_path / "image")


def test_another_safetensors_file_is_no_image(plain_adapter):
    with pytest.raises(AdapterCorrupt, match="not an adapter image"):
        read_header(plain_adapter / "adapter_model.safetensors")


@pytest.mark.parametrize(("field", "value"), [("a_offset", 128), ("b_offset", -1), ("rank", 5000), ("stride", 7)])
def test_a_table_that_contradicts_the_header_is_refused(field, value, written, tmp_path):
    _, _, path, header = written
    sites = list(header.sites)
    index = next(i for i, site in enumerate(sites) if site.rank > 1 and site.a_offset != 128)
    sites[index] = msgspec.structs.replace(sites[index], **{field: value})
    content = path.read_bytes()
    head = json.loads(content[8 : header.data_offset])
    table = json.loads(head["__metadata__"][TABLE_KEY]) | {"sites": msgspec.to_builtins(sites)}
    head["__metadata__"][TABLE_KEY] = json.dumps(table)
    text = json.dumps(head).encode()
    text += b" " * (-(8 + len(text)) % 4096)
    spoiled = len(text).to_bytes(8, "little") + text + content[header.data_offset :]
    (tmp_path / "image").write_bytes(spoiled)
    with pytest.raises(AdapterCorrupt, match=sites[index].site):
        read_header(tmp_path / "image")


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4095), st.integers(0, 255)), min_size=1, max_size=5))
def test_a_mutated_header_is_read_or_refused(tmp_path_factory, plain_image, changes):
    content = bytearray(plain_image)
    for position, value in changes:
        content[position] = value
    path = tmp_path_factory.getbasetemp() / "mutated"
    path.write_bytes(content)
    with contextlib.suppress(AdapterError):
        read_header(path)


@pytest.fixture(scope="module")
def plain_image(plain_adapter, base, tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("plain-image") / "image"
    sites = compile_folder(plain_adapter, base).sites
    write_image(path, sites, base.manifest, image_key="k", digest="d", compiler_version=1)
    return path.read_bytes()
