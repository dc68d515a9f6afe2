"""Files that a command is to write, looked at before it runs."""

from __future__ import annotations

import os
from pathlib import Path


def check_writable(path: Path) -> None:
    """Errors: ValueError where no file can be written there. None is left behind."""
    was_there = os.path.lexists(path)
    try:
        path.open("ab").close()
        if not was_there:
            path.unlink()
    except OSError as error:
        raise ValueError(f"{path} can't be written: {error.strerror}") from None
