"""One line of JSON for each HTTP request: who asked what of which adapter, how it ended. Never a prompt."""

from __future__ import annotations

import logging
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TextIO

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.api.errors import shown
from server.api.line_writer import LineWriter
from server.http_metrics import HttpMetrics

QUIET_PATHS = frozenset({"/health", "/metrics", "/ready", "/ping"})  # asked many times a second: told when they fail
PLAIN_SEND = "multilora.send"  # in the scope: the server's own send(), which no middleware has wrapped
NO_RESPONSE = 499  # the client had gone before anything was said

logger = logging.getLogger("multilora.access")


def write_to(stream: TextIO) -> None:
    """Send the lines, and nothing else, to `stream`: standard output, while other logs go to standard error."""
    stream.flush()
    logger.addHandler(LineWriter(stream.fileno()))
    logger.setLevel(logging.INFO)
    logger.propagate = False


@dataclass(slots=True, eq=False)
class AccessEntry:
    """What is known of one HTTP request. Filled in by the gate and the request's meters; counts are over choices."""

    request_id: str = ""
    arrival_s: float = field(default_factory=time.time)
    model: str | None = None  # the name that answers; of a refused request the one it named
    adapter: str | None = None  # None: the base
    image_key: str | None = None  # None: the base, or nothing came
    prompts: dict[int, tuple[int, int]] = field(default_factory=dict)  # tokens and cached ones; choices share a prompt
    output_tokens: int | None = None
    ttft_s: float | None = None
    finish_reasons: set[str] = field(default_factory=set)

    def named(self, model: str) -> None:
        """It asks for this model, as the client wrote it."""
        self.model = shown(model)

    def asked(self, model: str, *, is_adapter: bool) -> None:
        """It was understood: the engine will be asked."""
        self.model = model
        self.adapter = model if is_adapter else None

    def prompt(self, key: int, num_prompt: int, num_cached: int) -> None:
        """The tokens of one of its prompts; `key` is the same for all choices of that prompt."""
        self.prompts[key] = (num_prompt, num_cached)

    def started(self, image_key: str, ttft_s: float) -> None:
        """A choice's first output came."""
        self.image_key = image_key or None
        self.ttft_s = ttft_s if self.ttft_s is None else min(self.ttft_s, ttft_s)

    def ended(self, reason: str, num_output: int) -> None:
        """A choice ended."""
        self.output_tokens = num_output + (self.output_tokens or 0)
        self.finish_reasons.add(reason)

    def line(self, method: str, path: str, status: int) -> bytes:
        """The line of JSON, without its end."""
        return msgspec.json.encode(
            {
                "time": round(self.arrival_s, 3),
                "id": self.request_id,
                "method": method,
                "route": shown(path),
                "status": status,
                "model": self.model,
                "adapter": self.adapter,
                "image_key": self.image_key,
                "prompt_tokens": sum(count for count, _ in self.prompts.values()) if self.prompts else None,
                "cached_tokens": sum(cached for _, cached in self.prompts.values()) if self.prompts else None,
                "output_tokens": self.output_tokens,
                "ttft_s": None if self.ttft_s is None else round(self.ttft_s, 6),
                "total_s": round(time.time() - self.arrival_s, 6),
                "finish_reason": ",".join(sorted(self.finish_reasons)) or None,
            }
        )


_current: ContextVar[AccessEntry | None] = ContextVar("access_entry", default=None)


def current_entry() -> AccessEntry:
    """The entry of the HTTP request being answered; one that is thrown away outside of any."""
    return _current.get() or AccessEntry()


class AccessLog:
    """ASGI middleware, the outermost: makes the request's entry, and when the response has ended writes its line
    and counts it. `handlers`: the templates of the app's routes.
    """

    def __init__(self, app: ASGIApp, http: HttpMetrics, handlers: frozenset[str], *, is_enabled: bool) -> None:
        self._app = app
        self._http = http
        self._handlers = handlers
        self._is_enabled = is_enabled

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        entry = AccessEntry()
        token = _current.set(entry)
        scope[PLAIN_SEND] = send
        status = NO_RESPONSE

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        except Exception:
            status = 500
            raise
        finally:
            _current.reset(token)
            if not (scope["path"] in QUIET_PATHS and status == 200):
                self._ended(scope, status, entry)

    def _ended(self, scope: Scope, status: int, entry: AccessEntry) -> None:
        self._http.ended(scope["method"], self._handler(scope), status, time.time() - entry.arrival_s)
        if self._is_enabled:
            logger.info("%s", entry.line(scope["method"], scope["path"], status).decode())

    def _handler(self, scope: Scope) -> str:
        """The template of the route that answered, or would have if the gate had let the request in."""
        template = getattr(scope.get("route"), "path_format", scope["path"])
        return template if template in self._handlers else "none"
