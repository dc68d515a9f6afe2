"""Flags that operators set, as the command line takes them; and the CPU quota."""

from __future__ import annotations

import logging
import os
from types import SimpleNamespace
from typing import get_args

import pytest
from rich.console import Console
from typer.testing import CliRunner

from adapters_store import cpus
from adapters_store.raw import RawFiles
from server import cli, launch
from server.banner import warnings_of
from server.config import EngineConfig, KernelBackend, ServerConfig
from server.errors import ConfigError


def parsed(monkeypatch, *flags: str, env: dict[str, str] | None = None) -> ServerConfig:
    seen: list[ServerConfig] = []
    monkeypatch.setattr(cli, "_run", lambda found, adapter_examples: seen.append(found))
    result = CliRunner().invoke(cli.app, ["serve", "--model", "base", *flags], env=env)
    assert result.exit_code == 0, result.output
    return seen[0]


def test_defaults(monkeypatch):
    found = parsed(monkeypatch)
    assert (found.api_keys, found.allowed_origins, found.has_access_log) == ((), (), True)
    assert found.adapter_metrics_top == 50
    assert found.shutdown_timeout_s < 30, "Kubernetes kills after 30 s"
    assert found.max_queue_len > 2000 and found.engine_stall_timeout_s > 10


def test_values(monkeypatch):
    flags = ["--max-queue-len", "7", "--shutdown-timeout", "3", "--engine-stall-timeout", "9", "--disable-access-log"]
    found = parsed(monkeypatch, *flags, "--allowed-origins", '["https://a.example"]')
    assert (found.max_queue_len, found.shutdown_timeout_s, found.engine_stall_timeout_s) == (7, 3, 9)
    assert parsed(monkeypatch, "--adapter-metrics-top", "0").adapter_metrics_top == 0
    assert not found.has_access_log and found.allowed_origins == ("https://a.example",)


def test_remote_sources(monkeypatch):
    found = parsed(monkeypatch)
    assert (found.adapter_sources, found.disk_quota, found.raw_quota) == ((), None, None)
    assert (found.names.on_source_down, found.names.on_source_delete) == ("serve", "drop")
    assert (found.names.poll_interval_s, found.names.miss_ttl_s, found.allow_private_sources) == (10, 5, False)
    flags = ["--adapter-source", "s3://b/one", "--adapter-source", "hf://org", "--adapter-source-allow-private"]
    flags += ["--adapter-source-allow-host", "cdn.example:8443"]
    flags += ["--adapter-poll-interval", "1.5", "--adapter-miss-ttl", "0", "--raw-quota", "1KiB", "--disk-quota", "0"]
    found = parsed(monkeypatch, *flags, "--on-source-down", "fail", "--on-source-delete", "keep")
    assert found.adapter_sources == ("s3://b/one", "hf://org") and found.allow_private_sources
    assert found.source_redirect_hosts == ("cdn.example:8443",)
    assert (found.disk_quota, found.raw_quota) == (0, 1024)
    policy = (found.names.poll_interval_s, found.names.miss_ttl_s)
    assert policy == (1.5, 0) and (found.names.on_source_down, found.names.on_source_delete) == ("fail", "keep")


def test_a_file_of_adapters(monkeypatch):
    assert parsed(monkeypatch).adapters_file is None
    assert parsed(monkeypatch, "--adapters-file", "some/adapters.yaml").adapters_file == "some/adapters.yaml"


@pytest.mark.parametrize(
    ("content", "words"), [("adapters: [{name: b}]", "entry 1 .*the base"), ("adapters: [", r"line \d")]
)
async def test_a_wrong_file_of_adapters_stops_the_start_before_anything_is_loaded(tmp_path, content, words):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "adapters.yaml").write_text(content)
    path = str(tmp_path / "adapters.yaml")
    found = ServerConfig(engine=EngineConfig(model=str(tmp_path)), served_names=("b",), port=0, adapters_file=path)
    with pytest.raises(ConfigError, match=f"--adapters-file .*adapters.yaml: {words}"):
        await launch._serve(found, Console(quiet=True), {})


def test_a_backend_that_is_none_is_refused_with_the_list():
    result = CliRunner().invoke(cli.app, ["serve", "--model", "base", "--backend", "bogus"])
    assert result.exit_code == 2 and all(name in result.output for name in get_args(KernelBackend))


def test_a_policy_that_is_none_is_refused():
    result = CliRunner().invoke(cli.app, ["serve", "--model", "base", "--on-source-down", "guess"])
    assert result.exit_code == 2 and "serve" in result.output


