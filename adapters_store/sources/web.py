"""Adapters behind https://: a guarded client for web sources, and a plain web server's folders as a source."""

from __future__ import annotations

import logging
import netrc
import os
import re
from base64 import b64decode
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from email.utils import formatdate, parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

import httpx
import msgspec

from adapters_store.errors import AdapterDenied, AdapterUnavailable, SourceUnavailable
from adapters_store.limits import Limits
from adapters_store.ref import FileVersion, SourceVersion, is_adapter_name
from adapters_store.sources.folder import CONFIG_FILE, NOTED_FILES, FileChanged
from adapters_store.sources.guard import (
    Guard,
    GuardedTransport,
    Refused,
    allowed_origins,
    check_literal,
    origin_of,
)
from adapters_store.sources.remote import RemoteOptions
from adapters_store.sources.retry import Passing, within
from adapters_store.sources.transfer import CHUNK_BYTES, Checksum, Part, RangesIgnored, all_of

MAX_REDIRECTS = 5
MAX_CONNECTIONS = 128
"""to one host: the parts of all fetches that may run at once, and questions beside them"""
MAX_JSON_BYTES = 8 << 20
INDEX_FILE = "index.json"

for _library in ("httpx", "httpcore"):
    logging.getLogger(_library).setLevel(logging.WARNING)  # below it are whole URLs, signatures and all

T = TypeVar("T")

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)")
_SIZE = re.compile(r"[0-9]{1,18}")
_SHA256_DIGEST = re.compile(r"(?:^|,)\s*sha-256=:([A-Za-z0-9+/]{43}=):")
MISSING = (404, 410)
"""The statuses that say there is no such file."""


