"""Figures of a run, under the keys that `vllm bench serve` writes, and ours.

TTFT, TPOT, inter-token and end-to-end latencies are of completed requests; what failed is counted, by status and
message, and averaged into nothing. Open-loop latencies count from the time at which a request was due.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np

from loadtest.arrivals import Arrivals
from loadtest.client import Run
from loadtest.outcome import Outcome
from loadtest.workload import Request, WorkloadSpec

PERCENTILES = (50, 90, 95, 99)
LATENCIES = ("ttft", "tpot", "itl", "e2el")
GOALS = ("ttft", "tpot", "e2el")
_MAX_KINDS_OF_ERRORS = 20

Figures = dict[str, object]


def parse_goals(texts: Sequence[str]) -> dict[str, float]:
    """`ttft:500 tpot:50` as milliseconds by metric. Errors: ValueError."""
    goals: dict[str, float] = {}
    for text in texts:
        name, _, value = text.partition(":")
        if name in goals:
            raise ValueError(f"goal {text!r}: {name} has a limit already")
        try:
            goals[name] = float(value)
        except ValueError:
            goals[name] = math.nan
        if name not in GOALS or not 0 < goals[name] < math.inf:
            raise ValueError(f"goal {text!r}: one of {', '.join(GOALS)}, a colon and milliseconds above 0")
    return goals


def make_report(
    run: Run,
    requests: Sequence[Request],
    spec: WorkloadSpec,
    arrivals: Arrivals,
    adapters: Sequence[str],
    goals: Mapping[str, float],
    about: Mapping[str, Any],
) -> Figures:
    """All figures of a run. `about`: backend, model_id, label and whatever else is to be written."""
    completed = [outcome for outcome in run.outcomes if not outcome.error]
    outputs = sum(outcome.output_tokens for outcome in completed)
    inputs = sum(_prompt_tokens(outcome, requests) for outcome in completed)
    per_second = 1 / run.duration_s if run.duration_s > 0 else 0.0
    num_good = sum(_is_good(outcome, goals) for outcome in completed)
    return {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        **about,
        "num_prompts": len(run.outcomes),
        "request_rate": arrivals.rate if arrivals.is_open and math.isfinite(arrivals.rate) else "inf",
        "burstiness": arrivals.burstiness if math.isfinite(arrivals.burstiness) else "inf",
        "max_concurrency": arrivals.bounded(about.get("max_concurrency")),
        "duration": run.duration_s,
        "completed": len(completed),
        "failed": len(run.outcomes) - len(completed),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(completed) * per_second,
        "request_goodput": num_good * per_second if goals else None,
        "output_throughput": outputs * per_second,
        "total_token_throughput": (inputs + outputs) * per_second,
        "rtfx": 0.0,  # vLLM's: seconds of audio a second
        **_peaks(completed),
        **_latencies(completed),
        "workload": spec.as_json(),
        "goals_ms": dict(goals),
        "slo_attainment": num_good / len(run.outcomes) if goals else None,
        "error_counts": count_errors(run.outcomes),
        "adapters": per_adapter(run.outcomes, adapters),
        "fairness": fairness(run.outcomes),
        **_send_lag(run.outcomes),
        **_how_counted(completed, spec),
        **_details(run, requests),
    }


def percentiles(name: str, seconds: Sequence[float]) -> Figures:
    """mean, median, std and percentiles in ms, under vLLM's names; null where there is nothing to measure."""
    values = np.asarray(seconds, dtype=np.float64) * 1e3
    keys = [f"{statistic}_{name}_ms" for statistic in ("mean", "median", "std", *(f"p{p}" for p in PERCENTILES))]
    if not len(values):
        return dict.fromkeys(keys)
    figures = [values.mean(), np.median(values), values.std(), *np.percentile(values, PERCENTILES)]
    return {key: float(figure) for key, figure in zip(keys, figures, strict=True)}


def jain(values: Sequence[float]) -> float | None:
    """Jain's index: (sum x)^2 / (n sum x^2). 1: all alike; 1/n: one has everything."""
    squares = sum(value * value for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else None


def fairness(outcomes: Sequence[Outcome]) -> Figures:
    """Jain's index over the models that were asked for (the base is one)."""
    served: dict[int | None, int] = {}
    asked: dict[int | None, int] = {}
    ttfts: dict[int | None, list[float]] = {}
    for outcome in outcomes:
        asked[outcome.adapter] = asked.get(outcome.adapter, 0) + outcome.max_tokens
        served.setdefault(outcome.adapter, 0)
        if not outcome.error:
            served[outcome.adapter] += outcome.output_tokens
            ttfts.setdefault(outcome.adapter, []).extend([outcome.ttft_s] if outcome.ttft_s is not None else [])
    return {
        "models": len(asked),
        "jain_served_tokens": jain(list(served.values())),
        "jain_served_share": jain([served[model] / asked[model] for model in asked]),
        "jain_mean_ttft": jain([float(np.mean(values)) for values in ttfts.values() if values]),
    }


def per_adapter(outcomes: Sequence[Outcome], adapters: Sequence[str]) -> dict[str, Figures]:
    """By name, most requests first; the base is under ""."""
    groups: dict[int | None, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.adapter, []).append(outcome)
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), -1 if item[0] is None else item[0]))
    return {"" if index is None else adapters[index]: _of_adapter(group) for index, group in ordered}


