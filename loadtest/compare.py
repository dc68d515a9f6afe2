"""`multilora bench compare`: result files side by side, with ratios to the first label.

Files with one label are repeats: their median is shown. Files whose workloads differ are refused, since a ratio between
them would say nothing. Files of `vllm bench serve` are taken too, as far as what they say of their workload agrees.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from loadtest.outputs import check_writable
from loadtest.plot import draw_svg
from loadtest.table import number

Result = dict[str, Any]

_HIGHER_IS_BETTER = ("request_throughput", "request_goodput", "slo_attainment", "output_throughput")
_LATENCIES = tuple(f"{s}_{name}_ms" for name in ("ttft", "tpot", "itl", "e2el") for s in ("median", "p90", "p99"))
METRICS = ("completed", "failed", "duration", *_HIGHER_IS_BETTER, *_LATENCIES)
# What a file without our `workload` says of its own. `burstiness` is of gaps: it says nothing where there are none.
_VLLM_WORKLOAD = ("num_prompts", "request_rate", "burstiness", "max_concurrency", "total_input_tokens")


class _Workload(msgspec.Struct):
    seed: int


# What is read of a file, with its types: of ours, and of vLLM's, which has less.
_Fields = msgspec.defstruct(
    "_Fields",
    [
        *((metric, float | None, None) for metric in METRICS),
        ("label", str | None, None),
        ("workload", _Workload | msgspec.UnsetType, msgspec.UNSET),
        *((key, list[float], []) for key in ("start_times", "ttfts", "latencies")),
        ("itls", list[list[float]], []),
        ("errors", list[str | None], []),
    ],
)


class Incomparable(ValueError):
    """The files' workloads differ, or a file is no result."""


@dataclass(frozen=True)
class Side:
    """The results of one label."""

    label: str
    results: list[Result]

    def median(self, metric: str) -> float | None:
        """Of the repeats that have it."""
        values = [result[metric] for result in self.results if result.get(metric) is not None]
        return statistics.median(values) if values else None


def main(arguments: Sequence[str]) -> None:
    """Print the table; write the picture where asked to. Ends with status 2 for what can't be compared."""
    parser = argparse.ArgumentParser(prog="multilora bench compare", description=__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="result files; ratios are to the first one's label")
    parser.add_argument("--plot", type=Path, help="write a picture of the labels' first files here (SVG)")
    options = parser.parse_args(arguments)
    try:
        if options.plot:
            check_writable(options.plot)
        sides = group([(str(path), read_result(path)) for path in options.files])
        if options.plot:
            options.plot.write_text(draw_svg([(side.label, side.results[0]) for side in sides]))
    except ValueError as error:
        parser.exit(2, f"multilora bench compare: {error}\n")
    Console().print(comparison(sides))


def read_result(path: Path) -> Result:
    """Errors: Incomparable for what is no result file."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Incomparable(f"{path}: {error}") from None
    if not isinstance(result, dict) or "output_throughput" not in result:
        raise Incomparable(f"{path} is no result of a load test: it has no output_throughput")
    try:
        msgspec.convert(result, _Fields)
    except msgspec.ValidationError as error:
        raise Incomparable(f"{path} is a damaged result: {error}") from None
    return result


def group(files: Sequence[tuple[str, Result]]) -> list[Side]:
    """By label, in order of appearance. Errors: Incomparable, naming what differs between which files."""
    first_name, first = files[0]
    for name, result in files[1:]:
        differing = _differences(first, result)
        if differing:
            raise Incomparable(f"{first_name} and {name} are of different workloads: {'; '.join(differing)}")
    sides: dict[str, list[Result]] = {}
    for name, result in files:
        sides.setdefault(result.get("label") or Path(name).stem, []).append(result)
    (first_label, expected), *others = ((label, _seeds(results)) for label, results in sides.items())
    for label, found in others:
        if found and expected and found != expected:
            raise Incomparable(f"{first_label!r} has the seeds {expected} and {label!r} has {found}")
    return [Side(label, results) for label, results in sides.items()]


def comparison(sides: Sequence[Side]) -> Table:
    """Medians, and behind each further label its ratio to the first."""
    table = Table("", *(f"{side.label} ({len(side.results)})" for side in sides), title="medians; ratio to the first")
    for metric in METRICS:
        medians = [side.median(metric) for side in sides]
        if any(median is not None for median in medians):
            table.add_row(metric, number(medians[0]), *(_cell(median, medians[0]) for median in medians[1:]))
    return table


def _cell(value: float | None, first: float | None) -> str:
    if value is None or not first:
        return number(value)
    return f"{number(value)}  ×{value / first:.3g}"


def _differences(one: Result, other: Result) -> list[str]:
    """`field: this and that`, for all that differs but the seed."""
    if "workload" in one and "workload" in other:
        left, right = _described(one), _described(other)
        fields = [field for field in left | right if field != "seed"]
    else:
        left, right, fields = one, other, list(_VLLM_WORKLOAD)
        if one.get("request_rate") == "inf":
            fields.remove("burstiness")
    return [f"{key}: {left.get(key)!r} and {right.get(key)!r}" for key in fields if left.get(key) != right.get(key)]


def _described(result: Result) -> Result:
    """The workload, and what else decides the figures."""
    return {**result["workload"], "goals_ms": result.get("goals_ms"), "max_concurrency": result.get("max_concurrency")}


def _seeds(results: Sequence[Result]) -> list[int]:
    """Each seed once: a side may have more repeats of a seed than another. None where the files don't say."""
    return sorted({result["workload"]["seed"] for result in results if "workload" in result})
