"""What the three scripts share: options, their time limit, tables, JSON, and cases that may fail without the rest."""

from __future__ import annotations

import argparse
import json
import os
import secrets
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from loadtest.gpu.machine import Machine
from loadtest.options import Parser, positive, result_file

DEFAULT_SECONDS = 420.0


class Run:
    """One run of a script: its machine, its options, what is left of its time, and what it found."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.options = name, options
        self.is_tiny: bool = options.tiny
        self.seed: int = options.seed
        self.machine = Machine(torch.device("cpu" if options.tiny else "cuda"))
        self.rows: list[dict[str, Any]] = []
        self.failed: list[dict[str, str]] = []
        self.not_run: list[str] = []
        self.extra: dict[str, Any] = {}
        self._end = time.monotonic() + options.seconds

    @property
    def has_time(self) -> bool:
        return time.monotonic() < self._end

    def case(self, name: str, measure: Callable[[], dict[str, Any] | list[dict[str, Any]]]) -> None:
        """Add what `measure()` gives: a row, or rows with names of their own.

        Without time left it is not run; what it raises costs this case alone. Not asked for (--match): nothing.
        """
        if not any(text in name for text in self.options.match):
            return
        if not self.has_time:
            self.not_run.append(name)
            return
        started = time.monotonic()
        try:
            found = measure()
        except Exception as error:  # the border of a case: one that can't compile must not cost the others
            traceback.print_exc()
            self.failed.append({"case": name, "error": f"{type(error).__name__}: {error}".splitlines()[0]})
            return
        took = {"took_s": round(time.monotonic() - started, 2)}
        self.rows += [{"case": name} | row | took for row in (found if isinstance(found, list) else [found])]

    def finish(self, columns: Sequence[str], summary: Mapping[str, Any], wrong: int) -> int:
        """Print the table and the summary, write the JSON; the status: 1 if anything is wrong, failed or not run."""
        result = {
            "script": self.name,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": self.machine.description(),
            "options": {
                key: str(value) if isinstance(value, Path) else value for key, value in vars(self.options).items()
            },
            "wrong": wrong,
            "failed": self.failed,
            "not_run": self.not_run,
            "summary": dict(summary),
            "rows": self.rows,
        } | self.extra
        if self.options.out:
            self.options.out.write_text(json.dumps(result, indent=1) + "\n")
        sys.stdout.write("\n" + table(self.rows, columns))
        for failure in self.failed:
            sys.stdout.write(f"FAILED {failure['case']}: {failure['error'][:200]}\n")
        for label, value in summary.items():
            sys.stdout.write(f"{label}: {shown(value)}\n")
        if self.not_run:
            sys.stdout.write(f"not run, no time left: {', '.join(self.not_run)}\n")
        sys.stdout.write(f"{self.name}: {wrong} wrong, {len(self.failed)} failed, seed {self.seed}\n")
        return int(wrong > 0 or bool(self.failed) or bool(self.not_run))


def parser(name: str, description: str | None) -> Parser:
    """The options that all three take."""
    made = Parser(
        prog=f"python -m loadtest.gpu.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--out", type=result_file, help="write the figures here as JSON")
    made.add_argument("--backend", default="triton", help="a name of kernels/ops.py; default triton")
    made.add_argument("--seconds", type=positive, default=DEFAULT_SECONDS, help="start nothing new after these")
    made.add_argument(
        "--match", nargs="+", default=[""], metavar="TEXT", help="only cases with one of these in the name"
    )
    made.add_argument("--seed", type=int, default=secrets.randbelow(1 << 31), help="default another each time")
    made.add_argument("--tiny", action="store_true", help="on the CPU, Triton interpreted; no time means anything")
    return made


def begin(name: str, options: argparse.Namespace) -> Run:
    """A run; ends with status 2 where the machine has no GPU."""
    if options.tiny:
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when kernels.triton is imported
        torch.set_num_threads(1)
    elif not torch.cuda.is_available():
        sys.stderr.write(f"python -m loadtest.gpu.{name}: torch sees no CUDA device here; --tiny runs on the CPU\n")
        sys.exit(2)
    torch.manual_seed(options.seed)
    return Run(name, options)


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Plain aligned text: it is read in logs, where a terminal's width is unknown."""
    if not rows:
        return ""
    cells = [list(columns)] + [[shown(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    aligned = (
        [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in cells
    )
    return "".join("  ".join(line).rstrip() + "\n" for line in aligned)


def shown(value: object) -> str:
    """Three digits that matter; a dash where there is nothing."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)