class WebClient:
    """Requests of one web source: guarded at each hop, with its errors told apart. Secrets are in no message."""

    def __init__(self, source: str, base: str, options: RemoteOptions, further_hosts: tuple[str, ...] = ()) -> None:
        """`base`: where the source is, or ValueError; `further_hosts`: where it may redirect to."""
        self.source = source
        try:
            self.origin = origin_of(base, allow_http=options.allow_private)
            check_literal(self.origin.host, allow_private=options.allow_private)
        except Refused as refused:
            raise ValueError(f"{source}: {refused}") from None
        allowed = allowed_origins(self.origin, further_hosts, allow_private=options.allow_private)
        self._guard = Guard(allowed, options.allow_private)
        self._retry = options.retry
        self._answer_s = options.connect_timeout_s + 2 * options.read_timeout_s  # of one that drips
        timeout = httpx.Timeout(options.read_timeout_s, connect=options.connect_timeout_s, pool=None)
        transport = GuardedTransport(self._guard, max_connections=MAX_CONNECTIONS)
        self._client = httpx.AsyncClient(transport=transport, timeout=timeout, trust_env=False)

    async def head(
        self,
        url: str,
        headers: Mapping[str, str],
        *,
        leaves: bool = True,
        is_missing: Callable[[httpx.Response], bool] = lambda response: response.status_code in MISSING,
    ) -> tuple[int, httpx.Headers]:
        """Status and headers of a HEAD: a success, 404 for what is missing, or with `leaves` False a redirect that
        would leave the host."""

        async def request() -> tuple[int, httpx.Headers]:
            async with self.open("HEAD", url, headers, leaves=leaves) as response:
                if is_missing(response):
                    return MISSING[0], response.headers
                if response.next_request is None:
                    self.check_status(response)
                return response.status_code, response.headers

        return await self._retry.run(self.source, lambda: within(self._answer_s, request()))

    async def json(self, url: str, headers: Mapping[str, str], form: type[T]) -> T | None:
        """What a GET gives as JSON of that form, None where there is nothing."""

        async def request() -> T | None:
            async with self.open("GET", url, headers) as response:
                if response.status_code in MISSING:
                    return None
                self.check_status(response)
                content = bytearray()
                async for chunk in response.aiter_raw():
                    content += chunk
                    if len(content) > MAX_JSON_BYTES:
                        raise AdapterUnavailable(f"{self.source}: a list of more than {MAX_JSON_BYTES} bytes")
            try:
                return msgspec.json.decode(content, type=form)
            except (msgspec.MsgspecError, ValueError, RecursionError):
                raise AdapterUnavailable(f"{self.source}: a list that is not JSON, or has another form") from None

        return await self._retry.run(self.source, lambda: within(self._answer_s, request()))

    async def read(self, part: Part, url: str, headers: Mapping[str, str], *, same: Mapping[str, str]) -> None:
        """Write a part's bytes to it. `same`: headers of which those that the answer has too must be equal."""
        asked = {**headers}
        if not part.is_whole_file or part.position:
            asked["Range"] = f"bytes={part.position}-{part.stop - 1}"
        async with self.open("GET", url, asked) as response:
            if response.status_code in (*MISSING, 412, 416):
                raise FileChanged(part.file.name)
            self.check_status(response)
            if any(_tag(response.headers.get(name, value)) != _tag(value) for name, value in same.items()):
                raise FileChanged(part.file.name)
            _check_range(part, response)
            digest = _SHA256_DIGEST.search(response.headers.get("repr-digest", ""))
            if digest:
                part.told[part.file.name] = Checksum("sha256", b64decode(digest[1]).hex())
            async for chunk in response.aiter_raw(CHUNK_BYTES):
                await part.write(chunk)

    @asynccontextmanager
    async def open(
        self, method: str, url: str, headers: Mapping[str, str], *, leaves: bool = True
    ) -> AsyncIterator[httpx.Response]:
        """An answer, redirects followed; with `leaves` False those to other hosts are the answer.

        Headers of ours that are secret go to the first host only.
        """
        request = self._client.build_request(method, url, headers={"Accept-Encoding": "identity", **headers})
        try:
            for _ in range(MAX_REDIRECTS + 1):
                response = await self._client.send(request, stream=True, follow_redirects=False)
                try:
                    if response.next_request is None:
                        if response.headers.get("content-encoding", "identity") != "identity":
                            raise AdapterUnavailable(f"{self.source} sends encoded content though asked not to")
                        yield response
                        return
                    request = response.next_request
                    if not leaves and origin_of(request.url, allow_http=True) != self.origin:
                        yield response
                        return
                finally:
                    await response.aclose()
            raise AdapterUnavailable(f"{self.source}: more than {MAX_REDIRECTS} redirects")
        except Refused as refused:
            raise AdapterUnavailable(f"{self.source}: an address was refused: {refused}") from None
        except httpx.InvalidURL:
            raise AdapterUnavailable(f"{self.source}: an address was refused: a redirect to what is no URL") from None
        except httpx.TimeoutException:
            raise Passing("it does not answer in time") from None
        except httpx.TransportError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise SourceUnavailable(f"{self.source}: the server's certificate is not valid") from None
            raise Passing(f"the connection failed ({type(error).__name__})") from None

    def check_status(self, response: httpx.Response) -> None:
        """Raise what a status means, unless it is a success."""
        status = response.status_code
        if response.is_success:
            return
        if status in (401, 403):
            raise AdapterDenied(f"access denied to {self.source} (HTTP {status})")
        if status in (408, 425, 429) or status >= 500:
            after = response.headers.get("retry-after", "")
            raise Passing(f"HTTP {status}", float(after) if after.isdecimal() else 0.0)
        raise AdapterUnavailable(f"{self.source}: HTTP {status}")

    async def close(self) -> None:
        await self._client.aclose()


