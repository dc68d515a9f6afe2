"""What this server accepts of one adapter."""

from __future__ import annotations

import msgspec


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds on one adapter; beyond them it is AdapterTooLarge. Bytes where a name says so."""

    max_rank: int = 512
    max_file_bytes: int = 16 << 30
    """all files of one adapter together"""
    max_image_bytes: int | None = None
    """the image's data section: what the host and the device hold"""
