"""A run's figures as tables in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from loadtest.report import LATENCIES

_MAX_ADAPTERS = 12
_NAMES = {"ttft": "time to first token", "tpot": "time per token", "itl": "gap between tokens", "e2el": "end to end"}


def print_report(result: dict[str, Any], console: Console) -> None:
    """Counts, latencies, the most asked for adapters, and errors if there are any."""
    console.print(_counts(result))
    console.print(_latencies(result))
    if any(result["adapters"]) and len(result["adapters"]) > 1:
        console.print(_adapters(result))
    if result["error_counts"]:
        table = Table("errors", "number", title="errors (in no figure above)")
        for message, number in result["error_counts"].items():
            table.add_row(message, str(number), style="red")
        console.print(table)


def rows_table(title: str, rows: Mapping[str, Mapping[str, object]]) -> Table:
    """Rows by name, each its figures by column; a dash where a row lacks one."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    table = Table("", *columns, title=title)
    for name, row in rows.items():
        table.add_row(name, *(number(row.get(column)) for column in columns))
    return table


def number(value: object) -> str:
    """As a person reads it: four digits that matter, a dash where there is nothing."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def _counts(result: dict[str, Any]) -> Table:
    table = Table(title=result.get("label") or result["model_id"], show_header=False)
    rows = {
        "requests completed / failed": f"{result['completed']} / {result['failed']}",
        "duration, s": result["duration"],
        "input / output tokens": f"{result['total_input_tokens']} / {result['total_output_tokens']}",
        "requests/s": result["request_throughput"],
        "output tokens/s": result["output_throughput"],
        "most output tokens in a second": result["max_output_tokens_per_s"],
        "most requests at once": result["max_concurrent_requests"],
        "tokens an event": result["tokens_per_event"],
        "sent late, median / p99 / most, ms": " / ".join(
            number(result[key]) for key in ("median_send_lag_ms", "p99_send_lag_ms", "max_send_lag_ms")
        ),
    }
    if result["goals_ms"]:
        goals = ", ".join(f"{name} {limit:g} ms" for name, limit in result["goals_ms"].items())
        rows[f"goodput within {goals}, requests/s"] = result["request_goodput"]
        rows["share of requests within"] = result["slo_attainment"]
    if result["fairness"]["models"] > 1:
        fair = result["fairness"]
        rows["Jain's index of tokens served / of those asked for / of mean TTFT"] = " / ".join(
            number(fair[key]) for key in ("jain_served_tokens", "jain_served_share", "jain_mean_ttft")
        )
    for key in ("tokens_without_stamp", "answers_of_another_length"):
        if result[key]:
            rows[key.replace("_", " ")] = result[key]
    for label, value in rows.items():
        table.add_row(label, number(value))
    return table


def _latencies(result: dict[str, Any]) -> Table:
    statistics = ("mean", "p50", "p90", "p99")
    table = Table("ms", *statistics)
    for name in LATENCIES:
        table.add_row(_NAMES[name], *(number(result[f"{statistic}_{name}_ms"]) for statistic in statistics))
    return table


def _adapters(result: dict[str, Any]) -> Table:
    found = result["adapters"]
    table = Table("model", "requests", "completed", "tokens", "TTFT p50", "p90", "p99", title="by model")
    for name, figures in list(found.items())[:_MAX_ADAPTERS]:
        table.add_row(name or "(base)", *(number(value) for value in figures.values()))
    if len(found) > _MAX_ADAPTERS:
        table.caption = f"and {len(found) - _MAX_ADAPTERS} more"
    return table
