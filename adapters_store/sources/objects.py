"""Adapters in object stores: s3://, gs:// and az://, through obstore.

obstore follows redirects by itself and shows nothing of them. The proxy setting closes them. Over https, hosts other
than the store's and its credentials' go to a proxy that does not exist (and http not at all); over http, every request
goes to the store's own endpoint as if that were the proxy. So a redirect leads nowhere else: it ends in an error, or
in what the store itself says to such a request without a signature.
"""

from __future__ import annotations

import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import obstore
from obstore.exceptions import BaseError, InvalidPathError, PermissionDeniedError, UnauthenticatedError
from obstore.store import AzureStore, GCSStore, MemoryStore, S3Store

from adapters_store.disk_threads import submit_raw
from adapters_store.errors import AdapterDenied, AdapterUnavailable
from adapters_store.limits import Limits
from adapters_store.ref import FileVersion, SourceVersion, is_adapter_name
from adapters_store.sources.endpoints import Endpoint, azure_endpoint, google_endpoint, s3_credentials, s3_endpoint
from adapters_store.sources.folder import CONFIG_FILE, NOTED_FILES, FileChanged
from adapters_store.sources.remote import RemoteOptions
from adapters_store.sources.retry import Passing, within
from adapters_store.sources.transfer import CHUNK_BYTES, Checksum, Part, all_of

if TYPE_CHECKING:
    from obstore import GetOptions, ObjectMeta
    from obstore.store import ClientConfig, RetryConfig

Store = S3Store | GCSStore | AzureStore
T = TypeVar("T")

MAX_LISTED = 500
"""Objects below a folder that are listed to see its files; where there are more, each file is asked for by name."""

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([A-Za-z]{1,64})</Code>")
_MD5 = re.compile(r'"?([0-9a-f]{32})"?')
_SHA256 = re.compile(r"[0-9a-f]{64}")


class UnlistableKey(AdapterUnavailable):
    """A key that obstore takes for no path is among those listed."""


