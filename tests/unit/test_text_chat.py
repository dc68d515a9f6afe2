"""Chats with an adapter's own template, extra variables and a final message to continue: as transformers has them."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.utils.chat_template_utils import render_jinja_template

from adapters_store.chat_template import AdapterTemplate
from adapters_store.errors import AdapterInvalid
from server.errors import BadRequest, ConfigError, ContextLengthExceeded
from server.text.templates import ChatTemplate, ChatTemplateError
from server.text.tokenizer import MAX_INLINE_CHAT_CHARS, BaseTokenizer

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and
 enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"""
TRIMMED = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</{{ m.role }}>\n{% endfor %}"
PARTS = """{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}
{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{% endif %}
</{{ m.role }}>{% endfor %}"""
VARIABLES = """{{ bos_token }}{{ enable_thinking }}{{ (style or '') | tojson }}{% for k, v in (extra or {}).items() %}
{{ k }}={{ v | tojson }};{% endfor %}{{ self_ }}{{ messages | length }}{% if date is not defined %}none{% endif %}"""
REASONING = """{% for m in messages %}{{ m.role }}:{% if m.reasoning_content is defined %}<think>{{
m.reasoning_content }}{{ m.thinking }}</think>{% endif %}{{ m.content }}
{% endfor %}"""

TURN = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, I"}]
FINALS = {
    "plain": TURN,
    "trailing space": [TURN[0], {"role": "assistant", "content": "Hello, I  "}],
    "leading space": [TURN[0], {"role": "assistant", "content": "  Hello"}],
    "newlines": [TURN[0], {"role": "assistant", "content": "a\n\nb\n"}],
    "repeated": [{"role": "user", "content": "Hello, I"}, *TURN],
    "user last": [TURN[0]],
    "empty": [TURN[0], {"role": "assistant", "content": ""}],
    "parts": [
        TURN[0],
        {"role": "assistant", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two "}]},
    ],
}


def theirs(template: str, messages: list[dict], **options) -> str:
    return render_jinja_template(conversations=[messages], chat_template=template, **options)[0][0]


@pytest.mark.parametrize("chat", FINALS)
@pytest.mark.parametrize("template", [CHATML, TRIMMED, PARTS], ids=["chatml", "trimmed", "parts"])
def test_continuing_the_final_message(template, chat):
    messages = FINALS[chat]
    ours = ChatTemplate(template, TOKENS)
    if chat == "parts" and not ours.takes_parts:
        messages = [messages[0], {"role": "assistant", "content": "one\ntwo "}]  # joined, as without continuing
    expected = theirs(template, messages, continue_final_message=True, add_generation_prompt=False, **TOKENS)
    assert ours.render(messages, add_generation_prompt=False, continue_final_message=True) == expected
    assert expected.rstrip().endswith(("two", messages[-1]["content"].strip()) if chat != "parts" else "two")


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        ("{% for m in messages %}{{ m.content[:4] }}{% endfor %}", TURN),  # drops the end
        ("{% for m in messages[:1] %}{{ m.content }}{% endfor %}", TURN),  # drops the message
        ("{{ messages | length }}", TURN),
        (CHATML, [TURN[0], {"role": "assistant"}]),
        (CHATML, []),
    ],
)
def test_what_cannot_be_continued_is_refused_by_both(template, messages):
    with pytest.raises(ValueError):
        theirs(template, messages, continue_final_message=True, add_generation_prompt=False)
    with pytest.raises(ChatTemplateError):
        ChatTemplate(template, TOKENS).render(messages, add_generation_prompt=False, continue_final_message=True)


def test_the_callers_messages_are_left_alone():
    messages = json.loads(json.dumps(FINALS["parts"]))
    ChatTemplate(PARTS, TOKENS).render(messages, add_generation_prompt=False, continue_final_message=True)
    assert messages == FINALS["parts"]


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"enable_thinking": False},
        {"enable_thinking": True, "style": "kurz ü <b>", "extra": {"a": [1, None, 2.5], "b": {"c": True}}},
        {"bos_token": "<other>"},
        {"self_": 1, "date": "today"},
    ],
)
@pytest.mark.parametrize("template", [CHATML, VARIABLES], ids=["chatml", "variables"])
def test_extra_variables(template, variables):
    ours = ChatTemplate(template, TOKENS)
    expected = theirs(template, [TURN[0]], add_generation_prompt=True, **{**TOKENS, **variables})
    assert ours.render([TURN[0]], variables=variables) == expected


def test_a_variable_may_have_any_name():
    ours = ChatTemplate("{{ messages | length }}{{ context }}{{ name }}", TOKENS)
    assert ours.render([TURN[0]], variables={"self": 1, "context": 2, "name": 3, "args": 4}) == "123"


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_under_its_three_names(key):
    messages = [TURN[0], {"role": "assistant", "content": "4", key: "2 + 2"}]
    assert ChatTemplate(REASONING, TOKENS).render(messages) == theirs(REASONING, messages, add_generation_prompt=True)


