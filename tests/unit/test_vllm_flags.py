"""vLLM's command lines about adapters, and what is resolved from ours before the server is ready."""

from __future__ import annotations

import json

import pytest
from msgspec.structs import replace
from typer.testing import CliRunner

from adapters_store.catalog import Catalog
from adapters_store.errors import AdapterCorrupt, AdapterTooLarge
from server import cli
from server.config import EngineConfig, ServerConfig
from server.engine.messages import SlotChange
from server.errors import ConfigError
from server.prepare import assign_modules, check_fit, prepare_adapters
from server.vllm_flags import parse_lora_modules, split_names, spread_lora_modules
from tests.api.doubles import ScriptedEngine, ScriptedStore
from tests.unit.byte_device import PAGE, make_ref


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("serve --lora-modules a=x b=y --port 1", "serve --lora-modules a=x --lora-modules b=y --port 1"),
        ("--lora-modules a=x --lora-modules b=y c=z", "--lora-modules a=x --lora-modules b=y --lora-modules c=z"),
        ("serve --port 1 --model m", "serve --port 1 --model m"),
        ("--lora-modules --port 1", "--lora-modules --port 1"),
        ("--lora-modules=a=x --port 1", "--lora-modules=a=x --port 1"),
        ("", ""),
    ],
)
def test_a_list_behind_one_flag(given, meant):
    assert spread_lora_modules(given.split()) == meant.split()


def test_forms_of_a_module():
    one = '{"name": "c", "path": "/z", "base_model_name": "base"}'
    many = '[{"name": "d", "path": "e=f"}, {"name": "g/h", "path": "i"}]'
    assert parse_lora_modules(["a=x", "b=y=z", one, many], ["base"]) == (
        *(("a", "x"), ("b", "y=z"), ("c", "/z")),
        *(("d", "e=f"), ("g/h", "i")),
    )
    assert parse_lora_modules([], ["base"]) == ()


def test_another_base_of_a_module_is_said_and_taken(caplog):
    given = ['{"name": "a", "path": "x", "base_model_name": "other"}', '{"name": "b", "path": "y"}']
    assert parse_lora_modules(given, ["base"]) == (("a", "x"), ("b", "y"))
    (said,) = caplog.messages
    assert "a:" in said and "'other'" in said and "'base'" in said


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("a", "name=path"),
        ("a=", "name=path"),
        ("=x", "name=path"),
        ("a:b=x", "a:b"),
        ("base=x", "base"),
        ("{", "JSON|truncated|malformed"),
        ('{"name": "a"}', "path"),
        ('{"name": "a", "path": "x", "wish": 1}', "wish"),
        ('[{"name": "a", "path": "x"}, {"name": "a", "path": "y"}]', "twice"),
    ],
)
def test_bad_modules(value, reason):
    with pytest.raises(ConfigError, match=reason):
        parse_lora_modules([value], ["base"])


def test_names_are_split_and_kept_once():
    assert split_names(["a,b", "c , a", ""]) == ("a", "b", "c")
    assert split_names(None) == ()


