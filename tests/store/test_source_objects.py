"""s3:// against a real S3 server, with a proxy before it that does what networks and stores do."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import obstore
import pytest

from adapters_store.errors import AdapterCorrupt, AdapterDenied, AdapterTooLarge, AdapterUnavailable, SourceUnavailable
from adapters_store.limits import Limits
from adapters_store.ref import SourceVersion
from adapters_store.sources.endpoints import s3_credentials
from adapters_store.sources.folder import NOTED_FILES, FileChanged
from adapters_store.sources.remote import RemoteOptions, RemoteSource, open_source
from tests.store.fault_proxy import FaultProxy, fault_proxy
from tests.store.s3_server import ACCESS_KEY, PUBLIC_BUCKET, SECRET_KEY, S3Server, s3_server
from tests.store.tls import Authority

MIB = 1 << 20
QUICK = RemoteOptions(
    attempts=3,
    first_backoff_s=0.01,
    max_backoff_s=0.05,
    connect_timeout_s=2,
    read_timeout_s=5,
    part_bytes=MIB,
    allow_private=True,
)
WEIGHTS = os.urandom(3 * MIB + 17)
CONFIG = b'{"peft_type": "LORA"}'


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[S3Server]:
    with s3_server(tmp_path_factory.mktemp("s3")) as running:
        for key, content in {
            "team/fr/adapter_config.json": CONFIG,
            "team/fr/adapter_model.safetensors": WEIGHTS,
            "team/fr/adapter_model.bin": b"pickle",
            "team/fr/README.md": b"not read",
            "team/fr/checkpoint-10/adapter_config.json": CONFIG,
            "team/fr/chat_template.jinja": b"{{ messages }}",
            "team/-odd/adapter_config.json": CONFIG,
            "team/empty/notes.txt": b"no adapter",
            "other/secret/adapter_config.json": CONFIG,
        }.items():
            running.store("adapters").put(key, content)
        yield running


@pytest.fixture
async def proxy(server, monkeypatch) -> AsyncIterator[FaultProxy]:
    async with fault_proxy(server.port) as running:
        use(monkeypatch, running.url)
        yield running


@pytest.fixture
async def source(proxy) -> AsyncIterator[RemoteSource]:
    """s3://adapters/team behind the proxy."""
    opened = open_source("s3://adapters/team", options=QUICK)
    yield opened
    await opened.close()


