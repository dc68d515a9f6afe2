"""What vLLM's command lines say about adapters, in this server's terms."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import chain

import msgspec

from adapters_store.ref import is_adapter_name
from server.errors import ConfigError

LORA_MODULES = "--lora-modules"

logger = logging.getLogger(__name__)


class LoraModule(msgspec.Struct, forbid_unknown_fields=True):
    """The JSON form of one --lora-modules value."""

    name: str
    path: str
    base_model_name: str | None = None


def spread_lora_modules(arguments: Sequence[str]) -> list[str]:
    """`--lora-modules a=x b=y`, as vLLM takes it, with the flag before every value."""
    spread: list[str] = []
    is_open = False
    for argument in arguments:
        if is_open and not argument.startswith("-") and spread[-1] != LORA_MODULES:
            spread.append(LORA_MODULES)
        is_open = argument == LORA_MODULES or (is_open and not argument.startswith("-"))
        spread.append(argument)
    return spread


def parse_lora_modules(values: Sequence[str], base_names: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """(name, folder) pairs of `name=path`, JSON objects and JSON lists of objects. Raises ConfigError."""
    modules = list(chain.from_iterable(_modules_of(value) for value in values))
    for index, module in enumerate(modules):
        if module.base_model_name not in (None, *base_names):
            logger.warning(
                "%s %s: base_model_name is %r, but the base is %r",
                *(LORA_MODULES, module.name, module.base_model_name, base_names[0]),
            )
        if not is_adapter_name(module.name) or module.name in base_names:
            raise ConfigError(f"{module.name!r} can't be an adapter's name")
        if module.name in (other.name for other in modules[:index]):
            raise ConfigError(f"{module.name!r} is given twice")
    return tuple((module.name, module.path) for module in modules)


def split_names(values: Sequence[str] | None) -> tuple[str, ...]:
    """The names of `a,b` values, each once, in order."""
    names = chain.from_iterable(value.split(",") for value in values or ())
    return tuple(dict.fromkeys(name.strip() for name in names if name.strip()))


def explain_vllm_flags(*, enable_lora: bool, max_cpu_loras: int | None) -> list[str]:
    """A line for each flag that was given and does nothing here."""
    lines = []
    if not enable_lora:
        lines.append("--no-enable-lora: adapters are always on here; start without --adapters to serve the base alone")
    if max_cpu_loras is not None:
        lines.append(
            f"--max-cpu-loras {max_cpu_loras}: host memory for adapters is counted in bytes here, "
            "by --host-memory; the number is not used"
        )
    return lines


def _modules_of(value: str) -> list[LoraModule]:
    text = value.strip()
    if not text.startswith(("{", "[")):
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise ConfigError(f"{value!r}: write name=path, or JSON with name and path")
        return [LoraModule(name, path)]
    try:
        return msgspec.json.decode(f"[{text}]" if text.startswith("{") else text, type=list[LoraModule])
    except msgspec.DecodeError as error:
        raise ConfigError(f"{value!r}: {error}") from error
