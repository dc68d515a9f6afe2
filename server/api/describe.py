"""What the API says of one adapter: what its name points to, and where that is."""

from __future__ import annotations

from adapters_store.ref import AdapterRef, SourceVersion
from server.api.models import root_of
from server.api.service import Service


def describe(service: Service, name: str, version: SourceVersion | None) -> dict[str, object]:
    """One adapter; without a version it has none yet. Bytes are of files at the source, of the image elsewhere; times
    are Unix seconds.
    """
    store, names, usage = service.state.store, service.names, service.supply.usage.of(name)
    key = None if version is None else version.key
    ref = None if key is None else store.peek(key)
    is_compiling = ref is None and key is not None and store.is_compiling(key)
    return {
        "name": name,
        "root": None if version is None else root_of(version),
        "version": key,
        "digest": ref.digest if ref else None,
        "image_key": ref.image_key if ref else None,
        "rank": ref.max_rank if ref else None,
        "bytes": ref.data_bytes if ref else None,
        "source": {"bytes": sum(file.size for file in version.files) if version and version.files else None},
        "raw": {"state": "absent" if key is None else _raw_state(service, key)},
        "disk": {"state": "compiled" if ref else "compiling" if is_compiling else "absent"},
        "host": {"state": "held" if ref and service.state.engine.residents.is_hosted(ref.image_key) else "absent"},
        "device": _on_device(service, name, ref),
        "given_by": names.giver_of(name),
        "is_changing": names.is_changing(name),
        "weight": names.weight_of(name),
        "uses": usage.num_uses,
        "last_used": usage.last_used_s or None,
        "last_error": _last_error(service, name, ref),
        "warnings": list(ref.warnings) if ref else [],
    }


def _last_error(service: Service, name: str, ref: AdapterRef | None) -> dict[str, object] | None:
    """The engine's, where it refused the image; else that of a change; else that of the last load."""
    if ref is not None and (failure := service.state.engine.residents.failure(ref.image_key)) is not None:
        return {"message": failure, "time": None}
    if (change := service.names.failed.get(name)) is not None:
        return {"message": change.message, "time": change.time_s}
    usage = service.supply.usage.of(name)
    return None if usage.last_error is None else {"message": usage.last_error, "time": usage.last_error_s or None}


def _raw_state(service: Service, version_key: str) -> str:
    """Of a remote adapter's files on disk; those of a folder of this machine are never copied."""
    remote = service.state.catalog.remote
    if remote is None:
        return "absent"
    return "held" if remote.raw.peek(version_key) else "fetching" if remote.is_fetching(version_key) else "absent"


def _on_device(service: Service, name: str, ref: AdapterRef | None) -> dict[str, object]:
    is_resident = ref is not None and ref.image_key in service.state.engine.residents
    return {"state": "resident" if is_resident else "absent", "pinned": name in service.supply.pins}
