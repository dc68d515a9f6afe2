"""How prompts and parameters are made: truncation, bad words, continued messages, templates, the base's defaults."""

from __future__ import annotations

import json
import logging

import pytest

from server.api.params import SamplingDefaults, read_sampling_defaults
from server.api.schemas import MAX_PROMPT_IDS
from server.engine.messages import RequestError
from server.errors import ConfigError
from tests.api.conftest import BASE, serve

CHAT = [{"role": "user", "content": "the lazy dog"}, {"role": "assistant", "content": "the quick"}]
TEXT = "the quick brown fox jumps"


async def ask(served, path: str = "/v1/completions", **fields) -> dict:
    async with served.http() as http:
        response = await http.post(path, json={"model": BASE, **fields})
    return response.json()


@pytest.mark.parametrize(
    ("keep", "max_tokens", "num_kept"), [(3, 5, 3), (1, None, 1), (500, 5, 200), (-1, 28, 100), (-1, None, 127)]
)
async def test_truncation_keeps_the_end(served, keep, max_tokens, num_kept):
    prompt = list(range(4, 204))
    answer = await ask(served, prompt=prompt, truncate_prompt_tokens=keep, max_tokens=max_tokens)
    if num_kept > 127:
        assert answer["error"]["code"] == "context_length_exceeded"
        return
    assert served.engine.added[0].prompt_ids == prompt[-num_kept:]
    assert answer["usage"]["prompt_tokens"] == num_kept


async def test_a_truncated_echo_is_what_was_kept(served):
    answer = await ask(served, prompt=TEXT, truncate_prompt_tokens=2, echo=True, max_tokens=0)
    kept = served.tokenizer.encode(TEXT, add_special_tokens=True)[-2:]
    assert answer["choices"][0]["text"] == served.tokenizer.decode(kept)


async def test_truncation_of_a_chat(served):
    whole = served.tokenizer.encode("<|user|>the lazy dog<|end|><|assistant|>", add_special_tokens=False)
    await ask(served, "/v1/chat/completions", messages=CHAT[:1], truncate_prompt_tokens=4, max_completion_tokens=3)
    assert served.engine.added[0].prompt_ids == whole[-4:]


async def test_bad_words_are_said_at_the_start_and_after_a_space(served):
    await ask(served, prompt="x", bad_words=["quick", " brown fox "])
    encode = served.tokenizer.encode
    assert set(served.engine.added[0].params.bad_words) == {
        tuple(encode(text, add_special_tokens=False)) for text in ("quick", " quick", "brown fox", " brown fox")
    }


async def test_biases_and_allowed_ids_reach_the_engine(served):
    await ask(served, prompt="x", logit_bias={"5": -100, "07": 0.5}, allowed_token_ids=[9, 8, 9], priority=-7)
    sent = served.engine.added[0]
    assert sent.params.logit_bias == ((5, -100.0), (7, 0.5))
    assert sent.params.allowed_token_ids == (9, 8)
    assert sent.priority == -7


async def test_a_continued_message(served):
    await ask(served, "/v1/chat/completions", messages=CHAT, continue_final_message=True)
    rendered = "<|user|>the lazy dog<|end|><|assistant|>the quick"
    assert served.engine.added[0].prompt_ids == served.tokenizer.encode(rendered, add_special_tokens=False)


async def test_an_adapters_own_template_and_its_variables(served):
    template = "{{ mood }}:{{ messages[-1]['content'] }}"
    (served.adapters_dir / "support-fr" / "chat_template.jinja").write_text(template)
    fields = {"messages": CHAT, "chat_template_kwargs": {"mood": "lazy"}}
    await ask(served, "/v1/chat/completions", **fields | {"model": "support-fr"})
    expected = served.tokenizer.encode("lazy:the quick", add_special_tokens=False)
    assert served.engine.added[0].prompt_ids == expected
    told = await ask(served, "/tokenize", **fields | {"model": "support-fr"})
    assert told["tokens"] == expected
    assert (await ask(served, "/tokenize", **fields))["tokens"] != expected


