"""Result files as one picture, written as SVG by hand: no plotting library is needed.

Four panels: how times to the first token are spread, gaps between tokens, end to end, and tokens a second over time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import numpy.typing as npt

Result = Mapping[str, Any]
Points = npt.NDArray[np.float64]  # [points, 2]

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8c6d1f", "#56b4e9", "#555555")  # told apart by everyone
_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 440, 270, 56, 42, 34, 16  # of a panel, and its margins
_MAX_POINTS = 400
_DETAILS = ("start_times", "ttfts", "itls", "errors")


@dataclass(frozen=True)
class _Panel:
    title: str
    unit: str
    lines: list[Points]
    is_share: bool  # the upright axis goes from 0 to 1


def draw_svg(results: Sequence[tuple[str, Result]]) -> str:
    """One line a (label, result) in every panel. Errors: ValueError where a result has no details by request."""
    for label, result in results:
        missing = [key for key in _DETAILS if key not in result]
        if missing:
            raise ValueError(f"{label!r} was saved without details by request ({', '.join(missing)}): nothing to draw")
    panels = [
        _Panel("time to first token", "ms", [_spread(_completed(r, "ttfts")) for _, r in results], True),
        _Panel("gap between tokens", "ms", [_spread(_gaps(r)) for _, r in results], True),
        _Panel("end to end", "ms", [_spread(_latencies(r)) for _, r in results], True),
        _Panel("output tokens a second", "s", [_rate(r) for _, r in results], False),
    ]
    legend = 22 * len(results) + 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * _WIDTH}" height="{2 * _HEIGHT + legend}" '
        'font-family="sans-serif" font-size="11" fill="#333">',
        '<rect width="100%" height="100%" fill="#fff"/>',
    ]
    for number, panel in enumerate(panels):
        at = f"translate({_WIDTH * (number % 2)},{_HEIGHT * (number // 2)})"
        parts += [f'<g transform="{at}">', *_draw_panel(panel), "</g>"]
    for number, (label, _) in enumerate(results):
        y = 2 * _HEIGHT + 16 + 22 * number
        parts.append(f'<rect x="{_LEFT}" y="{y - 5}" width="18" height="3" fill="{_colour(number)}"/>')
        parts.append(f'<text x="{_LEFT + 26}" y="{y}">{escape(label)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def nice_ticks(high: float, most: int = 6) -> list[float]:
    """Round values from 0 to at least `high`, steps of 1, 2 or 5 times a power of ten."""
    if not high > 0:
        return [0.0, 1.0]
    step = 10.0 ** math.floor(math.log10(high / most))
    step *= next(factor for factor in (1, 2, 5, 10) if high / (step * factor) <= most)
    return [step * number for number in range(math.ceil(high / step - 1e-9) + 1)]


def _completed(result: Result, key: str) -> list[float]:
    return [value for value, error in zip(result[key], result["errors"], strict=True) if not error]


def _latencies(result: Result) -> list[float]:
    """End to end; of a file that doesn't have them (vLLM's) to the last token, as they count."""
    if "latencies" in result:
        return _completed(result, "latencies")
    ends = [ttft + sum(gaps) for ttft, gaps in zip(result["ttfts"], result["itls"], strict=True)]
    return _completed({**result, "ends": ends}, "ends")


def _gaps(result: Result) -> list[float]:
    return [gap for gaps in result["itls"] for gap in gaps]


def _spread(seconds: Sequence[float]) -> Points:
    """(ms, share of values that are at most this)."""
    values = np.sort(np.asarray(seconds, dtype=np.float64)) * 1e3
    shares = np.arange(1, len(values) + 1) / max(1, len(values))
    kept = np.unique(np.linspace(0, len(values) - 1, min(len(values), _MAX_POINTS)).astype(int))
    rise = np.stack([values[kept], shares[kept]], axis=1)
    return np.concatenate([[[values[0], 0.0]], rise]) if len(values) else rise


def _rate(result: Result) -> Points:
    """(s from the first request, output tokens in the second that ends there)."""
    first = min(_completed(result, "start_times"), default=0.0)  # vLLM's are by a clock with any zero
    stamps = [
        start - first + float(since)
        for start, ttft, gaps, error in zip(
            result["start_times"], result["ttfts"], result["itls"], result["errors"], strict=True
        )
        if not error
        for since in np.cumsum([ttft, *gaps])
    ]
    counts = np.bincount(np.asarray(stamps).astype(int)) if stamps else np.zeros(0)
    return np.stack([np.arange(1, len(counts) + 1), counts], axis=1).astype(np.float64)


def _draw_panel(panel: _Panel) -> Iterator[str]:
    lines = [line for line in panel.lines if len(line)]
    across = nice_ticks(max((float(line[:, 0].max()) for line in lines), default=1.0))
    upright = [0.0, 0.25, 0.5, 0.75, 1.0]
    if not panel.is_share:
        upright = nice_ticks(max((float(line[:, 1].max()) for line in lines), default=1.0))
    inner_width, inner_height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x(value: float) -> float:
        return round(_LEFT + inner_width * value / across[-1], 1)

    def y(value: float) -> float:
        return round(_TOP + inner_height * (1 - value / upright[-1]), 1)

    yield f'<text x="{_LEFT}" y="20" font-size="13" font-weight="bold">{escape(panel.title)}</text>'
    for value in upright:
        yield f'<path d="M{_LEFT} {y(value)}H{_WIDTH - _RIGHT}" stroke="#e4e4e4"/>'
        yield f'<text x="{_LEFT - 6}" y="{y(value) + 4}" text-anchor="end">{value:g}</text>'
    for value in across:
        yield f'<path d="M{x(value)} {y(0)}v4" stroke="#999"/>'
        yield f'<text x="{x(value)}" y="{y(0) + 17}" text-anchor="middle">{value:g}</text>'
    yield f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 8}" text-anchor="end">{escape(panel.unit)}</text>'
    for number, line in enumerate(panel.lines):
        if len(line):
            path = "L".join(f"{x(across_)} {y(upright_)}" for across_, upright_ in line.tolist())
            yield f'<path d="M{path}" fill="none" stroke="{_colour(number)}" stroke-width="1.6"/>'


def _colour(number: int) -> str:
    return _COLOURS[number % len(_COLOURS)]
