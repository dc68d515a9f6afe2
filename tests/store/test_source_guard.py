"""Which URLs and addresses are refused, and that a connection goes to the address that was checked."""

from __future__ import annotations

import asyncio
import ipaddress
import socket

import httpx
import pytest

from adapters_store.errors import AdapterUnavailable
from adapters_store.sources.guard import (
    Guard,
    GuardedTransport,
    Origin,
    Refused,
    address_refusal,
    allowed_origins,
    origin_of,
)
from adapters_store.sources.remote import RemoteOptions, open_source
from tests.store.tls import Authority
from tests.store.web_server import web_server

BAD_URLS = [
    "http://store.example/",
    "ftp://store.example/",
    "file:///etc/passwd",
    "https://user@store.example/",
    "https://user:secret@store.example/",
    "https://@store.example/",
    "https://evil.example\\@store.example/",
    "https://store.example\\.evil.example/",
    "https://store.example/a\\b",
    "https://store.example/a b",
    "https://store.example/\x00",
    "https://store.example/\r\nHost: evil",
    "https://store.example/\x7f",
    "https://störe.example/",
    "https://2852039166/",
    "https://0xa9fea9fe/",
    "https://0xa9.0xfe.0xa9.0xfe/",
    "https://0251.0376.0251.0376/",
    "https://169.254.43518/",
    "https://127.1/",
    "https://127.0.0.01/",
    "https://[::ffff:7f00:1%25eth0]/",
    "https://[0:0:0:0:0:0:0:1]/",
    "https://store_.example/",
    "https://-a.example/",
    "https://a..example/",
    "https:///path",
    "https:store.example",
    "https:/store.example",
    "http:foo",
    "https://[",
    "https://store.example:99999/",
    "store.example",
    "",
]


@pytest.mark.parametrize("url", BAD_URLS)
def test_a_url_that_is_refused(url):
    with pytest.raises(Refused) as caught:
        origin_of(url, allow_http=False)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "url, origin",
    [
        ("https://store.example/a", Origin("https", "store.example", 443)),
        ("https://STORE.example.:8443", Origin("https", "store.example", 8443)),
        ("https://192.0.2.1/", Origin("https", "192.0.2.1", 443)),
        ("https://[2001:db8::1]:444/x", Origin("https", "2001:db8::1", 444)),
    ],
)
def test_a_url_that_is_read(url, origin):
    assert origin_of(url, allow_http=False) == origin


NEVER = [
    "169.254.169.254",
    "169.254.170.2",
    "169.254.1.1",
    "fd00:ec2::254",
    "fe80::1",
    "::ffff:169.254.169.254",
    "64:ff9b::a9fe:a9fe",
    "2002:a9fe:a9fe::1",
    "100.100.100.200",
    "168.63.129.16",
    "0.0.0.0",
    "::",
    "224.0.0.1",
    "ff02::1",
    "::ffff:0.0.0.0",
    "fec0::1",
    "feff::1",
    "::169.254.169.254",
    "::127.0.0.1",
    "::8.8.8.8",
    "64:ff9b:1::a9fe:a9fe",
    "64:ff9b:1:ffff::808:808",
]
PRIVATE = [
    "127.0.0.1",
    "127.8.8.8",
    "::1",
    "10.0.0.1",
    "172.16.0.1",
    "192.168.1.1",
    "100.64.0.1",
    "fc00::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "64:ff9b::7f00:1",
    "2002:7f00:1::1",
    "192.0.2.1",
    "240.0.0.1",
]
PUBLIC = ["8.8.8.8", "2606:4700::1111", "64:ff9b::808:808", "::ffff:8.8.8.8"]


@pytest.mark.parametrize("address", NEVER)
def test_an_address_that_is_never_connected_to(address):
    for allow_private in (False, True):
        assert address_refusal(ipaddress.ip_address(address), allow_private=allow_private)


@pytest.mark.parametrize("address", PRIVATE)
def test_an_address_that_must_be_allowed(address):
    assert address_refusal(ipaddress.ip_address(address), allow_private=False)
    assert address_refusal(ipaddress.ip_address(address), allow_private=True) is None


@pytest.mark.parametrize("address", PUBLIC)
def test_an_address_of_the_internet(address):
    assert address_refusal(ipaddress.ip_address(address), allow_private=False) is None


@pytest.mark.parametrize(
    "url",
    [
        "https://store.example:8443/",
        "https://store.example.evil.example/",
        "https://evil.example/store.example",
        "https://169.254.169.254/latest/meta-data",
        "http://store.example/",
    ],
)
def test_only_the_configured_hosts(url):
    guard = Guard(
        allowed_origins(origin_of("https://store.example", allow_http=False), ["cdn.example"], allow_private=False)
    )
    assert guard.check("https://cdn.example/x") and guard.check("https://store.example/x")
    with pytest.raises(Refused):
        guard.check(url)


