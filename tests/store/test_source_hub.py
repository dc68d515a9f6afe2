"""hf:// against a hub's layout on loopback; that it is one, the hub's own client says."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from huggingface_hub import hf_hub_download

from adapters_store.errors import AdapterCorrupt, AdapterDenied, AdapterUnavailable
from adapters_store.limits import Limits
from adapters_store.ref import SourceVersion
from adapters_store.sources.folder import FileChanged
from adapters_store.sources.remote import RemoteOptions, RemoteSource, open_source
from tests.store.hub_server import Hub
from tests.store.web_server import web_server

WEIGHTS = os.urandom(300_000)
FILES = {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": WEIGHTS}


@pytest.fixture
async def hub(monkeypatch, tmp_path) -> AsyncIterator[Hub]:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    async with web_server() as server, web_server() as content:
        yield Hub(server, content)


def opened(hub: Hub, url: str, **changes) -> RemoteSource:
    options = {"attempts": 2, "first_backoff_s": 0.01, "part_bytes": 100_000, "allow_private": True}
    allowed = (f"127.0.0.1:{hub.content.port}",)
    return open_source(
        url, options=RemoteOptions(**{**options, "hf_endpoint": hub.server.url, "allowed_hosts": allowed, **changes})
    )


async def resolved(source: RemoteSource, name: str) -> SourceVersion:
    version = await source.resolve(name)
    assert version is not None
    return version


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "url, name", [("hf://", "team/fr"), ("hf://team", "fr"), ("hf://team/fr", "fr"), ("hf://team/fr@main", "fr")]
)
async def test_a_repository_is_an_adapter(hub, tmp_path, url, name):
    commit = hub.commit("team/fr", {**FILES, "adapter_model.bin": b"pickle", "README.md": b""}, "main")
    source = opened(hub, url)
    version = await resolved(source, name)
    assert {file.version_id for file in version.files} == {commit}
    assert {file.name for file in version.files} == {*FILES, "adapter_model.bin"}
    await source.fetch(version, tmp_path, Limits())
    assert content(tmp_path) == FILES
    assert await source.resolve(f"{name}x") is None
    assert len(hub.content.asked("lfs")) == 3
    await source.close()


async def test_folders_of_a_repository_are_adapters(hub, tmp_path):
    files = {f"loras/{name}/{file}": data for name in ("a", "b/c") for file, data in FILES.items()}
    hub.commit(
        "team/many", {**files, "adapter_config.json": b"{}", "loras/-x/adapter_config.json": b"{}"}, "main", "v1"
    )
    source = opened(hub, "hf://team/many@v1/loras")
    assert source.source == "hf://team/many/loras@v1"
    assert await source.names() == ["a", "b/c"]
    assert source.misnamed == ["-x"]
    await source.fetch(await resolved(source, "b/c"), tmp_path, Limits())
    assert content(tmp_path) == FILES
    whole = opened(hub, "hf://team/many")
    assert await whole.names() == ["loras/a", "loras/b/c", "many"]
    assert (await resolved(whole, "many")).path == "team/many"
    owner = opened(hub, "hf://team")
    assert await owner.names() is None
    assert (await resolved(owner, "many/loras/a")).path == "team/many/loras/a"
    for one in (source, whole, owner):
        await one.close()


async def test_all_files_are_of_one_commit(hub, tmp_path):
    old = hub.commit("team/fr", FILES, "main")
    source = opened(hub, "hf://team")
    version = await resolved(source, "fr")
    new = hub.commit("team/fr", {**FILES, "adapter_model.safetensors": WEIGHTS[::-1]}, "main")
    await source.fetch(version, tmp_path, Limits())
    assert content(tmp_path) == FILES
    assert {file.version_id for file in (await resolved(source, "fr")).files} == {new} != {old}
    await source.close()


async def test_a_commit_that_leaves_an_adapter_alone_makes_no_new_version(hub, tmp_path):
    files = {f"{name}/{file}": data for name in ("a", "b") for file, data in FILES.items()}
    first = hub.commit("team/many", files, "main")
    source = opened(hub, "hf://team/many")
    a, b = await resolved(source, "a"), await resolved(source, "b")
    second = hub.commit("team/many", {**files, "b/adapter_model.safetensors": WEIGHTS[::-1]}, "main")
    assert await resolved(source, "a") == a and {file.version_id for file in a.files} == {first}
    assert {file.version_id for file in (await resolved(source, "b")).files} == {second}
    assert b.key != (await resolved(source, "b")).key
    hub.server.special = {path: made for path, made in hub.server.special.items() if first not in path}
    with pytest.raises(FileChanged):  # its commit is gone: the next is another
        await source.fetch(a, tmp_path, Limits())
    again = await resolved(source, "a")
    assert {file.version_id for file in again.files} == {second}
    await source.fetch(again, tmp_path, Limits())
    await source.close()


async def test_versions_remembered_are_bounded(hub, monkeypatch):
    monkeypatch.setattr("adapters_store.sources.hub.MAX_LAST", 2)
    source = opened(hub, "hf://team/many")
    hub.commit("team/many", {f"{name}/adapter_config.json": b"{}" for name in "abc"}, "main")
    for name in "abc":
        await resolved(source, name)
    assert list(source._last) == ["b", "c"]
    await source.close()


@pytest.mark.parametrize("token", [b"hf_\xff", "hf_ü".encode()])
async def test_a_token_that_is_none(hub, tmp_path, monkeypatch, token):
    hub.commit("team/fr", FILES, "main")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_bytes(token)
    source = opened(hub, "hf://team")
    with pytest.raises(AdapterUnavailable, match="token is not ASCII") as caught:
        await source.resolve("fr")
    assert "hf_" not in caught.value.message
    await source.close()


async def test_no_home_folder_is_no_token(hub, monkeypatch):
    def no_home(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    hub.commit("team/fr", FILES, "main")
    monkeypatch.setattr(Path, "expanduser", no_home)
    source = opened(hub, "hf://team")
    await resolved(source, "fr")
    await source.close()


async def test_a_size_that_no_file_has(hub):
    commit = hub.commit("team/fr", FILES, "main")
    headers = {"ETag": '"x"', "X-Repo-Commit": commit, "X-Linked-Size": "9" * 19}
    hub.server.special["/team/fr/resolve/main/adapter_config.json"] = lambda _: (200, headers, b"{}")
    source = opened(hub, "hf://team")
    with pytest.raises(AdapterUnavailable, match="does not say commit, size"):
        await source.resolve("fr")
    await source.close()


@pytest.mark.parametrize("listing", [b"[]", b'{"siblings": [{}]}', b'{"siblings": 1}', b"<html>"])
async def test_a_listing_of_another_form(hub, listing):
    hub.commit("team/fr", FILES, "main")
    hub.server.special["/api/models/team/fr/revision/main"] = lambda _: (200, {}, listing)
    source = opened(hub, "hf://team/fr")
    with pytest.raises(AdapterUnavailable, match="another form"):
        await source.names()
    await source.close()


async def test_a_commit_that_is_gone(hub, tmp_path):
    hub.commit("team/fr", FILES, "main")
    source = opened(hub, "hf://team")
    version = await resolved(source, "fr")
    hub.server.special.clear()
    with pytest.raises(FileChanged):
        await source.fetch(version, tmp_path, Limits())
    await source.close()


@pytest.mark.parametrize("file", list(FILES))
async def test_content_with_another_hash_is_corrupt(hub, tmp_path, file):
    hub.commit("team/fr", FILES, "main")
    source = opened(hub, "hf://team")
    version = await resolved(source, "fr")
    wrong = FILES[file][:-1] + b"?"
    changed = hub.content.files if file == "adapter_model.safetensors" else hub.server.special
    for path, made in list(changed.items()):
        if isinstance(made, bytes):
            changed[path] = wrong
        elif path.endswith(file):
            changed[path] = lambda request, answer=made: (*answer(request)[:2], wrong)
    with pytest.raises(AdapterCorrupt, match=f"{file} of fr"):
        await source.fetch(version, tmp_path, Limits())
    await source.close()


async def test_the_token_goes_to_the_hub_alone(hub, tmp_path, monkeypatch):
    hub.commit("team/fr", FILES, "main")
    hub.private["team/fr"] = "hf_secret"
    source = opened(hub, "hf://team")
    assert await source.resolve("fr") is None  # a hub does not tell who may not know
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text("hf_secret\n")
    (tmp_path / "to").mkdir()
    await source.fetch(await resolved(source, "fr"), tmp_path / "to", Limits())
    assert content(tmp_path / "to") == FILES
    assert {request.headers.get("authorization") for request in hub.content.requests} == {None}
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert await source.resolve("fr") is None
    for path in list(hub.server.special):
        hub.server.special[path] = lambda _: (403, {"X-Error-Code": "GatedRepo"}, b"")
    with pytest.raises(AdapterDenied, match="access denied to hf://team") as caught:
        await source.resolve("fr")
    assert "hf_wrong" not in caught.value.message
    await source.close()


async def test_content_hosts_must_be_allowed(hub, tmp_path):
    hub.commit("team/fr", FILES, "main")
    source = opened(hub, "hf://team", allowed_hosts=())
    version = await resolved(source, "fr")
    with pytest.raises(AdapterUnavailable, match="not among the configured hosts"):
        await source.fetch(version, tmp_path, Limits())
    assert not hub.content.requests
    await source.close()


async def test_an_endpoint_that_is_no_hub(hub):
    hub.server.files["/team/fr/resolve/main/adapter_config.json"] = b"{}"
    source = opened(hub, "hf://team")
    with pytest.raises(AdapterUnavailable, match="as a hub does"):
        await source.resolve("fr")
    await source.close()


@pytest.mark.parametrize("name", ["../team/fr", "fr/../fr", "fr@v1", "fr:x", ""])
async def test_a_name_that_is_none(hub, name):
    source = opened(hub, "hf://team")
    assert await source.resolve(name) is None
    assert not hub.server.requests
    await source.close()


async def test_the_layout_is_one_that_the_hubs_own_client_reads(hub, tmp_path):
    hub.commit("team/fr", FILES, "main")
    for name, data in FILES.items():
        path = await asyncio.to_thread(
            hf_hub_download, "team/fr", name, endpoint=hub.server.url, cache_dir=tmp_path / "cache", token=False
        )
        assert Path(path).read_bytes() == data
