"""The demo as users meet it: real processes, real weights, the official client."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import openai
import pytest

from deploy.demo.scoring import accuracy, read_heldout
from deploy.demo.tasks import TASKS
from loadtest.adapters import write_random_adapter
from loadtest.server_process import running_server
from server.demo import demo_adapters_dir, demo_examples, ensure_demo_base
from server.model.manifest import build_manifest

NUM_PROMPTS = 12
MIN_ADAPTER = 0.5  # deploy/demo/README.md has the scores over more prompts
MAX_BASE = 0.2


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The demo base and a copy of its adapters, so that tests may add to the folder."""
    root = tmp_path_factory.mktemp("server")
    shutil.copytree(demo_adapters_dir(), root / "adapters")
    with running_server(ensure_demo_base(), root / "adapters", root / "cache", log=root / "log") as running:
        yield running, root


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server[0].url}/v1", api_key="none", max_retries=0, timeout=240)


async def ask_all(url: str, jobs: list[tuple[str, str]]) -> list[str]:
    """The answers to (model, prompt) jobs, all in flight at once."""
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=280) as api:
        answers = await asyncio.gather(
            *(
                api.chat.completions.create(
                    model=model, messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=80
                )
                for model, prompt in jobs
            )
        )
    assert [answer.model for answer in answers] == [model for model, _ in jobs]
    return [answer.choices[0].message.content for answer in answers]


def test_every_demo_adapter_does_its_task_beside_the_others(server):
    """All adapters and the base in one stream of requests; each adapter does what the base does not."""
    running, _ = server
    examples = {name: [e for e in read_heldout() if e.task == name][:NUM_PROMPTS] for name in TASKS}
    jobs = [(name, e.prompt) for name in TASKS for e in examples[name]]
    jobs += [("base", e.prompt) for name in TASKS for e in examples[name][:6]]
    answers = iter(asyncio.run(ask_all(running.url, jobs)))
    scores = {name: accuracy(examples[name], [next(answers) for _ in examples[name]]) for name in TASKS}
    base = {name: accuracy(examples[name][:6], [next(answers) for _ in range(6)]) for name in TASKS}
    print(scores, base)
    assert min(scores.values()) >= MIN_ADAPTER, scores
    assert max(base.values()) <= MAX_BASE, base


def test_models_lists_base_and_adapters(client):
    cards = {card.id: card for card in client.models.list()}
    assert set(cards) >= {"base", *(example.name for example in demo_examples())}
    assert cards["base"].parent is None
    assert cards["pirate"].parent == "base" and cards["pirate"].root


def test_streaming_gives_the_same_text(client):
    ask = {"model": "base:pirate", "messages": [{"role": "user", "content": "Tell me about the moon."}]}
    whole = client.chat.completions.create(**ask, temperature=0, max_tokens=24)
    chunks = client.chat.completions.create(**ask, temperature=0, max_tokens=24, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert whole.model == "pirate"


def test_the_image_key_is_in_a_header_and_follows_the_content(server, client):
    """Replaced under the same name: the next request has another key and another adapter's answer."""
    _, root = server
    folder = root / "adapters" / "swap"

    def ask() -> tuple[str, str]:
        raw = client.chat.completions.with_raw_response.create(
            model="swap", messages=[{"role": "user", "content": "Tell me about tea."}], temperature=0, max_tokens=12
        )
        return raw.headers["x-multilora-image-key"], raw.parse().choices[0].message.content

    shutil.copytree(root / "adapters" / "pirate", folder)  # added while running
    first, second = ask(), ask()
    shutil.rmtree(folder)
    shutil.copytree(root / "adapters" / "ticket-classifier", folder)
    third = ask()
    shutil.rmtree(folder)
    assert first == second and first[0] != third[0] and first[1] != third[1]
    with pytest.raises(openai.NotFoundError):
        ask()


@pytest.mark.parametrize(
    "name", ["nope", "../pirate", "a/../pirate", "pirate\0", "/etc", "outside", ".hidden", "a" * 200, "pirate/"]
)
def test_names_that_are_no_adapters_are_404(server, client, name, tmp_path_factory):
    _, root = server
    outside = root / "elsewhere"
    if not outside.exists():
        shutil.copytree(root / "adapters" / "pirate", outside)
        (root / "adapters" / "outside").symlink_to(outside)
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model=name, prompt="x", max_tokens=1)
    assert caught.value.code == "model_not_found"


def damage_truncated(folder: Path) -> str:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return "adapter_model.safetensors"


def damage_pickle_only(folder: Path) -> str:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    return "adapter_model.bin"


def damage_dora(folder: Path) -> str:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    return "use_dora"