def use(monkeypatch, url: str, secret: str = SECRET_KEY) -> None:
    """The environment of one who has a key for the server at `url`."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)


async def resolved(source: RemoteSource, name: str = "fr") -> SourceVersion:
    version = await source.resolve(name)
    assert version is not None
    return version


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


ALL = {"adapter_config.json": CONFIG, "adapter_model.safetensors": WEIGHTS, "chat_template.jinja": b"{{ messages }}"}


async def test_resolve_notes_what_the_store_says(source):
    version = await resolved(source)
    assert (version.source, version.name, version.path) == ("s3://adapters/team", "fr", "team/fr")
    files = {file.name: file for file in version.files}
    assert {name: file.size for name, file in files.items()} == {
        **{name: len(data) for name, data in ALL.items()},
        "adapter_model.bin": 6,
    }
    assert all(file.etag and file.mtime_ns for file in files.values())
    assert await source.resolve("fr") == version


@pytest.mark.parametrize(
    "name", ["nothing", "empty", "../other/secret", "fr/", "/fr", "fr/../fr", "%2e%2e/other/secret"]
)
async def test_a_name_that_is_no_adapter_below_the_prefix(source, name):
    assert await source.resolve(name) is None


async def test_names_are_the_paths_below_the_prefix(source):
    assert await source.names() == ["fr", "fr/checkpoint-10"]
    assert source.misnamed == ["-odd"]


async def test_a_prefix_that_is_an_adapter_is_served_under_its_own_name(proxy):
    source = open_source("s3://adapters/team/fr/", options=QUICK)
    assert await source.names() == ["checkpoint-10", "fr"]
    assert (await resolved(source)).path == "team/fr"
    await source.close()


async def test_a_bucket_that_is_not_there_has_no_adapters(proxy):
    source = open_source("s3://nowhere", options=QUICK)
    assert await source.resolve("fr") is None
    assert await source.names() == []
    await source.close()


async def test_fetch_brings_what_is_read_and_no_more(source, proxy, tmp_path):
    await source.fetch(await resolved(source), tmp_path, Limits())
    assert content(tmp_path) == ALL
    assert proxy.asked("adapter_model.safetensors") == 4  # parts of a MiB
    assert proxy.asked("adapter_model.bin") == proxy.asked("README") == 0
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in tmp_path.iterdir())


async def test_limits_hold_before_the_download(source, proxy, tmp_path):
    version = await resolved(source)
    with pytest.raises(AdapterTooLarge, match="limit is 1000"):
        await source.fetch(version, tmp_path, Limits(max_file_bytes=1000))
    assert not content(tmp_path)
    assert all("list-type" in request.target for request in proxy.requests)


@pytest.mark.parametrize("where", ["list-type", "adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("fault", ["status:500", "status:503", "status:429", "reset", "cut:5", "abort:5"])
async def test_what_may_pass_is_tried_again(source, proxy, tmp_path, where, fault):
    proxy.faults += [(where, fault)] * 2
    await source.fetch(await resolved(source), tmp_path, Limits())
    assert content(tmp_path) == ALL
    assert not proxy.faults


@pytest.mark.parametrize(
    "fault, said", [("status:503", "HTTP 503 SlowDown, after 3 tries"), ("reset", "connection failed")]
)
async def test_what_does_not_pass_is_unavailable(source, proxy, tmp_path, fault, said):
    version = await resolved(source)
    proxy.always.append(("safetensors", fault))
    with pytest.raises(AdapterUnavailable, match=said) as caught:
        await source.fetch(version, tmp_path, Limits())
    assert "adapter_model.safetensors of fr from s3://adapters/team" in caught.value.message
    assert SECRET_KEY not in caught.value.message and "secret-of" not in caught.value.message
    proxy.always[:] = [("list-type", fault)]
    for asked in (source.resolve("fr"), source.names()):
        with pytest.raises(AdapterUnavailable, match=said):
            await asked
    proxy.always.clear()
    assert await source.resolve("fr") == version


async def test_denied_is_said_at_once(source, proxy, tmp_path):
    version = await resolved(source)
    proxy.always.append(("adapters", "status:403"))
    before = len(proxy.requests)
    with pytest.raises(AdapterDenied, match=r"access denied to s3://adapters/team \(HTTP 403 AccessDenied\)"):
        await source.resolve("fr")
    with pytest.raises(AdapterDenied):
        await source.names()
    assert len(proxy.requests) == before + 2
    with pytest.raises(AdapterDenied):
        await source.fetch(version, tmp_path, Limits())


async def test_a_wrong_key_is_denied(server, monkeypatch):
    use(monkeypatch, server.url, secret="another")
    source = open_source("s3://adapters/team", options=QUICK)
    with pytest.raises(AdapterDenied) as caught:
        await source.resolve("fr")
    assert "another" not in caught.value.message
    await source.close()


@pytest.mark.parametrize("status, said", [(400, "HTTP 400"), (301, "wrong region")])
async def test_what_no_further_try_helps_is_said_at_once(source, proxy, status, said):
    proxy.always.append(("list-type", f"status:{status}"))
    with pytest.raises(AdapterUnavailable, match=said) as caught:
        await source.resolve("fr")
    assert len(proxy.requests) == 1 and not isinstance(caught.value, SourceUnavailable)


@pytest.mark.parametrize("fault", ["status:404", "status:412", "etag:other"])
async def test_a_file_that_is_another_one_by_now(source, proxy, tmp_path, fault):
    version = await resolved(source)
    proxy.always.append(("safetensors", fault))
    with pytest.raises(FileChanged):
        await source.fetch(version, tmp_path, Limits())


async def test_a_replaced_file_is_not_mixed_with_the_old(source, server, tmp_path):
    store = server.store("adapters")
    store.put("team/new/adapter_config.json", CONFIG)
    store.put("team/new/adapter_model.safetensors", WEIGHTS)
    version = await resolved(source, "new")
    store.put("team/new/adapter_model.safetensors", WEIGHTS[::-1])
    assert await source.resolve("new") != version
    with pytest.raises(FileChanged):
        await source.fetch(version, tmp_path, Limits())


async def test_corrupted_bytes_are_fetched_again_and_then_refused(source, proxy, server, tmp_path):
    server.store("adapters").put("team/small/adapter_config.json", CONFIG)
    obstore.put(server.store("adapters"), "team/small/adapter_model.safetensors", WEIGHTS[:MIB], use_multipart=False)
    version = await resolved(source, "small")
    proxy.faults.append(("small/adapter_model", "corrupt"))
    await source.fetch(version, tmp_path, Limits())
    assert content(tmp_path)["adapter_model.safetensors"] == WEIGHTS[:MIB]
    proxy.always.append(("small/adapter_model", "corrupt"))
    with pytest.raises(AdapterCorrupt, match="of small from"):
        await source.fetch(version, tmp_path, Limits())


async def test_a_sha256_given_with_the_object_is_checked(source, server, tmp_path):
    store = server.store("adapters")
    for name, digest in (("signed", "0" * 64),):
        store.put(f"team/{name}/adapter_config.json", CONFIG, attributes={"sha256": digest})
    with pytest.raises(AdapterCorrupt, match="of signed from"):
        await source.fetch(await resolved(source, "signed"), tmp_path, Limits())


async def test_a_slow_drip_is_given_up(proxy, tmp_path):
    slow = RemoteOptions(
        allow_private=True, read_timeout_s=0.5, grace_s=1, min_bytes_per_s=1 << 30, first_backoff_s=0.01, attempts=50
    )
    source = open_source("s3://adapters/team", options=slow)
    version = await resolved(source)
    proxy.always.append(("safetensors", "drip:0.02"))
    with pytest.raises(AdapterUnavailable, match="too slowly"):
        await source.fetch(version, tmp_path, Limits())
    await source.close()


async def test_a_server_that_says_nothing(proxy):
    source = open_source(
        "s3://adapters/team", options=RemoteOptions(allow_private=True, attempts=1, read_timeout_s=0.2)
    )
    proxy.always.append(("list-type", "hang:30"))
    with pytest.raises(SourceUnavailable, match="in time"):
        await source.resolve("fr")
    await source.close()


async def test_cancelled_it_stops_and_leaves_nothing_running(source, proxy, tmp_path):
    version = await resolved(source)
    proxy.always.append(("safetensors", "drip:0.01"))
    fetch = asyncio.ensure_future(source.fetch(version, tmp_path, Limits()))
    while not proxy.asked("safetensors"):
        await asyncio.sleep(0.01)
    started = time.monotonic()
    fetch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetch
    assert time.monotonic() - started < 5
    while proxy.open_connections:
        await asyncio.sleep(0.01)
    asked = len(proxy.requests)
    await asyncio.sleep(0.2)
    assert len(proxy.requests) == asked


@pytest.mark.parametrize("where", ["list-type", "safetensors"])
async def test_a_redirect_goes_nowhere(source, proxy, tmp_path, where):
    """The store itself gets the request, and what it says to that is an error or that there is nothing."""
    reached = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reached.append(await reader.readline())
        writer.close()

    version = await resolved(source)
    other = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = other.sockets[0].getsockname()[1]
    for target in (f"http://127.0.0.1:{port}/x", f"http://localhost:{port}/", f"https://localhost:{port}/"):
        proxy.always[:] = [(where, f"redirect:{target}")]
        with suppress(AdapterUnavailable, FileChanged, AdapterDenied):
            if await source.resolve("fr") is not None:
                await source.fetch(version, tmp_path, Limits())
                raise AssertionError("a redirect was taken for the file")
    other.close()
    assert not reached


async def test_a_redirect_to_https_is_refused_at_once(source, proxy):
    proxy.always[:] = [("list-type", "redirect:https://localhost:1/")]
    with pytest.raises(AdapterUnavailable, match="refused") as caught:
        await source.resolve("fr")
    assert not isinstance(caught.value, SourceUnavailable)
    assert sum(request.method == "GET" for request in proxy.requests) == 1  # the other is its CONNECT


async def test_a_store_that_knows_no_ranges_is_told_of_at_once(source, proxy, tmp_path):
    version = await resolved(source)
    proxy.always.append(("safetensors", "whole"))
    with pytest.raises(AdapterUnavailable, match="it gives whole files where parts of them are asked for") as caught:
        await source.fetch(version, tmp_path, Limits())
    assert not isinstance(caught.value, SourceUnavailable)


async def test_a_redirect_goes_nowhere_over_https(server, monkeypatch, tmp_path):
    """The other hosts there are 127.0.0.1, whose certificate is fine, and http."""
    authority = Authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    tls = authority.server("DNS:localhost,IP:127.0.0.1")
    async with (
        fault_proxy(server.port, tls) as proxy,
        fault_proxy(server.port, tls) as other,
        fault_proxy(server.port) as plain,
    ):
        use(monkeypatch, f"https://localhost:{proxy.port}")
        source = open_source("s3://adapters/team", options=QUICK)
        await resolved(source)
        for target in (
            f"https://127.0.0.1:{other.port}/adapters?list-type=2",
            f"http://127.0.0.1:{plain.port}/adapters?list-type=2",
            f"http://localhost:{plain.port}/adapters?list-type=2",
            "http://169.254.169.254/latest/meta-data",
        ):
            proxy.always[:] = [("list-type", f"redirect:{target}")]
            before = len(proxy.requests)
            with pytest.raises(
                AdapterUnavailable, match="a redirect, or another host than the store's, was refused"
            ) as caught:
                await source.resolve("fr")
            assert len(proxy.requests) == before + 1 and not isinstance(caught.value, SourceUnavailable)
        await source.close()
        assert other.connections == plain.connections == 0


async def test_keys_from_the_shared_credentials_file(server, monkeypatch, tmp_path):
    use(monkeypatch, server.url)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    file = tmp_path / "credentials"
    keys = "[{}]\naws_access_key_id = {}\naws_secret_access_key = {}\n"
    file.write_text(keys.format("default", "nobody", "wrong") + keys.format("store", ACCESS_KEY, SECRET_KEY))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    denied = open_source("s3://adapters/team", options=QUICK)
    with pytest.raises(AdapterDenied):
        await denied.resolve("fr")
    monkeypatch.setenv("AWS_PROFILE", "store")
    source = open_source("s3://adapters/team", options=QUICK)
    await resolved(source)
    monkeypatch.setenv("AWS_PROFILE", "other")
    with pytest.raises(ValueError, match="no keys for the profile other"):
        open_source("s3://adapters/team", options=QUICK)
    for one in (denied, source):
        await one.close()


@pytest.mark.parametrize(
    "content",
    [
        b"[default]\naws_access_key_id = key\nsecret words\n",
        b"secret = words",
        b"[default]\nsecret = \xff",
        b"[default]\nsecret = 1\nsecret = 2",
    ],
)
async def test_a_credentials_file_that_is_none_is_not_quoted(server, monkeypatch, tmp_path, content):
    use(monkeypatch, server.url)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    file = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"{file} is no file of profiles and keys") as caught:
        open_source("s3://adapters/team", options=QUICK)
    assert "secret" not in str(caught.value)
    file.write_text(f"[default]\naws_access_key_id = {ACCESS_KEY}\naws_secret_access_key = {SECRET_KEY}\n")
    source = open_source("s3://adapters/team", options=QUICK)
    file.write_bytes(content)  # it breaks while the server runs
    with pytest.raises(AdapterDenied) as failed:
        await source.resolve("fr")
    assert "secret" not in failed.value.message
    await source.close()


def test_no_home_folder_is_no_credentials_file(server, monkeypatch):
    def no_home(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    use(monkeypatch, server.url)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setattr(Path, "expanduser", no_home)
    assert s3_credentials() is None
    monkeypatch.setenv("AWS_PROFILE", "store")
    with pytest.raises(ValueError, match="AWS_SHARED_CREDENTIALS_FILE"):
        s3_credentials()


@pytest.mark.parametrize("key", ["team/fr//x", "team/fr/../x", "team/./x"])
async def test_a_key_that_can_not_be_listed(source, proxy, key):
    """The names can't be had then, and that is said at once; an adapter that is asked for can."""
    version = await resolved(source)
    proxy.requests.clear()
    proxy.always.append(("list-type", f"listing:{key}"))
    with pytest.raises(AdapterUnavailable, match=r"s3://adapters/team: a key there has an empty, '\.' or '\.\.' part"):
        await source.names()
    assert len(proxy.requests) == 1
    again = await resolved(source)
    assert [(file.name, file.size) for file in again.files] == [(file.name, file.size) for file in version.files]


