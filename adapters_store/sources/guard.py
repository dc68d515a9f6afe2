"""Which hosts and addresses a web source may reach: checked at every hop, and connections pinned to the checked."""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import httpx

from adapters_store.tensorfile import shown

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

METADATA_ADDRESSES = frozenset(
    ipaddress.ip_address(address)
    for address in (
        "169.254.169.254",
        "169.254.170.2",
        "169.254.170.23",
        "fd00:ec2::254",
        "fd00:ec2::23",
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.192",
    )
)
"""Where clouds hand credentials to whoever asks from a machine. Refused whatever is allowed."""

_UNCHECKABLE = tuple(ipaddress.ip_network(network) for network in ("fec0::/10", "64:ff9b:1::/48", "::/96"))
"""Site-local, a network's own NAT64, IPv4-compatible: where they lead, only that network knows."""
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_HOST_NAME = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)(\.(?!-)[a-z0-9-]{1,63}(?<!-))*", re.IGNORECASE)
_LOOKS_NUMERIC = re.compile(r"(0x[0-9a-f]*|[0-9]+)", re.IGNORECASE)
_BAD_CHARACTERS = re.compile(r"[\x00-\x20\x7f\\]")
_DEFAULT_PORTS = {"http": 80, "https": 443}
_RESOLVED_S = 10.0


class Refused(Exception):
    """The guard does not let a URL or an address through; the text says which and why."""


@dataclass(frozen=True, slots=True)
class Origin:
    """A scheme, a host (lower case, no trailing dot) and a port: what may be reached."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


def origin_of(url: str | httpx.URL, *, allow_http: bool) -> Origin:
    """The origin of a URL that is safe to read; Refused says what is not.

    Refused are other schemes, credentials, backslashes, control characters, spaces, and numbers as hosts that
    only some parsers take for an address (decimal, octal, hexadecimal, shortened).
    """
    text = str(url)
    check_characters(text)
    try:
        parsed = httpx.URL(text)
    except (httpx.InvalidURL, ValueError):
        raise Refused("not a URL") from None
    if parsed.scheme not in ("https", "http") or (parsed.scheme == "http" and not allow_http):
        raise Refused(f"the scheme {shown(parsed.scheme)}; it must be https")
    if parsed.userinfo or "@" in text.partition("//")[2].partition("/")[0]:
        raise Refused("a URL with credentials in it")
    host = parsed.host.lower().removesuffix(".")
    check_host(host)
    port = parsed.port if parsed.port is not None else _DEFAULT_PORTS[parsed.scheme]
    if not 0 < port < 65536:
        raise Refused(f"the port {port}")
    return Origin(parsed.scheme, host, port)


def check_characters(text: str) -> None:
    """Refused for what parsers of URLs read in more than one way."""
    if _BAD_CHARACTERS.search(text) or not text.isascii():
        raise Refused("a URL with a backslash, a space, a control or a non-ASCII character")


def check_host(host: str) -> None:
    """Refused unless `host` is a DNS name, or an IP address in its one usual form."""
    if is_address(host):
        if str(ipaddress.ip_address(host)) != host or "%" in host:
            raise Refused(f"{shown(host)} is an address that is not in its usual form")
    elif not _HOST_NAME.fullmatch(host) or _LOOKS_NUMERIC.fullmatch(host.rsplit(".", 1)[-1]):
        raise Refused(f"{shown(host)} is neither a host name nor an address in its usual form")


def is_address(host: str) -> bool:
    """Whether a host is an IP address, not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def check_literal(host: str, *, allow_private: bool) -> None:
    """Refused for a host that is an address which may not be connected to; names are looked at when resolved."""
    if is_address(host) and (why := address_refusal(ipaddress.ip_address(host), allow_private=allow_private)):
        raise Refused(f"{host} is {why}")


def address_refusal(address: IPAddress, *, allow_private: bool) -> str | None:
    """Why an address may not be connected to, or None."""
    for one in (address, *_embedded(address)):
        if one in METADATA_ADDRESSES:
            return "a metadata address"
        if one.is_link_local:
            return "a link-local address"
        if one.is_multicast or one.is_unspecified:
            return "a multicast or unspecified address"
        if not one.is_loopback and any(one in network for network in _UNCHECKABLE):
            return "a site-local, IPv4-compatible or locally translated address"
        if not allow_private and not one.is_global and not _embedded(one):
            return "an address of this machine, of a private network or reserved"
    return None


def _embedded(address: IPAddress) -> list[IPAddress]:
    """The IPv4 addresses that an IPv6 address may lead to."""
    if isinstance(address, ipaddress.IPv4Address):
        return []
    found: list[IPAddress | None] = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    if address in _NAT64:
        found.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return [one for one in found if one is not None]


