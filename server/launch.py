"""The API process: starts the engine, the store and the HTTP server, and ends with them."""

from __future__ import annotations

import asyncio
import logging
import socket
from pathlib import Path

import uvicorn
import uvloop
from rich.console import Console

from adapters_store.catalog import Catalog
from adapters_store.limits import Limits
from adapters_store.manifest import read_manifest
from adapters_store.sources.local import LocalSource
from adapters_store.store import AdapterStore
from server.api.app import create_app
from server.api.service import ApiLimits, ServerState
from server.banner import show_banner
from server.config import ServerConfig
from server.engine.client import AsyncEngine
from server.errors import ConfigError
from server.text.tokenizer import BaseTokenizer

DEAD_ENGINE_GRACE_S = 3.0  # how long /health stays red and requests get 503 before the process exits
SHUTDOWN_GRACE_S = 10  # how long open requests may take to end after SIGTERM

logger = logging.getLogger(__name__)


def run(config: ServerConfig, console: Console, adapter_examples: dict[str, str]) -> int:
    """Serve until stopped. Returns the exit status: 0 when asked to stop, 1 when the engine died.

    Raises ConfigError for what can't be served, before anything listens.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    return uvloop.run(_serve(config, console, adapter_examples))


async def _serve(config: ServerConfig, console: Console, adapter_examples: dict[str, str]) -> int:
    sources = [LocalSource(_existing_folder("--adapters", root)) for root in config.adapter_roots]
    listener = _listen(config.host, config.port)
    tokenizer = await asyncio.to_thread(BaseTokenizer, Path(config.engine.model), Path(config.engine.cache_dir))
    engine = AsyncEngine()
    with console.status(f"Loading {config.engine.model}"):
        await engine.start(config.engine)
    catalog = Catalog(sources, config.served_names)
    store = AdapterStore(
        Path(config.engine.cache_dir),
        read_manifest(Path(engine.ready.manifest_path)),
        catalog,
        limits=Limits(max_rank=config.max_lora_rank),
        quota_bytes=config.disk_memory,
    )
    try:
        await store.start()
        state = ServerState(
            engine=engine,
            catalog=catalog,
            store=store,
            tokenizer=tokenizer,
            base_names=config.served_names,
            api_key=config.api_key,
            limits=ApiLimits(max_adapters_per_step=config.engine.max_adapters_per_step),
        )
        names = [listing.name for listing in await store.list()]
        port: int = listener.getsockname()[1]
        show_banner(console, config, engine.ready, port, names, adapter_examples)
        return await _answer(state, listener)
    finally:
        await store.close()
        await engine.close()


async def _answer(state: ServerState, listener: socket.socket) -> int:
    """Run the HTTP server until a signal, or until the engine has been dead for the grace period."""
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(state),
            log_level="warning",
            http="httptools",
            timeout_graceful_shutdown=SHUTDOWN_GRACE_S,
        )
    )
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    dying = asyncio.create_task(state.engine.died.wait())
    await asyncio.wait({serving, dying}, return_when=asyncio.FIRST_COMPLETED)
    has_died = dying.done()
    if has_died:
        logger.error("the engine has stopped; exiting in %.0f s", DEAD_ENGINE_GRACE_S)
        await asyncio.wait({serving}, timeout=DEAD_ENGINE_GRACE_S)
        server.should_exit = True
    dying.cancel()
    await serving
    return 1 if has_died else 0


def _existing_folder(flag: str, path: str) -> Path:
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(f"{flag} {path}: no such folder")
    return folder


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket, taken before the model is loaded: a port in use is said at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"--host {host} --port {port}: {error.strerror}") from error
    return listener
