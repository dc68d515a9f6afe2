"""Chat templates render what transformers renders, and nothing gets out of the sandbox."""

from __future__ import annotations

from datetime import datetime

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from server.text.templates import ChatTemplate, ChatTemplateError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "image_token": "<img>"}
SYSTEM = {"role": "system", "content": " Be brief.\n"}
CHATS = {
    "one": [{"role": "user", "content": "Hi <there> & \"you\" 'ü' 🙂"}],
    "system": [SYSTEM, {"role": "user", "content": "Hi"}],
    "turns": [
        SYSTEM,
        {"role": "user", "content": "a\n\nb"},
        {"role": "assistant", "content": "  spaced  "},
        {"role": "user", "content": ""},
    ],
    "named": [{"role": "user", "content": "x", "name": "bob"}],
}
TEMPLATES = {
    "chatml": """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{% endif %}""",
    "llama": """{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim + '\n\n' %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set system_message = '' %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {%- set content = system_message + message['content'] if loop.index0 == 0 else message['content'] %}
    {%- if message['role'] == 'user' %}
        {{- '[INST] ' + content.strip() + ' [/INST]' }}
    {%- else %}
        {{- ' ' + content.strip() + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}""",
    # block whitespace: trim_blocks and lstrip_blocks both change this one
    "whitespace": """start
  {% for m in messages %}
    {% if m.role == "system" %}
  S: {{ m.content | trim }}
    {% else %}
  {{ m.role }}: {{ m.content }}
    {% endif %}
  {% endfor %}
end
""",
    "loop-controls": """{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}
{% if loop.index > 3 %}{% break %}{% endif %}[{{ m.content }}]{% endfor %}""",
    "tojson": """{% for m in messages %}{{ m | tojson }}{{ m | tojson(indent=2) }}
{{ m | tojson(sort_keys=true, separators=(',', ':'), ensure_ascii=true) }}{% endfor %}{{ tools | tojson }}""",
    "generation": """{% set x = 'out' %}{% for m in messages %}{% if m.role == 'assistant' %}
{% generation %}{% set x = 'in' %}{{ m.content }}{{ eos_token }}{{ x }}{% endgeneration %}
{% else %}{{ m.content }}{% endif %}{{ x }}{% endfor %}""",
    "namespace": """{% set ns = namespace(found=false, n=0) %}{% for m in messages %}
{% set ns.n = ns.n + 1 %}{% if m.role == 'user' %}{% set ns.found = true %}{% endif %}{% endfor %}
{{ ns.found }} {{ ns.n }} {{ dict(a=1) }} {{ dict.fromkeys(['k'], 2) }}""",
    "undefined": "{{ nothing }}{{ messages[0].nothing }}{{ nothing is defined }}{{ tools is none }}{{ documents }}",
    "macro": """{% macro turn(m) %}<{{ m.role }}>{{ m.content }}{{ caller() if caller else '' }}{% endmacro %}
{% for m in messages %}{{ turn(m) }}{% endfor %}{{ image_token }}{{ pad_token }}""",
    "filters": """{% for m in messages %}{{ m.content | upper | replace('H', 'J') | length }}{{ m.content[:2] }}
{{ m.content.split('\n') | join('|') }}{{ m.content.startswith('H') }}{{ loop.last }}{% endfor %}
{{ messages | map(attribute='role') | list }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}""",
}


def theirs(template: str, messages: list[dict], add_generation_prompt: bool) -> str:
    rendered, _ = render_jinja_template(
        conversations=[messages],
        chat_template=template,
        add_generation_prompt=add_generation_prompt,
        **TOKENS,
    )
    return rendered[0]


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_parity(name, chat, add_generation_prompt):
    template, messages = TEMPLATES[name], CHATS[chat]
    ours = ChatTemplate(template, TOKENS)
    try:
        expected = theirs(template, messages, add_generation_prompt)
    except Exception as error:
        with pytest.raises(ChatTemplateError, match=str(error)):
            ours.render(messages, add_generation_prompt=add_generation_prompt)
        return
    assert ours.render(messages, add_generation_prompt=add_generation_prompt) == expected


def test_parity_of_the_clock():
    template = "{{ strftime_now('%d %b %Y') }}"
    assert ChatTemplate(template, {}).render(CHATS["one"]) == theirs(template, CHATS["one"], True)
    assert ChatTemplate(template, {}).render(CHATS["one"]) == datetime.now().strftime("%d %b %Y")


def test_parity_of_parts_where_the_template_reads_them():
    template = """{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}
{% for part in m.content %}{% if part.type == 'text' %}{{ part.text | trim }}{% endif %}{% endfor %}{% endif %}
{% endfor %}"""
    messages = [{"role": "user", "content": [{"type": "text", "text": " a "}, {"type": "text", "text": "b"}]}]
    ours = ChatTemplate(template, TOKENS)
    assert (ours.takes_text, ours.takes_parts) == (True, True)
    assert ours.render(messages) == theirs(template, messages, True)


PARTS = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]


def test_parts_are_joined_where_the_template_wants_text():
    ours = ChatTemplate(TEMPLATES["chatml"], TOKENS)
    assert (ours.takes_text, ours.takes_parts) == (True, False)
    assert "a\nb" in ours.render(PARTS)
    printed = ChatTemplate("{% for m in messages %}{{ m.content }}{% endfor %}", {})
    assert printed.render(PARTS) == "a\nb"  # not the Python form of a list


def test_text_becomes_a_part_where_the_template_reads_parts_only():
    """Or the text would be dropped without a word: characters have no `text`."""
    ours = ChatTemplate("{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}", {})
    assert (ours.takes_text, ours.takes_parts) == (False, True)
    assert ours.render(CHATS["one"]) == CHATS["one"][0]["content"]
    assert ours.render(PARTS) == "ab"


def test_null_keys_are_no_keys():
    template = "{% for m in messages %}{{ 'name' in m }}{% endfor %}"
    assert ChatTemplate(template, {}).render([{"role": "user", "content": "x", "name": None}]) == "False"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages.__class__.__name__ }}",
        "{{ raise_exception.__globals__.json }}",
        "{{ dict.__class__.__init__.__globals__ }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(10000000) %}{% endfor %}",
    ],
)
def test_the_sandbox_holds(template):
    with pytest.raises(ChatTemplateError):
        ChatTemplate(template, {}).render(CHATS["one"])


def test_a_template_that_does_not_compile():
    with pytest.raises(ChatTemplateError, match="does not compile"):
        ChatTemplate("{% for %}", {})


def test_the_templates_own_refusal():
    with pytest.raises(ChatTemplateError, match=r"^roles must alternate$"):
        ChatTemplate(TEMPLATES["llama"], TOKENS).render([CHATS["one"][0]] * 2)
