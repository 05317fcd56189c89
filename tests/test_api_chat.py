import asyncio
import json
import random
import socket
import struct
import time
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

from server.api.inference import streaming
from server.api.inference.completions import CompletionFormatter
from server.api.inference.generation import start_generation
from server.api.inference.streaming import EventStream
from server.api.schemas import ChatCompletion, ChatCompletionChunk
from server.request import SamplingParams
from tests.fixtures.api_server import (
    BASE,
    MAX_MODEL_LEN,
    LiveServer,
    assert_error,
    base_plan,
    byte_tokenizer,
    events,
    ids,
    listening,
    scripted,
    serving,
)
from tests.fixtures.timing import HANG_SECONDS, wait_for


async def test_answers_in_openai_shape(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        answer = await api.chat("hi")
        assert answer.status_code == 200
        body = answer.json()
        ChatCompletion.model_validate(body)
        assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-")
        assert body["model"] == BASE and body["system_fingerprint"] == "0123456789ab-base"
        choice = body["choices"][0]
        assert choice["message"] == {"role": "assistant", "content": "Hello world", "refusal": None}
        assert choice["finish_reason"] == "stop" and choice["logprobs"] is None
        prompt = len(api.engine.submitted[0].token_ids)
        assert body["usage"] == {
            "prompt_tokens": prompt,
            "completion_tokens": 12,  # the end token counts
            "total_tokens": prompt + 12,
            "prompt_tokens_details": {"cached_tokens": 4},
        }


async def test_renders_the_chat_template(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        messages = [
            {"role": "developer", "content": "Be {{7*7}}."},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ]
        await api.chat(messages=messages)
        tokenizer = api.context.tokenizer
        prompt = tokenizer.backend.decode(api.engine.submitted[0].token_ids, skip_special_tokens=False)
        expected = "<|start|>system\nBe {{7*7}}.<|end|>\n<|start|>user\nab<|end|>\n<|start|>assistant\n"
        assert prompt == expected


async def test_continues_the_last_assistant_message(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Well, "}]
        assert (await api.chat(messages=messages, continue_final_message=True)).status_code == 200
        prompt = api.context.tokenizer.backend.decode(api.engine.submitted[0].token_ids, skip_special_tokens=False)
        assert prompt.endswith("<|start|>assistant\nWell, ")
        assert_error(await api.chat(continue_final_message=True), 400)


async def test_a_model_without_chat_template_refuses_chat(tmp_path: Path) -> None:
    async with serving(tmp_path, tokenizer=byte_tokenizer(template=None)) as api:
        assert_error(await api.chat(), 400, "unsupported")
        assert (await api.complete()).status_code == 200


async def test_streams_chunks(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        api.says("Grüße 😀")
        chunks = events(await api.chat(stream=True, stream_options={"include_usage": True}))
        for chunk in chunks:
            ChatCompletionChunk.model_validate(chunk)
            assert chunk["object"] == "chat.completion.chunk"
        assert len({chunk["id"] for chunk in chunks}) == 1
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        text = "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1])
        assert text == "Grüße 😀"
        assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
        assert chunks[-2]["usage"] is None
        assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 13


async def test_streaming_and_not_say_the_same_for_several_choices(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        texts = ["one", "two words", "three"]
        api.engine.script = scripted(api.context.tokenizer, texts, api.engine.info.eos_token_ids)
        whole = (await api.chat(n=3, seed=5)).json()
        assert [choice["message"]["content"] for choice in whole["choices"]] == texts
        assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2]
        assert [submit.sampling.seed for submit in api.engine.submitted] == [5, 6, 7]
        assert whole["usage"]["prompt_tokens"] == len(api.engine.submitted[0].token_ids)
        streamed = ["", "", ""]
        for chunk in events(await api.chat(n=3, stream=True)):
            for choice in chunk["choices"]:
                streamed[choice["index"]] += choice["delta"].get("content", "")
        assert streamed == texts


async def test_logprobs(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        api.says("é")
        content = (await api.chat(logprobs=True, top_logprobs=3)).json()["choices"][0]["logprobs"]["content"]
        assert [entry["bytes"] for entry in content] == [[0xC3], [0xA9]]
        assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-0.5, -1.5, -9999.0]
        chunks = events(await api.chat(logprobs=True, stream=True))
        streamed = [entry for c in chunks[1:] for entry in c["choices"][0]["logprobs"]["content"]]
        assert [entry["bytes"] for entry in streamed] == [[0xC3], [0xA9]]
        assert streamed[0]["top_logprobs"] == []
        assert_error(await api.chat(top_logprobs=3), 400)


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_strings_end_the_sequence(tmp_path: Path, stream: bool) -> None:
    async with serving(tmp_path) as api:
        api.says("one STOP two", end=False)
        answer = await api.chat(stop=["STOP"], stream=stream, max_tokens=100)
        choices = [c["choices"][0] for c in events(answer)] if stream else [answer.json()["choices"][0]]
        text = "".join(c["delta"].get("content", "") if stream else c["message"]["content"] for c in choices)
        assert text == "one " and choices[-1]["finish_reason"] == "stop"
        assert api.engine.aborted == [api.engine.submitted[0].seq_id]


async def test_the_answer_may_fill_the_context(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        api.says("x", end=False)
        body = (await api.chat("hi")).json()
        assert body["usage"]["total_tokens"] == MAX_MODEL_LEN
        assert body["choices"][0]["finish_reason"] == "length"
        assert (await api.chat(max_completion_tokens=3)).json()["usage"]["completion_tokens"] == 3
        assert_error(await api.chat(max_tokens=MAX_MODEL_LEN), 400, "context_length_exceeded")
        assert_error(await api.chat("x" * MAX_MODEL_LEN), 400, "context_length_exceeded")
        assert_error(await api.chat("x" * MAX_MODEL_LEN * 17), 400, "context_length_exceeded")


async def test_sampling_parameters_reach_the_engine(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        asked = {"temperature": 0.5, "top_p": 0.9, "top_k": -1, "min_p": 0.1, "repetition_penalty": 1.1}
        asked |= {"presence_penalty": 1, "frequency_penalty": -1, "min_tokens": 2, "ignore_eos": True}
        await api.chat(**asked, stop_token_ids=[5], logit_bias={"7": 3}, seed=9)
        sampling = api.engine.submitted[0].sampling
        for name, value in (asked | {"top_k": 0}).items():
            assert getattr(sampling, name) == value, name
        assert sampling.stop_token_ids == (5,) and sampling.logit_bias == {7: 3} and sampling.seed == 9
        await api.chat()
        assert api.engine.submitted[1].sampling.temperature == 1.0


async def test_priorities_reach_the_engine_unless_they_would_have_no_effect(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        for fields in ({"priority": -3}, {"priority": None}, {}):
            assert (await api.chat(**fields)).status_code == 200
        assert [submit.priority for submit in api.engine.submitted] == [-3, 0, 0]
    async with serving(tmp_path / "fcfs", scheduling_policy="fcfs") as api:
        assert assert_error(await api.chat(priority=1), 400, "unsupported")["param"] == "priority"
        assert (await api.complete(priority=0)).status_code == 200


@pytest.mark.parametrize(
    ("fields", "headers", "limit", "seconds"),
    [
        ({}, {}, 0, None),
        ({"timeout": 5}, {}, 0, 5),
        ({}, {"x-request-timeout": "2.5"}, 0, 2.5),
        ({}, {}, 7, 7),
        ({"timeout": 5}, {"x-request-timeout": "9"}, 3, 3),
        ({"timeout": 5}, {"x-request-timeout": "4"}, 60, 4),
    ],
)
async def test_the_earliest_deadline_counts_from_the_arrival(
    fields: dict[str, Any], headers: dict[str, str], limit: float, seconds: float | None, tmp_path: Path
) -> None:
    async with serving(tmp_path, request_timeout=limit) as api:
        before = time.monotonic()
        api.http.headers.update(headers)
        assert (await api.chat(**fields)).status_code == 200
        (submit,) = api.engine.submitted
    if seconds is None:
        assert submit.deadline is None
    else:
        assert submit.deadline is not None and before + seconds <= submit.deadline <= time.monotonic() + seconds


@pytest.mark.parametrize("value", ["0", "-1", "nan", "soon", "86401"])
async def test_a_timeout_that_is_no_time_is_refused(value: str, tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        if value != "soon":
            assert (await api.chat(timeout=float(value) if value != "nan" else value)).status_code == 400
        api.http.headers["x-request-timeout"] = value
        assert_error(await api.chat(), 400)
        assert not api.engine.submitted


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_whose_time_is_over_gets_504(tmp_path: Path, stream: bool) -> None:
    async with serving(tmp_path) as api:
        api.engine.fail_after, api.engine.failure_reason = 0, "timeout"
        assert_error(await api.chat(timeout=5, stream=stream), 504, "deadline_exceeded")


@pytest.mark.reliability("T63")
@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_before_the_first_token_is_a_json_error(tmp_path: Path, stream: bool) -> None:
    async with serving(tmp_path) as api:
        api.engine.fail_after = 0
        assert_error(await api.chat(stream=stream), 500, "internal_error")
        api.engine.failure = "The adapter gave no finite numbers."
        assert assert_error(await api.chat(stream=stream), 500)["message"] == api.engine.failure


@pytest.mark.reliability("T63")
async def test_a_failure_after_the_first_token_is_an_error_frame(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        api.engine.fail_after = 3
        frames = events(await api.chat(stream=True))
        assert frames[-1]["error"]["code"] == "internal_error"
        assert "".join(f["choices"][0]["delta"].get("content", "") for f in frames[:-1]) == "Hel"
        assert len(api.context.in_flight) == 0


async def test_counts_nothing_in_flight_after_the_answer(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.chat(n=4)
        await api.chat(stream=True, n=2)
        assert len(api.context.in_flight) == 0
        assert api.engine.aborted == []


def _send_chat(server: LiveServer, **fields: Any) -> socket.socket:
    body = json.dumps({"model": BASE, "messages": [{"role": "user", "content": "x"}], **fields}).encode()
    host, port = server.url.removeprefix("http://").split(":")
    client = socket.create_connection((host, int(port)))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n"
    client.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + body)
    return client


@pytest.mark.reliability("T40")
def test_a_client_that_leaves_at_any_time_is_aborted(tmp_path: Path) -> None:
    """Streaming or not, one choice or several, closed or reset, sooner or later: nothing keeps running."""
    chance = random.Random(0)
    with listening(tmp_path) as server:
        server.engine.slow = 0.002
        tokens = ids(server.context.tokenizer, "x") * 1000
        server.engine.script = lambda _: tokens
        clients = []
        for _ in range(60):
            clients.append(_send_chat(server, stream=chance.random() < 0.5, n=chance.choice([1, 2, 4])))
            time.sleep(chance.random() * 0.01)
            if len(clients) > 5:
                leaving = clients.pop(chance.randrange(len(clients)))
                if chance.random() < 0.5:  # with a reset instead of an end
                    leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                leaving.close()
        for client in clients:
            client.close()
        server.wait_idle()


def test_a_reader_that_lags_does_not_hold_the_sequence(tmp_path: Path) -> None:
    with listening(tmp_path) as server:
        client = _send_chat(server, stream=True)
        wait_for(lambda: server.engine.submitted, "the request")
        server.wait_idle()
        client.settimeout(HANG_SECONDS)
        received = b""
        while b"[DONE]" not in received:
            received += client.recv(65536)
        client.close()


@pytest.mark.reliability("T25")
async def test_a_reader_that_never_reads_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_WRITE_SECONDS", 0.05)

    async def stuck(message: Any) -> None:
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    async def silent() -> Any:
        await asyncio.Event().wait()

    async with serving(tmp_path) as api:
        api.waits_after(1)
        generation = start_generation(api.context, base_plan(api.context, SamplingParams(max_tokens=100)))
        stream = EventStream(generation, CompletionFormatter(generation))
        with pytest.raises(ClientDisconnect):
            await stream({"type": "http", "state": {}}, silent, stuck)
        assert api.engine.aborted == [f"{generation.id}-0"] and len(api.context.in_flight) == 0
