"""Whether a request was made on this machine for this machine, not by a page of another site in its browser."""

from __future__ import annotations

from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from server.config import is_loopback


def foreign_header(headers: Headers, allowed_origins: Sequence[str]) -> str | None:
    """The header that shows a page of another site; None if there is none.

    A page can reach a server on loopback in two ways. It sends the request across sites: then `origin` names the
    page. Or its own name is made to resolve to 127.0.0.1 (DNS rebinding): then the request is of one origin, and
    `host` names the page. `allowed_origins` are CORS's; "*" is no name, and allows nothing here.
    """
    hosts = headers.getlist("host")
    if len(hosts) != 1 or not _is_local(f"//{hosts[0]}"):
        return "host"
    return "origin" if has_foreign_origin(headers, allowed_origins) else None


def has_foreign_origin(headers: Headers, allowed_origins: Sequence[str]) -> bool:
    """Whether a page sent the request that is neither of this machine nor of `allowed_origins`."""
    return any(origin not in allowed_origins and not _is_local(origin) for origin in headers.getlist("origin"))


def _is_local(url: str) -> bool:
    try:
        name = urlsplit(url).hostname or ""
    except ValueError:
        return False
    return is_loopback(name) or name.endswith(".localhost")
