"""What happens to named adapters before the server is ready: given their folders, compiled, pinned."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from adapters_store.catalog import Catalog
from adapters_store.errors import AdapterError
from adapters_store.ref import AdapterRef
from adapters_store.store import AdapterStore
from server.adapters.regions import region_bytes
from server.api.pins import Pins
from server.config import ServerConfig, format_bytes
from server.engine.client import Engine
from server.errors import ConfigError

PIN_TIMEOUT_S = 300.0  # for all pinned images to be read
PIN_POLL_S = 0.01


def assign_modules(catalog: Catalog, modules: Iterable[tuple[str, str]]) -> None:
    """Serve each folder under its name. Raises ConfigError when one is no adapter folder."""
    for name, path in modules:
        try:
            catalog.assign(catalog.named.look_anywhere(name, Path(path)))
        except AdapterError as error:
            raise ConfigError(f"--lora-modules {name}={path}: {error.message}") from error


async def prepare_adapters(config: ServerConfig, engine: Engine, store: AdapterStore) -> Pins:
    """Compile --preload and --pin, load --pin. Raises ConfigError for one that can't be served or doesn't fit."""
    for name in config.preload:
        await _compile("--preload", name, store)
    refs = [await _compile("--pin", name, store) for name in config.pin]
    adapter_bytes, max_adapters = engine.ready.adapter_bytes, config.engine.max_loaded_adapters
    check_fit(refs, adapter_bytes, max_adapters)
    pins = Pins(engine, store, partial(fit_problem, adapter_bytes=adapter_bytes, max_adapters=max_adapters))
    for ref in refs:
        pins.add(ref)
    await _until_resident(refs, engine)
    return pins


def check_fit(refs: Iterable[AdapterRef], adapter_bytes: int, max_adapters: int) -> None:
    """Raises ConfigError, with the sizes, when these images can't all be on the device at once."""
    if (problem := fit_problem(refs, adapter_bytes, max_adapters)) is not None:
        raise ConfigError(f"--pin: {problem}")


def fit_problem(refs: Iterable[AdapterRef], adapter_bytes: int, max_adapters: int) -> str | None:
    """Why these images can't all be on the device at once, with the sizes; None when they can."""
    by_key = {ref.image_key: ref for ref in refs}
    total = sum(region_bytes(ref.data_bytes) for ref in by_key.values())
    if total > adapter_bytes:
        sizes = ", ".join(f"{ref.name} {format_bytes(region_bytes(ref.data_bytes))}" for ref in by_key.values())
        return (
            f"{format_bytes(total)} don't fit into the adapter memory of {format_bytes(adapter_bytes)} "
            f"({sizes}); {'pin fewer or ' if len(by_key) > 1 else ''}raise --adapter-memory"
        )
    if len(by_key) > max_adapters:
        return f"{len(by_key)} adapters are more than the {max_adapters} that can be loaded"
    return None


async def _compile(flag: str, name: str, store: AdapterStore) -> AdapterRef:
    try:
        return await store.ensure(await store.resolve(name))
    except AdapterError as error:
        raise ConfigError(f"{flag} {name}: {error.message}") from error


async def _until_resident(refs: Iterable[AdapterRef], engine: Engine) -> None:
    deadline_s = time.monotonic() + PIN_TIMEOUT_S
    for ref in refs:
        while ref.image_key not in engine.residents:
            failure = engine.residents.failure(ref.image_key)
            if failure is not None:
                raise ConfigError(f"--pin {ref.name}: {failure}")
            if engine.died.is_set() or time.monotonic() > deadline_s:
                raise ConfigError(f"--pin {ref.name}: it did not come to the device within {PIN_TIMEOUT_S:.0f} s")
            await asyncio.sleep(PIN_POLL_S)