def count_errors(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """By status and message, numbers left out of messages; the rarest beyond a bound together."""
    counts = Counter(
        f"{outcome.status or '-'} {re.sub(r'[0-9]+', '#', outcome.error)}" for outcome in outcomes if outcome.error
    )
    kept = dict(counts.most_common(_MAX_KINDS_OF_ERRORS))
    others = counts.total() - sum(kept.values())
    return kept | ({"others": others} if others else {})


def _of_adapter(group: Sequence[Outcome]) -> Figures:
    completed = [outcome for outcome in group if not outcome.error]
    ttft = percentiles("ttft", [outcome.ttft_s for outcome in completed if outcome.ttft_s is not None])
    return {
        "requests": len(group),
        "completed": len(completed),
        "output_tokens": sum(outcome.output_tokens for outcome in completed),
        **{key: ttft[key] for key in ("median_ttft_ms", "p90_ttft_ms", "p99_ttft_ms")},
    }


def _latencies(completed: Sequence[Outcome]) -> Figures:
    seconds: dict[str, list[float]] = {
        "ttft": [outcome.ttft_s for outcome in completed if outcome.ttft_s is not None],
        "tpot": [outcome.tpot_s for outcome in completed if outcome.tpot_s is not None],
        "itl": [gap for outcome in completed for gap in outcome.itls_s],
        "e2el": [outcome.e2el_s for outcome in completed],
    }
    return {key: value for name in LATENCIES for key, value in percentiles(name, seconds[name]).items()}


def _is_good(outcome: Outcome, goals: Mapping[str, float]) -> bool:
    """Within every goal. An answer of one token has no TPOT and keeps any goal for it, as in vLLM."""
    measured = {"ttft": outcome.ttft_s, "tpot": outcome.tpot_s or 0.0, "e2el": outcome.e2el_s}
    return all((value := measured[name]) is not None and value * 1e3 <= goal for name, goal in goals.items())


def _peaks(completed: Sequence[Outcome]) -> Figures:
    """Most tokens in one second of the run, and most requests at once."""
    if not completed:
        return {"max_output_tokens_per_s": 0.0, "max_concurrent_requests": 0}
    first = min(outcome.begun for outcome in completed)
    stamps = np.array([stamp - first for outcome in completed for stamp in outcome.stamps])
    changes = sorted([(o.begun, 1) for o in completed] + [(o.ended, -1) for o in completed])
    return {
        "max_output_tokens_per_s": float(np.bincount(stamps.astype(int)).max()) if len(stamps) else 0.0,
        "max_concurrent_requests": int(np.cumsum([change for _, change in changes]).max()),
    }


def _send_lag(outcomes: Sequence[Outcome]) -> Figures:
    """How late the generator was: from when a request was due to when it began to connect, and then connecting."""
    lags = percentiles("send_lag", [outcome.begun - outcome.due for outcome in outcomes])
    worst = max(outcome.begun - outcome.due for outcome in outcomes)
    connects = percentiles("connect", [outcome.connect_s for outcome in outcomes])
    kept = {key: value for key, value in (lags | connects).items() if key.startswith(("median", "p99"))}
    return {**kept, "max_send_lag_ms": worst * 1e3}


def _how_counted(completed: Sequence[Outcome], spec: WorkloadSpec) -> Figures:
    """What the stamps rest on, and answers that are not as long as asked although the end of text was to be ignored."""
    num_events = sum(outcome.num_events for outcome in completed)
    num_stamps = sum(len(outcome.stamps) for outcome in completed)
    return {
        "tokens_per_event": num_stamps / num_events if num_events else None,
        "tokens_without_stamp": sum(max(0, o.output_tokens - len(o.stamps)) for o in completed),
        "answers_of_another_length": sum(spec.ignore_eos and o.output_tokens != o.max_tokens for o in completed),
    }


def _details(run: Run, requests: Sequence[Request]) -> Figures:
    """By request, in order, in vLLM's form; seconds. What failed has 0 and an error."""
    outcomes = run.outcomes
    return {
        "input_lens": [_prompt_tokens(outcome, requests) for outcome in outcomes],
        "output_lens": [0 if outcome.error else outcome.output_tokens for outcome in outcomes],
        "ttfts": [0.0 if outcome.error else outcome.ttft_s or 0.0 for outcome in outcomes],
        "itls": [[] if outcome.error else [round(gap, 7) for gap in outcome.itls_s] for outcome in outcomes],
        "latencies": [0.0 if outcome.error else outcome.e2el_s for outcome in outcomes],
        "start_times": [outcome.due - run.started for outcome in outcomes],
        "queue_times": [outcome.begun - outcome.due for outcome in outcomes],
        "generated_texts": [outcome.text for outcome in outcomes],
        "errors": [outcome.error for outcome in outcomes],
    }


def _prompt_tokens(outcome: Outcome, requests: Sequence[Request]) -> int:
    asked = requests[outcome.index].prompt_tokens
    return asked if outcome.prompt_tokens is None else outcome.prompt_tokens