class WebSource:
    """A web server's folder: an adapter is at PREFIX/NAME/adapter_config.json.

    Names can be listed when PREFIX/index.json is a JSON list of them. Credentials: the host's entry in the netrc file
    ($NETRC or ~/.netrc).
    """

    def __init__(self, base: str, options: RemoteOptions) -> None:
        """`base`: the prefix's URL without a slash at its end."""
        self.source = self.endpoint = base
        self.misnamed: list[str] = []
        self._web = WebClient(base, base, options, options.allowed_hosts)
        self._transfer = options.transfer

    async def resolve(self, name: str) -> SourceVersion | None:
        """See RemoteSource; a HEAD for each file."""
        if not is_adapter_name(name):
            return None
        for folder in self._folders(name):
            config = await self._note(folder, CONFIG_FILE)
            if config is not None:
                rest = [file for file in NOTED_FILES if file != CONFIG_FILE]
                found = await all_of(self._note(folder, file) for file in rest)
                files = (config, *(file for file in found if file is not None))
                return SourceVersion(self.source, name, folder, files)
        return None

    async def names(self) -> list[str] | None:
        """See RemoteSource: what index.json lists."""
        listed = await self._web.json(f"{self.source}/{INDEX_FILE}", self._headers(), list[str])
        if listed is None:
            return None
        self.misnamed = [name for name in listed if not is_adapter_name(name)]
        return sorted({name for name in listed if is_adapter_name(name)})

    async def fetch(self, version: SourceVersion, folder: Path, limits: Limits) -> dict[str, str]:
        """See RemoteSource."""
        assert version.source == self.source and version.path in self._folders(version.name), version
        return await self._transfer.fetch(version, folder, limits, partial(self._read, version.path), lambda _: None)

    async def close(self) -> None:
        await self._web.close()

    async def _note(self, folder: str, file: str) -> FileVersion | None:
        status, headers = await self._web.head(f"{folder}/{file}", self._headers())
        if status in MISSING:
            return None
        size = size_of(headers.get("content-length", ""))
        if size is None:
            raise AdapterUnavailable(f"{self.source} does not say how long {file} is (no Content-Length)")
        etag, modified = headers.get("etag", ""), _nanoseconds(headers.get("last-modified", ""))
        if not etag and not modified:
            raise AdapterUnavailable(f"{self.source} gives neither ETag nor Last-Modified for {file}; one is needed")
        if not etag.isascii():
            raise AdapterUnavailable(f"{self.source} gives an ETag for {file} that can't be sent back: it is not ASCII")
        return FileVersion(file, size, modified, etag)

    async def _read(self, folder: str, part: Part) -> None:
        file, headers = part.file, self._headers()
        modified = formatdate(file.mtime_ns / 1e9, usegmt=True)
        same = {"etag": file.etag} if file.etag else {"last-modified": modified}
        if file.etag and not file.etag.startswith("W/"):
            headers["If-Match"] = file.etag
        elif file.mtime_ns:  # a weak tag never matches
            headers["If-Unmodified-Since"] = modified
        await self._web.read(part, f"{folder}/{file.name}", headers, same=same)

    def _folders(self, name: str) -> list[str]:
        itself = [self.source] if self.source.rsplit("/", 1)[-1] == name else []
        return [*itself, f"{self.source}/{name}"]

    def _headers(self) -> dict[str, str]:
        return netrc_authorization(self._web.origin.host)


def netrc_authorization(host: str) -> dict[str, str]:
    """The Authorization header that the netrc file ($NETRC or ~/.netrc) has for a host, if any."""
    try:
        entry = netrc.netrc(Path(os.environ.get("NETRC") or "~/.netrc").expanduser()).authenticators(host)
    except (OSError, RuntimeError, UnicodeDecodeError, netrc.NetrcParseError):  # RuntimeError: no home folder
        return {}
    if entry is None:
        return {}
    login, _, password = entry
    request = httpx.Request("GET", "https://host")
    return {"Authorization": next(httpx.BasicAuth(login, password or "").auth_flow(request)).headers["Authorization"]}


def size_of(text: str) -> int | None:
    """The bytes that a header says, or None when it says none that a file can have."""
    return int(text) if _SIZE.fullmatch(text) else None


def _check_range(part: Part, response: httpx.Response) -> None:
    """Check that an answer has the bytes from part.position; a whole file as an answer rewinds a part that is one."""
    if response.status_code == 206:
        found = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
        if found is None or int(found[1]) != part.position:
            raise Passing("an answer with another range than asked for")
        if found[3] not in ("*", str(part.file.size)):
            raise FileChanged(part.file.name)
        return
    if response.headers.get("content-length", str(part.file.size)) != str(part.file.size):
        raise FileChanged(part.file.name)
    if not part.is_whole_file:
        raise RangesIgnored(part.file.name)
    part.position = 0


def _tag(value: str) -> str:
    return value.removeprefix("W/")


def _nanoseconds(date: str) -> int:
    try:
        return int(parsedate_to_datetime(date).timestamp()) * 1_000_000_000
    except (ValueError, OverflowError):
        return 0
