"""The official client against a real port: what it accepts is what OpenAI compatibility means."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.fixtures.api_server import BASE, LiveServer, byte_tokenizer, form, ids, listening
from tests.fixtures.timing import HANG_SECONDS


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LiveServer]:
    with listening(tmp_path) as live:
        yield live


@pytest.fixture
def client(server: LiveServer) -> Iterator[openai.OpenAI]:
    with connected(server) as found:
        yield found


def connected(server: LiveServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=HANG_SECONDS)


HI: list[dict[str, str]] = [{"role": "user", "content": "hi"}]


def test_models(server: LiveServer, client: openai.OpenAI) -> None:
    url, data = f"{server.url}/v1/adapters", {"name": "acme"}
    httpx.post(url, data=data, files=form(), timeout=HANG_SECONDS).raise_for_status()
    assert [model.id for model in client.models.list()] == [BASE, "acme"]
    assert client.models.retrieve("acme").owned_by == "loraplex"
    with pytest.raises(openai.NotFoundError) as missing:
        client.models.retrieve("nope")
    assert missing.value.code == "model_not_found"


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=BASE, messages=HI, logprobs=True, top_logprobs=2)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == "Hello world"
    assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
    assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.content is not None
    assert answer.choices[0].logprobs.content[0].top_logprobs[0].token == "H"


def test_chat_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=BASE,
        messages=HI,  # type: ignore[arg-type]
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"top_k": 5, "min_p": 0.1},
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "Hello world"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 12


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=BASE, prompt=["a", "b"], logprobs=1)
    assert [choice.text for choice in answer.choices] == ["Hello world"] * 2
    assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.text_offset is not None
    stream = client.completions.create(model=BASE, prompt="a", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "Hello world"


def test_errors_become_the_client_s_own(server: LiveServer, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nope", messages=HI)  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=BASE, messages=HI, temperature=9)  # type: ignore[arg-type]
    assert refused.value.param == "temperature"
    server.engine.fail_after = 0
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model=BASE, messages=HI)  # type: ignore[arg-type]
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model=BASE, messages=HI, stream=True)  # type: ignore[arg-type]


@pytest.mark.reliability("T63")
@pytest.mark.parametrize("after", [1, 10])
def test_a_stream_that_fails_raises(server: LiveServer, client: openai.OpenAI, after: int) -> None:
    server.engine.fail_after = after
    stream = client.chat.completions.create(model=BASE, messages=HI, stream=True)  # type: ignore[arg-type]
    with pytest.raises(openai.APIError):
        list(stream)


def test_a_stream_that_the_client_closes_is_aborted(server: LiveServer, client: openai.OpenAI) -> None:
    server.engine.waits_after = lambda _: 1
    stream = client.chat.completions.create(model=BASE, messages=HI, stream=True, n=2)  # type: ignore[arg-type]
    next(iter(stream))
    stream.close()
    server.wait_idle()
    assert len(server.engine.aborted) == 2


def test_embeddings(client: openai.OpenAI) -> None:
    """The client asks for base64 unless it is told otherwise."""
    packed = client.embeddings.create(model=BASE, input=["a", "bc"])
    plain = client.embeddings.create(model=BASE, input=["a", "bc"], encoding_format="float")
    assert [item.embedding for item in packed.data] == [item.embedding for item in plain.data]
    assert sum(value * value for value in packed.data[1].embedding) == pytest.approx(1)
    short = client.embeddings.create(model=BASE, input=[5, 6], dimensions=3, extra_body={"pooling": "mean"}, user="me")
    assert len(short.data[0].embedding) == 3 and short.usage.prompt_tokens == 2
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(model=BASE, input="a", dimensions=99)
    assert refused.value.param == "dimensions"


TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
HERMES = (
    "{% for tool in tools or [] %}<tool_call>{% endfor %}"
    "{% for m in messages %}{{ m.content }}{{ m.tool_calls }}{% endfor %}"
)


def test_tools(tmp_path: Path) -> None:
    output = """Hm <tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>"""
    tokenizer = byte_tokenizer(HERMES)
    with listening(tmp_path, tokenizer=tokenizer) as live, connected(live) as client:
        live.engine.script = lambda _: ids(tokenizer, output) + live.engine.info.eos_token_ids
        answer = client.chat.completions.create(model=BASE, messages=HI, tools=TOOLS)  # type: ignore[arg-type]
        assert answer.choices[0].finish_reason == "tool_calls" and answer.choices[0].message.tool_calls
        (call,) = answer.choices[0].message.tool_calls
        assert call.type == "function" and call.function.name == "weather"
        with client.chat.completions.stream(model=BASE, messages=HI, tools=TOOLS) as stream:  # type: ignore[arg-type]
            kinds = [event.type for event in stream]
            message = stream.get_final_completion().choices[0].message
        assert "tool_calls.function.arguments.delta" in kinds and "tool_calls.function.arguments.done" in kinds
        assert message.content == "Hm" and message.tool_calls
        assert message.tool_calls[0].function.arguments == call.function.arguments == '{"city": "Paris"}'
        history = [*HI, message.to_dict(), {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
        again = client.chat.completions.create(model=BASE, messages=history, tools=TOOLS)  # type: ignore[arg-type]
        assert again.choices[0].message.tool_calls


def test_responses(tmp_path: Path) -> None:
    template = HERMES.replace("<tool_call>", "</think>") + "{# <tool_call> #}"
    output = """<think>Hm.</think>So <tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>"""
    tools: list[Any] = [{"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": True}]
    with listening(tmp_path, tokenizer=byte_tokenizer(template)) as live, connected(live) as client:
        plain = client.responses.create(model=BASE, input="hi", store=True)
        assert plain.output_text == "Hello world" and plain.status == "completed" and plain.store is False
        assert plain.usage is not None and plain.usage.output_tokens == 12
        live.engine.script = lambda _: ids(live.context.tokenizer, output) + live.engine.info.eos_token_ids
        whole = client.responses.create(model=BASE, input="hi", tools=tools)
        with client.responses.stream(model=BASE, input="hi", tools=tools) as stream:
            kinds = {event.type for event in stream}
            final = stream.get_final_response()
        assert {"response.output_text.delta", "response.function_call_arguments.delta", "response.completed"} <= kinds
        for found in (whole, final):
            assert [item.type for item in found.output] == ["reasoning", "message", "function_call"]
            assert found.output_text == "So"
        call = whole.output[-1]
        assert call.type == "function_call" and (call.name, call.arguments) == ("weather", '{"city": "Paris"}')
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
        history: list[Any] = [{"role": "user", "content": "hi"}, *(item.to_dict() for item in whole.output), result]
        assert client.responses.create(model=BASE, input=history, tools=tools).output
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(model=BASE, input="hi", previous_response_id=whole.id)
        assert refused.value.param == "previous_response_id" and "input" in refused.value.message
