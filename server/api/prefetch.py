"""Bringing an adapter to a tier without a request for it, and waiting, for a while, until it is there."""

from __future__ import annotations

import asyncio
import time
from typing import Literal

from adapters_store.errors import AdapterTooLarge, AdapterUnavailable
from adapters_store.ref import AdapterRef
from server.api.service import Service
from server.errors import BadRequest, EngineDead

WAIT_S = 10.0
POLL_S = 0.01


async def bring(service: Service, ref: AdapterRef, tier: Literal["disk", "host", "device"]) -> bool:
    """Bring an image from disk to `tier`; False when it is not there within WAIT_S.

    Raises BadRequest where there is no such tier, AdapterTooLarge, AdapterUnavailable, EngineDead.
    """
    engine = service.state.engine
    if tier == "disk":
        return True
    if tier == "device":
        service.supply.pins.check_alone(ref)
    if tier == "host":
        if not engine.ready.host_bytes:
            raise BadRequest("This server has no host tier: start it with --host-memory.", param="tier")
        if ref.data_bytes > engine.ready.host_bytes:
            raise AdapterTooLarge(
                f"adapter {ref.name} takes {ref.data_bytes} bytes and the host memory for adapters is "
                f"{engine.ready.host_bytes} bytes; raise --host-memory"
            )
    service.state.store.lease(ref)  # until it has been read
    try:
        if not _is_there(service, ref, tier):
            engine.residents.forget_failure(ref.image_key)
            engine.prefetch_adapter(ref, tier)
        return await until_resident(service, ref, tier)
    finally:
        service.state.store.release(ref)


async def until_resident(service: Service, ref: AdapterRef, tier: Literal["host", "device"]) -> bool:
    """Wait until an image is where it was asked for; False when it is not within WAIT_S.

    Raises AdapterUnavailable when it could not be loaded, EngineDead.
    """
    engine = service.state.engine
    deadline_s = time.monotonic() + WAIT_S
    while not _is_there(service, ref, tier):
        if (failure := engine.residents.failure(ref.image_key)) is not None:
            raise AdapterUnavailable(f"adapter {ref.name} could not be loaded: {failure}")
        if not engine.is_alive:
            raise EngineDead("The engine has stopped; the server is going down.")
        if time.monotonic() > deadline_s:
            return False
        await asyncio.sleep(POLL_S)
    return True


def _is_there(service: Service, ref: AdapterRef, tier: Literal["host", "device"]) -> bool:
    residents = service.state.engine.residents
    return residents.is_hosted(ref.image_key) if tier == "host" else ref.image_key in residents