class ObjectSource:
    """The adapters below a prefix of one bucket: PREFIX/NAME/adapter_config.json is one."""

    def __init__(
        self, source: str, endpoint: str, store: Store, prefix: str, options: RemoteOptions, outlet: socket.socket
    ) -> None:
        """`outlet`: a port of ours where nobody listens; held so that nobody else does."""
        self.source = source
        self.endpoint = endpoint
        self.misnamed: list[str] = []
        self._store = store
        self._prefix = prefix
        self._retry = options.retry
        self._transfer = options.transfer
        self._read_timeout_s = options.read_timeout_s
        self._outlet = outlet
        # what obstore's errors say, without a status, of a request that the proxy setting has closed
        self._refusals = ("error following redirect", "TunnelUnsuccessful", f"127.0.0.1:{outlet.getsockname()[1]},")

    async def resolve(self, name: str) -> SourceVersion | None:
        """See RemoteSource; one LIST, which has size, ETag and date of every file, or a HEAD for each."""
        if not is_adapter_name(name):
            return None
        for folder in self._folders(name):
            files = await self._retry.run(self.source, partial(self._list_folder, folder))
            if files is None:
                files = await self._ask_for_each(folder)
            if CONFIG_FILE in files:
                noted = tuple(_version(file, files[file]) for file in NOTED_FILES if file in files)
                return SourceVersion(self.source, name, folder, noted)
        return None

    async def names(self) -> list[str]:
        """See RemoteSource; lists everything below the prefix."""
        folders = await self._retry.run(self.source, self._list_all)
        itself = [self._prefix] if self._prefix in folders else []
        names = [folder.removeprefix(f"{self._prefix}/") for folder in folders if folder != self._prefix]
        names += [folder.rsplit("/", 1)[-1] for folder in itself]
        self.misnamed = sorted(name for name in names if name and not is_adapter_name(name))
        return sorted({name for name in names if is_adapter_name(name)})

    async def fetch(self, version: SourceVersion, folder: Path, limits: Limits) -> dict[str, str]:
        """See RemoteSource."""
        assert version.source == self.source and version.path in self._folders(version.name), version
        return await self._transfer.fetch(version, folder, limits, partial(self._read, version.path), self._checksum)

    async def close(self) -> None:
        """obstore's connections close with it."""
        self._outlet.close()

    async def _list_folder(self, folder: str) -> dict[str, ObjectMeta] | None:
        """The files of a folder by name; None where a bounded look does not show all of them.

        The listing goes into folders below: one that stays out of them can't be ended early, and a client may name
        a folder with millions of objects.
        """
        pages = aiter(obstore.list(self._store, folder or None, chunk_size=MAX_LISTED))
        try:
            async with self._told_apart():
                listed = await self._next(pages) or []
        except FileNotFoundError:
            return {}
        except UnlistableKey:
            return None
        if len(listed) >= MAX_LISTED:
            return None
        return {_file(found["path"]): found for found in listed if _folder(found["path"]) == folder}

    async def _ask_for_each(self, folder: str) -> dict[str, ObjectMeta]:
        """The noted files of a folder by name, its config first: most large folders are no adapters."""
        names = [name for name in NOTED_FILES if name != CONFIG_FILE]
        config = await self._head(folder, CONFIG_FILE)
        if config is None:
            return {}
        found = await all_of(self._head(folder, name) for name in names)
        return {CONFIG_FILE: config} | {name: meta for name, meta in zip(names, found, strict=True) if meta is not None}

    async def _head(self, folder: str, name: str) -> ObjectMeta | None:
        """What the store says of one file, without its version: that needs further rights to be read."""
        path = f"{folder}/{name}" if folder else name

        async def ask() -> ObjectMeta:
            async with self._told_apart(name):
                return await within(self._read_timeout_s, obstore.head_async(self._store, path))

        try:
            meta = await self._retry.run(f"{name} below {self.source}", ask)
        except FileNotFoundError:
            return None
        return {**meta, "version": None}

    async def _list_all(self) -> set[str]:
        """Every folder at or below the prefix that has a config."""
        folders: set[str] = set()
        pages = aiter(obstore.list(self._store, self._prefix or None, chunk_size=1000))
        try:
            async with self._told_apart():
                while (page := await self._next(pages)) is not None:
                    paths = [meta["path"] for meta in page]
                    folders |= {_folder(path) for path in paths if _file(path) == CONFIG_FILE}
        except FileNotFoundError:
            pass
        return folders

    async def _read(self, folder: str, part: Part) -> None:
        file = part.file
        options: GetOptions = {"range": (part.position, part.stop)}
        if file.version_id:
            options["version"] = file.version_id
        if file.etag:
            options["if_match"] = file.etag
        else:
            options["if_unmodified_since"] = datetime.fromtimestamp(file.mtime_ns / 1e9, UTC)
        path = f"{folder}/{file.name}" if folder else file.name
        try:
            async with self._told_apart(file.name):
                result = await within(self._read_timeout_s, obstore.get_async(self._store, path, options=options))
                if not _is_same(file, result.meta):
                    raise FileChanged(file.name)
                digest = str(result.attributes.get("sha256", ""))
                if _SHA256.fullmatch(digest):
                    part.told[file.name] = Checksum("sha256", digest)
                chunks = aiter(result.stream(min_chunk_size=CHUNK_BYTES))
                while (chunk := await self._next(chunks)) is not None:
                    await part.write(chunk)
        except FileNotFoundError:
            raise FileChanged(file.name) from None

    async def _next(self, items: AsyncIterator[T]) -> T | None:
        """The next of what comes piece by piece, None at its end."""
        try:
            return await within(self._read_timeout_s, anext(items))
        except StopAsyncIteration:
            return None

    @asynccontextmanager
    async def _told_apart(self, file: str = "") -> AsyncIterator[None]:
        """obstore's errors as ours, FileNotFoundError for 404. `file`: what was asked for, if it is one.

        Their own text stays out of ours: it has the request's URL, which is signed for some stores.
        """
        try:
            yield
        except InvalidPathError:
            raise UnlistableKey(
                f"{self.source}: a key there has an empty, '.' or '..' part, which can't be listed"
            ) from None
        except BaseError as error:
            text = str(error).partition("\n\nDebug source")[0]
            status, code = _STATUS.search(text), _CODE.search(text)
            number = int(status[1]) if status else 0
            said = " ".join(filter(None, (f"HTTP {number}" if number else "", code[1] if code else "")))
            if isinstance(error, PermissionDeniedError | UnauthenticatedError) or number in (401, 403):
                raise AdapterDenied(f"access denied to {self.source} ({said})") from None
            if number == 404:
                raise FileNotFoundError(file) from None
            if number in (412, 416):
                raise FileChanged(file) from None
            if number in (408, 425, 429) or number >= 500 or (code and code[1] == "RequestTimeout"):
                raise Passing(said) from None
            if number or "redirect without" in text:
                why = said or "a redirect to nowhere, as stores send for the wrong region or endpoint"
                raise AdapterUnavailable(f"{self.source}: {why}") from None
            if any(mark in str(error) for mark in self._refusals):
                raise AdapterUnavailable(
                    f"{self.source}: a redirect, or another host than the store's, was refused"
                ) from None
            if "non-partial response" in text:
                raise AdapterUnavailable(
                    f"{self.source}: it gives whole files where parts of them are asked for"
                ) from None
            raise Passing("the connection failed") from None

    def _checksum(self, file: FileVersion) -> Checksum | None:
        """An S3 ETag of that form is the MD5 of the object, unless that is encrypted with a key of its own."""
        found = _MD5.fullmatch(file.etag)
        return Checksum("md5", found[1], is_guess=True) if found and self.source.startswith("s3://") else None

    def _folders(self, name: str) -> list[str]:
        itself = [self._prefix] if self._prefix.rsplit("/", 1)[-1] == name else []
        return [*itself, f"{self._prefix}/{name}" if self._prefix else name]


