"""uvicorn's HTTP protocol, except that a connection carries one request at a time, and that a response's stream can
be written without waiting."""

from __future__ import annotations

from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.api.errors import body_of, error_type

MAX_HEAD_BYTES = 64 << 10  # of a request line with its headers; of a body's trailers too
LINGER_S = 1.0  # how long what comes after a refused head is thrown away, before the connection is closed

_LINE = "multilora.line"  # in the scope
_TOO_LARGE_BODY = body_of(
    f"The request line and headers are larger than {MAX_HEAD_BYTES} bytes",
    error_type(431),
    None,
    "headers_too_large",
)
_TOO_LARGE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: application/json\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%b" % (len(_TOO_LARGE_BODY), _TOO_LARGE_BODY)
)


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

    Heads are bounded too, which uvicorn leaves to a proxy: above MAX_HEAD_BYTES the answer is 431.
    """

    _is_last = False  # what else arrives on this connection is not read
    _num_unread = 0  # bytes since the parser last said anything: of a head, a chunk's own, or trailers

    def on_headers_complete(self) -> None:
        self._num_unread = 0
        if self.cycle is not None and not self.cycle.response_complete:
            self._is_last = True
            self.cycle.keep_alive = False
        if not self._is_last:
            super().on_headers_complete()
            self.scope[_LINE] = Line(self.cycle)  # type: ignore[literal-required]

    def on_body(self, body: bytes) -> None:
        self._num_unread = 0
        if not self._is_last:
            super().on_body(body)

    def on_message_complete(self) -> None:
        self._num_unread = 0
        if not self._is_last:
            super().on_message_complete()

    def data_received(self, data: bytes) -> None:
        # In pieces: so the parser, which keeps what it has not told of, never has more than the bound.
        while data and not self._is_last and not self.transport.is_closing():
            room = MAX_HEAD_BYTES - self._num_unread
            piece, data = data[:room], data[room:]
            self._num_unread += len(piece)
            super().data_received(piece)
            if self._num_unread >= MAX_HEAD_BYTES and not self.transport.is_closing():
                self._refuse_head()

    def _refuse_head(self) -> None:
        """The request line and headers, or a body's trailers, are too large."""
        self._is_last = True
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(_TOO_LARGE)
            if self.transport.can_write_eof():
                self.transport.write_eof()
            # Closed with something unread, the connection would be reset and the client might not see the answer.
            self.loop.call_later(LINGER_S, self.transport.close)
        elif self.cycle.more_body:
            self.transport.close()
        else:
            self.cycle.keep_alive = False  # it came after a request whose answer goes on
