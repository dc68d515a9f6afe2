"""HTTP requests by route, under the names and labels that vLLM's instrumentator gives them."""

from __future__ import annotations

from adapters_store.histogram import Histogram
from server.exposition import CounterSeries, Family, HistogramSeries

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_BUCKETS = (0.1, 0.5, 1, 5, 30)  # the instrumentator's first three, and two for long answers


class HttpMetrics:
    """Series are made at their first request; there are at most routes times methods times five classes of status."""

    def __init__(self) -> None:
        self.requests = Family("http_requests_total", "counter", "HTTP requests by method, status and handler.")
        self.durations = Family(
            "http_request_duration_seconds", "histogram", "From a request's arrival to its response's end."
        )
        self._requests: dict[tuple[str, str, str], CounterSeries] = {}
        self._durations: dict[tuple[str, str], Histogram] = {}

    def ended(self, method: str, handler: str, status: int, duration_s: float) -> None:
        """A request ended. `handler` is the route's template, never the path; "none" where no route fits."""
        method = method if method in _METHODS else "other"
        self._counter(handler, method, f"{status // 100}xx").add()
        self._histogram(handler, method).add(duration_s)

    def _counter(self, handler: str, method: str, status: str) -> CounterSeries:
        key = (handler, method, status)
        if key not in self._requests:
            labels = {"handler": handler, "method": method, "status": status}
            self._requests[key] = CounterSeries(self.requests.name, labels)
            self.requests.series.append(self._requests[key])
        return self._requests[key]

    def _histogram(self, handler: str, method: str) -> Histogram:
        key = (handler, method)
        if key not in self._durations:
            labels = {"handler": handler, "method": method}
            self._durations[key] = Histogram(_BUCKETS)
            series = HistogramSeries(self.durations.name, _BUCKETS, labels, self._durations[key])
            self.durations.series.append(series)
        return self._durations[key]
