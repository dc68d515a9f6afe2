"""Adapters' own templates can neither hold nor bloat the server: each breach costs its own request alone."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from adapters_store.child import IMPORT_ROOT, frame, read_frame
from adapters_store.errors import AdapterInvalid, AdapterTooLarge, AdapterUnavailable
from server.errors import BadRequest
from server.text import renderer as module
from server.text.render_worker import MAX_TEMPLATES, Rendered, RenderJob, Reply, Templates
from server.text.renderer import TemplateRenderer, TextTooLong
from server.text.templates import ChatTemplate, ChatTemplateError

ECHO = "{{ messages[0].content }}"
LOOPS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
HOLDS = {
    "loops": LOOPS,
    "power": "{% set n = 10 ** 6 %}{{ (n ** n ** 2) % 7 }}",
    "power while it compiles": "{{ 10 ** (10 ** 10) % 7 }}",
    "lipsum": "{{ lipsum(n=10 ** 7) }}",
    "long to compile": "{{ x }}" * 140_000,
}
BLOATS = {
    "product": "{{ 'a' * 10 ** 10 }}",
    "center": "{{ 'a' | center(10 ** 9) }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "format method": "{{ '{:1000000000}'.format(1) }}",
    "doubling": "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "lists": """{% set ns = namespace(l=[]) %}{% for i in range(99999) %}
{% set ns.l = ns.l + [range(99999) | list] %}{% endfor %}""",
    "join": "{{ range(99999) | join('x' * 99999) }}",
}
BROKEN = {
    "syntax": "{% for %}",
    "parentheses": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "signs": "{{ " + "-" * 100_000 + "1 }}",
    "blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "loops": "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
}
REFUSES = {
    "recursion": "{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}",
    "half a character": r"{{ '\ud800' }}",
    "sandbox": "{{ ''.__class__.__mro__ }}",
    "attribute": "{% set x = namespace() %}{{ x.y.z }}",
}
WHERE = "chat_template.jinja of adapter fr"


def job(source: str, content: str = "hi", **fields) -> RenderJob:
    defaults = {
        "source": source,
        "special_tokens": {"bos_token": "<s>"},
        "messages": [{"role": "user", "content": content}],
        "add_generation_prompt": True,
        "continue_final_message": False,
        "variables": {},
        "max_chars": 10_000,
    }
    return RenderJob(**{**defaults, **fields})


@pytest.fixture
async def renderer() -> AsyncIterator[TemplateRenderer]:
    renderer = TemplateRenderer()
    yield renderer
    await renderer.close()
    assert renderer.pid is None


async def assert_works(renderer: TemplateRenderer, adapter: str = "other") -> None:
    assert await renderer.render(adapter, WHERE, job(ECHO, "<ü 🙂>")) == "<ü 🙂>"


# --- breaches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOLDS)
async def test_time_is_bounded(renderer, monkeypatch, name):
    await assert_works(renderer)
    pid = renderer.pid
    with monkeypatch.context() as patch, pytest.raises(AdapterTooLarge, match=rf"^{WHERE}: .* longer than 0\.7 s, "):
        patch.setattr(module, "MAX_RENDER_S", 0.7)
        await renderer.render("fr", WHERE, job(HOLDS[name]))
    assert_gone(pid)
    await assert_works(renderer, "fr")


@pytest.mark.parametrize("name", BLOATS)
async def test_memory_is_bounded(renderer, monkeypatch, name):
    monkeypatch.setattr(module, "MAX_RENDER_S", 60.0)  # so that it is not the time
    with pytest.raises(AdapterTooLarge, match=rf"^{WHERE}: .* more memory than 512 MiB, the limit$"):
        await renderer.render("fr", WHERE, job(BLOATS[name]))
    await assert_works(renderer, "fr")


@pytest.mark.parametrize("name", BROKEN)
async def test_what_does_not_compile_names_its_file(renderer, name):
    await assert_works(renderer)
    pid = renderer.pid
    with pytest.raises(AdapterInvalid, match=rf"^{WHERE}: the chat template does not compile"):
        await renderer.render("fr", WHERE, job(BROKEN[name]))
    await assert_works(renderer)
    assert renderer.pid == pid


@pytest.mark.parametrize("name", REFUSES)
async def test_what_fails_in_rendering_is_the_templates_refusal(renderer, name):
    await assert_works(renderer)
    pid = renderer.pid
    with pytest.raises(ChatTemplateError):
        await renderer.render("fr", WHERE, job(REFUSES[name]))
    await assert_works(renderer)
    assert renderer.pid == pid


async def test_a_templates_words_are_cut(renderer):
    with pytest.raises(ChatTemplateError) as raised:
        await renderer.render("fr", WHERE, job("{{ raise_exception('ab' * 10 ** 6) }}"))
    assert 100 < len(str(raised.value)) < 2000


async def test_the_text_is_bounded(renderer):
    assert await renderer.render("fr", WHERE, job("{{ 'a' * 10000 }}")) == "a" * 10_000
    with pytest.raises(TextTooLong) as raised:
        await renderer.render("fr", WHERE, job("{{ 'a' * 10001 }}"))
    assert raised.value.num_chars == 10_001


async def test_an_adapter_that_always_holds_it_delays_others_by_one_turn(renderer, monkeypatch):
    monkeypatch.setattr(module, "MAX_RENDER_S", 1.0)
    await assert_works(renderer, "good")
    ended = []

    async def ask(adapter: str, source: str) -> None:
        try:
            await renderer.render(adapter, WHERE, job(source))
        except AdapterTooLarge:
            assert adapter == "bad"
        ended.append(adapter)

    bad = [asyncio.create_task(ask("bad", LOOPS)) for _ in range(4)]
    await asyncio.sleep(0.05)
    await asyncio.gather(*(ask("good", ECHO) for _ in range(20)))
    assert ended.count("bad") <= 1
    await asyncio.gather(*bad)
    assert ended.count("bad") == 4


# --- the child ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "error"), [(signal.SIGKILL, AdapterUnavailable), (signal.SIGSEGV, AdapterInvalid)])
async def test_the_child_dies_in_mid_render(renderer, number, error):
    await assert_works(renderer)
    task = asyncio.create_task(renderer.render("fr", WHERE, job(LOOPS)))
    await asyncio.sleep(0.1)
    os.kill(renderer.pid, number)
    with pytest.raises(error, match=f"^{WHERE}: "):
        await task
    await assert_works(renderer)


async def test_the_child_is_killed_while_it_is_idle(renderer):
    await assert_works(renderer)
    process = renderer._process
    process.kill()
    await process.wait()
    await assert_works(renderer)


async def test_one_child_serves_all_and_each_gets_its_own_text(renderer):
    async def ask(index: int) -> str:
        return await renderer.render(f"adapter-{index % 7}", WHERE, job(f"{index % 7}:{ECHO}", f"{index}"))

    assert await asyncio.gather(*map(ask, range(150))) == [f"{index % 7}:{index}" for index in range(150)]
    pid = renderer.pid
    await assert_works(renderer)
    assert renderer.pid == pid


async def test_a_caller_who_leaves_does_not_shift_the_answers(renderer):
    await assert_works(renderer)
    slow = "{% for a in range(99999) %}{% endfor %}slow"
    for delay_s in (0.0, 0.0, 0.001, 0.002, 0.004):
        task = asyncio.create_task(renderer.render("fr", WHERE, job(slow)))
        await asyncio.sleep(delay_s)
        task.cancel()
        await assert_works(renderer)
    assert await renderer.render("fr", WHERE, job(slow)) == "slow"


async def test_close_ends_a_render_and_a_later_one_starts_anew(renderer):
    await assert_works(renderer)
    pid = renderer.pid
    task = asyncio.create_task(renderer.render("fr", WHERE, job(LOOPS)))
    await asyncio.sleep(0.05)
    await renderer.close()
    with pytest.raises(AdapterUnavailable):
        await task
    assert_gone(pid)
    await assert_works(renderer)


SMALL = "import server.text.render_worker as w; w.MAX_IDLE_BYTES = 24 << 20; w.main()"


def test_a_child_that_has_grown_ends_before_it_refuses_anyone():
    """Compiled templates are kept; many huge ones, each within the bounds, must not use up another's room."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", SMALL], cwd=IMPORT_ROOT, **pipes) as child:
        assert read_frame(child.stdout) == b""
        for index in range(MAX_TEMPLATES):
            source = f"{index}{{% if false %}}{chr(1) * 800_000}{{% endif %}}"
            child.stdin.write(frame(msgspec.json.encode(job(source))))
            child.stdin.flush()
            reply = msgspec.json.decode(read_frame(child.stdout), type=Reply)
            assert reply.outcome == Rendered(str(index))
            if reply.is_last:
                break
        assert reply.is_last and index > 0
        assert child.wait(20) == 0


