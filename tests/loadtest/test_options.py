"""What the bench commands refuse: in one line, with status 2, before anything is started or written."""

from __future__ import annotations

import asyncio
import signal
from types import SimpleNamespace

import pytest

import loadtest.kernels
from loadtest import bench, catalog, cold, steps, throughput
from tests.zoo import tiny_base

KERNELS = {"--rounds": ["0"], "--rows": ["8", "0"], "--threads": ["-1"]}
PARTS = {"--num-adapters": ["0"], "--repeats": ["0"], "--rank": ["8", "513"], "--model": ["/nowhere"]}
CATALOG = {
    "--registered": ["8", "0"],
    "--num-requests": ["0"],
    "--repeats": ["0"],
    "--load": ["nan"],
    "--concurrency": ["0"],
    "--prompt-tokens": ["0"],
    "--output-tokens": ["x"],
    "--warmup": ["-1"],
    "--model": ["/nowhere"],
}
ASKED = [
    *([command, flag, *values] for command in ("step", "throughput", "cold") for flag, values in PARTS.items()),
    *(["kernels", flag, *values] for flag, values in KERNELS.items()),
    *(["catalog", flag, *values] for flag, values in CATALOG.items()),
    *(["catalog", f"--rate={rate}"] for rate in ("0", "-1", "inf", "x")),
    *([command, "--json", path] for command in ("step", "kernels", "catalog") for path in ("none/x.json", "folder")),
    *(["catalog", flag, path] for flag in ("--out", "--folder") for path in ("file", "file/runs")),
]


def refused(arguments, capsys):
    """The line."""
    capsys.readouterr()  # what the making of a base has shown
    with pytest.raises(SystemExit) as ended:
        bench.main([str(argument) for argument in arguments])
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 1
    return lines[0]


@pytest.fixture(autouse=True)
def the_tests_own_handler():
    """Some commands take SIGTERM."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def nothing_runs(tmp_path, monkeypatch):
    """An empty folder to be in, and no work that could be done."""

    def begun(*_, **__):
        raise AssertionError("work was begun")

    monkeypatch.chdir(tmp_path)
    for name in ("steps.measure_steps", "throughput.measure_throughput", "cold.measure_cold"):
        monkeypatch.setattr(f"loadtest.{name}", begun)
    monkeypatch.setattr(catalog, "_write", begun)
    monkeypatch.setattr(loadtest.kernels, "measure", begun)


@pytest.mark.parametrize("arguments", ASKED, ids=" ".join)
def test_what_makes_no_sense_is_refused(arguments, nothing_runs, tmp_path, capsys):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    flag, _, value = arguments[1].partition("=")
    line = refused(arguments, capsys)
    assert line.startswith("multilora bench") and flag in line and (value or arguments[-1]) in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--popularity", "bogus"], "popularity 'bogus'"),
        (["--popularity", "power:0"], "power:0"),
        (["--registered", "1", "4", "--parts", "mixes"], "'one adapter has 90 %' with --registered 1"),
        (["--highest-id", "321"], "--highest-id 321"),
        (["--highest-id", "100"], "highest-id 100"),
        (["--prompt-tokens", "500", "--output-tokens", "13"], "512 tokens"),
        (["--registered", "8", "8"], "smaller first"),
    ],
)
def test_a_catalog_that_cannot_be_asked_for_is_refused_before_adapters_are_written(
    flags, told, nothing_runs, tmp_path, capsys
):
    base = tiny_base(tmp_path / "base", "llama", num_hidden_layers=1)
    sizes = [] if "--registered" in flags else ["--registered", "2", "4"]
    assert told in refused(["catalog", "--model", base, "--folder", tmp_path / "kept", *sizes, *flags], capsys)
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("command", ["catalog", "cold"])
def test_a_base_that_is_not_served_is_refused(command, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    assert str(tmp_path) in refused([command, "--model", tmp_path], capsys)


def test_a_level_of_the_kernels_that_there_is_not_is_refused(nothing_runs, monkeypatch, capsys):
    monkeypatch.setattr(loadtest.kernels, "native_library", loadtest.kernels.native_library.__wrapped__)
    monkeypatch.setenv("MULTILORA_CPU_KERNELS", "bogus")
    assert "MULTILORA_CPU_KERNELS: unknown level 'bogus'" in refused(["kernels"], capsys)


class Asked(Exception):
    """With the prompt's ids."""


def ask(prompt, *_):
    raise Asked(prompt)


class Client:
    """Of httpx."""

    def stream(self, *_, json, **__):
        raise Asked(json["prompt"])

    async def post(self, _, json):
        raise Asked(json["prompt"])


def of_step(workload, monkeypatch):
    runner = SimpleNamespace(_forward=None, _sampler=SimpleNamespace(sample=None))
    llm = SimpleNamespace(core=SimpleNamespace(_runner=runner, _batches=None), submit=ask)
    steps._decoding(llm, workload, [None])


def of_cold(workload, monkeypatch):
    cold.first_token(Client(), workload, "base", 7)


def of_throughput(workload, monkeypatch):
    asyncio.run(throughput._complete(Client(), workload, "base", 7, 3))


@pytest.mark.parametrize("part", [of_step, of_cold, of_throughput])
def test_prompts_are_of_the_bases_vocabulary(part, tmp_path, monkeypatch):
    workload = bench.Workload(tiny_base(tmp_path, "llama", vocab_size=90, num_hidden_layers=1))
    with pytest.raises(Asked) as asked:
        part(workload, monkeypatch)
    (ids,) = asked.value.args
    assert len(ids) == workload.prompt_tokens and min(ids) >= 3 and max(ids) < 90
    assert len(set(ids)) == 87, "11 and 87 have no common factor: all of them come"
