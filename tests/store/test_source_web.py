"""https:// sources against a real web server on loopback, and where its redirects may not lead."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from adapters_store.errors import AdapterCorrupt, AdapterDenied, AdapterTooLarge, AdapterUnavailable, SourceUnavailable
from adapters_store.limits import Limits
from adapters_store.ref import SourceVersion
from adapters_store.remote_names import MAX_QUESTIONS
from adapters_store.remote_tier import MAX_FETCHES
from adapters_store.sources.folder import FileChanged
from adapters_store.sources.remote import RemoteOptions, RemoteSource, open_source
from adapters_store.sources.web import MAX_CONNECTIONS
from tests.store.web_server import Answer, Request, WebServer, file_answer, web_server

MIB = 1 << 20
WEIGHTS = os.urandom(2 * MIB + 5)
FILES = {
    "adapter_config.json": b'{"peft_type": "LORA"}',
    "adapter_model.safetensors": WEIGHTS,
    "tokenizer_config.json": b"{}",
}
FR = "/team/fr"
MODEL = f"{FR}/adapter_model.safetensors"


def options(**changes) -> RemoteOptions:
    quick = {"attempts": 3, "first_backoff_s": 0.01, "max_backoff_s": 0.05, "part_bytes": MIB, "read_timeout_s": 3}
    return RemoteOptions(**{**quick, "allow_private": True, **changes})


@pytest.fixture
async def server() -> AsyncIterator[WebServer]:
    async with web_server() as running:
        running.files = {f"{FR}/{name}": content for name, content in FILES.items()}
        running.files |= {f"{FR}/adapter_model.bin": b"pickle", "/other/adapter_config.json": b"{}"}
        yield running


@pytest.fixture
async def source(server) -> AsyncIterator[RemoteSource]:
    opened = open_source(f"{server.url}/team/", options=options())
    yield opened
    await opened.close()


async def resolved(source: RemoteSource) -> SourceVersion:
    version = await source.resolve("fr")
    assert version is not None
    return version


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


async def test_resolve_and_fetch(source, server, tmp_path):
    version = await resolved(source)
    assert (version.source, version.path) == (f"{server.url}/team", f"{server.url}/team/fr")
    assert {file.name: file.size for file in version.files} == {
        **{name: len(data) for name, data in FILES.items()},
        "adapter_model.bin": 6,
    }
    assert all(file.etag and file.mtime_ns for file in version.files)
    assert await source.resolve("fr") == version
    await source.fetch(version, tmp_path, Limits())
    assert content(tmp_path) == FILES
    assert len(server.asked("safetensors", "GET")) == 3
    assert not server.asked("adapter_model.bin", "GET")


@pytest.mark.parametrize("name", ["nothing", "../other", "fr/", "%2e%2e/other", "fr/../../other"])
async def test_a_name_that_is_no_adapter_below_the_prefix(source, server, name):
    assert await source.resolve(name) is None
    assert not server.asked("other")


async def test_a_prefix_that_is_an_adapter_is_served_under_its_own_name(server):
    source = open_source(f"{server.url}{FR}", options=options())
    assert (await resolved(source)).path == f"{server.url}{FR}"
    await source.close()


async def test_names_are_those_of_the_index(source, server):
    assert await source.names() is None
    server.files["/team/index.json"] = json.dumps(["fr", "a/b", "../x", "fr"]).encode()
    assert await source.names() == ["a/b", "fr"]
    assert source.misnamed == ["../x"]
    for wrong in (b'{"a": 1}', b"[1]", b"<html>", b"[" * 100_000, b'["\xff"]', b"[" + b'"a",' * (9 << 18) + b'"a"]'):
        server.files["/team/index.json"] = wrong
        with pytest.raises(AdapterUnavailable):
            await source.names()


async def test_limits_hold_before_the_download(source, server, tmp_path):
    with pytest.raises(AdapterTooLarge):
        await source.fetch(await resolved(source), tmp_path, Limits(max_file_bytes=1000))
    assert not server.asked("", "GET")


@pytest.mark.parametrize("hidden", ["etag", "last-modified"])
async def test_one_of_etag_and_date_is_enough(source, server, tmp_path, hidden):
    server.hidden = {hidden}
    version = await resolved(source)
    await source.fetch(version, tmp_path, Limits())
    assert content(tmp_path) == FILES


@pytest.mark.parametrize(
    "hidden, says",
    [({"etag", "last-modified"}, "neither ETag nor Last-Modified"), ({"content-length"}, "Content-Length")],
)
async def test_a_server_that_does_not_say_enough(source, server, hidden, says):
    server.hidden = hidden
    with pytest.raises(AdapterUnavailable, match=says):
        await source.resolve("fr")


@pytest.mark.parametrize("said", ["9" * 19, "9" * 5000, "-1", "+1", "1_0"])
async def test_a_length_that_no_file_has(source, server, said):
    server.special[f"{FR}/adapter_config.json"] = lambda _: (200, {"ETag": '"x"', "Content-Length": said}, b"")
    with pytest.raises(AdapterUnavailable, match=r"Content-Length|connection failed"):
        await source.resolve("fr")


async def test_a_tag_that_can_not_be_sent_back(source, server):
    server.special[f"{FR}/adapter_config.json"] = lambda request: (200, {"ETag": '"\xfc"'}, b"{}")
    with pytest.raises(AdapterUnavailable, match="not ASCII"):
        await source.resolve("fr")


async def test_a_range_that_no_file_has(source, server, tmp_path):
    version = await resolved(source)
    server.special[MODEL] = lambda _: (206, {"Content-Range": f"bytes {'9' * 5000}-1/*"}, b"x")
    with pytest.raises(AdapterUnavailable, match="another range"):
        await source.fetch(version, tmp_path, Limits())


@pytest.mark.parametrize("netrc", [b"\xff\xfe", None])
async def test_a_netrc_that_can_not_be_read_gives_no_credentials(source, server, tmp_path, monkeypatch, netrc):
    if netrc is None:
        monkeypatch.delenv("NETRC", raising=False)
        monkeypatch.setattr(Path, "expanduser", no_home)
    else:
        (tmp_path / "netrc").write_bytes(netrc)
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    await resolved(source)
    assert {request.headers.get("authorization") for request in server.requests} == {None}


def no_home(path: Path) -> Path:
    raise RuntimeError("Could not determine home directory.")


async def test_no_url_is_logged(server, caplog):
    """Redirects to content hosts are signed."""
    server.special[f"{FR}/adapter_config.json"] = redirect(f"{FR}/tokenizer_config.json?signature=secret")
    server.files[f"{FR}/tokenizer_config.json?signature=secret"] = b"{}"
    source = open_source(f"{server.url}/team", options=options())
    with caplog.at_level("INFO"):
        await resolved(source)
    await source.close()
    assert server.asked("signature=secret") and "secret" not in caplog.text


def test_questions_get_connections_while_all_fetches_run():
    assert MAX_FETCHES * RemoteOptions().parts_in_flight + MAX_QUESTIONS <= MAX_CONNECTIONS


@pytest.mark.parametrize("hidden", [set(), {"etag"}, {"last-modified"}])
async def test_a_file_that_is_another_one_by_now(source, server, tmp_path, hidden):
    server.hidden = hidden
    version = await resolved(source)
    server.files[MODEL] = WEIGHTS[::-1] if not hidden else WEIGHTS + b"more"
    with pytest.raises(FileChanged):
        await source.fetch(version, tmp_path, Limits())
    del server.files[MODEL]
    with pytest.raises(FileChanged):
        await source.fetch(version, tmp_path, Limits())


async def test_a_server_that_minds_no_condition(source, server, tmp_path):
    """The tag of the answer is compared too."""
    version = await resolved(source)
    changed = WEIGHTS[::-1]
    server.special[MODEL] = lambda request: file_answer(
        Request("GET", MODEL, {name: value for name, value in request.headers.items() if name != "if-match"}), changed
    )
    with pytest.raises(FileChanged):
        await source.fetch(version, tmp_path, Limits())


async def test_a_server_that_knows_no_ranges(source, server, tmp_path):
    def whole(request: Request) -> Answer:
        request.headers.pop("range", None)
        return file_answer(request, WEIGHTS)

    server.special[MODEL] = whole
    await source.fetch(await resolved(source), tmp_path, Limits())
    assert content(tmp_path) == FILES


def failing(times: int, answer: Answer):
    """The answer for the first GETs, then None: the file."""
    left = [times]

    def answered(request: Request) -> Answer | None:
        if request.method == "HEAD" or not left[0]:
            return None
        left[0] -= 1
        return answer

    return answered


CUT = (200, {"Content-Length": "21"}, b"{")


@pytest.mark.parametrize(
    "answer", [(500, {}, b""), (503, {"Retry-After": "0"}, b""), (429, {}, b""), (408, {}, b""), CUT]
)
async def test_what_may_pass_is_tried_again(source, server, tmp_path, answer):
    server.special[f"{FR}/adapter_config.json"] = failing(2, answer)
    version = await resolved(source)
    await source.fetch(version, tmp_path, Limits())
    assert content(tmp_path) == FILES
    server.special[f"{FR}/adapter_config.json"] = failing(3, answer)
    with pytest.raises(SourceUnavailable, match="after 3 tries"):
        await source.fetch(version, tmp_path, Limits())


async def test_a_cut_file_is_continued_where_it_was_cut(server, tmp_path):
    source = open_source(f"{server.url}/team", options=options(part_bytes=4 * MIB))
    cut = MIB + 1000

    def once(request: Request) -> Answer | None:
        if request.method == "HEAD" or request.headers.get("range"):
            return None
        status, headers, body = file_answer(request, WEIGHTS)
        return status, {**headers, "Content-Length": str(len(body))}, body[:cut]

    server.special[MODEL] = once
    await source.fetch(await resolved(source), tmp_path, Limits())
    assert content(tmp_path) == FILES
    assert [request.headers.get("range") for request in server.asked("safetensors", "GET")] == [
        None,
        f"bytes={MIB}-{len(WEIGHTS) - 1}",
    ]
    await source.close()


@pytest.mark.parametrize("status", [401, 403])
async def test_denied_is_said_at_once(source, server, status):
    server.special[f"{FR}/adapter_config.json"] = lambda _: (status, {}, b"secret words")
    with pytest.raises(AdapterDenied, match=f"access denied to {server.url}/team") as caught:
        await source.resolve("fr")
    assert len(server.requests) == 1 and "secret" not in caught.value.message


async def test_another_status_is_unavailable_at_once(source, server):
    server.special[f"{FR}/adapter_config.json"] = lambda _: (418, {}, b"")
    with pytest.raises(AdapterUnavailable, match="HTTP 418") as caught:
        await source.resolve("fr")
    assert len(server.requests) == 1 and not isinstance(caught.value, SourceUnavailable)


async def test_more_bytes_than_noted_are_not_written(source, server, tmp_path):
    version = await resolved(source)
    tag = version.files[0].etag
    server.special[f"{FR}/adapter_config.json"] = lambda _: (
        206,
        {"ETag": tag, "Content-Range": "bytes 0-9/*"},
        b"x" * 5 * MIB,
    )
    with pytest.raises(AdapterUnavailable, match="more bytes came"):
        await source.fetch(version, tmp_path, Limits())
    sizes = {file.name: file.size for file in version.files}
    assert all(len(data) <= sizes[name] for name, data in content(tmp_path).items())


async def test_encoded_content_is_refused(source, server, tmp_path):
    version = await resolved(source)
    server.special[MODEL] = lambda request: (200, {"Content-Encoding": "gzip"}, WEIGHTS)
    with pytest.raises(AdapterUnavailable, match="encoded"):
        await source.fetch(version, tmp_path, Limits())
    assert all(request.headers["accept-encoding"] == "identity" for request in server.requests)


async def test_a_digest_in_the_answer_is_checked(source, server, tmp_path):
    version = await resolved(source)

    def digested(claimed: bytes):
        digest = base64.b64encode(hashlib.sha256(claimed).digest()).decode()

        def answer(request: Request) -> Answer:
            status, headers, body = file_answer(request, WEIGHTS)
            return status, {**headers, "Repr-Digest": f"sha-256=:{digest}:"}, body

        return answer

    server.special[MODEL] = digested(WEIGHTS)
    await source.fetch(version, tmp_path, Limits())
    server.special[MODEL] = digested(b"another")
    with pytest.raises(AdapterCorrupt, match="the checksum that the store gives"):
        await source.fetch(version, tmp_path, Limits())


async def test_a_slow_drip_is_given_up(server, tmp_path):
    source = open_source(f"{server.url}/team", options=options(grace_s=0.5, min_bytes_per_s=1 << 30))
    version = await resolved(source)
    server.drip_s = 0.01
    with pytest.raises(AdapterUnavailable, match="too slowly"):
        await source.fetch(version, tmp_path, Limits())
    await source.close()


async def test_cancelled_it_stops(source, server, tmp_path):
    version = await resolved(source)
    server.drip_s = 0.01
    fetch = asyncio.ensure_future(source.fetch(version, tmp_path, Limits()))
    while not server.asked("", "GET"):
        await asyncio.sleep(0.01)
    before = len(asyncio.all_tasks())
    fetch.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetch
    asked = len(server.requests)
    await asyncio.sleep(0.1)
    assert len(server.requests) == asked and len(asyncio.all_tasks()) < before


async def test_the_first_failure_stops_the_other_parts(source, server, tmp_path):
    version = await resolved(source)
    server.drip_s = 0.01
    server.special[f"{FR}/adapter_config.json"] = lambda _: (403, {}, b"")
    with pytest.raises(AdapterDenied):
        await source.fetch(version, tmp_path, Limits())
    server.drip_s = 0
    asked = len(server.requests)
    await asyncio.sleep(0.2)
    assert len(server.requests) == asked
    assert not [task for task in asyncio.all_tasks() if "bring" in repr(task)]


def redirect(target: str, status: int = 302):
    return lambda _: (status, {"Location": target}, b"")


@pytest.fixture
async def other() -> AsyncIterator[WebServer]:
    """Another server of this machine, which nobody configured."""
    async with web_server() as running:
        running.files = {f"{FR}/{name}": content for name, content in FILES.items()}
        yield running


def forbidden(port: int) -> list[str]:
    return [
        f"http://127.0.0.1:{port}/x",
        f"http://localhost:{port}/x",
        f"http://[::1]:{port}/x",
        f"http://[::ffff:127.0.0.1]:{port}/x",
        f"http://2130706433:{port}/x",
        f"http://0x7f000001:{port}/x",
        f"http://0177.0.0.1:{port}/x",
        f"http://127.1:{port}/x",
        f"http://0.0.0.0:{port}/x",
        f"//127.0.0.1:{port}/x",
        "http://169.254.169.254/latest/meta-data",
        "http://[fd00:ec2::254]/latest/meta-data",
        "file:///etc/passwd",
        "ftp://127.0.0.1/x",
        "gopher://127.0.0.1/x",
        "https://evil.example/x",
        "data:,x",
        "http://[",
    ]


@pytest.mark.parametrize("method", ["HEAD", "GET"])
async def test_redirects_that_are_refused(source, server, other, tmp_path, method):
    version = await resolved(source)
    here = server.url.removeprefix("http://")
    # the last ones name the configured host only for some parsers of URLs
    tricks = [
        f"http://{here}@127.0.0.1:{other.port}/x",
        f"http://127.0.0.1:{other.port}\\@{here}/x",
        f"http://{here}\\x",
    ]
    tricks += [f"http://user@{here}{MODEL}", f"http://{here}/a\\b"]
    for target in [*forbidden(other.port), *tricks]:
        server.special[f"{FR}/adapter_config.json" if method == "HEAD" else MODEL] = redirect(target)
        with pytest.raises(AdapterUnavailable) as caught:
            await (source.resolve("fr") if method == "HEAD" else source.fetch(version, tmp_path, Limits()))
        assert "refused" in caught.value.message and not isinstance(caught.value, SourceUnavailable)
        server.special.clear()
    assert not other.requests


@pytest.mark.parametrize("target", ["http://[", "//[", "http://a b:x/", "http://here:port/", "http://[::1]]/"])
async def test_a_redirect_to_what_is_no_url_is_refused_at_once(source, server, target):
    """It says nothing of the connection, and the next try would bring the same."""
    server.special[f"{FR}/adapter_config.json"] = redirect(target)
    with pytest.raises(AdapterUnavailable, match="refused") as caught:
        await source.resolve("fr")
    assert len(server.requests) == 1 and not isinstance(caught.value, SourceUnavailable)


async def test_redirects_are_followed_to_allowed_hosts_without_credentials(server, other, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in FILES:
        server.special[f"{FR}/{name}"] = redirect(f"{other.url}{FR}/{name}?signed=1", 307)
        other.files[f"{FR}/{name}?signed=1"] = FILES[name]
    source = open_source(f"{server.url}/team", options=options(allowed_hosts=(f"127.0.0.1:{other.port}",)))
    (tmp_path / "to").mkdir()
    await source.fetch(await resolved(source), tmp_path / "to", Limits())
    assert content(tmp_path / "to") == FILES
    basic = "Basic " + base64.b64encode(b"me:secret").decode()
    assert {request.headers.get("authorization") for request in server.requests} == {basic}
    assert {request.headers.get("authorization") for request in other.requests} == {None}
    await source.close()


async def test_a_chain_of_redirects_has_an_end(source, server):
    config = f"{FR}/adapter_config.json"
    for hop in range(5):
        server.special[config if hop == 0 else f"/hop{hop}"] = redirect(f"/hop{hop + 1}")
    server.files["/hop5"] = b"{}"
    assert await source.resolve("fr") is not None
    server.special["/hop5"] = redirect("/hop6")
    server.files["/hop6"] = b"{}"
    with pytest.raises(AdapterUnavailable, match="more than 5 redirects"):
        await source.resolve("fr")
    server.special["/hop1"] = redirect("/hop1")
    with pytest.raises(AdapterUnavailable, match="more than 5 redirects"):
        await source.resolve("fr")