def test_compiled_templates_are_kept_by_source_and_tokens():
    templates = Templates()
    first = templates.get(job(ECHO))
    assert templates.get(job(ECHO, "another chat")) is first
    assert templates.get(job(ECHO, special_tokens={})) is not first
    for index in range(MAX_TEMPLATES - 2):
        templates.get(job(str(index)))
        assert templates.get(job(ECHO)) is first  # in use, so not the one that goes
    templates.get(job("one more"))
    templates.get(job("and another"))
    assert len(templates._compiled) == MAX_TEMPLATES
    assert templates.get(job(ECHO)) is first


async def test_what_a_template_is_given_survives_the_pipe(renderer):
    source = "{{ bos_token }}{{ v | tojson }}{{ v.big + 1 }}{{ messages | tojson }}{{ add_generation_prompt }}"
    value = {
        "big": 2**70,
        "neg": -(2**70),
        "float": 0.1,
        "none": None,
        "text": "\0\x1f\n ü 🙂 \ufffe",
        "list": [[], {}],
    }
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "a"}], "name": None},
        {"role": "x", "content": "y\r\n"},
    ]
    expected = ChatTemplate(source, {"bos_token": "<s>"}).render(chat, variables={"v": value})
    assert await renderer.render("fr", WHERE, job(source, messages=chat, variables={"v": value})) == expected


