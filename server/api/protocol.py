"""uvicorn's HTTP protocol, except that a connection carries one request at a time, and that a response's stream can
be written without waiting."""

from __future__ import annotations

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

_LINE = "multilora.line"  # in the scope


class Line:
    """The connection under one response, once its head has been sent as chunked."""

    __slots__ = ("_cycle",)

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    def is_free(self) -> bool:
        """Whether what is written now leaves, or waits only for a client that is not behind."""
        cycle = self._cycle
        return bool(cycle.chunked_encoding) and not (
            cycle.flow.write_paused or cycle.disconnected or cycle.response_complete
        )

    def write(self, body: bytes) -> None:
        """Send some of the body; not empty, and only while `is_free`. send() ends the response."""
        self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(body), body))


def line_of(scope: Scope) -> Line | None:
    """The line under the response to this request; None under another protocol."""
    line = scope.get(_LINE)
    return line if isinstance(line, Line) else None


class OneAtATimeProtocol(HttpToolsProtocol):
    """Answers the first of pipelined requests, then closes: a client has to send the others again (RFC 9112, 9.3.2).

    uvicorn would queue them and read no further, so that a client which leaves is noticed only after its
    running request has ended by itself.
    """

    _is_last = False  # what else arrives on this connection is not read

    def on_headers_complete(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._is_last = True
            self.cycle.keep_alive = False
        if not self._is_last:
            super().on_headers_complete()
            self.scope[_LINE] = Line(self.cycle)  # type: ignore[literal-required]

    def on_body(self, body: bytes) -> None:
        if not self._is_last:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._is_last:
            super().on_message_complete()

    def data_received(self, data: bytes) -> None:
        if not self._is_last:
            super().data_received(data)