def test_sources_are_opened_in_their_order(tmp_path):
    engine = EngineConfig(model="base")
    (tmp_path / "adapters").mkdir()
    (tmp_path / "with space").mkdir()
    urls = (
        f"file://localhost{tmp_path}/with%20space",
        "s3://b/one",
        str(tmp_path),
        "https://host.example/two",
        f"file://{tmp_path}/",
        "s3://b/one",
    )
    found = ServerConfig(
        engine=engine, served_names=("b",), adapter_roots=(str(tmp_path / "adapters"),), adapter_sources=urls
    )
    opened = [source.source for source in launch._open_sources(found)]
    first = [f"{tmp_path}/adapters", f"{tmp_path}/with space"]
    assert opened == [*first, "s3://b/one", str(tmp_path), "https://host.example/two", str(tmp_path)]
    refused = (
        ("ftp://host/x", "ftp"),
        ("file://adapters/x", "read as a host"),
        ("s3://key:secret@b/x", "--adapter-source"),
        ("/no/such", "no such"),
    )
    for url, word in refused:
        config = ServerConfig(engine=engine, served_names=("b",), adapter_sources=(url,))
        with pytest.raises(ConfigError, match=word) as said:
            launch._open_sources(config)
        assert "secret" not in str(said.value)


@pytest.mark.parametrize("flags", [["--adapter-source", ""], ["--adapter-source", "file://"], ["--adapters", ""]])
def test_a_variable_that_is_not_set_serves_no_folder(monkeypatch, flags):
    with pytest.raises(ConfigError, match=f"^{flags[0]}: it is empty"):
        launch._open_sources(parsed(monkeypatch, *flags))


async def test_a_cache_folder_in_use_is_an_error_of_the_flag_and_ends_the_engine(tmp_path, monkeypatch):
    class Engine:
        ready = SimpleNamespace(manifest_path="manifest")
        is_closed = False

        async def start(self, config: EngineConfig) -> None: ...

        async def close(self) -> None:
            self.is_closed = True

    engine = Engine()
    monkeypatch.setattr(launch, "AsyncEngine", lambda: engine)
    monkeypatch.setattr(launch, "BaseTokenizer", lambda *_: None)
    monkeypatch.setattr(launch, "read_manifest", lambda _: None)
    (tmp_path / "config.json").write_text("{}")
    other = RawFiles(tmp_path / "cache", 1)
    of_engine = EngineConfig(model=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    sources = ("https://store.example/a",)
    found = ServerConfig(engine=of_engine, served_names=("b",), port=0, adapter_sources=sources)
    with pytest.raises(ConfigError, match=r"--cache-dir .* in use by another server"):
        await launch._serve(found, Console(quiet=True), {})
    assert engine.is_closed
    other.close()


def test_libraries_that_log_whole_urls_are_kept_quiet():
    loggers = [logging.getLogger(name) for name in ("httpx", "httpcore")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.NOTSET)
        launch._set_up_logging()
        assert not any(logger.isEnabledFor(logging.INFO) for logger in loggers)
        assert all(logger.isEnabledFor(logging.WARNING) for logger in loggers)
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@pytest.mark.parametrize(
    ("flags", "env", "keys"),
    [
        (["--api-key", "a"], {}, ("a",)),
        (["--api-key", "a,b", "--api-key", "c"], {}, ("a", "b", "c")),
        ([], {"MULTILORA_API_KEY": "d,e"}, ("d", "e")),
        (["--api-key", ""], {}, ()),
    ],
)
def test_keys_are_repeated_or_listed(monkeypatch, flags, env, keys):
    assert parsed(monkeypatch, *flags, env=env).api_keys == keys


@pytest.mark.parametrize("origins", ["*", '"*"', "[1]", "{}"])
def test_origins_that_are_no_list_are_refused_by_name(origins):
    result = CliRunner().invoke(cli.app, ["serve", "--model", "base", "--allowed-origins", origins])
    assert result.exit_code == 2


@pytest.mark.parametrize(
    ("host", "keys", "is_warned"),
    [("127.0.0.1", (), False), ("::1", (), False), ("0.0.0.0", (), True), ("0.0.0.0", ("k",), False), ("::", (), True)],
)
def test_open_to_others_without_a_key_is_said(host, keys, is_warned):
    found = ServerConfig(engine=EngineConfig(model="m"), served_names=("b",), host=host, api_keys=keys)
    assert bool(warnings_of(found)) == is_warned
    assert all("--api-key" in line and host in line for line in warnings_of(found))


@pytest.mark.parametrize(
    ("text", "quota"),
    [("max 100000", None), ("150000 100000", 1.5), ("50000 100000", 0.5), ("400000 100000", 4.0), ("garbage", None)],
)
def test_the_cgroups_cpu_quota_bounds_the_threads(tmp_path, monkeypatch, text, quota):
    (tmp_path / "cpu.max").write_text(text + "\n")
    found = cpus._cgroup_quota(tmp_path / "cpu.max")
    assert found == quota
    monkeypatch.setattr(cpus, "_cgroup_quota", lambda: found)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(3)))
    assert cpus.available_cpus() == {None: 3, 1.5: 1, 0.5: 1, 4.0: 3}[quota]


def test_without_a_cgroup_file_there_is_no_quota(tmp_path):
    assert cpus._cgroup_quota(tmp_path / "missing") is None
