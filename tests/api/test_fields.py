"""docs/api.md's tables of fields, row by row, against the schemas and against the running server."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params
from tokenizers import Tokenizer, processors

from server.api.fields import INERT, REFUSED_IN_MESSAGES
from server.api.schemas import REFUSED_BY_SCHEMA, ChatRequest, CompletionRequest, Message
from server.text.tokenizer import BaseTokenizer
from tests.api.conftest import ANSWER, BASE, serve

DOCS = Path(__file__).resolve().parents[2] / "docs" / "api.md"
ENDPOINTS = {CompletionRequest: "/v1/completions", ChatRequest: "/v1/chat/completions"}
TEMPLATE = (
    "{{ mood }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
VLLM_FIELDS = (
    "use_beam_search top_k min_p repetition_penalty length_penalty stop_token_ids include_stop_str_in_output "
    "ignore_eos min_tokens skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens truncation_side "
    "prompt_logprobs logprob_token_ids allowed_token_ids bad_words echo add_generation_prompt "
    "continue_final_message add_special_tokens documents chat_template chat_template_kwargs media_io_kwargs "
    "mm_processor_kwargs structured_outputs priority request_id session_id return_tokens_as_token_ids "
    "return_token_ids return_prompt_text cache_salt kv_transfer_params ec_transfer_params vllm_xargs "
    "repetition_detection stream_interval thinking_token_budget include_reasoning prompt_embeds guided_json "
    "guided_regex guided_choice guided_grammar "
)

# A value of each honoured field that must show, in what the engine is asked or in the answer; some need company.
SHOWING: dict[str, dict] = {
    "model": {"model": "support-fr"},
    "prompt": {"prompt": "lazy"},
    "messages": {"messages": [{"role": "user", "content": "lazy"}]},
    "n": {"n": 2},
    "max_tokens": {"max_tokens": 3},
    "max_completion_tokens": {"max_completion_tokens": 3},
    "min_tokens": {"min_tokens": 2},
    "temperature": {"temperature": 0.5},
    "top_p": {"top_p": 0.5},
    "top_k": {"top_k": 5},
    "min_p": {"min_p": 0.5},
    "repetition_penalty": {"repetition_penalty": 1.5},
    "presence_penalty": {"presence_penalty": 0.5},
    "frequency_penalty": {"frequency_penalty": 0.5},
    "seed": {"seed": 2},
    "stop": {"stop": "brown"},
    "stop_token_ids": {"stop_token_ids": [5]},
    "include_stop_str_in_output": {"include_stop_str_in_output": True, "stop": "brown"},
    "ignore_eos": {"ignore_eos": True},
    "logit_bias": {"logit_bias": {"5": 1.5}},
    "allowed_token_ids": {"allowed_token_ids": [5, 6]},
    "bad_words": {"bad_words": ["fox"]},
    "top_logprobs": {"top_logprobs": 2, "logprobs": True},
    "prompt_logprobs": {"prompt_logprobs": 1},
    "echo": {"echo": True},
    "truncate_prompt_tokens": {"truncate_prompt_tokens": 1},
    "skip_special_tokens": {"skip_special_tokens": False},
    "priority": {"priority": -3},
    "stream": {"stream": True},
    "stream_options": {"stream_options": {"include_usage": True}, "stream": True},
    "return_token_ids": {"return_token_ids": True},
    "return_tokens_as_token_ids": {"return_tokens_as_token_ids": True, "logprobs": None},
    "cache_salt": {"cache_salt": "tenant"},
    "add_generation_prompt": {"add_generation_prompt": False},
    "continue_final_message": {"continue_final_message": True},
    "chat_template_kwargs": {"chat_template_kwargs": {"mood": "quick"}},
}
ON = {CompletionRequest: 1, ChatRequest: True}  # what turns on logprobs, by endpoint


def tables() -> list[list[list[str]]]:
    """The cells of every table of the page, header and rule left out."""
    found: list[list[list[str]]] = []
    is_open = False
    for line in DOCS.read_text().splitlines():
        is_row = line.startswith("|")
        if is_row and not is_open:
            found.append([])
        if is_row:
            found[-1].append([cell.strip() for cell in line.strip("|").split(" | ")])
        is_open = is_row
    return [table[2:] for table in found]


FIELDS = [[row[0].strip("|` "), *row[1:]] for row in tables()[0]]
ROWS = [
    pytest.param(schema, row[0], row[column], id=f"{row[0]}-{name}")
    for row in FIELDS
    for column, (schema, name) in enumerate([(CompletionRequest, "completions"), (ChatRequest, "chat")], 1)
]


def inert_values(cell: str) -> list[object]:
    return [json.loads(value) for value in re.findall(r"`([^`]*)`", cell)]


@pytest.fixture
async def server(model_dir, adapters_dir, tmp_path):
    """A server whose tokenizer and template react to every field there is."""
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    system = ("<|system|>", tokenizer.token_to_id("<|system|>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<|system|> $A", special_tokens=[system])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "TokenizersBackend", "eos_token": "<|end|>", "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    async with serve(BaseTokenizer(tmp_path), adapters_dir) as served:
        served.answer(f"{ANSWER}<|user|> brown")
        yield served


async def outcome(server, schema, fields: dict) -> tuple[int, str, list]:
    """The status, the body without what differs by time, and what the engine was asked."""
    asked: dict = {"model": BASE, "seed": 1}
    if schema is CompletionRequest:
        asked |= {"prompt": "the quick", "max_tokens": 90}
    else:
        asked |= {"messages": [{"role": "user", "content": "the quick"}]}
    asked |= fields
    if asked.get("max_completion_tokens"):
        asked.pop("max_tokens", None)
    server.engine.added.clear()
    async with server.http() as http:
        response = await http.post(ENDPOINTS[schema], json=asked)
    text = re.sub(r'"(id|created)": ?("[^"]*"|\d+)', "", response.text)
    sent = [
        (request.prompt_ids, request.params, request.cache_salt, request.priority, request.adapter, request.pending)
        for request in server.engine.added
    ]
    return response.status_code, text, sent


def test_the_tables_name_every_field_once():
    names = [row[0] for row in FIELDS]
    assert len(set(names)) == len(names)
    ours = {name for schema in ENDPOINTS for name in (*schema.model_fields, *REFUSED_BY_SCHEMA[schema])}
    openai = {
        *completion_params.CompletionCreateParamsBase.__annotations__,
        *chat_params.CompletionCreateParamsBase.__annotations__,
        "stream",
    }
    assert ours == set(names)
    assert openai | set(VLLM_FIELDS.split()) <= set(names)
    assert len(names) > 80


@pytest.mark.parametrize(("schema", "name", "cell"), ROWS)
def test_a_rows_state_is_the_codes(schema, name, cell):
    state = re.match(r"\w+", cell).group()
    refused = REFUSED_BY_SCHEMA[schema]
    if name in schema.model_fields:
        assert state == ("inert" if name in INERT else "honoured")
    elif name in refused:
        assert state == "refused"
        said = {json.dumps(value) for value in inert_values(cell)}
        assert said == {json.dumps(value) for value in refused[name] if not (value == 1 and type(value) is float)}
    else:
        assert state == "unknown"


def test_the_table_of_messages():
    rows = {row[0].strip("|` "): row[1].strip("| ") for row in tables()[1]}
    assert rows.keys() == Message.model_fields.keys() | REFUSED_IN_MESSAGES.keys()
    for name, cell in rows.items():
        assert cell.startswith("honoured" if name in Message.model_fields else "refused"), name
        if name in REFUSED_IN_MESSAGES:
            assert tuple(inert_values(cell)) == REFUSED_IN_MESSAGES[name]


async def test_every_honoured_field_shows(server):
    for schema in ENDPOINTS:
        honoured = [row[0] for row in FIELDS if row[1 + (schema is ChatRequest)].startswith("honoured")]
        assert len(honoured) > 30
        for name in honoured:
            fields = dict(SHOWING.get(name, {}))
            if name == "logprobs":
                fields = {"logprobs": ON[schema]}
            elif name == "add_special_tokens":
                fields = {"add_special_tokens": schema is ChatRequest}
            elif "logprobs" in fields:
                fields["logprobs"] = ON[schema]
            company = {key: value for key, value in fields.items() if key != name}
            without = await outcome(server, schema, company)
            shown = await outcome(server, schema, fields)
            assert (without[0], shown[0]) == (200, 200), (name, shown[1], without[1])
            assert shown[1:] != without[1:], name


async def test_every_inert_field_changes_nothing(server):
    values = {"metadata": {"a": "b"}, "store": True}
    for schema in ENDPOINTS:
        plain = await outcome(server, schema, {})
        for row in FIELDS:
            if row[1 + (schema is ChatRequest)] == "inert":
                assert await outcome(server, schema, {row[0]: values.get(row[0], "x")}) == plain, row[0]


async def test_every_refused_field_is_named_and_its_idle_values_are_taken(server):
    for schema in ENDPOINTS:
        plain = await outcome(server, schema, {})
        for row in FIELDS:
            cell = row[1 + (schema is ChatRequest)]
            if cell.startswith("refused"):
                status, text, sent = await outcome(server, schema, {row[0]: {"odd": "value"}})
                error = json.loads(text)["error"]
                assert (status, sent) == (400, []), row[0]
                assert (error["param"], error["code"]) == (row[0], "unsupported_parameter")
                for value in (None, *inert_values(cell)):
                    assert await outcome(server, schema, {row[0]: value}) == plain, row[0]
            elif cell == "unknown":
                status, text, sent = await outcome(server, schema, {row[0]: None})
                assert (status, json.loads(text)["error"]["code"], sent) == (400, "unknown_parameter", [])