@pytest.fixture(scope="module")
def crowd(server) -> list[str]:
    """Objects below a folder, some pages of them, that sort before and after an adapter's files."""
    keys = [f"{letter}{number:04}" for letter in "0z" for number in range(1200)]

    async def put() -> None:
        store = server.store("adapters")
        await asyncio.gather(*(obstore.put_async(store, f"crowd/{key}/x", b"1") for key in keys))
        for name, data in ALL.items():
            await obstore.put_async(store, f"crowd/{name}", data)
            await obstore.put_async(store, f"crowd/0500/{name}", data)

    asyncio.run(put())
    return keys


async def test_a_large_folder_is_not_listed_whole(crowd, proxy, tmp_path):
    """Whoever names one costs a page of its listing and a HEAD, also where it is an adapter."""
    source = open_source("s3://adapters", options=QUICK)
    version = await resolved(source, "crowd")
    assert proxy.asked("list-type") == 1
    assert [request.method for request in proxy.requests].count("HEAD") == len(NOTED_FILES)
    assert {file.name: file.size for file in version.files} == {name: len(data) for name, data in ALL.items()}
    await source.fetch(version, tmp_path, Limits())
    assert content(tmp_path) == ALL
    assert await source.resolve("crowd") == version
    proxy.requests.clear()
    assert (await resolved(source, "crowd/0500")).path == "crowd/0500"  # which is small
    assert proxy.asked("") == 1
    await source.close()


