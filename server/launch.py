"""The API process: starts the engine, the catalog, the store and the HTTP server, and ends with them."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from adapters_store.catalog import Catalog
from adapters_store.sources.local import LocalSource
from adapters_store.store import AdapterStore
from server.api.service import ServerState
from server.config import ServerConfig
from server.engine.client import AsyncEngine
from server.text.tokenizer import BaseTokenizer

DEAD_ENGINE_GRACE_S = 3.0  # how long /health stays red and requests get 503 before the process exits


def run(config: ServerConfig, console: Console, adapter_examples: dict[str, str]) -> int:
    """Serve until stopped. Returns the exit status: 0 when asked to stop, 1 when the engine died."""
    import uvloop

    return uvloop.run(_serve(config, console, adapter_examples))


async def _serve(config: ServerConfig, console: Console, adapter_examples: dict[str, str]) -> int:
    sources = [LocalSource(_adapter_root(root)) for root in config.adapter_roots]
    engine = AsyncEngine()
    with console.status(f"Loading {config.engine.model}"):
        await engine.start(config.engine)
    manifest_path = Path(engine.ready.manifest_path)
    catalog = Catalog(sources, config.served_names)
    store = AdapterStore(
        Path(config.engine.cache_dir),
        manifest_path,
        sources,
        max_rank=config.max_lora_rank,
        quota_bytes=config.disk_memory,
    )
    try:
        state = ServerState(
            engine=engine,
            catalog=catalog,
            store=store,
            tokenizer=BaseTokenizer(Path(config.engine.model)),
            base_names=config.served_names,
            api_key=config.api_key,
        )
        return await _listen(config, state, console, adapter_examples)
    finally:
        await store.close()
        await engine.close()
