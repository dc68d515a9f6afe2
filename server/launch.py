"""The API process: starts the engine, the store and the HTTP server, and ends with them."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import sys
from pathlib import Path
from urllib.parse import unquote

import uvloop
from rich.console import Console

from adapters_store.catalog import Catalog
from adapters_store.errors import reason_of
from adapters_store.limits import Limits
from adapters_store.manifest import BaseManifest, read_manifest
from adapters_store.remote_tier import RemoteTier
from adapters_store.sources.local import LocalSource
from adapters_store.sources.named import NamedSource
from adapters_store.sources.remote import RemoteOptions, RemoteSource, open_source
from adapters_store.store import AdapterStore
from server.api import access_log
from server.api.params import read_sampling_defaults
from server.api.service import ApiLimits, ServerState
from server.banner import show_banner
from server.config import ServerConfig
from server.desired_file import AdaptersFile, read_adapters_file
from server.engine.client import AsyncEngine
from server.errors import ConfigError
from server.prepare import assign_modules, prepare_adapters
from server.serving import serve_until_stopped
from server.text.tokenizer import BaseTokenizer


def run(config: ServerConfig, console: Console, adapter_examples: dict[str, str]) -> int:
    """Serve until stopped. Returns the exit status: 0 when asked to stop, 1 when the engine died.

    Raises ConfigError for what can't be served, before anything listens.
    """
    _set_up_logging()
    access_log.write_to(sys.stdout)
    _allow_many_connections()
    return uvloop.run(_serve(config, console, adapter_examples))


async def _serve(config: ServerConfig, console: Console, adapter_examples: dict[str, str]) -> int:
    sources = _open_sources(config)
    base = _existing_folder("--model", config.engine.model)
    if not (base / "config.json").is_file():
        raise ConfigError(f"--model {base}: no config.json there, so it is no model's folder")
    wanted = await asyncio.to_thread(_read_wanted, config)
    listener = _listen(config.host, config.port)
    tokenizer = await asyncio.to_thread(BaseTokenizer, base, Path(config.engine.cache_dir))
    engine = AsyncEngine()
    with console.status(f"Loading {config.engine.model}"):
        await engine.start(config.engine)
    store: AdapterStore | None = None
    try:
        store = _open_store(config, read_manifest(Path(engine.ready.manifest_path)), sources)
        catalog = store.catalog
        await store.start()
        with console.status("Preparing adapters"):
            pins = await prepare_adapters(config, engine, store)
        state = ServerState(
            engine=engine,
            catalog=catalog,
            store=store,
            tokenizer=tokenizer,
            defaults=read_sampling_defaults(Path(config.engine.model)),
            base_names=config.served_names,
            api_keys=config.api_keys,
            may_load_adapters=config.may_load_adapters,
            guards_loading=not config.allow_runtime_loading,
            pins=pins,
            adapters_file=wanted,
            limits=ApiLimits(
                max_adapters_per_step=config.engine.max_adapters_per_step,
                max_queue_len=config.max_queue_len,
                max_queue_wait_s=config.engine.max_queue_wait_s,
                engine_stall_timeout_s=config.engine_stall_timeout_s,
                has_access_log=config.has_access_log,
                adapter_metrics_top=config.adapter_metrics_top,
                allowed_origins=config.allowed_origins,
            ),
        )
        names = [listing.name for listing in await store.list()]
        port: int = listener.getsockname()[1]
        show_banner(console, config, engine.ready, port, names, adapter_examples, catalog.warnings)
        return await serve_until_stopped(state, listener, shutdown_timeout_s=config.shutdown_timeout_s)
    finally:
        if store is not None:
            await store.close()
        await engine.close()


def _read_wanted(config: ServerConfig) -> AdaptersFile | None:
    """What --adapters-file says. ConfigError names the line or entry that is wrong."""
    if config.adapters_file is None:
        return None
    try:
        return read_adapters_file(Path(config.adapters_file), config.served_names)
    except ConfigError as error:
        raise ConfigError(f"--adapters-file {error}") from error


def _open_store(
    config: ServerConfig, manifest: BaseManifest, sources: list[LocalSource | RemoteSource]
) -> AdapterStore:
    """The store and its catalog. ConfigError for what can't be used: a cache folder, a name given by hand."""
    cache_dir, limits = Path(config.engine.cache_dir), Limits(max_rank=config.engine.max_lora_rank)
    named = NamedSource(source.root for source in sources if isinstance(source, LocalSource))
    folders = _leading_folders(sources)
    others = sources[len(folders) :]
    try:
        remote = None
        if others:
            remote = RemoteTier(others, cache_dir, policy=config.names, limits=limits, quota_bytes=config.raw_quota)
        catalog = Catalog(folders, config.served_names, named=named, remote=remote)
        assign_modules(catalog, config.lora_modules)
        return AdapterStore(cache_dir, manifest, catalog, limits=limits, quota_bytes=config.disk_quota)
    except OSError as error:
        raise ConfigError(f"--cache-dir {cache_dir}: {reason_of(error)}") from error


def _open_sources(config: ServerConfig) -> list[LocalSource | RemoteSource]:
    """The folders of --adapters, then what --adapter-source names, in the command line's order."""
    sources: list[LocalSource | RemoteSource] = []
    sources += [LocalSource(_existing_folder("--adapters", root)) for root in config.adapter_roots]
    options = RemoteOptions(allow_private=config.allow_private_sources, allowed_hosts=config.source_redirect_hosts)
    for url in dict.fromkeys(config.adapter_sources):
        if url.startswith("file://") or "://" not in url:
            sources.append(LocalSource(_existing_folder("--adapter-source", _path_of(url))))
            continue
        try:
            sources.append(open_source(url, options=options))
        except ValueError as error:
            raise ConfigError(f"--adapter-source: {error}") from error
    return sources


def _path_of(url: str) -> str:
    """The path of a file URL, or what is no URL as it is."""
    if not url.startswith("file://"):
        return url
    host, slash, path = url.removeprefix("file://").partition("/")
    if host not in ("", "localhost"):
        raise ConfigError(f"--adapter-source {url}: {host} is read as a host, which file: has none of; file:///PATH")
    return slash + unquote(path)


def _leading_folders(sources: list[LocalSource | RemoteSource]) -> list[LocalSource]:
    """The folders that come before any remote source: most servers have no others."""
    folders: list[LocalSource] = []
    for source in sources:
        if not isinstance(source, LocalSource):
            break
        folders.append(source)
    return folders


def _set_up_logging() -> None:
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)  # below it are whole URLs, signatures and all


def _allow_many_connections() -> None:
    """Raise the soft limit on open files, often 1,024, to the hard one: each open stream is a file."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _existing_folder(flag: str, path: str) -> Path:
    if not path:  # a variable that is not set; the folder of now is nothing to serve unasked
        raise ConfigError(f"{flag}: it is empty; name a folder")
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
