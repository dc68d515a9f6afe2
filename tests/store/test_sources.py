"""The local folder source and the catalog: what is found, and what is never opened."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from adapters_store.catalog import Catalog
from adapters_store.errors import AdapterNotFound
from adapters_store.ref import FileVersion, SourceVersion
from adapters_store.sources.folder import FileChanged
from adapters_store.sources.local import LocalSource


def adapter(path: Path, config: str = "{}", weights: bytes | None = b"weights") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(config)
    if weights is not None:
        (path / "adapter_model.safetensors").write_bytes(weights)
    return path


@pytest.fixture
def root(tmp_path) -> Path:
    root = tmp_path / "adapters"
    adapter(root / "fr")
    adapter(root / "team" / "sql")
    adapter(root / "team" / "sql" / "checkpoint-10")
    (root / "team" / "empty").mkdir()
    adapter(tmp_path / "outside")
    return root


def test_names_are_the_paths_of_adapter_folders(root):
    assert LocalSource(root).names() == ["fr", "team/sql", "team/sql/checkpoint-10"]


def test_resolve_says_what_is_there(root):
    (root / "fr" / "tokenizer.json").write_text("{}")
    (root / "fr" / "adapter_model.bin").write_bytes(b"pickle")
    (root / "fr" / "README.md").write_text("not read")
    version = LocalSource(root).resolve("fr")
    assert version is not None
    assert (version.name, version.path, version.source) == ("fr", str(root / "fr"), str(root))
    names = {file.name: file.size for file in version.files}
    assert names == {
        "adapter_config.json": 2,
        "adapter_model.safetensors": 7,
        "tokenizer.json": 2,
        "adapter_model.bin": 6,
    }


@pytest.mark.parametrize(
    "name",
    [
        "nothing",
        "team",
        "team/empty",
        "",
        ".",
        "..",
        "../outside",
        "team/../fr",
        "team//sql",
        "/fr",
        "fr/",
        "fr\0",
        "fr\n",
        "fr/adapter_config.json",
        "a" * 129,
        "é",
        "fr:1",
        "fr@1",
        "a,b",
        "~",
        "fr%2f",
    ],
)
def test_other_names_are_not_found(name, root):
    assert LocalSource(root).resolve(name) is None


def test_a_root_that_is_an_adapter_is_served_under_its_own_name(root):
    source = LocalSource(root / "team" / "sql")
    assert source.names() == ["checkpoint-10", "sql"]
    version = source.resolve("sql")
    assert version is not None
    assert version.path == str(root / "team" / "sql")
    assert source.resolve("fr") is None


def test_a_root_that_does_not_exist(tmp_path):
    source = LocalSource(tmp_path / "nowhere")
    assert source.names() == []
    assert source.resolve("fr") is None


def test_the_version_changes_with_the_files(root):
    source = LocalSource(root)
    seen = {source.resolve("fr")}
    (root / "fr" / "adapter_model.safetensors").write_bytes(b"longer weights")
    seen.add(source.resolve("fr"))
    adapter(root / "fr", "[]")
    seen.add(source.resolve("fr"))
    (root / "fr" / "added_tokens.json").write_text("{}")
    seen.add(source.resolve("fr"))
    assert len({version.key for version in seen}) == 4
    assert len({source.resolve("fr").key for _ in range(3)}) == 1


def test_a_moved_link_is_another_version_though_sizes_and_times_are_the_same(root):
    for number in (1, 2):
        for file in adapter(root / f"v{number}", weights=b"%07d" % number).iterdir():
            os.utime(file, ns=(0, 0))
    (root / "current").symlink_to("v1")
    source = LocalSource(root)
    first = source.resolve("current")
    (root / "current").unlink()
    (root / "current").symlink_to("v2")
    assert first is not None
    assert source.resolve("current").key != first.key


# --- links ----------------------------------------------------------------------------------------------


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """Every path that is opened while the test runs."""
    paths: list[str] = []
    real_open = os.open

    def spy(path, *args, **kwargs):
        paths.append(os.fspath(path))
        return real_open(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", spy)
    return paths


def test_links_inside_the_root_are_followed(root):
    (root / "alias").symlink_to("team/sql")
    (root / "blob").write_bytes(b"blob weights")
    (root / "fr" / "adapter_model.safetensors").unlink()
    (root / "fr" / "adapter_model.safetensors").symlink_to(root / "blob")
    source = LocalSource(root)
    assert "alias" in source.names()
    assert source.resolve("alias") is not None
    version = source.resolve("fr")
    assert bytes(source.read(version, version.files[1])) == b"blob weights"


def test_links_out_of_the_root_are_not_found(root, tmp_path, opened):
    (root / "stolen").symlink_to(tmp_path / "outside")
    (root / "sub").symlink_to(tmp_path)
    (root / "fr" / "adapter_model.safetensors").unlink()
    (root / "fr" / "adapter_model.safetensors").symlink_to(tmp_path / "outside" / "adapter_model.safetensors")
    linked = root / "config"
    linked.mkdir()
    (linked / "adapter_config.json").symlink_to(tmp_path / "outside" / "adapter_config.json")
    source = LocalSource(root)
    for name in ("stolen", "sub/outside", "fr", "config"):
        assert source.resolve(name) is None
    assert "stolen" not in source.names()
    assert "sub/outside" not in source.names()
    assert not [path for path in opened if "outside" in path]


def test_a_link_that_is_put_there_after_resolve_is_not_opened(root, tmp_path, opened):
    source = LocalSource(root)
    version = source.resolve("fr")
    (root / "fr" / "adapter_model.safetensors").unlink()
    (root / "fr" / "adapter_model.safetensors").symlink_to(tmp_path / "outside" / "adapter_model.safetensors")
    with pytest.raises(FileChanged):
        source.read(version, version.files[1])
    assert not [path for path in opened if "outside" in path]


def test_a_forged_version_reads_nothing_outside(root, tmp_path, opened):
    source = LocalSource(root)
    outside = LocalSource(tmp_path).resolve("outside")
    forged = SourceVersion(source.source, "fr", outside.path, outside.files)
    with pytest.raises(FileChanged):
        source.read(forged, forged.files[0])
    with pytest.raises(FileChanged):
        source.read(source.resolve("fr"), FileVersion("../../outside/adapter_config.json", 2))
    assert opened == []


def test_link_loops_end(root):
    (root / "team" / "loop").symlink_to(root)
    (root / "self").symlink_to("self")
    source = LocalSource(root)
    assert source.resolve("self") is None
    assert set(source.names()) >= {"fr", "team/sql"}


def test_what_is_no_regular_file_is_not_opened(root, opened):
    (root / "fr" / "adapter_model.safetensors").unlink()
    os.mkfifo(root / "fr" / "adapter_model.safetensors")
    assert LocalSource(root).resolve("fr") is None
    assert opened == []


# --- reading --------------------------------------------------------------------------------------------


def test_read_gives_the_bytes(root):
    source = LocalSource(root)
    version = source.resolve("fr")
    assert {file.name: bytes(source.read(version, file)) for file in version.files} == {
        "adapter_config.json": b"{}",
        "adapter_model.safetensors": b"weights",
    }


@pytest.mark.parametrize("change", ["rewrite", "replace", "truncate", "remove"])
def test_read_refuses_another_file(change, root):
    source = LocalSource(root)
    version = source.resolve("fr")
    weights = root / "fr" / "adapter_model.safetensors"
    if change == "rewrite":
        weights.write_bytes(b"WEIGHTS")
    elif change == "replace":
        (root / "new").write_bytes(b"WEIGHTS")
        (root / "new").replace(weights)
    elif change == "truncate":
        os.truncate(weights, 3)
    else:
        weights.unlink()
    with pytest.raises(FileChanged):
        source.read(version, version.files[1])


# --- catalog --------------------------------------------------------------------------------------------


async def test_the_first_source_wins(root, tmp_path):
    adapter(tmp_path / "second" / "fr")
    adapter(tmp_path / "second" / "only-there")
    catalog = Catalog([LocalSource(root), LocalSource(tmp_path / "second")], ["base"])
    assert (await catalog.resolve("fr")).source == str(root)
    assert (await catalog.resolve("only-there")).source == str(tmp_path / "second")
    listed = await catalog.list()
    assert [item.name for item in listed] == ["fr", "only-there", "team/sql", "team/sql/checkpoint-10"]
    assert next(item.path for item in listed if item.name == "only-there") == str(tmp_path / "second" / "only-there")
    assert len(catalog.warnings) == 1


async def test_the_bases_name_is_never_an_adapter(root):
    adapter(root / "org" / "base")
    catalog = Catalog([LocalSource(root)], ["org/base"])
    with pytest.raises(AdapterNotFound):
        await catalog.resolve("org/base")
    assert "org/base" not in [item.name for item in await catalog.list()]
    assert "org/base" in catalog.warnings[0]


@pytest.mark.parametrize("name", ["nothing", "../outside", "fr\0", "fr\n", "x" * 1000])
async def test_not_found_names_the_model(name, root):
    with pytest.raises(AdapterNotFound) as raised:
        await Catalog([LocalSource(root)], ["base"]).resolve(name)
    assert raised.value.http_status == 404
    assert raised.value.message.isprintable()
    assert repr(name)[:100].rstrip("'") in raised.value.message


async def test_a_new_adapter_is_found_at_once_and_listed_soon(root):
    now = 0.0
    catalog = Catalog([LocalSource(root)], ["base"], clock=lambda: now)
    with pytest.raises(AdapterNotFound):
        await catalog.resolve("new")
    await catalog.list()
    adapter(root / "new")
    assert (await catalog.resolve("new")).name == "new"
    assert "new" not in [item.name for item in await catalog.list()]
    now = 1.0
    assert "new" in [item.name for item in await catalog.list()]


async def test_listings_at_once_walk_once(root):
    source = LocalSource(root)
    walks = 0
    names = source.names

    def counting():
        nonlocal walks
        walks += 1
        return names()

    source.names = counting
    catalog = Catalog([source], ["base"])
    listings = await asyncio.gather(*(catalog.list() for _ in range(10)))
    assert walks == 1
    assert all(listing == listings[0] for listing in listings)
