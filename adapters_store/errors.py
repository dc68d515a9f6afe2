"""Errors of the adapter store. Each carries the HTTP status and the OpenAI error code it becomes.

AdapterError                        500 adapter_error
├── AdapterNotFound                 404 model_not_found       no such name under any source
│   └── VersionNotFound             404 model_not_found       the name is there, that version of it is not at hand
├── VersionAmbiguous                400 ambiguous_version     several versions of a name begin with what was asked for
├── AdapterInvalid                  422 adapter_invalid       the files are wrong, with the file or tensor named
│   ├── AdapterCorrupt              422 adapter_corrupt       truncated, not safetensors, checksum differs
│   ├── AdapterMismatch             422 adapter_mismatch      made for another base: shape, site, vocabulary
│   └── AdapterUnsupported          422 adapter_unsupported   a feature that is not served, by name
├── AdapterTooLarge                 422 adapter_too_large     a limit of this server: rank, bytes
├── AdapterDenied                   403 adapter_denied        the source refuses this server's credentials
└── AdapterUnavailable              503 adapter_unavailable   may work later: torn read, worker crash, I/O
    ├── SourceUnavailable           503 adapter_unavailable   the source does not answer, whatever it is asked for
    └── RawDamaged                  503 raw_damaged           files kept as fetched are not what was fetched
"""

from __future__ import annotations


class AdapterError(Exception):
    """Something is wrong with one adapter; other adapters and requests are untouched."""

    http_status = 500
    code = "adapter_error"

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class AdapterNotFound(AdapterError):
    """No configured source has an adapter of that name (or the name is outside the grammar)."""

    http_status = 404
    code = "model_not_found"


class VersionNotFound(AdapterNotFound):
    """A version of a name was asked for that is not at hand (any more); the message lists those that are."""


class VersionAmbiguous(AdapterError):
    """What was asked for is the beginning of several versions of a name."""

    http_status = 400
    code = "ambiguous_version"


class AdapterInvalid(AdapterError):
    """The adapter's own files are wrong."""

    http_status = 422
    code = "adapter_invalid"


class AdapterCorrupt(AdapterInvalid):
    """Bytes that cannot be what they claim: truncated, not safetensors, a checksum that differs."""

    code = "adapter_corrupt"


class AdapterMismatch(AdapterInvalid):
    """A sound adapter for another base: a shape, a module or a vocabulary that this base lacks."""

    code = "adapter_mismatch"


class AdapterUnsupported(AdapterInvalid):
    """A PEFT feature that this server does not serve; the message names it."""

    code = "adapter_unsupported"


class AdapterTooLarge(AdapterError):
    """The adapter exceeds a limit of this server; the message has the figure and the limit."""

    http_status = 422
    code = "adapter_too_large"


class AdapterDenied(AdapterError):
    """The adapter's source does not let this server read it; trying again doesn't help."""

    http_status = 403
    code = "adapter_denied"


class AdapterUnavailable(AdapterError):
    """The attempt failed for a reason that may pass; trying again can help."""

    http_status = 503
    code = "adapter_unavailable"


class SourceUnavailable(AdapterUnavailable):
    """The source is not to be spoken to: no connection, no answer in time, 408, 429, 5xx. Another name would fail too.

    What it says of one file is an AdapterUnavailable alone.
    """


class RawDamaged(AdapterUnavailable):
    """The files of an adapter are not on disk as they were fetched; the store drops and fetches them again."""

    code = "raw_damaged"


def reason_of(error: OSError | MemoryError) -> str:
    """What the system says, for a message that names the file itself."""
    strerror = error.strerror if isinstance(error, OSError) else None
    return strerror or str(error) or type(error).__name__


def adapter_error(code: str, message: str) -> AdapterError:
    """The error of `code`, for one that crossed a process boundary as (code, message)."""
    return _BY_CODE.get(code, AdapterError)(message)


_BY_CODE: dict[str, type[AdapterError]] = {
    error.code: error
    for error in (
        AdapterNotFound,
        VersionAmbiguous,
        AdapterInvalid,
        AdapterCorrupt,
        AdapterMismatch,
        AdapterUnsupported,
        AdapterTooLarge,
        AdapterDenied,
        AdapterUnavailable,
        RawDamaged,
    )
}