@pytest.mark.parametrize(("keeps", "text"), [(True, "the quick brown"), (False, "the quick ")])
async def test_a_kept_stop_string(served, keeps, text):
    served.answer(TEXT)
    answer = await ask(served, prompt="x", stop="brown", include_stop_str_in_output=keeps)
    assert answer["choices"][0]["text"] == text
    assert answer["choices"][0]["stop_reason"] == "brown"


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("keeps", [True, False])
async def test_special_tokens_and_the_end(served, skips, keeps):
    served.answer("the<|user|> dog")
    answer = await ask(served, prompt="x", skip_special_tokens=skips, include_stop_str_in_output=keeps)
    end = "<|end|>" if keeps and not skips else ""
    assert answer["choices"][0]["text"] == ("the dog" if skips else "the<|user|> dog") + end


@pytest.mark.parametrize(("status", "param"), [(400, None), (404, "model"), (422, "model"), (503, None)])
async def test_the_field_of_an_engines_error(served, status, param):
    served.answer("", finish_reason="error", error=RequestError(status, "some_code", "No."))
    assert (await ask(served, prompt="x"))["error"]["param"] == param


def write_defaults(folder, **fields) -> None:
    (folder / "generation_config.json").write_text(json.dumps(fields))


def test_defaults_of_a_base(tmp_path, caplog):
    assert read_sampling_defaults(tmp_path) == SamplingDefaults()
    write_defaults(
        tmp_path, temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.05, eos_token_id=[1], min_p=None
    )
    assert read_sampling_defaults(tmp_path) == SamplingDefaults(
        temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.05
    )
    write_defaults(tmp_path, temperature=0.6, top_p=0, top_k="many")
    with caplog.at_level(logging.WARNING):
        assert read_sampling_defaults(tmp_path) == SamplingDefaults(temperature=0.6)
    assert "top_p is 0" in caplog.text
    assert "top_k is 'many'" in caplog.text
    (tmp_path / "generation_config.json").write_text("[")
    with pytest.raises(ConfigError, match="generation_config"):
        read_sampling_defaults(tmp_path)


async def test_a_request_goes_before_the_defaults(tokenizer, adapters_dir):
    defaults = SamplingDefaults(temperature=0.6, top_p=0.9, top_k=20, min_p=0.1, repetition_penalty=1.05)
    given = {"temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1}
    async with serve(tokenizer, adapters_dir, defaults=defaults) as served:
        await ask(served, prompt="x")
        await ask(served, prompt="x", **given)
        await ask(served, prompt="x", **dict.fromkeys(given))  # null is absent
        taken, own, again = (request.params for request in served.engine.added)
    assert [getattr(taken, name) for name in given] == [0.6, 0.9, 20, 0.1, 1.05]
    assert [getattr(own, name) for name in given] == [0, 1, 0, 0, 1]
    assert [getattr(again, name) for name in given] == [0.6, 0.9, 20, 0.1, 1.05]


async def test_a_text_that_no_context_holds_is_refused_before_it_is_tokenized(served, monkeypatch):
    tokenizer = served.state.tokenizer
    max_chars = served.state.engine.ready.max_model_len * tokenizer.max_token_chars
    monkeypatch.setattr(tokenizer, "encode", lambda *_, **__: pytest.fail("tokenized"))
    bodies = [
        ("/v1/completions", {"model": BASE, "prompt": "x" * (max_chars + 1)}, "prompt"),
        ("/v1/completions", {"model": BASE, "prompt": [[5] * (MAX_PROMPT_IDS + 1)]}, "prompt"),
        ("/v1/chat/completions", {"model": BASE, "messages": [{"role": "user", "content": "x"}] * 5000}, "messages"),
    ]
    async with served.http() as http:
        for path, body, param in bodies:
            response = await http.post(path, json=body)
            error = response.json()["error"]
            assert response.status_code == 400, error
            assert (error["code"], error["param"]) == ("context_length_exceeded", param)
            assert "maximum context length is" in error["message"]
