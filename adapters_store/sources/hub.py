"""Adapters in repositories of a Hugging Face hub: hf://, hf://OWNER, hf://OWNER/REPO[@REVISION][/FOLDER]."""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from functools import partial
from pathlib import Path
from urllib.parse import quote

import httpx
import msgspec

from adapters_store.errors import AdapterUnavailable, SourceUnavailable
from adapters_store.limits import Limits
from adapters_store.ref import FileVersion, SourceVersion, is_adapter_name
from adapters_store.sources.folder import CONFIG_FILE, NOTED_FILES, FileChanged
from adapters_store.sources.remote import RemoteOptions
from adapters_store.sources.transfer import Checksum, Part, all_of
from adapters_store.sources.web import MISSING, WebClient, size_of
from adapters_store.tensorfile import shown

DEFAULT_ENDPOINT = "https://huggingface.co"
CONTENT_HOSTS = (
    "cdn-lfs.huggingface.co",
    "cdn-lfs-us-1.huggingface.co",
    "cdn-lfs-eu-1.huggingface.co",
    "cdn-lfs.hf.co",
    "cdn-lfs-us-1.hf.co",
    "cdn-lfs-eu-1.hf.co",
    "cas-bridge.xethub.hf.co",
    "transfer.xethub.hf.co",
    "us.gcp.cdn.hf.co",
    "us.aws.cdn.hf.co",
)
"""Where the default endpoint redirects to for content. Another endpoint's are given by the operator."""

MAX_LAST = 16_384
"""names whose last version is remembered"""

_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
_COMMIT = re.compile(r"[0-9a-f]{40,64}")
_ALGORITHMS = {40: "git", 64: "sha256"}


class _File(msgspec.Struct):
    rfilename: str


class _Listing(msgspec.Struct):
    """What a hub says of a repository at a revision, as far as it is read."""

    siblings: list[_File]


