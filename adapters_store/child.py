"""What a worker child process and its parent share: frames on pipes, and the child's end with its parent.

A frame is a 4-byte big-endian length and that many bytes.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from pathlib import Path
from typing import BinaryIO

LENGTH_BYTES = 4
MAX_FRAME_BYTES = 64 << 20
IMPORT_ROOT = Path(__file__).resolve().parent.parent  # the folder that this package is imported from
_PR_SET_PDEATHSIG = 1


def frame(message: bytes) -> bytes:
    """`message` with its length before it. Raises ValueError above MAX_FRAME_BYTES."""
    if len(message) > MAX_FRAME_BYTES:
        raise ValueError(f"a message of {len(message)} bytes (limit {MAX_FRAME_BYTES})")
    return len(message).to_bytes(LENGTH_BYTES, "big") + message


def read_frame(stream: BinaryIO) -> bytes | None:
    """The next message; None at the end of the stream."""
    prefix = stream.read(LENGTH_BYTES)
    if len(prefix) < LENGTH_BYTES:
        return None
    length = int.from_bytes(prefix, "big")
    message = stream.read(length)
    return message if len(message) == length else None


def take_replies() -> BinaryIO:
    """The child's stdout as the stream of its replies; whatever else prints goes to stderr from now on."""
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    return replies


def end_with_parent(parent: int) -> None:
    """Ask the kernel (Linux) to end this process when its parent dies, also while it is at work."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit(1)
