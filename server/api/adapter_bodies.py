"""The bodies of the routes that manage adapters, and of an entry of --adapters-file, which is the same."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.api.schemas import Strict
from server.engine.limits import MAX_WEIGHT, MIN_WEIGHT

MAX_PATH_CHARS = 4096
MAX_NAME_CHARS = 1024  # longer than any name that fits the grammar: those are told what is wrong with them

AdapterPath = Annotated[str, Field(min_length=1, max_length=MAX_PATH_CHARS)]


def _not_both(first: str, second: str) -> dict[str, Any]:
    """In a JSON schema: at most one of two strings is given."""
    given = {name: {"required": [name], "properties": {name: {"type": "string"}}} for name in (first, second)}
    return {"not": {"allOf": list(given.values())}}


class AdapterEntry(Strict):
    """One adapter as it shall be: where its name points to, and how it is kept. At most one of path and source."""

    model_config = ConfigDict(json_schema_extra=_not_both("path", "source"))

    name: Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARS)]
    path: Annotated[AdapterPath | None, Field(description="Below a folder of --adapters.")] = None
    source: Annotated[AdapterPath | None, Field(description="A URL below a remote --adapter-source.")] = None
    pin: Annotated[bool | None, Field(description="Whether it stays on the device; null: as it is.")] = None
    weight: Annotated[
        float | None,
        Field(ge=MIN_WEIGHT, le=MAX_WEIGHT, description="Its share when several adapters have work; null: as it is."),
    ] = None


class FileEntry(AdapterEntry):
    """One of the `adapters` in --adapters-file."""

    preload: Annotated[bool, Field(description="Compiled at once, not by the first request.")] = False


class NewAdapter(AdapterEntry):
    """POST /v1/adapters."""

    preload: Annotated[bool, Field(description="False: compiled by the first request, and not before the answer.")] = (
        True
    )
    replace: Annotated[bool, Field(description="Replace the adapter that has this name.")] = False


class PrefetchRequest(Strict):
    """POST /v1/adapters/{name}/prefetch."""

    tier: Literal["disk", "host", "device"] = "device"


class InspectRequest(Strict):
    """POST /v1/adapters/inspect: one of name and path."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [{"required": [name], "properties": {name: {"type": "string"}}} for name in ("name", "path")]
        }
    )

    name: Annotated[str | None, Field(min_length=1, max_length=MAX_NAME_CHARS)] = None
    path: Annotated[AdapterPath | None, Field(description="Below a folder of --adapters.")] = None


class LoadLoraAdapterRequest(BaseModel):
    """vLLM's body, and the base_model_name that older controllers send. As at vLLM other keys mean nothing."""

    model_config = ConfigDict(extra="ignore", strict=True)

    lora_name: str = Field("", max_length=1024)
    lora_path: str = Field("", max_length=MAX_PATH_CHARS, description="Below a folder of --adapters.")
    load_inplace: bool = Field(False, description="Replace the adapter that has this name.")
    base_model_name: str | None = Field(None, description="Means nothing; a name that is not the base's is logged.")
    is_3d_lora_weight: Literal[False] = False


class UnloadLoraAdapterRequest(BaseModel):
    """vLLM's body; lora_int_id and other keys mean nothing here."""

    model_config = ConfigDict(extra="ignore", strict=True)

    lora_name: str = Field("", max_length=1024)
    lora_int_id: int | None = None