@dataclass(slots=True)
class Guard:
    """The origins that may be reached, and the addresses they have.

    A name is resolved here, every address it has is checked, and callers connect to one of these: what a
    name server says a moment later does not matter.
    """

    allowed: frozenset[Origin]
    allow_private: bool = False
    _resolved: dict[Origin, tuple[float, list[str]]] = field(default_factory=dict)

    def check(self, url: str | httpx.URL) -> Origin:
        """The origin of a URL that may be opened; Refused otherwise."""
        origin = origin_of(url, allow_http=self.allow_private)
        if origin not in self.allowed:
            raise Refused(f"{origin} is not among the configured hosts")
        return origin

    async def addresses(self, origin: Origin) -> list[str]:
        """The checked addresses of an origin's host; Refused when one of them is refused.

        OSError when the name can't be resolved. Remembered for some seconds.
        """
        until, known = self._resolved.get(origin, (0.0, []))
        if time.monotonic() < until:
            return known
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(origin.host, origin.port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        for address in addresses:
            why = address_refusal(ipaddress.ip_address(address), allow_private=self.allow_private)
            if why is not None:
                raise Refused(f"{origin.host} is at {address}: {why}")
        self._resolved[origin] = (time.monotonic() + _RESOLVED_S, addresses)
        return addresses


class GuardedTransport(httpx.AsyncBaseTransport):
    """Sends a request only to an allowed origin, and there to an address that was checked.

    The connection goes to the address; the Host header, TLS's server name and the certificate's check stay with the
    host name. Each origin has its own connections: one that was opened for another name is never used.
    """

    def __init__(self, guard: Guard, *, max_connections: int) -> None:
        self._guard = guard
        self._tls = httpx.create_ssl_context()
        self._limits = httpx.Limits(max_connections=max_connections, max_keepalive_connections=max_connections)
        self._transports: dict[Origin, httpx.AsyncHTTPTransport] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Refused for what is not allowed; else as httpx, whose errors are raised."""
        origin = self._guard.check(request.url)
        try:
            addresses = await self._guard.addresses(origin)
        except OSError as error:
            raise httpx.ConnectError(f"{origin.host} can't be resolved", request=request) from error
        transport = self._transport(origin)
        last: httpx.TransportError | None = None
        for address in addresses:
            try:
                response = await transport.handle_async_request(_pinned(request, origin, address))
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                last = error
                continue
            if not _leads_somewhere(request, response):  # httpx would call it a broken connection
                await response.aclose()
                raise Refused("a redirect to what is no URL")
            return response
        raise last or httpx.ConnectError(f"{origin.host} has no address", request=request)

    async def aclose(self) -> None:
        for transport in self._transports.values():
            await transport.aclose()

    def _transport(self, origin: Origin) -> httpx.AsyncHTTPTransport:
        if origin not in self._transports:
            self._transports[origin] = httpx.AsyncHTTPTransport(verify=self._tls, trust_env=False, limits=self._limits)
        return self._transports[origin]


def _pinned(request: httpx.Request, origin: Origin, address: str) -> httpx.Request:
    """The same request, to an address of its host."""
    url = request.url.copy_with(host=address)
    extensions = dict(request.extensions)
    if origin.scheme == "https":
        extensions["sni_hostname"] = origin.host
    return httpx.Request(request.method, url, headers=request.headers, stream=request.stream, extensions=extensions)


def _leads_somewhere(request: httpx.Request, response: httpx.Response) -> bool:
    """Whether a redirect's address is one; true for what is no redirect."""
    try:
        return not response.has_redirect_location or bool(request.url.join(response.headers["location"]))
    except (httpx.InvalidURL, ValueError):
        return False


def allowed_origins(primary: Origin, further: Iterable[str], *, allow_private: bool) -> frozenset[Origin]:
    """The configured origin and the further hosts ("name" or "name:port"), by https or the primary's scheme.

    ValueError for an entry that is no host.
    """
    found = {primary}
    for entry in further:
        if "/" in entry:
            raise ValueError(f"the allowed host {shown(entry)}: it must be a host, or host:port")
        for scheme in dict.fromkeys(("https", primary.scheme)):
            try:
                origin = origin_of(f"{scheme}://{entry}", allow_http=allow_private)
                check_literal(origin.host, allow_private=allow_private)
                found.add(origin)
            except Refused as refused:
                raise ValueError(f"the allowed host {shown(entry)}: {refused}") from None
    return frozenset(found)