@cache
def _start_threads() -> None:
    """obstore's own, which it keeps: of the priority of the thread that asks first."""
    submit_raw(lambda: obstore.put(MemoryStore(), "first", b"")).result()


def open_objects(scheme: str, bucket: str, prefix: str, options: RemoteOptions) -> ObjectSource:
    """The source s3://BUCKET/PREFIX (or gs, az). Endpoint and credentials come from the environment only.

    ValueError for an http endpoint that was not allowed, and for what the store's library can't take.
    """
    source = f"{scheme}://{bucket}" + (f"/{prefix}" if prefix else "")
    _start_threads()
    outlet = socket.socket()
    outlet.bind(("127.0.0.1", 0))
    try:
        endpoint = {"s3": s3_endpoint, "gs": google_endpoint, "az": azure_endpoint}[scheme](bucket)
        store = _store(scheme, bucket, endpoint, options, outlet.getsockname()[1])
        return ObjectSource(source, endpoint.url, store, prefix, options, outlet)
    except (BaseError, ValueError) as error:
        outlet.close()
        raise ValueError(f"{source}: {str(error).partition(chr(10))[0]}") from None


def _outlet(endpoint: Endpoint, options: RemoteOptions, dead_port: int) -> ClientConfig:
    """Where obstore's requests may go; see the head of this module."""
    if not endpoint.is_http:
        return {"proxy_url": f"http://127.0.0.1:{dead_port}", "proxy_excludes": ",".join(endpoint.hosts)}
    if not options.allow_private:
        raise ValueError(f"the endpoint {endpoint.url} is http; that needs the option to allow private sources")
    return {"proxy_url": endpoint.url}


def _version(name: str, found: ObjectMeta) -> FileVersion:
    modified = int(found["last_modified"].timestamp() * 1e6) * 1000
    return FileVersion(name, found["size"], modified, found["e_tag"] or "", found["version"] or "")


def _is_same(noted: FileVersion, found: ObjectMeta) -> bool:
    """Whether an answer is of the noted version; the quotes of an ETag differ between requests for some stores."""
    etag = found["e_tag"] or noted.etag
    return found["size"] == noted.size and etag.strip('"') == noted.etag.strip('"')


def _folder(path: str) -> str:
    return path.rpartition("/")[0]


def _file(path: str) -> str:
    return path.rpartition("/")[2]


def _store(scheme: str, bucket: str, endpoint: Endpoint, options: RemoteOptions, dead_port: int) -> Store:
    client: ClientConfig = {
        **_outlet(endpoint, options, dead_port),
        "allow_http": endpoint.is_http,
        "connect_timeout": timedelta(seconds=options.connect_timeout_s),
        "read_timeout": timedelta(seconds=options.read_timeout_s),
        "timeout": timedelta(hours=1),  # of a whole part; Transfer has the floor on speed
    }
    once: RetryConfig = {"max_retries": 0, "retry_timeout": timedelta(seconds=1)}
    if scheme == "gs":
        return GCSStore(bucket, client_options=client, retry_config=once)
    if scheme == "az":
        return AzureStore(bucket, client_options=client, retry_config=once)
    return S3Store(bucket, client_options=client, retry_config=once, credential_provider=s3_credentials())