async def test_a_large_folder_that_is_no_adapter_costs_two_requests(crowd, server, proxy):
    source = open_source("s3://adapters", options=QUICK)
    proxy.always.append(("adapter_config.json", "status:404"))
    assert await source.resolve("crowd") is None
    assert [request.method for request in proxy.requests] == ["GET", "HEAD"]
    proxy.always[:] = [("adapter_config.json", "status:403")]
    with pytest.raises(AdapterDenied):
        await source.resolve("crowd")
    proxy.always[:] = [("crowd/adapter_model.safetensors", "status:503")]
    with pytest.raises(AdapterUnavailable, match="HTTP 503, after 3 tries"):
        await source.resolve("crowd")
    await source.close()


async def test_gs_speaks_the_same_requests_unsigned(server, monkeypatch, tmp_path):
    """Google's XML interface is S3's but for the signature, so a public bucket there is one here."""
    for name, data in ALL.items():
        server.store(PUBLIC_BUCKET).put(f"team/fr/{name}", data)
    async with fault_proxy(server.port) as proxy:
        monkeypatch.setenv("GOOGLE_BASE_URL", proxy.url)
        monkeypatch.setenv("GOOGLE_SKIP_SIGNATURE", "true")
        source = open_source(f"gs://{PUBLIC_BUCKET}/team", options=QUICK)
        assert await source.names() == ["fr"]
        version = await resolved(source)
        proxy.faults += [("safetensors", "abort:5"), ("list-type", "status:503")]
        await source.fetch(version, tmp_path, Limits())
        assert content(tmp_path) == ALL
        server.store(PUBLIC_BUCKET).put("team/fr/adapter_config.json", b"{}")
        assert await source.resolve("fr") != version
        with pytest.raises(FileChanged):
            await source.fetch(version, tmp_path, Limits())
        await source.close()


@pytest.mark.parametrize(
    "endpoint, allow_private, says",
    [
        ("http://127.0.0.1:9000", False, "is http"),
        ("https://user:secret@store.example", True, "credentials"),
        ("ftp://store.example", True, "scheme"),
        ("https://0x7f.1", True, "usual form"),
        ("http://169.254.169.254", True, "metadata"),
    ],
)
def test_an_endpoint_that_is_refused(monkeypatch, endpoint, allow_private, says):
    use(monkeypatch, endpoint)
    with pytest.raises(ValueError, match=says) as caught:
        open_source("s3://adapters/team", options=RemoteOptions(allow_private=allow_private))
    assert "secret" not in str(caught.value)
