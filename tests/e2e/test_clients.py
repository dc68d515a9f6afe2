"""The clients that users have, unchanged, against real processes: openai, langchain-openai and litellm.

What one client is told is the oracle of the others: all of them ask for the same greedy answers.
"""

from __future__ import annotations

import asyncio
import json
import socket

import openai
import pytest
from langchain_openai import ChatOpenAI
from openai.types.chat import ChatCompletion

from loadtest.server_process import running_server
from server.demo import demo_adapters_dir, demo_examples, ensure_demo_base

KEY = "s3cret"
NAMES = [example.name for example in demo_examples()]
PROMPTS = {"base": "What is the capital of France?", **{example.name: example.prompt for example in demo_examples()}}
MAX_TOKENS = 12
GREEDY = {"temperature": 0, "max_tokens": MAX_TOKENS}
REASONS = {"base": "stop", "pirate": "length"}
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@pytest.fixture(scope="module", autouse=True)
def only_loopback():
    """No client may talk to anyone but the server: no price list, no telemetry, no tokenizer download."""
    strangers: list[object] = []
    resolve, connect = socket.getaddrinfo, socket.socket.connect

    def checked(host: object) -> None:
        if host not in LOOPBACK:
            strangers.append(host)
            raise OSError(f"{host} is not the server")

    def checked_resolve(host, *args, **kwargs):
        checked(host)
        return resolve(host, *args, **kwargs)

    def checked_connect(self, address):
        checked(address[0] if isinstance(address, tuple) else "localhost")  # a path is a Unix socket
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "getaddrinfo", checked_resolve)
        patch.setattr(socket.socket, "connect", checked_connect)
        patch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it fetches prices when imported
        patch.setenv("LANGSMITH_TRACING", "false")
        yield
    assert not strangers


@pytest.fixture(scope="module")
def url(tmp_path_factory, only_loopback):
    """The demo, with a key."""
    root = tmp_path_factory.mktemp("clients")
    flags = ("--api-key", KEY, "--threads", "1")
    with running_server(ensure_demo_base(), demo_adapters_dir(), root / "cache", *flags, log=root / "log") as running:
        yield f"{running.url}/v1"


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=240) as api:
        yield api


def async_client(url: str) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=240)


