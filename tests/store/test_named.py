"""Names given by hand: what they point to, what goes before what, and the roots that nothing leaves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from adapters_store.catalog import Catalog
from adapters_store.errors import AdapterInvalid, AdapterNotFound, AdapterTooLarge, AdapterUnavailable
from adapters_store.sources.local import LocalSource
from adapters_store.sources.named import NamedSource, PathRefused
from adapters_store.store import AdapterStore


def adapter(folder: Path, weights: bytes = b"weights") -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return folder


@pytest.fixture
def root(tmp_path) -> Path:
    adapter(tmp_path / "root" / "fr")
    adapter(tmp_path / "root" / "team" / "sql")
    adapter(tmp_path / "outside")
    return tmp_path / "root"


@pytest.fixture
def catalog(root) -> Catalog:
    return Catalog([LocalSource(root)], ["base"], named=NamedSource([root]), list_age_s=60.0)


async def names(catalog: Catalog) -> list[str]:
    return [item.name for item in await catalog.list()]


# --- paths ----------------------------------------------------------------------------------------------


def test_paths_are_looked_for_below_every_root(root, tmp_path):
    second = adapter(tmp_path / "second" / "only-there").parent
    source = NamedSource([root, second])
    for path in ("fr", str(root / "fr"), "team/../fr", "./fr/"):
        version = source.look("x", path)
        assert (version.name, version.source) == ("x", str(root))
        assert Path(version.path).samefile(root / "fr")
    assert source.look("x", "only-there").source == str(second)
    with pytest.raises(AdapterNotFound, match="adapter_config"):
        source.look("x", "team")


def test_nothing_outside_the_roots(root, tmp_path):
    source = NamedSource([root])
    (root / "link").symlink_to(tmp_path / "outside")
    for path in (
        str(tmp_path / "outside"),
        "../outside",
        "link",
        "fr/../../outside",
        "/nowhere",
        "..",
        "a\0b",
        "\ud800",
    ):
        with pytest.raises(PathRefused):
            source.look("x", path)
    with pytest.raises(PathRefused):
        NamedSource([]).look("x", str(root / "fr"))


def test_a_file_that_leads_out_is_no_adapter(root, tmp_path):
    (root / "fr" / "adapter_model.safetensors").unlink()
    (root / "fr" / "adapter_model.safetensors").symlink_to(tmp_path / "outside" / "adapter_model.safetensors")
    with pytest.raises(AdapterNotFound):
        NamedSource([root]).look("x", "fr")


def test_a_link_that_is_moved_out_later_is_not_followed(root, tmp_path):
    """What was checked at the load is checked again at every resolve."""
    (root / "current").symlink_to(root / "fr")
    source = NamedSource([root])
    source.assign(source.look("x", "current"))
    assert source.resolve("x") is not None
    (root / "current").unlink()
    (root / "current").symlink_to(tmp_path / "outside")
    assert source.resolve("x") is None


def test_the_operators_folder_is_its_own_root(tmp_path, root):
    source = NamedSource()
    version = source.look_anywhere("x", tmp_path / "outside")
    source.assign(version)
    assert source.resolve("x") == version
    assert bytes(LocalSource(Path(version.source)).read(version, version.files[1])) == b"weights"
    with pytest.raises(AdapterNotFound, match=r"no adapter_config\.json"):
        source.look_anywhere("y", root)


# --- the catalog ----------------------------------------------------------------------------------------


async def test_a_given_name_goes_first_and_never_becomes_another(catalog, root):
    catalog.assign(catalog.named.look("fr", "team/sql"))
    assert (await catalog.resolve("fr")).path == str(root / "team" / "sql")
    assert {item.name: item.path for item in await catalog.list()}["fr"] == str(root / "team" / "sql")
    shutil.rmtree(root / "team")
    with pytest.raises(AdapterNotFound):  # there is a folder "fr", but this name was given something else
        await catalog.resolve("fr")


async def test_a_given_names_files_are_read_anew(catalog, root):
    catalog.assign(catalog.named.look("x", "fr"))
    before = await catalog.resolve("x")
    (root / "fr" / "adapter_model.safetensors").write_bytes(b"others")
    assert (await catalog.resolve("x")).key != before.key


async def test_names_that_were_taken_away_are_bounded(catalog, monkeypatch, caplog):
    monkeypatch.setattr("adapters_store.catalog.MAX_REMOVED", 3)
    for name in ("fr", "a", "fr", "b", "c"):  # taken away again: among the last
        catalog.remove(name)
    with pytest.raises(AdapterNotFound):
        await catalog.resolve("fr")
    assert "a: what the sources have of it is served" in caplog.text
    catalog.remove("d")
    assert (await catalog.resolve("fr")).name == "fr" and len(catalog._removed) == 3


async def test_a_removed_name_stays_away_until_it_is_given_again(catalog, root):
    assert await names(catalog) == ["fr", "team/sql"]
    catalog.remove("fr")
    assert await names(catalog) == ["team/sql"]  # at once, however old a listing may be
    with pytest.raises(AdapterNotFound):
        await catalog.resolve("fr")
    catalog.assign(catalog.named.look("fr", "fr"))
    assert await names(catalog) == ["fr", "team/sql"]
    assert (await catalog.resolve("fr")).name == "fr"


async def test_the_compiler_reads_the_named_folder(base, plain_adapter, tmp_path):
    """Through the real worker: a name that no folder has, and the same image as under the folder's own name."""
    shutil.copytree(plain_adapter, tmp_path / "root" / "fr")
    catalog = Catalog([LocalSource(tmp_path / "root")], ["base"], named=NamedSource([tmp_path / "root"]))
    store = AdapterStore(tmp_path / "cache", base.manifest, catalog)
    await store.start()
    try:
        catalog.assign(catalog.named.look("other/name", "fr"))
        ref = await store.ensure(await catalog.resolve("other/name"))
        own = await store.ensure(await catalog.resolve("fr"))
        assert (ref.name, own.name) == ("other/name", "fr")
        assert ref.image_key == own.image_key and ref.version != own.version
        assert store.compiles == 1
        assert store.peek(ref.version) == ref
    finally:
        await store.close()


