"""What this server accepts of one adapter."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from adapters_store.errors import AdapterTooLarge
from adapters_store.ref import FileVersion


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds on one adapter; beyond them it is AdapterTooLarge. Bytes where a name says so."""

    max_rank: int = 512
    max_file_bytes: int = 16 << 30
    """all files of one adapter together"""
    max_json_bytes: int = 256 << 20
    """its config or its tokenizer"""
    max_image_bytes: int | None = None
    """the image's data section: what the host and the device hold"""

    def check_files(self, files: Iterable[FileVersion]) -> None:
        """AdapterTooLarge when these are too large to be read."""
        total = 0
        for file in files:
            total += file.size
            if file.name.endswith(".json") and file.size > self.max_json_bytes:
                raise AdapterTooLarge(
                    f"{file.name} has {file.size} bytes; this server's limit is {self.max_json_bytes}"
                )
        if total > self.max_file_bytes:
            raise AdapterTooLarge(f"the files have {total} bytes; this server's limit is {self.max_file_bytes}")
