"""Looking at and reading the files of one adapter folder, never through a symlink out of the root."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from adapters_store.errors import AdapterUnavailable
from adapters_store.ref import FileVersion
from adapters_store.vocabulary import ADDED_TOKENS_FILE, TOKENIZER_FILE

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"

READ_FILES = (CONFIG_FILE, WEIGHTS_FILE, ADDED_TOKENS_FILE, TOKENIZER_FILE)
"""What the compiler reads; the digest is over these."""
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILES = (TEMPLATE_FILE, TOKENIZER_CONFIG_FILE)
"""Where an adapter may bring its own chat template, the first before the second."""
NOTED_FILES = (*READ_FILES, *TEMPLATE_FILES, PICKLE_FILE)
"""What a SourceVersion records. The pickle is never opened; it is noted so that it can be refused by name."""

CHUNK_BYTES = 64 << 20


class FileChanged(Exception):
    """A file is no longer the one that was noted."""


def real_path_below(root: Path, path: Path) -> Path | None:
    """The real path of `path` when it is the real path `root` or lies below it, else None."""
    real = Path(os.path.realpath(path))
    return real if real.is_relative_to(root) else None


def note_files(root: Path, folder: Path) -> tuple[FileVersion, ...] | None:
    """The files of an adapter folder as they are now; None when it is no adapter folder below `root`.

    `root` is a real path. None too when one of the files is a symlink out of the root or no regular file.
    """
    real_folder = real_path_below(root, folder)
    if real_folder is None:
        return None
    noted = []
    for name in NOTED_FILES:
        path = real_folder / name
        status = _status(path)
        if status is None:
            continue
        if stat.S_ISLNK(status.st_mode):
            real = real_path_below(root, path)
            status = _status(real) if real is not None else None
        if status is None or not stat.S_ISREG(status.st_mode):
            return None
        noted.append(_version(name, status))
    return tuple(noted) if any(file.name == CONFIG_FILE for file in noted) else None


def read_file(root: Path, folder: Path, expected: FileVersion) -> memoryview:
    """All bytes of a noted file.

    FileChanged when it is another one by now, AdapterUnavailable when it can't be read.
    """
    real = real_path_below(root, folder / expected.name)
    if real is None:
        raise FileChanged(expected.name)
    try:
        # a real path has no symlinks left; O_NOFOLLOW and the look at what was opened guard the gap
        descriptor = os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise FileChanged(expected.name) from None
    except OSError as error:
        raise AdapterUnavailable(f"{expected.name} can't be opened: {error.strerror}") from error
    with os.fdopen(descriptor, "rb", buffering=0) as file:
        opened = _version(expected.name, os.fstat(descriptor))
        if opened != expected or not _is_opened_below(root, descriptor):
            raise FileChanged(expected.name)
        content = memoryview(bytearray(expected.size))
        filled = 0
        while filled < expected.size:
            count = file.readinto(content[filled : filled + CHUNK_BYTES])
            if not count:
                raise FileChanged(expected.name)
            filled += count
    return content.toreadonly()


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat(follow_symlinks=False)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
            return None
        raise AdapterUnavailable(f"{path.name} can't be looked at: {error.strerror}") from error


def _version(name: str, status: os.stat_result) -> FileVersion:
    # inode and change time: two files of one size and one (reset) mtime, swapped by a symlink, still differ
    tag = f"{status.st_ino:x}-{status.st_ctime_ns:x}"
    return FileVersion(name, status.st_size, status.st_mtime_ns, tag)


def _is_opened_below(root: Path, descriptor: int) -> bool:
    """Whether the open file lies below the root, as far as this system can tell."""
    link = Path(f"/proc/self/fd/{descriptor}")
    return not link.is_symlink() or real_path_below(root, link.readlink()) is not None
