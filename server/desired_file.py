"""--adapters-file: which adapters there shall be, as JSON or YAML, read whole or not at all.

adapters:
  - name: support-fr            # and at most one of path (below --adapters) and source (a URL below a source)
    path: team/support-fr
    preload: true               # compiled at once; else by the first request
    pin: true                   # kept on the device
    weight: 2.0                 # its share when several adapters have work
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from adapters_store.errors import reason_of
from adapters_store.ref import is_adapter_name
from server.api.adapter_bodies import FileEntry
from server.errors import ConfigError

MAX_BYTES = 16 << 20
MAX_DEPTH = 16
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is some ten times as fast


class _Loader(_LOADER):  # type: ignore[misc,valid-type]
    """The safe loader, which takes no key twice: two entries without a dash between them would become one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(problem=_twice(key.value), problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class Signature(NamedTuple):
    """Which file a path leads to, links followed: another one, or the same one written again, differs."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> Signature:
        """Raises OSError."""
        status = path.stat()
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class AdaptersFile:
    """What the file said when it was read."""

    path: Path
    signature: Signature
    entries: tuple[FileEntry, ...]
    digest: str
    """sha256 of the content"""


def read_adapters_file(path: Path, base_names: Sequence[str] = ()) -> AdaptersFile:
    """The file as it is now. Blocking. Raises ConfigError, which names the line or the entry that is wrong."""
    try:
        signature = Signature.of(path)
        if signature.size > MAX_BYTES:
            raise ConfigError(f"{path}: {signature.size} bytes; at most {MAX_BYTES} are read")
        if not path.is_file():  # a pipe is waited for without end, a device may have none
            raise ConfigError(f"{path}: not a regular file")
        content = path.read_bytes()
        if Signature.of(path) != signature:
            raise ConfigError(f"{path}: it changed while it was read")
    except OSError as error:
        raise ConfigError(f"{path}: {reason_of(error)}") from error
    entries = _entries(_parsed(path, content), str(path), base_names)
    return AdaptersFile(path, signature, entries, hashlib.sha256(content).hexdigest())


def _parsed(path: Path, content: bytes) -> Any:
    kind = path.suffix.lower()
    if kind not in (".json", ".yaml", ".yml"):
        raise ConfigError(f"{path}: its name must end in .json, .yaml or .yml, which says what is in it")
    try:
        if kind == ".json":
            return json.loads(content, object_pairs_hook=_once)
        _check_depth(content)
        return yaml.load(content, Loader=_Loader)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise ConfigError(f"{path}: {where}{error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())[:200]
        raise ConfigError(f"{path}: {reason}") from None


def _twice(key: str) -> str:
    return f"the key {key[:128]!r} stands twice in one object"


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. ValueError when a key stands in it twice."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(_twice(key))
        found[key] = value
    return found


def _check_depth(content: bytes) -> None:
    """ValueError for a nesting that no valid file has: libyaml's loader would overrun the stack."""
    depth = 0
    for event in yaml.parse(content, Loader=_LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"line {event.start_mark.line + 1}: nested more than {MAX_DEPTH} deep")


def _entries(content: Any, path: str, base_names: Sequence[str]) -> tuple[FileEntry, ...]:
    if not isinstance(content, dict) or not isinstance(content.get("adapters"), list):
        raise ConfigError(f"{path}: it must be an object with a list 'adapters'")
    unknown = [str(key) for key in content if key != "adapters"]
    if unknown:
        raise ConfigError(f"{path}: unknown key {unknown[0]!r}; there is 'adapters' only")
    entries: list[FileEntry] = []
    first_of: dict[str, int] = {}
    for number, given in enumerate(content["adapters"], start=1):
        entry = _entry(given, f"{path}: entry {number}", base_names)
        if entry.name in first_of:
            raise ConfigError(
                f"{path}: entry {number}: the name {entry.name!r} is that of entry {first_of[entry.name]}"
            )
        first_of[entry.name] = number
        entries.append(entry)
    return tuple(entries)


def _entry(given: Any, where: str, base_names: Sequence[str]) -> FileEntry:
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: it must be an object with a 'name'")
    if isinstance(given.get("name"), str):
        where = f"{where} ({given['name'][:128]!r})"
    try:
        entry = FileEntry.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{where}: {field[:128]!r}: {first['msg']}") from None
    if entry.path is not None and entry.source is not None:
        raise ConfigError(f"{where}: 'path' or 'source', not both")
    if entry.name in base_names:
        raise ConfigError(f"{where}: the name is the base model's")
    if not is_adapter_name(entry.name):
        raise ConfigError(
            f"{where}: the name must be parts of letters, digits, '.', '_' and '-' joined by '/', at most 128 bytes"
        )
    return entry
