"""`multilora bench`: the figures of docs/benchmarks.md. Ratios and limits are taken in the same run.

throughput   32 concurrent requests over HTTP, with 32 adapters and without, alternating
step         what 32 adapters add to a decode step, against their bytes at the measured bandwidth; where its time goes
memory       resident memory of the API and the engine process
cold         first token of the base, of warm adapters of each --rank, and of ones never seen, by phase
scrape       what a GET /metrics costs
streams      what open streams cost the API process: memory of one, CPU time of a token, its share of a step

Seven more take options of their own (--help): `serve`, a load test of any server; `compare`, its result files side by
side; `peers`, ours and other servers in turns; `catalog`, 1,000 registered adapters against 32, and real mixes;
`kernels`, each native kernel against torch and the machine's limits; `store`, adapters from object storage;
`thrash`, twice as many hot adapters as fit the arena.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rich.console import Console
from rich.table import Table

from loadtest.options import Parser, base_folder, count, lora_rank, result_file
from loadtest.table import number, rows_table
from server.config import default_cache_dir
from server.errors import ConfigError

console = Console()

COMMANDS = ("serve", "compare", "peers", "catalog", "kernels", "store", "thrash")
_LOWEST_ID = 3  # of prompts: below are special tokens
_MAX_IDS = 40_000  # large vocabularies have special tokens at their end too


@dataclass
class Workload:
    """What is measured; the defaults are those of docs/benchmarks.md."""

    model: Path
    num_adapters: int = 32
    ranks: tuple[int, ...] = (16,)  # `cold` measures each, the other parts take the first
    prompt_tokens: int = 128
    output_tokens: int = 64
    repeats: int = 3

    @property
    def rank(self) -> int:
        """Of the adapters, where all have the same."""
        return self.ranks[0]

    def prompt(self, start: int) -> list[int]:
        """`prompt_tokens` ids of the base's vocabulary, others for another `start`."""
        return [_LOWEST_ID + (start + 11 * position) % self._num_ids for position in range(self.prompt_tokens)]

    @cached_property
    def _num_ids(self) -> int:
        from server.model.skeleton import read_config

        size: int = read_config(self.model).get_text_config().vocab_size
        return min(_MAX_IDS, size - _LOWEST_ID)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the chosen parts (all of them by default) and print a table each; or one of COMMANDS.

    Ends with status 2 for what can't be asked.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in COMMANDS:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers that `peers` started are stopped then
        importlib.import_module(f"loadtest.{arguments[0]}").main(arguments[1:])
        return
    from loadtest.cold import measure_cold
    from loadtest.peers import is_configured
    from loadtest.scrape import measure_scrape
    from loadtest.steps import measure_steps
    from loadtest.streams import measure_streams
    from loadtest.throughput import measure_memory, measure_throughput
    from server.demo import ensure_demo_base

    parts: dict[str, Callable[[Workload, Path], dict[str, object]]] = {
        "step": measure_steps,
        "throughput": measure_throughput,
        "memory": measure_memory,
        "cold": measure_cold,
        "scrape": measure_scrape,
        "streams": measure_streams,
    }
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="multilora bench", description=__doc__, formatter_class=raw)
    parser.add_argument("part", nargs="*", help=f"any of {', '.join(parts)}; default all")
    parser.add_argument("--model", type=base_folder, help="a local base; default the demo base")
    parser.add_argument("--num-adapters", type=count, default=32)
    parser.add_argument("--rank", type=lora_rank, nargs="+", default=[16], help="several for `cold`; else the first")
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument("--json", type=result_file, help="write the figures here too")
    options = parser.parse_args(arguments)
    unknown = set(options.part) - set(parts)
    if unknown:
        parser.error(f"unknown part {sorted(unknown)[0]!r}; there are {', '.join(parts)}")
    workload = Workload(
        model=options.model or ensure_demo_base(default_cache_dir()),
        num_adapters=options.num_adapters,
        ranks=tuple(options.rank),
        repeats=options.repeats,
    )
    figures: dict[str, object] = {"machine": f"{platform.machine()}, {platform.platform()}"}
    for name in options.part or parts:
        with tempfile.TemporaryDirectory(prefix="multilora-bench-") as folder:
            try:
                figures[name] = parts[name](workload, Path(folder))
            except ConfigError as error:
                parser.error(str(error))
        print_figures(name, figures[name])
    if not options.part and is_configured():
        _compare_with_peers(default_cache_dir() / "bench-peers")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def _compare_with_peers(folder: Path) -> None:
    """Model M with adapters of ranks 8, 16, 32, 64 in turn, through every peer that the environment names."""
    from loadtest.base import model_m
    from loadtest.peers import main as run_peers
    from loadtest.prepare import write_adapters

    model = model_m(default_cache_dir())
    write_adapters(model, folder / "adapters", num_adapters=32, ranks=(8, 16, 32, 64))
    run_peers(["--model", str(model), "--adapters", str(folder / "adapters"), "--out", str(folder / "results")])


def print_figures(name: str, figures: object) -> None:
    """Figures with labels; a mapping among them is a table of its own: columns by row."""
    assert isinstance(figures, dict)
    table = Table(title=name, show_header=False)
    for label, value in figures.items():
        if not isinstance(value, dict):
            table.add_row(str(label), number(value))
    console.print(table)
    for label, rows in figures.items():
        if isinstance(rows, dict):
            console.print(rows_table(str(label), rows))


if __name__ == "__main__":
    main()
