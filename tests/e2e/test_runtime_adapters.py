"""Adapters at run time in real processes: pins under pressure, replacement under a running stream, unload."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM

from loadtest.server_process import running_server
from tests.store.bases import ALL_LINEAR, SMALL, VOCAB, make_adapter, make_base

PINNED = ["alias", "one"]
NAMES = ["one", "two", "three", "four", "five"]
ARENA = "160KiB"  # three of these images
HOST = "110KiB"  # two of them
PROMPT = [5, 6, 7]
LONG = 600  # tokens: the stream outlives a replacement


def stir(seed: int) -> Callable[[torch.nn.Module], None]:
    """Factors so large that each adapter has an answer of its own."""

    def fill(model: torch.nn.Module) -> None:
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_()

    return fill


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A tiny base with a long context, adapters of equal size that answer differently, and one outside the root."""
    root = tmp_path_factory.mktemp("runtime")
    base = make_base(root / "base", "llama")
    config = LlamaConfig(**SMALL | {"max_position_embeddings": 4096, "tie_word_embeddings": False})
    LlamaForCausalLM(config).save_pretrained(root / "base")
    Tokenizer(WordLevel({f"t{n}": n for n in range(VOCAB)}, "t0")).save(str(root / "base" / "tokenizer.json"))
    (root / "base" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "TokenizersBackend"}))
    for index, name in enumerate(NAMES):
        make_adapter(base, root / "adapters" / name, target_modules=ALL_LINEAR, r=8, prepare=stir(index))
    (root / "adapters" / "alias").symlink_to("five")
    make_adapter(base, root / "elsewhere", target_modules=["q_proj"])
    return root


@pytest.fixture(scope="module")
def http(root):
    memory = ["--adapter-memory", ARENA, "--host-memory", HOST, "--kv-memory", "64MiB"]
    flags = [*memory, "--dtype", "float32", "--threads", "1"]
    by_hand = ["--pin", "one,alias", "--preload", "two,given", "--lora-modules", f"given={root / 'elsewhere'}"]
    with (
        running_server(root / "base", root / "adapters", root / "cache", *flags, *by_hand, log=root / "log") as server,
        httpx.Client(base_url=server.url, timeout=120) as client,
    ):
        yield client


def body(model: str, max_tokens: int = 12, **fields) -> dict[str, object]:
    return {"model": model, "prompt": PROMPT, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, **fields}


def ask(http, model: str, max_tokens: int = 12) -> str:
    response = http.post("/v1/completions", json=body(model, max_tokens))
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def adapters(http) -> dict[str, dict]:
    return {entry["name"]: entry for entry in http.get("/v1/adapters").json()["data"]}


def load(http, name: str, path: str, **fields) -> None:
    response = http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **fields})
    assert response.status_code == 200, response.text


def test_ready_means_prepared(http):
    """Before any request: the pinned one is on the device, the preloaded ones are compiled, nothing else is."""
    found = adapters(http)
    assert set(found) == {*NAMES, "alias", "given"}
    assert found["one"]["device"] == {"state": "resident", "pinned": True}
    assert {name for name, entry in found.items() if entry["disk"]["state"] == "compiled"} == {*PINNED, "two", "given"}
    assert [name for name, entry in found.items() if entry["device"]["state"] == "resident"] == PINNED
    assert found["given"]["rank"] == 4 and found["one"]["rank"] == 8
    assert all(entry["uses"] == 0 for entry in found.values())


def test_a_pinned_adapter_stays_under_pressure(http):
    answers = {name: ask(http, name) for name in NAMES}
    assert len(set(answers.values())) == len(NAMES)
    for name in (*NAMES[1:], *reversed(NAMES[1:])):
        assert ask(http, name) == answers[name]
        found = adapters(http)
        residents = {entry["image_key"] for entry in found.values() if entry["device"]["state"] == "resident"}
        assert residents >= {found[name]["image_key"] for name in (*PINNED, name)} and len(residents) <= 3
    assert adapters(http)["five"]["uses"] == 3
    assert ask(http, "one") == answers["one"]


