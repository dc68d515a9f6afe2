"""Options of the bench commands: refused in one line, with status 2, before anything is started or written."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path
from typing import NoReturn

from loadtest.outputs import check_writable

MAX_RANK = 512  # what a server takes unless told otherwise


class Parser(argparse.ArgumentParser):
    """Says what is wrong without the usage above it; --help has that."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def count(text: str) -> int:
    """A whole number from 1 up."""
    return _whole(text, 1, math.inf)


def count_or_none(text: str) -> int:
    """A whole number from 0 up."""
    return _whole(text, 0, math.inf)


def lora_rank(text: str) -> int:
    """A rank that servers take."""
    return _whole(text, 1, MAX_RANK)


def positive(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number


def base_folder(text: str) -> Path:
    """A folder with a config.json."""
    path = Path(text)
    if not (path / "config.json").is_file():
        raise argparse.ArgumentTypeError(f"{text}: no config.json there, so it is no model's folder")
    return path


def result_file(text: str) -> Path:
    """A file that can be written, in a folder that there is."""
    path = Path(text)
    try:
        check_writable(path)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return path


def result_folder(text: str) -> Path:
    """A folder that files can be written to; it is made, with its parents, by who writes the first."""
    path = Path(text)
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not there.is_dir():
        raise argparse.ArgumentTypeError(f"{text} can't be a folder: {there} is a file")
    if not os.access(there, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text} can't be written to")
    return path


def _whole(text: str, low: int, high: float) -> int:
    try:
        number = int(text)
    except ValueError:
        number = low - 1
    if not low <= number <= high:
        limits = f"from {low} to {high}" if high < math.inf else f"from {low} up"
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {limits}")
    return number
