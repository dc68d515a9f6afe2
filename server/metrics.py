"""The requests' metrics, under the vllm:* names that dashboards read. The engine's and the tiers': engine_metrics.

Labels are the base and the engine, never an adapter: names that clients choose must not make series.
"""

from __future__ import annotations

from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest

from server.engine_metrics import ENGINE, LABELS, EngineCollector, EngineFacts

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
FINISH_REASONS = ("stop", "length", "abort", "error")

_TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_GAP_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5, 10)
_TIME_BUCKETS = (0.05, 0.1, 0.3, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 480)
_TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000)

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series per instrument that nothing reads


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestEnd:
    """What is known of a request that had output, at its end."""

    num_prompt: int
    num_output: int
    max_tokens: int
    queue_s: float  # from its arrival in the engine to its first rows: in line, and waiting for the adapter
    prefill_s: float  # from its first rows to its first token
    decode_s: float  # from its first token to its last


class Metrics:
    """The instruments of one server. `registry` is the server's own; two servers never share one."""

    def __init__(self, registry: CollectorRegistry, model_name: str, facts: EngineFacts) -> None:
        self._registry = registry
        self._labels = (model_name, ENGINE)
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of requests that started.")
        self._generation_tokens = self._counter("generation_tokens", "Tokens generated.")
        self._ttft = self._histogram("time_to_first_token_seconds", "From arrival to the first token.", _TTFT_BUCKETS)
        self._gap = self._histogram("inter_token_latency_seconds", "Between two tokens of a request.", _GAP_BUCKETS)
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
        ends = Counter(
            "vllm:request_success", "Requests that ended, by reason.", (*LABELS, "finished_reason"), registry=registry
        )
        self._ends = {reason: ends.labels(*self._labels, reason) for reason in FINISH_REASONS}
        registry.register(EngineCollector(self._labels, facts))

    def first_token(self, num_prompt_tokens: int, ttft_s: float) -> None:
        """A request's first output came."""
        self._prompt_tokens.inc(num_prompt_tokens)
        self._ttft.observe(ttft_s)

    def tokens(self, count: int, gap_s: float | None) -> None:
        """An output of `count` tokens came `gap_s` after the one before it (None: it is the first).

        Several tokens are what came while the reader was busy; each gets its share of the gap.
        """
        self._generation_tokens.inc(count)
        if gap_s is not None:
            for _ in range(count):
                self._gap.observe(gap_s / count)

    def request_end(self, reason: str, latency_s: float, end: RequestEnd | None) -> None:
        """A request that the engine had ended: one of FINISH_REASONS. `end` is None when it had no output."""
        self._ends[reason].inc()
        self._latency.observe(latency_s)
        if end is None:
            return
        self._queue.observe(end.queue_s)
        self._prefill.observe(end.prefill_s)
        self._decode.observe(end.decode_s)
        self._inference.observe(end.prefill_s + end.decode_s)
        self._num_prompt.observe(end.num_prompt)
        self._num_output.observe(end.num_output)
        self._max_tokens.observe(end.max_tokens)
        if end.num_output > 1:
            self._per_token.observe(end.decode_s / (end.num_output - 1))

    def exposition(self) -> bytes:
        """What GET /metrics answers."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"vllm:{name}", text, LABELS, registry=self._registry).labels(*self._labels)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        family = Histogram(f"vllm:{name}", text, LABELS, buckets=buckets, registry=self._registry)
        return family.labels(*self._labels)
