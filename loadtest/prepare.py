"""What a comparison of servers runs on: model M, and adapters of chosen ranks for any base.

    python -m loadtest.prepare --out FOLDER --num-adapters 32 --ranks 8,16,32,64 [--model PATH]

FOLDER/adapters/a00, a01, ...: all-linear, random, bf16, ranks in turn. Without --model, model M is made in the cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path


def write_adapters(model: Path, folder: Path, num_adapters: int, ranks: Sequence[int]) -> list[Path]:
    """Names sort as they count."""
    from loadtest.adapters import write_random_adapter
    from server.model.manifest import build_manifest

    manifest = build_manifest(model)
    width = max(2, len(str(num_adapters - 1)))
    paths = [folder / f"a{index:0{width}d}" for index in range(num_adapters)]
    for index, path in enumerate(paths):
        write_random_adapter(path, manifest, ranks[index % len(ranks)], seed=index)
    return paths


def main() -> None:
    """The command."""
    from loadtest.base import model_m
    from server.config import default_cache_dir

    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="an existing base; default model M")
    parser.add_argument("--num-adapters", type=int, default=32)
    parser.add_argument("--ranks", default="8,16,32,64")
    options = parser.parse_args()
    model = options.model or model_m(default_cache_dir())
    ranks = [int(rank) for rank in options.ranks.split(",")]
    paths = write_adapters(model, options.out / "adapters", options.num_adapters, ranks)
    print(f"--model {model} --adapters {options.out / 'adapters'}: {len(paths)} adapters")


if __name__ == "__main__":
    main()