@pytest.mark.parametrize(
    "entry", ["cdn.example/path", "user@cdn.example", "0x7f.1", "", "*", "127.0.0.1:8443", "[fe80::1]"]
)
def test_an_allowed_host_that_is_none(entry):
    with pytest.raises(ValueError, match="allowed host"):
        open_source("https://store.example", options=RemoteOptions(allowed_hosts=(entry,)))


def answers(monkeypatch, *rounds: list[str]) -> None:
    """Make the running loop's resolver give these addresses, one list a call, the last one for ever."""
    left = list(rounds)

    async def getaddrinfo(host, port, **_):
        addresses = left.pop(0) if len(left) > 1 else left[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo, raising=False)


async def test_a_name_at_a_private_address_is_refused(monkeypatch):
    for addresses in (["127.0.0.1"], ["8.8.8.8", "10.0.0.1"], ["169.254.169.254"]):
        answers(monkeypatch, addresses)
        source = open_source("https://store.example/adapters", options=RemoteOptions(attempts=1))
        with pytest.raises(AdapterUnavailable, match=r"an address was refused: store\.example is at"):
            await source.resolve("fr")
        await source.close()


async def test_the_connection_goes_to_the_address_that_was_checked(tmp_path, monkeypatch):
    """A name server that gives another address a moment later (rebinding) changes nothing; TLS knows the name."""
    authority = Authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    async with web_server(authority.server("DNS:store.example")) as server:
        server.files["/adapters/fr/adapter_config.json"] = b"{}"
        answers(monkeypatch, ["127.0.0.1"], ["169.254.169.254"])
        url = f"https://store.example:{server.port}/adapters"
        source = open_source(url, options=RemoteOptions(attempts=1, allow_private=True))
        assert await source.resolve("fr") is not None
        await source.close()
        assert set(authority.asked) == {"store.example"}
        assert {request.headers["host"] for request in server.requests} == {f"store.example:{server.port}"}


async def test_a_certificate_for_another_name_is_refused_at_once(tmp_path, monkeypatch):
    authority = Authority(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
    async with web_server(authority.server("DNS:store.example,IP:127.0.0.1")) as server:
        answers(monkeypatch, ["127.0.0.1"])
        source = open_source(f"https://other.example:{server.port}", options=RemoteOptions(allow_private=True))
        with pytest.raises(AdapterUnavailable, match="certificate"):
            await source.resolve("fr")
        await source.close()
        assert not server.requests


async def test_the_next_address_is_tried_when_one_does_not_answer(monkeypatch):
    async with web_server() as server:
        server.files["/x"] = b"here"
        answers(monkeypatch, ["127.0.0.9", "127.0.0.1"])
        origin = Origin("http", "store.example", server.port)
        transport = GuardedTransport(Guard(frozenset({origin}), allow_private=True), max_connections=2)
        async with httpx.AsyncClient(transport=transport, trust_env=False) as client:
            assert (await client.get(f"{origin}/x")).content == b"here"


@pytest.mark.parametrize(
    "url, says",
    [
        ("s3://key:secret@bucket/a", "credentials"),
        ("https://user:secret@store.example/a", "credentials"),
        ("hf://user:secret@owner/repo", "credentials"),
        ("s3://bucket/a?secret=1", "query"),
        ("https://store.example/a?token=secret", "query"),
        ("https://store.example/a#secret", "fragment"),
        ("s3://bucket/../other", "'..'"),
        ("https://store.example/a/%2e%2e/b", "'..'"),
        ("https://store.example/a%2fb", "path"),
        ("https://store.example/a%5cb", "path"),
        ("s3://bucket/a//b", "empty part"),
        ("s3://bucket/a\\b", "backslash"),
        ("s3://bucket/a\nb", "control"),
        ("s3:///a", "names no host"),
        ("https://", "names no host"),
        ("ftp://host/a", "no kind"),
        ("file:///a", "no"),
        ("/folder", "URL like"),
        ("http://store.example/a", "must be https"),
        ("https://0x7f000001/a", "usual form"),
        ("hf://owner/repo@../x", "is not hf://"),
        ("hf://owner/repo@", "is not hf://"),
        ("hf://ow ner", "space"),
        ("https://127.0.0.1/a", "127.0.0.1 is an address of this machine"),
        ("https://10.0.0.1/a", "10.0.0.1 is an address of this machine, of a private network"),
    ],
)
def test_a_source_that_can_not_be_opened(url, says):
    with pytest.raises(ValueError, match=says) as caught:
        open_source(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("is_source", [True, False])
@pytest.mark.parametrize("host", ["169.254.169.254", "[fd00:ec2::254]", "100.100.100.200", "[64:ff9b::a9fe:a9fe]"])
def test_a_metadata_address_is_refused_before_anything_is_served(host, is_source):
    """Whatever is allowed: as the source itself, and as a host that it may redirect to."""
    for scheme in ("http", "https"):
        options = RemoteOptions(allow_private=True, allowed_hosts=() if is_source else (host,))
        with pytest.raises(ValueError, match=r"metadata address|link-local"):
            open_source(f"{scheme}://{host if is_source else 'store.example'}/latest", options=options)
