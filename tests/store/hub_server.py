"""A hub's repository layout on the test web server: commits, redirects to a content host, tokens, error codes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field

from tests.store.web_server import Answer, Request, WebServer, file_answer

LFS_BYTES = 1024
"""files from this size on are LFS files"""


@dataclass
class Hub:
    """Repositories on `server`; LFS files' content is on `content`, another server."""

    server: WebServer
    content: WebServer
    private: dict[str, str] = field(default_factory=dict)
    """the token of each repository that needs one"""

    def commit(self, repository: str, files: dict[str, bytes], *revisions: str) -> str:
        """A commit with these files, which `revisions` point to from now on; its id."""
        described = json.dumps([repository, {name: hashlib.sha1(data).hexdigest() for name, data in files.items()}])
        commit = hashlib.sha1(described.encode()).hexdigest()
        for revision in (commit, *revisions):
            place = f"/{repository}/resolve/{revision}"
            for path in [path for path in self.server.special if path.startswith(f"{place}/")]:
                del self.server.special[path]
            for name, data in files.items():
                self.server.special[f"{place}/{name}"] = self._answering(repository, commit, data)
            listing = json.dumps({"sha": commit, "siblings": [{"rfilename": name} for name in files]}).encode()
            self.server.special[f"/api/models/{repository}/revision/{revision}"] = lambda _, body=listing: (
                200,
                {},
                body,
            )
        return commit

    def _answering(self, repository: str, commit: str, data: bytes):
        def answer(request: Request) -> Answer:
            token = self.private.get(repository)
            if token and request.headers.get("authorization") != f"Bearer {token}":
                return 401, {"X-Error-Code": "RepoNotFound"}, b""
            if len(data) < LFS_BYTES:
                blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
                status, headers, body = file_answer(request, data)
                return status, {**headers, "ETag": f'"{blob}"', "X-Repo-Commit": commit}, body
            digest = hashlib.sha256(data).hexdigest()
            self.content.files.setdefault(f"/lfs/{digest}?signed", data)
            headers = {
                "Location": f"{self.content.url}/lfs/{digest}?signed",
                "X-Repo-Commit": commit,
                "X-Linked-ETag": f'"{digest}"',
                "X-Linked-Size": str(len(data)),
            }
            return 302, headers, b"Found"

        return answer
