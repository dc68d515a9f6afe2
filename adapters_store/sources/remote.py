"""Sources behind a network: what the store asks of one, and which URL makes which."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote

from adapters_store.limits import Limits
from adapters_store.ref import SourceVersion
from adapters_store.sources.retry import Retry
from adapters_store.sources.transfer import Transfer
from adapters_store.tensorfile import shown


class RemoteSource(Protocol):
    """The adapters below one prefix of a remote store. Lives on one event loop.

    Every method may raise AdapterDenied (the store refuses this server's credentials; at once) and
    AdapterUnavailable (it can't be asked, after bounded retries). Messages never hold a secret.
    """

    source: str
    """the id that its SourceVersions carry, e.g. "s3://bucket/team-a": no credentials, no query"""
    endpoint: str
    """where that is: the same id at another endpoint is another source; no credentials"""
    misnamed: list[str]
    """adapters that the last names() met but no request can name"""

    async def resolve(self, name: str) -> SourceVersion | None:
        """What `name` points to now, asked of the store; None when it has no such adapter."""

    async def names(self) -> list[str] | None:
        """The names of all adapters below the prefix now, sorted; None where the store can't list."""

    async def fetch(self, version: SourceVersion, folder: Path, limits: Limits) -> dict[str, str]:
        """Write the files of `version` that the server reads into `folder`, which exists and is empty.

        Returns the sha256 of those whose content was hashed as it came, by name.

        Never the pickle. Raises AdapterTooLarge before the first byte, FileChanged when a file is another one
        by now, AdapterCorrupt when a checksum that the store gives does not match, OSError when the disk
        refuses (what is in `folder` then is the caller's to remove). Cancelled, it stops and leaves nothing running.
        """

    async def close(self) -> None:
        """Close the connections."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteOptions:
    """How remote sources are asked. Seconds and bytes where a name says so."""

    attempts: int = 5
    """tries of one request, where trying again can help"""
    retry_s: float = 30.0
    """no further try once this much has passed since the first"""
    first_backoff_s: float = 0.1
    max_backoff_s: float = 5.0
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 15.0
    """the longest wait for the next bytes of an answer"""
    min_bytes_per_s: int = 256 << 10
    """a whole fetch that is slower than this, after `grace_s`, is given up"""
    grace_s: float = 30.0
    part_bytes: int = 8 << 20
    parts_in_flight: int = 8
    """of one fetch"""
    allow_private: bool = False
    """http:// and addresses of this machine or network, for the hosts that are configured"""
    allowed_hosts: tuple[str, ...] = ()
    """further hosts ("cdn.example" or "cdn.example:8443") that an https:// or hf:// source may redirect to"""
    hf_endpoint: str | None = None
    """instead of HF_ENDPOINT, or https://huggingface.co"""

    @property
    def retry(self) -> Retry:
        """How one request is tried again."""
        return Retry(
            attempts=self.attempts, total_s=self.retry_s, first_s=self.first_backoff_s, max_s=self.max_backoff_s
        )

    @property
    def transfer(self) -> Transfer:
        """How one adapter's files are brought."""
        return Transfer(
            retry=self.retry,
            part_bytes=self.part_bytes,
            parts_in_flight=self.parts_in_flight,
            min_bytes_per_s=self.min_bytes_per_s,
            grace_s=self.grace_s,
        )


def open_source(url: str, *, options: RemoteOptions | None = None) -> RemoteSource:
    """The source that `url` names: s3://, gs://, az://, https:// or hf://. Nothing is asked of it yet.

    ValueError says what is wrong with the URL, which it quotes only when no credentials can be in it.
    """
    options = options or RemoteOptions()
    scheme, host, parts = _split(url)
    # imported here: each brings a library that the others don't need
    if scheme in ("s3", "gs", "az"):
        from adapters_store.sources.objects import open_objects

        return open_objects(scheme, host, "/".join(parts), options)
    if scheme == "hf":
        from adapters_store.sources.hub import HubSource

        return HubSource("/".join([host, *parts]) if host else "", options)
    if scheme in ("https", "http"):
        from adapters_store.sources.web import WebSource

        return WebSource("/".join([f"{scheme}://{host}", *parts]), options)
    raise ValueError(f"{scheme}:// is no kind of adapter source; there are s3, gs, az, https and hf")


def _split(url: str) -> tuple[str, str, list[str]]:
    """Scheme, host (or bucket, or owner) and the parts of the path of a source's URL."""
    scheme, mark, rest = url.partition("://")
    if not mark or not re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme):
        raise ValueError("an adapter source is a URL like s3://bucket/prefix")
    if "@" in (rest if scheme != "hf" else rest.partition("/")[0]):
        raise ValueError(f"credentials in the URL of a {scheme}:// source; they belong into environment or a file")
    if "?" in rest or "#" in rest:
        raise ValueError(f"a query or a fragment in the URL of a {scheme}:// source")
    if re.search(r"[\x00-\x20\x7f\\]", rest) or not rest.isascii():
        raise ValueError(f"{shown(url)}: a backslash, a space, a control or a non-ASCII character")
    host, _, path = rest.partition("/")
    if not host and (path or scheme != "hf"):
        raise ValueError(f"{shown(url)} names no host, bucket or owner")
    parts = path.removesuffix("/").split("/") if path.strip("/") else []
    if any(unquote(part) in ("", ".", "..") or re.search(r"[/\\\x00-\x1f]", unquote(part)) for part in parts):
        raise ValueError(f"{shown(url)}: an empty part, '.' or '..' in the path")
    return scheme, host, parts
