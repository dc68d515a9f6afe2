"""uvicorn's HTTP protocol, except that a connection carries one request at a time."""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


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

    def on_body(self, body: bytes) -> None:
        if not self._is_last:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._is_last:
            super().on_message_complete()

    def data_received(self, data: bytes) -> None:
        if not self._is_last:
            super().data_received(data)