def chat(model: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": PROMPTS[model]}]


@pytest.fixture(scope="module")
def alone(client) -> dict[str, ChatCompletion]:
    """Each model's answer to its own prompt, asked for one after the other; the pirate's is cut, the base's not."""
    return {name: client.chat.completions.create(model=name, messages=chat(name), **GREEDY) for name in PROMPTS}


@pytest.fixture(scope="module")
def answers(alone) -> dict[str, str]:
    """The texts of `alone`."""
    texts = {name: answer.choices[0].message.content for name, answer in alone.items()}
    assert len(set(texts.values())) == len(texts) and all(texts.values())
    assert {name: alone[name].choices[0].finish_reason for name in REASONS} == REASONS
    return texts


class TestOpenAI:
    def test_the_list_has_the_base_and_the_adapters(self, client):
        page = client.models.list()
        assert [card.id for card in page] == ["base", *sorted(NAMES)]
        assert {card.object for card in page} == {"model"}
        assert client.models.retrieve("pirate").id == "pirate"

    def test_a_chat_is_answered(self, client):
        answer = client.chat.completions.create(
            model="ticket-classifier", messages=chat("ticket-classifier"), temperature=0, max_tokens=24
        )
        (choice,) = answer.choices
        assert (answer.object, choice.finish_reason, choice.message.role) == ("chat.completion", "stop", "assistant")
        assert "/" in choice.message.content  # queue/urgency: the adapter was at work, and knows its end
        usage = answer.usage
        assert usage.prompt_tokens > 0 and 0 < usage.completion_tokens < 24
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens

    def test_a_chat_streams_the_same_and_ends_with_the_usage(self, client, answers):
        stream = client.chat.completions.create(
            model="pirate", messages=chat("pirate"), stream=True, stream_options={"include_usage": True}, **GREEDY
        )
        *chunks, last = stream
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answers["pirate"]
        assert chunks[0].choices[0].delta.role == "assistant"
        assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
        assert not last.choices and last.usage.completion_tokens == MAX_TOKENS
        assert len({chunk.id for chunk in [*chunks, last]}) == 1 and {chunk.model for chunk in chunks} == {"pirate"}

    def test_the_streaming_helper_puts_the_answer_together(self, client):
        ask = {"model": "ticket-classifier", "messages": chat("ticket-classifier"), "temperature": 0, "max_tokens": 24}
        with client.chat.completions.stream(**ask) as stream:
            kinds = {event.type for event in stream}
            final = stream.get_final_completion()
        assert {"chunk", "content.delta", "content.done"} <= kinds
        whole = client.chat.completions.create(**ask)
        assert final.choices[0].message.content == whole.choices[0].message.content
        assert final.choices[0].finish_reason == "stop"

    def test_a_completion_streams_what_it_says_at_once(self, client):
        ask = {"model": "pirate", "prompt": "The ship", **GREEDY}
        whole = client.completions.create(**ask)
        *chunks, last = client.completions.create(**ask, stream=True, stream_options={"include_usage": True})
        assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text != ""
        assert (whole.object, whole.model, whole.choices[0].finish_reason) == ("text_completion", "pirate", "length")
        assert chunks[-1].choices[0].finish_reason == "length"
        assert not last.choices and last.usage.completion_tokens == whole.usage.completion_tokens == MAX_TOKENS

    def test_all_models_at_once_from_an_async_client(self, url, answers):
        """Whole and streamed, all in flight together: each says what it says alone."""

        async def whole(api: openai.AsyncOpenAI, name: str) -> str:
            answer = await api.chat.completions.create(model=name, messages=chat(name), **GREEDY)
            return answer.choices[0].message.content

        async def streamed(api: openai.AsyncOpenAI, name: str) -> str:
            stream = await api.chat.completions.create(model=name, messages=chat(name), stream=True, **GREEDY)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        async def ask_all() -> list[str]:
            async with async_client(url) as api:
                assert [card.id async for card in api.models.list()] == ["base", *sorted(NAMES)]
                return await asyncio.gather(*(ask(api, name) for ask in (whole, streamed) for name in PROMPTS))

        assert asyncio.run(ask_all()) == [*answers.values()] * 2

    def test_an_async_completion(self, url, client):
        ask = {"model": "pirate", "prompt": ["The ship", "The sea"], **GREEDY}

        async def ask_it() -> tuple[list[str], list[str]]:
            async with async_client(url) as api:
                whole = await api.completions.create(**ask)
                texts = ["", ""]
                async for chunk in await api.completions.create(**ask, stream=True):
                    texts[chunk.choices[0].index] += chunk.choices[0].text
                return [choice.text for choice in whole.choices], texts

        whole, streamed = asyncio.run(ask_it())
        assert whole == streamed and all(whole) and whole[0] != whole[1]

    def test_raw_responses(self, client, url, answers):
        ask = {"model": "pirate", "messages": chat("pirate"), **GREEDY}
        raw = client.chat.completions.with_raw_response.create(**ask, extra_headers={"x-request-id": "mine-1"})
        assert raw.status_code == 200 and raw.headers["content-type"] == "application/json"
        assert raw.headers["x-request-id"] == raw.request_id == "mine-1"
        assert raw.headers["x-multilora-image-key"]
        assert raw.parse().choices[0].message.content == answers["pirate"]

        async def lines() -> list[str]:
            async with (
                async_client(url) as api,
                api.completions.with_streaming_response.create(
                    model="base", prompt="One, two,", stream=True, **GREEDY
                ) as response,
            ):
                assert response.headers["content-type"].startswith("text/event-stream")
                return [line async for line in response.iter_lines() if line]

        *events, done = asyncio.run(lines())
        assert done == "data: [DONE]"
        assert all(json.loads(event.removeprefix("data: "))["object"] == "text_completion" for event in events)

    def test_choices_of_a_chat_and_their_logprobs(self, client):
        ask = {"model": "pirate", "messages": chat("pirate"), "n": 3, "seed": 5, "temperature": 1, "max_tokens": 6}
        answer, again = (
            client.chat.completions.create(**ask, logprobs=True, top_logprobs=2),
            client.chat.completions.create(**ask),
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        texts = [choice.message.content for choice in answer.choices]
        assert texts == [choice.message.content for choice in again.choices] and len(set(texts)) > 1
        scored = [choice.logprobs.content for choice in answer.choices]
        assert sum(map(len, scored)) == answer.usage.completion_tokens
        for text, tokens in zip(texts, scored, strict=True):
            said = b"".join(bytes(token.bytes) for token in tokens)
            assert said.removesuffix(b"<|im_end|>").decode() == text
            assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in tokens)

    def test_choices_of_a_completion_and_their_logprobs(self, client):
        answer = client.completions.create(
            model="pirate", prompt=["The ship", "The sea"], n=2, logprobs=3, seed=5, max_tokens=6, temperature=1
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        for choice in answer.choices:
            told = choice.logprobs
            assert len(told.tokens) == len(told.token_logprobs) == len(told.top_logprobs) == len(told.text_offset)
            assert "".join(told.tokens).startswith(choice.text) and told.text_offset[0] == 0
            for token, logprob, top in zip(told.tokens, told.token_logprobs, told.top_logprobs, strict=True):
                assert top[token] == logprob <= max(top.values()) <= 0

    @pytest.mark.parametrize("is_streamed", [False, True])
    def test_a_stop_string_ends_the_answer_and_is_not_in_it(self, client, answers, is_streamed):
        before, stop = answers["pirate"][:9], answers["pirate"][9:14]
        ask = {"model": "pirate", "messages": chat("pirate"), "stop": ["no such words", stop], **GREEDY}
        if is_streamed:
            chunks = list(client.chat.completions.create(**ask, stream=True))
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            (choice,) = client.chat.completions.create(**ask).choices
            text, reason = choice.message.content, choice.finish_reason
        assert (text, reason) == (before, "stop")

    @pytest.mark.parametrize("is_streamed", [False, True])
    @pytest.mark.parametrize(
        "change, kind, status, code, param",
        [
            ({"model": "nobody"}, openai.NotFoundError, 404, "model_not_found", "model"),
            ({"temperature": 3}, openai.BadRequestError, 400, "invalid_value", "temperature"),
            ({"max_tokens": 100_000}, openai.BadRequestError, 400, "context_length_exceeded", "max_tokens"),
            ({"extra_body": {"nonsense": 1}}, openai.BadRequestError, 400, "unknown_parameter", "nonsense"),
            ({"extra_body": {"best_of": 2}}, openai.BadRequestError, 400, "unsupported_parameter", "best_of"),
        ],
    )
    def test_errors_are_typed(self, client, url, change, kind, status, code, param, is_streamed):
        ask = {"model": "pirate", **GREEDY, "stream": is_streamed, **change}

        async def ask_async() -> None:
            async with async_client(url) as api:
                await api.chat.completions.create(messages=chat("pirate"), **ask)

        for asked in (
            lambda: client.chat.completions.create(messages=chat("pirate"), **ask),
            lambda: client.completions.create(prompt="x", **ask),
            lambda: asyncio.run(ask_async()),
        ):
            with pytest.raises(kind) as caught:
                asked()
            error = caught.value
            assert (error.status_code, error.code, error.param) == (status, code, param)
            assert error.type == "invalid_request_error" and error.message and error.request_id

    def test_a_wrong_key_is_an_authentication_error(self, url):
        with openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as api:
            for ask in (api.models.list, lambda: api.completions.create(model="base", prompt="x", max_tokens=1)):
                with pytest.raises(openai.AuthenticationError) as caught:
                    ask()
                assert (caught.value.status_code, caught.value.code) == (401, "invalid_api_key")


class TestLangChain:
    @staticmethod
    def model(url: str, name: str, **options) -> ChatOpenAI:
        return ChatOpenAI(model=name, base_url=url, api_key=KEY, max_retries=0, timeout=240, **GREEDY, **options)

    @pytest.mark.parametrize("name", REASONS)
    def test_it_says_the_same(self, url, alone, answers, name):
        message = self.model(url, name).invoke(PROMPTS[name])
        assert message.content == answers[name]
        assert message.response_metadata["model_name"] == name
        assert message.response_metadata["finish_reason"] == REASONS[name]
        assert message.usage_metadata["input_tokens"] == alone[name].usage.prompt_tokens
        assert message.usage_metadata["output_tokens"] == alone[name].usage.completion_tokens

    def test_streams(self, url, answers):
        chunks = list(self.model(url, "pirate", stream_usage=True).stream(PROMPTS["pirate"]))
        assert len([chunk for chunk in chunks if chunk.content]) > 1
        whole = chunks[0]
        for chunk in chunks[1:]:
            whole += chunk
        assert whole.content == answers["pirate"]
        assert whole.response_metadata["finish_reason"] == "length"
        assert whole.usage_metadata["output_tokens"] == MAX_TOKENS

    def test_async(self, url, answers):
        async def ask() -> tuple[str, str]:
            model = self.model(url, "pirate")
            said = await model.ainvoke(PROMPTS["pirate"])
            return said.content, "".join([chunk.content async for chunk in model.astream(PROMPTS["pirate"])])

        assert asyncio.run(ask()) == (answers["pirate"], answers["pirate"])

    def test_options_reach_the_server(self, url, answers):
        stop = answers["pirate"][9:14]
        assert self.model(url, "pirate").invoke(PROMPTS["pirate"], stop=[stop]).content == answers["pirate"][:9]
        scored = self.model(url, "pirate", logprobs=True, top_logprobs=1).invoke(PROMPTS["pirate"])
        tokens = scored.response_metadata["logprobs"]["content"]
        assert "".join(token["token"] for token in tokens) == answers["pirate"]

    def test_errors_are_typed(self, url):
        with pytest.raises(openai.NotFoundError):
            self.model(url, "nobody").invoke("x")
        with pytest.raises(openai.BadRequestError):
            list(self.model(url, "pirate", extra_body={"nonsense": 1}).stream("x"))
        with pytest.raises(openai.AuthenticationError):
            ChatOpenAI(model="pirate", base_url=url, api_key="wrong", max_retries=0).invoke("x")


class TestLiteLLM:
    @pytest.fixture(scope="class")
    def litellm(self, only_loopback):
        """Imported under the environment of `only_loopback`: importing it looks for a price list."""
        import litellm

        litellm.suppress_debug_info = True
        return litellm

    @staticmethod
    def ask(url: str, name: str) -> dict:
        return {
            "model": f"openai/{name}", "api_base": url, "api_key": KEY, "num_retries": 0, "max_retries": 0,
            "messages": chat(name), **GREEDY,
        }  # fmt: skip

    @pytest.mark.parametrize("name", REASONS)
    def test_it_says_the_same(self, litellm, url, alone, answers, name):
        answer = litellm.completion(**self.ask(url, name))
        assert (answer.model, answer.choices[0].message.content) == (name, answers[name])
        assert answer.choices[0].finish_reason == REASONS[name]
        assert answer.usage.prompt_tokens == alone[name].usage.prompt_tokens
        assert answer.usage.completion_tokens == alone[name].usage.completion_tokens

    def test_streams(self, litellm, url, answers):
        stream = litellm.completion(**self.ask(url, "pirate"), stream=True, stream_options={"include_usage": True})
        *chunks, last = stream
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == answers["pirate"]
        assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["length"]
        assert last.usage.completion_tokens == MAX_TOKENS

    def test_async(self, litellm, url, answers):
        async def ask() -> tuple[str, str]:
            said = await litellm.acompletion(**self.ask(url, "pirate"))
            stream = await litellm.acompletion(**self.ask(url, "pirate"), stream=True)
            streamed = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            return said.choices[0].message.content, streamed

        assert asyncio.run(ask()) == (answers["pirate"], answers["pirate"])

    def test_a_text_completion(self, litellm, url, client):
        ask = {**self.ask(url, "pirate"), "model": "text-completion-openai/pirate", "prompt": "The ship"}
        del ask["messages"]
        whole = client.completions.create(model="pirate", prompt="The ship", **GREEDY)
        assert litellm.text_completion(**ask).choices[0].text == whole.choices[0].text

    def test_errors_are_typed(self, litellm, url):
        for change, kind in (
            ({"model": "openai/nobody"}, litellm.NotFoundError),
            ({"temperature": 3}, litellm.BadRequestError),
            ({"max_tokens": 100_000}, litellm.ContextWindowExceededError),
            ({"api_key": "wrong"}, litellm.AuthenticationError),
        ):
            with pytest.raises(kind):
                litellm.completion(**{**self.ask(url, "pirate"), **change})