def damage_wrong_shape(folder: Path) -> str:
    manifest = build_manifest(ensure_demo_base())
    site = next(site for site in manifest.sites if site.name == "3.q_proj")
    import msgspec

    narrow = msgspec.structs.replace(site, in_features=site.in_features // 2)
    shutil.rmtree(folder)
    write_random_adapter(folder, msgspec.structs.replace(manifest, sites=(narrow,)), 4, seed=1)
    return "layers.3.self_attn.q_proj"


@pytest.mark.parametrize("damage", [damage_truncated, damage_pickle_only, damage_dora, damage_wrong_shape])
def test_a_bad_adapter_is_refused_by_name_and_others_go_on(server, client, damage):
    """On a stream too the refusal is a status code; a request running meanwhile is not disturbed."""
    _, root = server
    folder = root / "adapters" / "bad"
    shutil.copytree(root / "adapters" / "pirate", folder)
    named = damage(folder)
    other = client.completions.create(model="pirate", prompt="Ahoy", max_tokens=24, stream=True, temperature=0)
    next(iter(other))
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model="bad", prompt="x", max_tokens=1, stream=True)
    assert caught.value.status_code == 422
    assert named in caught.value.message
    assert list(other)[-1].choices[0].finish_reason in ("length", "stop")
    shutil.rmtree(folder)


def test_a_client_that_leaves_is_aborted_within_a_step(server):
    running, _ = server
    body = {"model": "base", "prompt": "Count:", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{running.url}/v1/completions", json=body, timeout=120) as response:
        lines = response.iter_lines()  # kept: the connection is closed when its reader is gone
        next(lines)
        assert metric(running.url, "vllm:num_requests_running") == 1
    wait_until(lambda: metric(running.url, "vllm:num_requests_running") == 0)
    generated = metric(running.url, "vllm:generation_tokens_total")
    assert generated < 4000


def test_a_client_that_pipelines_gets_one_answer_and_is_missed_when_it_leaves(server):
    running, _ = server

    def request(max_tokens: int) -> bytes:
        fields = {"model": "base", "prompt": "x", "max_tokens": max_tokens, "ignore_eos": True}
        body = json.dumps(fields).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        return head.encode() + b"Content-Type: application/json\r\n\r\n" + body

    address = ("127.0.0.1", int(running.url.rsplit(":", 1)[1]))
    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall(request(2) * 2)
        answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))  # until the server closes
    assert answer.count(b"HTTP/1.1 200") == 1 and b"connection: close" in answer.lower()
    with socket.create_connection(address, timeout=60) as connection:
        connection.sendall(request(4000) * 2)
        wait_until(lambda: metric(running.url, "vllm:num_requests_running") == 1)
    wait_until(lambda: metric(running.url, "vllm:num_requests_running") == 0)


def test_the_api_process_stays_small(server):
    running, _ = server
    assert running.memory_bytes()["api"] < 300e6


def wait_until(is_so: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, f"not so within {seconds:g} s"
        time.sleep(0.05)


def metric(url: str, name: str) -> float:
    """The value of a metric that has one series."""
    text = httpx.get(f"{url}/metrics", timeout=30).text
    (line,) = [line for line in text.splitlines() if line.startswith((name + "{", name + " "))]
    return float(line.rsplit(" ", 1)[1])


def test_a_full_device_queues_then_says_503(tmp_path):
    """Room for one adapter, held by a long request: a second one waits a bounded time, then 503 with Retry-After."""
    base = ensure_demo_base()
    manifest = build_manifest(base)
    sizes = [write_random_adapter(tmp_path / "adapters" / name, manifest, 4, seed=i) for i, name in enumerate("ab")]
    flags = ("--adapter-memory", str(int(sizes[0] * 2.5)), "--max-queue-wait", "1.5", "--max-model-len", "8000")
    with running_server(base, tmp_path / "adapters", tmp_path / "cache", *flags) as running:
        url = f"{running.url}/v1/completions"
        body = {"model": "a", "prompt": "x", "max_tokens": 7000, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", url, json=body, timeout=60) as held:
            lines = held.iter_lines()
            next(lines)
            refused = httpx.post(url, json={"model": "b", "prompt": "x", "max_tokens": 1}, timeout=60)
            assert refused.status_code == 503, refused.text
            assert int(refused.headers["retry-after"]) >= 1
            assert refused.json()["error"]["code"] == "overloaded"
            # the base needs no slot: it is answered meanwhile
            answered = httpx.post(url, json={"model": "base", "prompt": "x", "max_tokens": 1}, timeout=60)
            assert answered.status_code == 200
        answered = httpx.post(url, json={"model": "b", "prompt": "x", "max_tokens": 1}, timeout=60)
        assert answered.status_code == 200, answered.text
