"""The identities of an adapter: what a name points to, what was fetched, what was compiled."""

from __future__ import annotations

import hashlib
import re

import msgspec

MAX_NAME_BYTES = 128
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")


def is_adapter_name(name: str) -> bool:
    """Whether `name` fits the grammar: parts of [A-Za-z0-9][A-Za-z0-9._-]* joined by '/', at most 128 bytes."""
    return len(name) <= MAX_NAME_BYTES and _NAME.fullmatch(name) is not None


class FileVersion(msgspec.Struct, frozen=True):
    """One file as a source reports it, before any byte of it is read."""

    name: str
    size: int
    mtime_ns: int = 0
    etag: str = ""
    version_id: str = ""


class SourceVersion(msgspec.Struct, frozen=True):
    """What a name points to right now. Keys resolve and fetch."""

    source: str
    """the source's own id, e.g. its root folder or bucket prefix"""
    name: str
    path: str
    """where the files are, in the source's terms"""
    files: tuple[FileVersion, ...]

    @property
    def key(self) -> str:
        return hashlib.sha256(msgspec.msgpack.encode(self)).hexdigest()


class AdapterRef(msgspec.Struct, frozen=True):
    """A compiled adapter: the identity that travels between processes."""

    name: str
    version: str
    """key of the SourceVersion it was fetched from"""
    digest: str
    """sha256 over the sorted (file name, sha256) of the files the compiler read"""
    image_key: str
    """hash of digest, base digest, compiler version, dtype and shard"""
    image_path: str
    data_offset: int
    """where the image's data section starts in the file, bytes"""
    data_bytes: int
    """bytes of the data section: what the host and the device hold"""
    checksum: str
    """of the image's data section"""
    max_rank: int
    sites: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def digest_of(files: dict[str, str]) -> str:
    """The adapter digest: sha256 over the sorted (file name, sha256 hex) pairs."""
    lines = "".join(f"{name}\0{sha}\n" for name, sha in sorted(files.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def image_key_of(digest: str, base_digest: str, compiler_version: int, dtype: str, shard: str = "0/1") -> str:
    """The image key: what an image is made of and for."""
    text = f"image\0{digest}\0{base_digest}\0{compiler_version}\0{dtype}\0{shard}"
    return hashlib.sha256(text.encode()).hexdigest()