@pytest.mark.parametrize(
    ("host", "is_allowed"),
    [("127.0.0.1", True), ("127.8.0.1", True), ("::1", True), ("localhost", True)]
    + [("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("", False), ("localhost.example.org", False)],
)
def test_runtime_loading_is_on_by_itself_on_loopback_only(host, is_allowed):
    config = ServerConfig(engine=EngineConfig(model="m"), served_names=("base",), host=host)
    assert config.may_load_adapters is is_allowed
    assert replace(config, allow_runtime_loading=True).may_load_adapters


# --- the command ----------------------------------------------------------------------------------------


@pytest.fixture
def serve(monkeypatch):
    """Run `multilora serve` up to the point where it would start; gives its ServerConfig and what it said."""

    def run(*arguments: str):
        started: list[ServerConfig] = []
        monkeypatch.setattr(cli, "_run", lambda config, **_: started.append(config))
        result = CliRunner().invoke(cli.app, spread_lora_modules(["serve", "--model", "some/base", *arguments]))
        return (started[0] if started else None), result.output

    return run


def test_flags_are_mapped(serve):
    config, output = serve(
        *("--enable-lora", "--max-loras", "7", "--max-lora-rank", "32", "--lora-modules", "a=x", "b=y"),
        *("--preload", "a,b", "--pin", "b", "--pin", "c", "--host", "0.0.0.0", "--allow-runtime-loading"),
    )
    assert config is not None, output
    assert (config.engine.max_adapters_per_step, config.engine.max_lora_rank) == (7, 32)
    assert config.lora_modules == (("a", "x"), ("b", "y"))
    assert (config.preload, config.pin, config.may_load_adapters) == (("a", "b"), ("b", "c"), True)
    assert "max-cpu-loras" not in output


def test_what_has_no_counterpart_is_explained_in_one_line(serve, capsys):
    config, output = serve("--max-cpu-loras", "9")
    output += capsys.readouterr().err
    assert config is not None
    assert "--max-cpu-loras 9" in output and "--host-memory" in output


def test_a_bad_module_ends_the_start(serve, capsys):
    config, _ = serve("--lora-modules", "nonsense")
    assert config is None


# --- before the server is ready -------------------------------------------------------------------------


def config(**fields) -> ServerConfig:
    return ServerConfig(engine=EngineConfig(model="m"), served_names=("base",), **fields)


def adapter(folder) -> None:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({}))


class Store(ScriptedStore):
    """ScriptedStore with names, as AdapterStore has them."""

    def __init__(self, root) -> None:
        super().__init__()
        self.catalog = Catalog([], ["base"])
        for name in ("a", "b"):
            adapter(root / name)
        assign_modules(self.catalog, [("a", str(root / "a")), ("b", str(root / "b"))])

    async def resolve(self, name):
        return await self.catalog.resolve(name)


def engine(adapter_bytes: int = 1 << 20) -> ScriptedEngine:
    made = ScriptedEngine(10, 0, script=lambda request: pytest.fail("nothing is asked"))
    made.ready = replace(made.ready, adapter_bytes=adapter_bytes)
    return made


def test_a_module_without_an_adapter_ends_the_start(tmp_path):
    with pytest.raises(ConfigError, match=r"--lora-modules x=.*nowhere.*adapter_config\.json"):
        assign_modules(Catalog([], ["base"]), [("x", str(tmp_path / "nowhere"))])


async def test_preloaded_is_compiled_and_pinned_is_on_the_device(tmp_path):
    store, device = Store(tmp_path), engine()
    pins = await prepare_adapters(config(preload=("a",), pin=("b",)), device, store)
    assert store.ensured == ["a", "b"]
    assert device.pinned == ["image-of-b"]
    assert ("b" in pins, "a" in pins) == (True, False)
    assert store.leases == {"image-of-b": 1}


async def test_a_later_pin_must_fit_beside_those_made_at_start(tmp_path):
    pins = await prepare_adapters(config(pin=("b",)), engine(3 * PAGE), Store(tmp_path))
    pins.check(make_ref("a", 2 * PAGE))
    with pytest.raises(AdapterTooLarge, match=r"adapter a can't be pinned: 16\.0 KiB don't fit .* 12\.0 KiB"):
        pins.check(make_ref("a", 3 * PAGE))
    pins.check(make_ref("new", 3 * PAGE, name="b"))  # in place of its own


@pytest.mark.parametrize("flag", ["preload", "pin"])
async def test_one_that_cannot_be_served_ends_the_start(tmp_path, flag):
    store = Store(tmp_path)
    store.errors["b"] = AdapterCorrupt("cut short")
    with pytest.raises(ConfigError, match=f"--{flag} b: cut short"):
        await prepare_adapters(config(**{flag: ("b",)}), engine(), store)
    with pytest.raises(ConfigError, match=f"--{flag} nobody: .*does not exist"):
        await prepare_adapters(config(**{flag: ("nobody",)}), engine(), store)


async def test_an_image_that_does_not_load_ends_the_start(tmp_path, monkeypatch):
    device = engine()
    failed = [SlotChange("image-of-b", "failed", "checksum differs")]
    monkeypatch.setattr(device, "pin_adapter", lambda ref: device.residents.apply(failed))
    with pytest.raises(ConfigError, match="--pin b: checksum differs"):
        await prepare_adapters(config(pin=("b",)), device, Store(tmp_path))


def test_pins_must_fit_with_the_sizes_named():
    refs = [make_ref("a", 3 * PAGE), make_ref("b", 2 * PAGE - 1), make_ref("a", 3 * PAGE, name="alias")]
    check_fit(refs, 5 * PAGE, 2)  # one content is there once
    with pytest.raises(
        ConfigError, match=r"--pin: 20\.0 KiB .* 16\.0 KiB \(.*12\.0 KiB, b 8\.0 KiB\).*--adapter-memory"
    ):
        check_fit(refs, 4 * PAGE, 2)
    with pytest.raises(ConfigError, match="2 adapters are more than the 1"):
        check_fit(refs, 5 * PAGE, 1)