def test_the_listing_tells_what_host_memory_has(http):
    for name in NAMES:
        ask(http, name)
    found = adapters(http)
    held = {entry["image_key"] for entry in found.values() if entry["host"]["state"] == "held"}
    assert held == {found[name]["image_key"] for name in ("three", "four")}  # the last read: two are pinned
    samples = http.get("/metrics").text.splitlines()
    (told,) = [line for line in samples if line.startswith("multilora_tier_adapters{") and 'tier="host"' in line]
    assert float(told.rsplit(" ", 1)[1]) == 2


@pytest.mark.parametrize("headers", [{"host": "evil.example"}, {"origin": "https://evil.example"}])
def test_a_page_of_another_site_gives_no_names(http, headers):
    """Loading is on here by loopback alone."""
    body = {"lora_name": "y", "lora_path": "two"}
    refused = http.post("/v1/load_lora_adapter", json=body, headers=headers)
    assert refused.status_code == 403 and "y" not in adapters(http)


def test_a_pin_follows_a_link_there_and_back(http, root):
    """`alias` leads to "five", to "four", and to "five" again, which is on disk by then."""
    for target, left in (("four", "five"), ("five", "four")):
        link, before = root / "adapters" / "alias", adapters(http)["alias"]["version"]
        (root / "adapters" / "new").symlink_to(target)
        (root / "adapters" / "new").rename(link)
        assert ask(http, "alias") == ask(http, target)
        for name in ("two", "three"):
            ask(http, name)
        while (found := adapters(http))["alias"]["version"] == before:  # a listing is up to a second old
            time.sleep(0.1)
        assert found["alias"]["image_key"] == found[target]["image_key"]
        assert found["alias"]["device"] == {"state": "resident", "pinned": True}
        assert found[left]["device"] == {"state": "absent", "pinned": False}


def test_a_replacement_leaves_the_running_stream_alone(http):
    load(http, "x", "two")
    undisturbed = ask(http, "two", LONG)
    first, text = "", ""
    with http.stream("POST", "/v1/completions", json=body("x", LONG, stream=True)) as stream:
        assert stream.status_code == 200
        for line in stream.iter_lines():
            if not line.startswith("data: {"):
                continue
            text += "".join(choice["text"] for choice in json.loads(line[6:])["choices"])
            if not first:
                first = text
                load(http, "x", "three", load_inplace=True)
                assert ask(http, "x") == ask(http, "three")
                for name in ("four", "five"):  # and pressure on the device, so that it would be evicted
                    ask(http, name)
    assert text == undisturbed
    assert not ask(http, "x", LONG).startswith(first + undisturbed[len(first) : len(first) + 40])


def test_unload_takes_name_and_image(http):
    load(http, "gone", "../adapters/four")
    ask(http, "gone")
    key = adapters(http)["gone"]["image_key"]
    assert adapters(http)["four"]["image_key"] == key  # one content under two names
    assert http.post("/v1/unload_lora_adapter", json={"lora_name": "gone"}).status_code == 200
    assert http.post("/v1/completions", json=body("gone")).status_code == 404
    ask(http, "five")  # the drop was sent before this request
    assert adapters(http)["four"]["device"]["state"] == "absent"
    assert ask(http, "four")


def test_a_pinned_name_takes_its_pin_along(http):
    old = adapters(http)["one"]["image_key"]
    load(http, "one", "two", load_inplace=True)
    ask(http, "three")
    found = adapters(http)
    assert found["one"]["image_key"] == found["two"]["image_key"] != old
    assert found["one"]["device"] == {"state": "resident", "pinned": True}
    for name in ("three", "four", "five"):
        ask(http, name)
    assert adapters(http)["one"]["device"]["state"] == "resident"


def test_pins_that_do_not_fit_end_the_start_with_their_sizes(root):
    command = [
        *(sys.executable, "-m", "server", "serve", "--model", str(root / "base"), "--adapters", str(root / "adapters")),
        *("--cache-dir", str(root / "cache"), "--port", "0", "--adapter-memory", ARENA, "--kv-memory", "8MiB"),
        *("--pin", ",".join(NAMES), "--threads", "1"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 2, said
    assert "--pin" in said and "160.0 KiB" in said and "five" in said and "--adapter-memory" in said