# --- through the tokenizer ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tokenizer = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "TokenizersBackend", "chat_template": TRIMMED, "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
async def base(folder) -> AsyncIterator[BaseTokenizer]:
    tokenizer = BaseTokenizer(folder)
    yield tokenizer
    await tokenizer.close()


def own(source: str, file: str = "chat_template.jinja", **tokens: str) -> AdapterTemplate:
    return AdapterTemplate("fr", file, source, tokens)


async def chat(base: BaseTokenizer, messages=None, template: str | AdapterTemplate | None = None, **options) -> str:
    options = {"add_generation_prompt": True, "add_special_tokens": False, **options}
    options["template"] = own(template) if isinstance(template, str) else template
    return base.decode(await base.encode_chat(messages or [TURN[0]], **options), skip_special_tokens=False)


async def test_an_adapters_template_in_place_of_the_bases(base):
    assert await chat(base) == "<user>Hi</user>\n"
    for _ in range(2):  # compiled, and from memory
        assert await chat(base, template=CHATML) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert await chat(base) == "<user>Hi</user>\n"


async def test_variables_reach_the_template(base):
    text = await chat(base, template=CHATML, kwargs={"enable_thinking": False})
    assert text.endswith("<think>\n\n</think>\n\n")
    assert await chat(base, template="{{ x }}", kwargs={"x": "y"}) == "y"


@pytest.mark.parametrize("name", ["messages", "tools", "documents", "add_generation_prompt"])
async def test_variables_may_not_replace_the_requests_own(base, name):
    with pytest.raises(BadRequest, match=name) as raised:
        await chat(base, kwargs={name: "x"})
    assert raised.value.param == "chat_template_kwargs"


async def test_continuing_goes_without_a_generation_prompt(base):
    with pytest.raises(BadRequest, match="add_generation_prompt"):
        await chat(base, TURN, continue_final_message=True)
    text = await chat(base, TURN, continue_final_message=True, add_generation_prompt=False)
    assert text == "<user>Hi</user>\n<assistant>Hello, I"


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer_config.json"])
async def test_a_broken_template_of_an_adapter_is_its_fault_and_names_the_file(base, file):
    for _ in range(2):
        with pytest.raises(AdapterInvalid, match=rf"^{file} of adapter fr: the chat template does not compile"):
            await chat(base, template=own("{% for %}", file))
    with pytest.raises(BadRequest, match="refuses these messages: nope"):
        await chat(base, template="{{ raise_exception('nope') }}")
    with pytest.raises(BadRequest, match="unsafe"):
        await chat(base, template="{{ ''.__class__.__mro__ }}")


async def test_an_adapters_own_special_tokens(base):
    """Those that its tokenizer_config.json names, and then no others; without any, the base's."""
    template = "{{ bos_token }}|{{ eos_token }}|{{ image_token }}"
    assert await chat(base, template=own(template)) == "<s>|</s>|"
    assert await chat(base, template=own(template, eos_token="<end>", image_token="[i]")) == "|<end>|[i]"
    assert await chat(base, template=own(template)) == "<s>|</s>|"  # one source, two compiled templates


@pytest.mark.parametrize("template", [None, "{{ 'x' * 150000 }}", "{% for m in messages %}{{ m.content }}{% endfor %}"])
async def test_what_no_context_could_hold_is_not_tokenized(base, template):
    messages = [{"role": "user", "content": "y" * 1000}] * 150
    with pytest.raises(ContextLengthExceeded, match=r"1\d{5} characters of these messages, above the 149999 "):
        await chat(base, messages, template=template, max_chars=149_999)


async def test_a_long_chat_is_the_same_off_the_loop(base):
    """The base's template renders in a thread from some length on."""
    short = [{"role": "user", "content": "y" * 100}]
    unit = await chat(base, short)
    messages = short * (MAX_INLINE_CHAT_CHARS // 100)
    loop_thread, rendered_in = threading.get_ident(), []
    render = base.chat_template.render
    base.chat_template.render = lambda *args, **kwargs: (
        rendered_in.append(threading.get_ident()) or render(*args, **kwargs)
    )
    assert await chat(base, messages) == unit * len(messages)
    assert await chat(base, short) == unit
    assert [thread == loop_thread for thread in rendered_in] == [False, True]


async def test_a_template_cannot_hand_the_tokenizer_half_a_character(base):
    with pytest.raises(BadRequest, match="not Unicode"):
        await chat(base, template=r"{{ '\ud800' }}")


@pytest.mark.parametrize("template", [7, [{"name": "default"}]])
def test_a_base_whose_template_is_no_text_is_refused(folder, tmp_path, template):
    shutil.copy(folder / "tokenizer.json", tmp_path)
    config = {"tokenizer_class": "TokenizersBackend", "chat_template": template}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"chat.template"):
        BaseTokenizer(tmp_path)
