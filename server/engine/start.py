"""What the engine process calls first: the engine for a configuration, without the imports that it can do without."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import msgspec

from server.config import EngineConfig

if TYPE_CHECKING:
    from server.engine.core import EngineCore


def build_core(config_json: bytes) -> EngineCore:
    """The engine for a JSON EngineConfig. Raises ConfigError."""
    config = msgspec.json.decode(config_json, type=EngineConfig)
    if config.device == "cpu" and config.backend != "triton":
        # 50 MiB: transformers imports torch's compiler, which nobody here uses, and that imports triton where it is
        sys.modules["triton"] = None  # type: ignore[assignment]
    from server.engine.build import build  # imports torch and transformers
    from server.engine.processors import bind_team

    core = build(config)
    if config.device == "cpu" and config.backend in ("auto", "cpu"):
        bind_team()  # last: a thread that starts after this is bound with the one that starts it
    return core