async def test_variables_nested_too_deeply_are_the_clients_fault(renderer):
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(BadRequest) as raised:
        await renderer.render("fr", WHERE, job(ECHO, variables={"v": nested}))
    assert raised.value.param == "chat_template_kwargs"
    while nested:
        nested = nested[0]  # a chain this long is freed by hand: the destructor recurses
    await assert_works(renderer)


async def test_the_child_sees_no_secret_and_has_no_room_to_grow(renderer, monkeypatch):
    monkeypatch.setenv("MULTILORA_API_KEY", "s3cret")
    monkeypatch.setenv("TZ", "UTC")
    await assert_works(renderer)
    process = Path("/proc") / str(renderer.pid)
    environment = (process / "environ").read_bytes()
    assert b"s3cret" not in environment and b"TZ=UTC" in environment
    limits = (process / "limits").read_text().splitlines()
    soft, hard = next(line for line in limits if line.startswith("Max address space")).split()[3:5]
    assert soft == hard and int(soft) < 1 << 30


def test_the_child_imports_nothing_heavy():
    code = (
        "import sys, server.text.render_worker; "
        "assert not {'torch', 'numpy', 'transformers', 'tokenizers', 'fastapi'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=IMPORT_ROOT, timeout=60)


PARENT = """
import asyncio, sys
from server.text.renderer import TemplateRenderer
from tests.unit.test_text_renderer import ECHO, LOOPS, WHERE, job

async def main():
    renderer = TemplateRenderer()
    await renderer.render("a", WHERE, job(ECHO))
    task = asyncio.create_task(renderer.render("b", WHERE, job(LOOPS)))
    await asyncio.sleep(0.05)
    print(renderer.pid, flush=True)
    await task

asyncio.run(main())
"""


def test_the_child_ends_with_its_parent():
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, cwd=IMPORT_ROOT) as parent:
        pid = int(parent.stdout.readline())
        parent.kill()
    assert_gone(pid)


def assert_gone(pid: int) -> None:
    """Not there, or only its exit status (a zombie that no parent has looked at)."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state == "Z":
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} is still there")