# --- chat templates -------------------------------------------------------------------------------------


async def template(catalog: Catalog, name: str = "fr") -> str | None:
    return await source_of(catalog, await catalog.resolve(name))


async def source_of(catalog: Catalog, version) -> str | None:
    found = await catalog.chat_template(version)
    return None if found is None else found.source


def config(folder: Path, value: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))


async def test_the_template_file_goes_before_the_config(catalog, root):
    assert await template(catalog) is None
    config(root / "fr", "from the config ü")
    assert await template(catalog) == "from the config ü"
    (root / "fr" / "chat_template.jinja").write_text("from the file ü")
    assert await template(catalog) == "from the file ü"
    assert await template(catalog, "team/sql") is None


async def test_forms_of_the_config(catalog, root):
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    for value, expected in ((named, "d"), ({"default": "d", "x": "y"}, "d"), ({"x": "y"}, None), (None, None)):
        config(root / "fr", value)
        assert await template(catalog) == expected


@pytest.mark.parametrize("value", [7, [1], [{"name": "default"}], {"default": 7}, True])
async def test_a_template_that_is_no_text_is_named(catalog, root, value):
    config(root / "fr", value)
    with pytest.raises(AdapterInvalid, match=r"tokenizer_config\.json of adapter fr"):
        await template(catalog)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b'{"chat_template": "\xff"}', b"[" * 100_000])
async def test_a_config_that_is_no_object_is_named(catalog, root, content):
    (root / "fr" / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(AdapterInvalid, match=r"tokenizer_config\.json of adapter fr"):
        await template(catalog)


async def test_a_file_that_is_no_text_is_named(catalog, root):
    (root / "fr" / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(AdapterInvalid, match=r"chat_template\.jinja of adapter fr"):
        await template(catalog)


async def test_sizes_are_bounded(catalog, root):
    (root / "fr" / "chat_template.jinja").write_bytes(b"x" * ((1 << 20) + 1))
    with pytest.raises(AdapterTooLarge, match=r"chat_template\.jinja of adapter fr has 1048577 bytes; .* 1048576"):
        await template(catalog)
    (root / "fr" / "chat_template.jinja").unlink()
    config(root / "fr", "x" * ((1 << 20) + 1))
    with pytest.raises(AdapterTooLarge, match=r"tokenizer_config\.json of adapter fr"):
        await template(catalog)


async def test_the_template_is_the_versions_own(catalog, root):
    """A version resolved before a replacement never renders with the new one's template."""
    (root / "fr" / "chat_template.jinja").write_text("old")
    old = await catalog.resolve("fr")
    assert await source_of(catalog, old) == "old"
    late = await catalog.resolve("fr")
    (root / "fr" / "chat_template.jinja").write_text("new")
    assert await source_of(catalog, old) == "old"
    new = await catalog.resolve("fr")
    assert new.key != old.key
    assert await source_of(catalog, new) == "new"
    fresh = Catalog([LocalSource(root)], ["base"])
    with pytest.raises(AdapterUnavailable, match="is being replaced"):
        await fresh.chat_template(late)


async def test_a_template_out_of_the_root_is_not_read(catalog, root, tmp_path):
    (tmp_path / "secret").write_text("secret")
    (root / "fr" / "chat_template.jinja").symlink_to(tmp_path / "secret")
    with pytest.raises(AdapterNotFound):
        await template(catalog)
