"""The requests' metrics, under the vllm:* names that dashboards read. The engine's and the tiers': engine_metrics.

Labels are the base and the engine; an adapter's name only where the series are bounded (adapter_metrics).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector, generate_latest

from adapters_store.histogram import Histogram
from server.adapter_metrics import AdapterMetrics
from server.engine_metrics import ENGINE, EngineFacts, EngineMetrics
from server.exposition import CounterSeries, Family, HistogramSeries
from server.http_metrics import HttpMetrics

FINISH_REASONS = ("stop", "length", "abort", "error")

_TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_GAP_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5, 10)
_TIME_BUCKETS = (0.05, 0.1, 0.3, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 480)
_TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000)
_CHOICE_BUCKETS = (1, 2, 5, 10, 20)


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestEnd:
    """What is known of a request that had output, at its end."""

    num_prompt: int
    num_output: int
    max_tokens: int
    queue_s: float  # from its arrival in the engine to its first rows: in line, and waiting for the adapter
    prefill_s: float  # from its first rows to its first token
    decode_s: float  # from its first token to its last


@dataclass(slots=True, eq=False)
class Siblings:
    """The choices of one prompt, which are requests of their own; for what is counted once for all of them."""

    num_open: int  # choices that have not ended
    num_choices: int = field(init=False)
    max_output: int = 0  # tokens of the longest that has ended

    def __post_init__(self) -> None:
        self.num_choices = self.num_open


class Metrics:
    """The instruments of one server; two servers never share one."""

    def __init__(self, model_name: str, facts: EngineFacts, adapter_top: int = 50) -> None:
        """`adapter_top`: how many adapters have series of their own."""
        self.http = HttpMetrics()
        self._labels = {"model_name": model_name, "engine": ENGINE}
        self.adapters = AdapterMetrics(adapter_top, self._labels)
        self._families: list[Family] = [self.http.requests, self.http.durations]
        self._further: list[Callable[[], Iterable[str]]] = []
        self._engine = EngineMetrics(self._labels, facts)
        self._process = CollectorRegistry()  # process_* and python_* of the API process, by their own makers
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._process)
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that started.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._ttft = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", _TTFT_BUCKETS)
        self._gap = self._histogram("inter_token_latency_seconds", "Between two tokens of a request.", _GAP_BUCKETS)
        self._histogram(
            "time_per_output_token_seconds",
            "The old name of vllm:inter_token_latency_seconds.",
            _GAP_BUCKETS,
            self._gap,
        )
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds",
            "Decode time by tokens but the first.",
            _GAP_BUCKETS,
        )
        self._latency = self._histogram("e2e_request_latency_seconds", "From arrival to end.", _TIME_BUCKETS)
        self._queue = self._histogram(
            "request_queue_time_seconds",
            "From arrival to the first rows, the adapter included.",
            _TIME_BUCKETS,
        )
        self._prefill = self._histogram(
            "request_prefill_time_seconds", "From the first rows to the first token.", _TIME_BUCKETS
        )
        self._decode = self._histogram(
            "request_decode_time_seconds", "From the first token to the last.", _TIME_BUCKETS
        )
        self._inference = self._histogram(
            "request_inference_time_seconds", "From the first rows to the last token.", _TIME_BUCKETS
        )
        self._num_prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKEN_BUCKETS)
        self._num_output = self._histogram("request_generation_tokens", "Tokens of an answer.", _TOKEN_BUCKETS)
        self._max_tokens = self._histogram(
            "request_params_max_tokens", "The most tokens that a request may generate.", _TOKEN_BUCKETS
        )
        self._num_choices = self._histogram("request_params_n", "Choices asked for of a prompt.", _CHOICE_BUCKETS)
        self._max_output = self._histogram(
            "request_max_num_generation_tokens", "Tokens of the longest of a prompt's choices.", _TOKEN_BUCKETS
        )
        self._ends = self._reasons("request_success", "Requests that ended, by reason.")

    def first_token(self, num_prompt_tokens: int, ttft_s: float) -> None:
        """A request's first output came."""
        self._prompt_tokens.add(num_prompt_tokens)
        self._ttft.add(ttft_s)

    def tokens(self, count: int, gap_s: float | None) -> None:
        """An output of `count` tokens came `gap_s` after the one before it (None: it is the first).

        Several tokens are what came while the reader was busy; each gets its share of the gap.
        """
        self._generation_tokens.value += count
        if gap_s is not None and count:
            self._gap.add(gap_s / count, count)

    def request_end(self, reason: str, latency_s: float, end: RequestEnd | None) -> None:
        """A request that the engine had ended: one of FINISH_REASONS. `end` is None when it had no output."""
        self._ends[reason].add()
        self._latency.add(latency_s)
        if end is None:
            return
        self._queue.add(end.queue_s)
        self._prefill.add(end.prefill_s)
        self._decode.add(end.decode_s)
        self._inference.add(end.prefill_s + end.decode_s)
        self._num_prompt.add(end.num_prompt)
        self._num_output.add(end.num_output)
        self._max_tokens.add(end.max_tokens)
        if end.num_output > 1:
            self._per_token.add(end.decode_s / (end.num_output - 1))

    def choice_end(self, siblings: Siblings, num_output: int) -> None:
        """One of a prompt's choices ended; the last one counts for the prompt."""
        siblings.num_open -= 1
        siblings.max_output = max(siblings.max_output, num_output)
        if not siblings.num_open:
            self._num_choices.add(siblings.num_choices)
            self._max_output.add(siblings.max_output)

    def add_lines(self, lines: Callable[[], Iterable[str]]) -> None:
        """Further families, as they are at each scrape."""
        self._further.append(lines)

    def exposition(self) -> bytes:
        """What GET /metrics answers."""
        parts = [part for family in self._families for part in family.text()]
        parts += [line for lines in self._further for line in lines()]
        return "".join([*parts, *self.adapters.text(), *self._engine.text()]).encode() + generate_latest(self._process)

    def _family(self, name: str, kind: str, text: str) -> Family:
        family = Family(f"vllm:{name}", kind, text)
        self._families.append(family)
        return family

    def _counter(self, name: str, text: str) -> CounterSeries:
        family = self._family(f"{name}_total", "counter", text)
        series = CounterSeries(family.name, self._labels)
        family.series.append(series)
        return series

    def _reasons(self, name: str, text: str) -> dict[str, CounterSeries]:
        family = self._family(f"{name}_total", "counter", text)
        series = {
            reason: CounterSeries(family.name, {**self._labels, "finished_reason": reason}) for reason in FINISH_REASONS
        }
        family.series.extend(series.values())
        return series

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], values: Histogram | None = None
    ) -> Histogram:
        """A new histogram, or another name for the one that has `values`."""
        family = self._family(name, "histogram", text)
        values = values or Histogram(buckets)
        family.series.append(HistogramSeries(family.name, buckets, self._labels, values))
        return values