class HubSource:
    """Repositories on a hub, or the folders of one.

    `hf://` serves OWNER/REPO[/FOLDER], `hf://OWNER` serves REPO[/FOLDER], and one with a repository the folders in
    it (itself under its last part's name). The revision is resolved to a commit at each resolve, all files are of
    that commit, and each is checked against the hash that the hub has of it.
    """

    def __init__(self, place: str, options: RemoteOptions) -> None:
        """`place`: what follows hf://; ValueError when that names no place of a hub."""
        place, self._revision = _split_revision(place)
        self.source = f"hf://{place}" + ("" if self._revision == "main" else f"@{self._revision}")
        self.misnamed: list[str] = []
        self._place = place.split("/") if place else []
        endpoint = (options.hf_endpoint or os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
        self.endpoint = endpoint
        content = CONTENT_HOSTS if endpoint == DEFAULT_ENDPOINT else ()
        self._web = WebClient(self.source, endpoint, options, (*options.allowed_hosts, *content))
        self._transfer = options.transfer
        self._last: OrderedDict[str, SourceVersion] = OrderedDict()
        """by name: what the last resolve gave; a commit that leaves an adapter's files alone makes no new version"""

    async def resolve(self, name: str) -> SourceVersion | None:
        """See RemoteSource; a HEAD for each file, the config's first."""
        if not is_adapter_name(name):
            return None
        for parts in self._folders(name):
            found = await self._note(parts, CONFIG_FILE, self._revision)
            if found is None:
                continue
            commit = found.version_id
            rest = [file for file in NOTED_FILES if file != CONFIG_FILE]
            files = [found, *await all_of(self._note(parts, file, commit) for file in rest)]
            noted = tuple(file for file in files if file is not None)
            return self._same(SourceVersion(self.source, name, "/".join(parts), noted))
        return None

    async def names(self) -> list[str] | None:
        """See RemoteSource. One repository's folders; a whole owner's, or the hub's, are not listed."""
        if len(self._place) < 2:
            return None
        repository, prefix = "/".join(self._place[:2]), "/".join(self._place[2:])
        url = f"{self.endpoint}/api/models/{repository}/revision/{quote(self._revision, safe='')}"
        listed = await self._web.json(url, self._headers(), _Listing)
        paths = [file.rfilename for file in listed.siblings] if listed is not None else []
        folders = {f"/{path}".removesuffix(f"/{CONFIG_FILE}")[1:] for path in paths if _is_config(path)}
        names = [self._place[-1] if folder == prefix else _below(folder, prefix) for folder in folders]
        self.misnamed = sorted(name for name in names if name and not is_adapter_name(name))
        return sorted({name for name in names if name and is_adapter_name(name)})

    async def fetch(self, version: SourceVersion, folder: Path, limits: Limits) -> dict[str, str]:
        """See RemoteSource."""
        parts = version.path.split("/")
        assert version.source == self.source and parts in self._folders(version.name), version
        try:
            return await self._transfer.fetch(version, folder, limits, partial(self._read, parts), _checksum)
        except FileChanged:  # the commit may be gone
            self._last.pop(version.name, None)
            raise

    async def close(self) -> None:
        await self._web.close()

    def _same(self, found: SourceVersion) -> SourceVersion:
        """The version that the last resolve of this name gave, when all its files are the same; else `found`."""
        last = self._last.pop(found.name, None)
        version = last if last is not None and _but_commit(last) == _but_commit(found) else found
        self._last[found.name] = version
        if len(self._last) > MAX_LAST:
            self._last.popitem(last=False)
        return version

    async def _note(self, parts: list[str], file: str, revision: str) -> FileVersion | None:
        """A file at a revision, with the commit as its version; None where there is none."""
        status, headers = await self._web.head(
            self._url(parts, file, revision), self._headers(), leaves=False, is_missing=_is_missing
        )
        if status in MISSING:
            return None
        commit = headers.get("x-repo-commit", "")
        size = size_of(headers.get("x-linked-size") or headers.get("content-length", ""))
        etag = (headers.get("x-linked-etag") or headers.get("etag", "")).removeprefix("W/").strip('"')
        if not _COMMIT.fullmatch(commit) or size is None or not etag:
            raise AdapterUnavailable(
                f"{self.source}: the endpoint does not say commit, size and hash of {file} as a hub does"
            )
        return FileVersion(file, size, 0, etag, commit)

    async def _read(self, parts: list[str], part: Part) -> None:
        url = self._url(parts, part.file.name, part.file.version_id)
        await self._web.read(part, url, self._headers(), same={"x-repo-commit": part.file.version_id})

    def _url(self, parts: list[str], file: str, revision: str) -> str:
        path = "/".join([*parts[2:], file])
        return f"{self.endpoint}/{parts[0]}/{parts[1]}/resolve/{quote(revision, safe='')}/{path}"

    def _folders(self, name: str) -> list[list[str]]:
        """Owner, repository and folder, in parts, of what `name` may be."""
        itself = [self._place] if len(self._place) > 1 and self._place[-1] == name else []
        return [parts for parts in (*itself, [*self._place, *name.split("/")]) if len(parts) > 1]

    def _headers(self) -> dict[str, str]:
        token = hub_token()
        return {"Authorization": f"Bearer {token}"} if token else {}


def hub_token() -> str | None:
    """The token in HF_TOKEN, or in the file that the hub's own tools keep it in.

    SourceUnavailable when that can't be a token.
    """
    token = (os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN") or _token_file()).strip()
    if not token.isascii():
        raise SourceUnavailable("the hub's token is not ASCII text: see HF_TOKEN, or the token file")
    return token or None


def _token_file() -> str:
    """What is in the token file; empty without one."""
    home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    try:
        path = Path(os.environ.get("HF_TOKEN_PATH") or f"{home}/token").expanduser()
        return path.read_text(encoding="utf-8", errors="replace")
    except (OSError, RuntimeError):  # RuntimeError: no home folder
        return ""


def _split_revision(place: str) -> tuple[str, str]:
    """OWNER/REPO[/FOLDER] and the revision of OWNER/REPO[@REVISION][/FOLDER], "main" when it has none."""
    parts = place.split("/") if place else []
    revision = "main"
    if len(parts) > 1 and "@" in parts[1]:
        parts[1], _, revision = parts[1].partition("@")
    if not all(_PART.fullmatch(part) for part in parts) or not _REVISION.fullmatch(revision):
        raise ValueError(f"{shown(f'hf://{place}')} is not hf://OWNER/REPO[@REVISION][/FOLDER]")
    return "/".join(parts), revision


def _is_missing(response: httpx.Response) -> bool:
    """Whether an answer says that there is no such file, revision or repository.

    A hub gives 401 for a repository that isn't there, so that nobody learns of private ones.
    """
    code = response.headers.get("x-error-code", "")
    return response.status_code in MISSING or code in ("EntryNotFound", "RevisionNotFound", "RepoNotFound")


def _checksum(file: FileVersion) -> Checksum | None:
    """An LFS file's ETag is the sha256 of its content, another's its git hash."""
    algorithm = _ALGORITHMS.get(len(file.etag)) if re.fullmatch(r"[0-9a-f]+", file.etag) else None
    return Checksum(algorithm, file.etag) if algorithm else None


def _but_commit(version: SourceVersion) -> tuple[object, ...]:
    """What makes the files of a version; the hashes are of their content."""
    return version.path, [(file.name, file.size, file.etag) for file in version.files]


def _is_config(path: str) -> bool:
    return path.rpartition("/")[2] == CONFIG_FILE


def _below(folder: str, prefix: str) -> str | None:
    """The path from `prefix` to `folder`, or None when it isn't below it."""
    if not prefix:
        return folder
    return folder.removeprefix(f"{prefix}/") if folder.startswith(f"{prefix}/") else None
