"""The adapters that --adapters-file asks for: the file is watched, and what is served made to agree with it.

file ──each second──▶ read ──valid──▶ wanted: one entry a name
                        └──not──▶ logged once; what was wanted stays
wanted ──▶ a name that is new or changed: given (replaced only when the new one is compiled), pinned, weighed
       ──▶ a name that is no longer there: taken back; requests that run go on
       ──▶ one that fails: the others go on, this one again after 1, 2, 4, ... 60 s
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

from adapters_store.errors import AdapterError, reason_of
from server.api.adapter_bodies import FileEntry
from server.api.naming import AdapterNames, message_of
from server.desired_file import AdaptersFile, Signature, read_adapters_file
from server.errors import ConfigError, ServerError
from server.exposition import head, number

POLL_S = 1.0
FIRST_RETRY_S, MAX_RETRY_S = 1.0, 60.0
START_PATIENCE_S = 60.0  # that a start waits for what shall be preloaded or pinned
MAX_AT_ONCE = 8  # names that are being changed
MAX_TOLD = 100  # failed entries that GET /v1/adapters tells

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Want:
    """One name: what the file wants of it (None: nothing any more), and how far that is."""

    entry: FileEntry | None
    is_due: bool = True
    has_been_given: bool = False
    has_pinned: bool = False
    failures: int = 0
    message: str = ""  # of the last failure, while it stands
    failed_s: float = 0.0  # time.time()
    retry_at: float = 0.0  # monotonic


class DesiredAdapters:
    """Makes the names agree with the file, one task a change. Lives on one event loop."""

    def __init__(self, file: AdaptersFile, names: AdapterNames, *, poll_s: float = POLL_S) -> None:
        """`file`: as it was at start, and valid."""
        self._file = file
        self._names = names
        self._poll_s = poll_s
        self._wants: dict[str, _Want] = {}
        self._changes: dict[str, asyncio.Task[None]] = {}
        self._turns = asyncio.Semaphore(MAX_AT_ONCE)
        self._seen: Signature | None = file.signature  # at the last look
        self._read: Signature | None = file.signature  # of what was read last, whether or not it was valid
        self._error: str | None = None  # why the file as it is now is not what is wanted
        self._applied_s = 0.0
        self._watcher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Give the names, which is not waited for beyond START_PATIENCE_S; watch the file from then on."""
        self._want(self._file)
        self._begin()
        if self._changes:
            await asyncio.wait(list(self._changes.values()), timeout=START_PATIENCE_S)
        self._watcher = asyncio.create_task(self._watch(), name="adapters file")

    async def close(self) -> None:
        """End the watching and what is under way."""
        tasks = [*self._changes.values(), *([self._watcher] if self._watcher is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def status(self) -> dict[str, object]:
        """For GET /v1/adapters; times are Unix seconds."""
        failed = {name: want for name, want in self._wants.items() if want.message}
        error = self._error
        if error is not None:  # folders of this machine are nobody's business
            error = error.replace(str(self._file.path), self._file.path.name)
        return {
            "ok": error is None,
            "error": error,
            "last_applied": self._applied_s or None,
            "entries": len(self._file.entries),
            "num_failed": len(failed),
            "failed": [
                {"name": name, "message": want.message, "time": want.failed_s}
                for name, want in sorted(failed.items())[:MAX_TOLD]
            ],
        }

    def metrics(self) -> Iterator[str]:
        """Their part of the exposition."""
        num_failed = sum(bool(want.message) for want in self._wants.values())
        for name, text, value in (
            ("ok", "Whether --adapters-file as it is now was read; else what it said before holds.", self._is_ok),
            ("last_applied_timestamp", "When it was last taken over, Unix seconds.", self._applied_s),
            ("entries", "Adapters that it asks for.", len(self._file.entries)),
            ("failed_entries", "Of these, those that could not be served as it says.", num_failed),
        ):
            name = f"multilora_adapters_file_{name}"
            yield f"{head(name, 'gauge', text)}{name} {number(value)}\n"

    @property
    def _is_ok(self) -> int:
        return int(self._error is None)

    # --- the file ---

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._poll_s)
            try:
                await self._look()
                self._begin()
            except Exception:  # a defect of ours; the next look may do
                log.exception("watching %s failed", self._file.path)

    async def _look(self) -> None:
        """Read the file when it has changed since it was read, but not while it still changes."""
        path = self._file.path
        try:
            now: Signature | None = await asyncio.to_thread(Signature.of, path)
        except OSError as error:
            self._seen = self._read = None
            self._refuse(f"{path}: {reason_of(error)}")
            return
        was_seen, self._seen = now == self._seen, now
        if not was_seen or now == self._read:
            return
        self._read = now
        try:
            file = await asyncio.to_thread(read_adapters_file, path, self._names.base_names)
        except ConfigError as error:
            self._refuse(str(error))
            return
        self._error = None
        is_other = file.digest != self._file.digest
        self._file = file
        if is_other:
            log.info("%s: %d adapters, taken over", path, len(file.entries))
            self._want(file)

    def _refuse(self, message: str) -> None:
        if message != self._error:
            log.error("--adapters-file is left as it was: %s", message)
        self._error = message

    # --- the names ---

    def _want(self, file: AdaptersFile) -> None:
        """What the file says is wanted from now on."""
        entries = {entry.name: entry for entry in file.entries}
        for name in [*self._wants, *entries]:
            want, entry = self._wants.get(name), entries.get(name)
            if want is None:
                self._wants[name] = _Want(entry)
            elif want.entry != entry:
                want.entry, want.is_due, want.failures, want.retry_at = entry, True, 0, 0.0
        self._applied_s = time.time()

    def _begin(self) -> None:
        """Begin the changes that are due."""
        now = time.monotonic()
        for name, want in self._wants.items():
            if want.is_due and now >= want.retry_at and name not in self._changes:
                self._changes[name] = asyncio.create_task(self._change(name, want), name=f"desired {name}")

    async def _change(self, name: str, want: _Want) -> None:
        entry = want.entry
        try:
            async with self._turns:
                await self._make(name, want, entry)
        except (AdapterError, ServerError) as error:
            self._note_failure(name, want, entry, message_of(error))
        except Exception as error:  # a defect of ours costs this name its change, not the others
            log.exception("making %s what --adapters-file says failed", name)
            self._note_failure(name, want, entry, message_of(error))
        else:
            want.is_due = want.entry is not entry  # the file may have changed meanwhile
            want.failures, want.message = 0, ""
            if want.entry is None and entry is None:
                del self._wants[name]
        finally:
            del self._changes[name]

    async def _make(self, name: str, want: _Want, entry: FileEntry | None) -> None:
        if entry is None:
            await self._names.release(name)
            return
        # what is served already is replaced by nothing that was not compiled
        compiles = entry.preload or want.has_been_given
        # what the file no longer says is undone; a pin that it never asked for (--pin) stays
        pin = False if entry.pin is None and want.has_pinned else entry.pin
        weight = 1.0 if entry.weight is None else entry.weight
        whole = entry.model_copy(update={"pin": pin, "weight": weight})
        await self._names.give(whole, by="file", replaces=True, compiles=compiles)
        want.has_been_given, want.has_pinned = True, bool(pin)

    def _note_failure(self, name: str, want: _Want, entry: FileEntry | None, message: str) -> None:
        if want.entry is not entry:  # the file has another by now, which is due at once
            return
        if message != want.message:
            log.warning("--adapters-file: %s: %s", name, message)
        want.message, want.failed_s = message, time.time()
        want.retry_at = time.monotonic() + min(MAX_RETRY_S, FIRST_RETRY_S * 2.0**want.failures)
        want.failures = min(want.failures + 1, 16)
        if want.entry is not None:
            self._names.note_failure(name, message)
