"""What evaluators ask for: log-probabilities of prompts, token ids in and out, and the tokenizer."""

from pathlib import Path
from typing import Any

import pytest

from server.api.schemas import ChatCompletion, Completion, CompletionChunk
from tests.fixtures.api_server import BASE, Api, assert_error, events, ids, serving, tokenizer_files


async def completed(api: Api, prompt: Any = "hi", **fields: Any) -> dict[str, Any]:
    """The first choice of a completion."""
    answer = await api.complete(prompt, **fields)
    assert answer.status_code == 200, answer.text
    Completion.model_validate(answer.json())
    return answer.json()["choices"][0]  # type: ignore[no-any-return]


async def test_echo_begins_text_and_log_probabilities_with_the_prompt(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        api.says("abc")
        for prompt in ("hiy", ids(api.context.tokenizer, "hiy")):
            choice = await completed(api, prompt, echo=True, logprobs=1, max_tokens=1)
            assert choice["text"] == "hiya"
            logprobs = choice["logprobs"]
            assert logprobs["tokens"] == ["h", "i", "y", "a"]
            assert logprobs["token_logprobs"] == [None, -1.0, -2.0, -0.5]
            assert logprobs["text_offset"] == [0, 1, 2, 3]
            assert logprobs["top_logprobs"][0] is None
            most_probable = api.context.tokenizer.token_bytes(65).decode()
            assert logprobs["top_logprobs"][1] == {most_probable: -0.25, "i": -1.0}
        assert api.engine.submitted[-1].sampling.prompt_logprobs == 1


async def test_echo_alone_asks_for_no_log_probabilities(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        choice = await completed(api, echo=True)
        assert choice["text"] == "hiHello world" and choice["logprobs"] is None
        assert api.engine.submitted[-1].sampling.prompt_logprobs is None


async def test_echoed_token_ids_show_special_tokens(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        end = api.context.tokenizer.backend.token_to_id("<|end|>")
        choice = await completed(api, [end, *ids(api.context.tokenizer, "é")], echo=True, logprobs=0, max_tokens=0)
        assert choice["text"] == "<|end|>é"
        assert choice["logprobs"]["text_offset"] == [0, 7, 7]  # a character of two tokens
        assert len(choice["logprobs"]["tokens"]) == 3


@pytest.mark.parametrize("several", [1, 3])
async def test_streams_echo_as_bodies_do(tmp_path: Path, several: int) -> None:
    async with serving(tmp_path) as api:
        prompts = ["one", "two", "three"][:several]
        fields: dict[str, Any] = {"echo": True, "logprobs": 1, "n": 2, "return_token_ids": True, "stop": ["o w"]}
        whole = (await api.complete(prompts, **fields)).json()["choices"]
        found: list[dict[str, Any]] = [{"text": "", "tokens": [], "ids": []} for _ in whole]
        for event in events(await api.complete(prompts, **fields, stream=True)):
            CompletionChunk.model_validate(event)
            (choice,) = event["choices"]
            known = found[choice["index"]]
            known["text"] += choice["text"]
            known["tokens"] += choice["logprobs"]["tokens"]
            known["ids"] += choice["token_ids"]
            if "prompt_token_ids" in choice:
                assert "prompt" not in known
                known["prompt"] = choice["prompt_token_ids"]
        for index, (choice, streamed) in enumerate(zip(whole, found, strict=True)):
            assert choice["text"] == streamed["text"] == prompts[index // 2] + "Hell"
            assert choice["logprobs"]["tokens"] == streamed["tokens"]
            assert choice["token_ids"] == streamed["ids"]
            assert choice["prompt_token_ids"] == streamed["prompt"] == ids(api.context.tokenizer, prompts[index // 2])


async def test_prompt_log_probabilities_in_vllm_s_shape(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        token_ids = ids(api.context.tokenizer, "hi")
        expected = {
            "65": {"logprob": -0.25, "rank": 1, "decoded_token": api.context.tokenizer.token_bytes(65).decode()},
            str(token_ids[1]): {"logprob": -1.0, "rank": 2, "decoded_token": "i"},
        }
        assert (await completed(api, prompt_logprobs=1))["prompt_logprobs"] == [None, expected]
        alone = await completed(api, prompt_logprobs=0, logprobs=5, echo=True)  # each has its own number
        assert list(alone["prompt_logprobs"][1]) == [str(token_ids[1])]
        assert len(alone["logprobs"]["top_logprobs"][1]) == 2
        body = (await api.chat(prompt_logprobs=1)).json()
        ChatCompletion.model_validate(body)
        assert len(body["prompt_logprobs"]) == body["usage"]["prompt_tokens"]
        assert assert_error(await api.complete(prompt_logprobs=1, stream=True), 400)
        assert assert_error(await api.complete(prompt_logprobs=21), 400)["param"] == "prompt_logprobs"
        assert "prompt_logprobs" not in await completed(api)


async def test_no_output_tokens_may_be_asked_for(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        limit = api.engine.info.max_model_len
        answer = await api.complete([1] * limit, max_tokens=0, echo=True, logprobs=1)
        body = answer.json()
        assert body["usage"]["completion_tokens"] == 0 and body["choices"][0]["finish_reason"] == "length"
        assert len(body["choices"][0]["logprobs"]["tokens"]) == limit
        assert_error(await api.complete([1] * limit), 400, "context_length_exceeded")
        assert_error(await api.complete([1] * (limit + 1), max_tokens=0), 400, "context_length_exceeded")
        assert (await api.chat(max_tokens=0)).json()["choices"][0]["message"]["content"] == ""


async def test_token_ids_out(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        api.says("ab")
        expected = ids(api.context.tokenizer, "ab") + api.engine.info.eos_token_ids
        for extra in ({}, {"logprobs": True, "return_tokens_as_token_ids": True}):
            body = (await api.chat(return_token_ids=True, **extra)).json()
            assert body["choices"][0]["token_ids"] == expected
            assert body["prompt_token_ids"] == api.engine.submitted[-1].token_ids
        tokens = [entry["token"] for entry in body["choices"][0]["logprobs"]["content"]]
        assert tokens == [f"token_id:{token}" for token in expected]
        chunks = events(await api.chat(return_token_ids=True, stream=True))
        assert chunks[0]["prompt_token_ids"] == api.engine.submitted[-1].token_ids
        assert all("prompt_token_ids" not in chunk for chunk in chunks[1:])
        assert [token for chunk in chunks[1:] for token in chunk["choices"][0]["token_ids"]] == expected
        plain = (await api.chat()).json()
        assert "prompt_token_ids" not in plain and "token_ids" not in plain["choices"][0]


async def test_usage_in_every_event(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        options = {"include_usage": True, "continuous_usage_stats": True}
        chunks = events(await api.chat(stream=True, stream_options=options))
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts) and counts[-1] == 12 and len(set(counts)) > 3
        assert all(chunk["usage"]["prompt_tokens"] == chunks[0]["usage"]["prompt_tokens"] for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("text", "fields", "expected"),
    [
        ("a<|start|>b", {"stop": "<|start|>"}, "a"),
        ("a<|start|>b", {"stop": "a<|start|>"}, ""),
        ("a<|start|>b c", {"stop": " c"}, "ab"),
        ("a<|start|>b", {"stop": "<|start|>x"}, "ab"),
        ("a<|start|>b", {"stop": "<|start|>", "include_stop_str_in_output": True}, "a<|start|>"),
        ("a<|start|>b", {"stop": "<|start|>", "skip_special_tokens": False}, "a"),
        ("a<|start|>b", {"skip_special_tokens": False}, "a<|start|>b"),
        ("ab cd", {"stop": ["b c"], "include_stop_str_in_output": True}, "ab c"),
        ("x<|start|>y<|start|>z", {"stop": ["y<|start|>z"]}, "x"),
        ("é<|start|>é", {"stop": ["<|start|>é!", "q"]}, "éé"),
    ],
)
async def test_stop_strings_and_special_tokens(
    tmp_path: Path, stream: bool, text: str, fields: dict[str, Any], expected: str
) -> None:
    async with serving(tmp_path) as api:
        api.says(text)
        answer = await api.complete(max_tokens=50, stream=stream, **fields)
        choices = [each["choices"][0] for each in (events(answer) if stream else [answer.json()])]
        assert "".join(choice["text"] for choice in choices) == expected
        assert choices[-1]["finish_reason"] == "stop"


async def test_a_stop_token_is_text_where_that_is_asked_for(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        api.says("abc")
        (stop,) = ids(api.context.tokenizer, "b")
        assert (await completed(api, stop_token_ids=[stop]))["text"] == "a"
        assert (await completed(api, stop_token_ids=[stop], include_stop_str_in_output=True))["text"] == "ab"


async def test_tokenize_and_back(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.upload("own", beside=tokenizer_files("<tool>", template="{{ messages[0].content }}!"))
        text = "Grüße <|start|>"
        body = (await api.http.post("/tokenize", json={"prompt": text, "return_token_strs": True})).json()
        assert body["count"] == len(body["tokens"]) == len(body["token_strs"]) and body["max_model_len"] == 256
        assert body["token_strs"][-1] == "<|start|>"
        back = await api.http.post("/detokenize", json={"model": BASE, "tokens": body["tokens"]})
        assert back.json() == {"prompt": text}
        own = (await api.http.post("/tokenize", json={"model": "own", "prompt": "<tool>"})).json()
        assert own["count"] == 1 and own["token_strs"] is None
        assert (await api.http.post("/detokenize", json={"model": "own", "tokens": own["tokens"]})).json() == {
            "prompt": "<tool>"
        }
        chat: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
        await api.chat("hi")
        rendered = (await api.http.post("/tokenize", json=chat)).json()["tokens"]
        assert rendered == api.engine.submitted[-1].token_ids
        shorter = (await api.http.post("/tokenize", json={**chat, "add_generation_prompt": False})).json()["tokens"]
        assert rendered[: len(shorter)] == shorter != rendered
        assert (await api.http.post("/tokenize", json={**chat, "model": "own"})).json()["count"] == 3
        template = (await api.http.get("/tokenizer_info", params={"model": "own"})).json()
        assert template["chat_template"] == "{{ messages[0].content }}!" and template["eos_token"] == "<|end|>"
        assert (await api.http.get("/tokenizer_info")).json()["model_max_length"] == 256


async def test_tokenizer_routes_refuse_what_they_cannot_read(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        for path, body, param in (
            ("/tokenize", {}, "prompt"),
            ("/tokenize", {"prompt": 1}, "prompt"),
            ("/tokenize", {"messages": []}, None),
            ("/detokenize", {"tokens": [10_000_000]}, "tokens"),
            ("/detokenize", {"tokens": [-1]}, "tokens.0"),
            ("/detokenize", {"tokens": "x"}, "tokens"),
        ):
            error = assert_error(await api.http.post(path, json=body), 400)
            assert param is None or error["param"] == param, error
        for model in ("nope", "x" * 257):
            assert (await api.http.get("/tokenizer_info", params={"model": model})).status_code in (400, 404)
            answer = await api.http.post("/tokenize", json={"model": model, "prompt": "x"})
            assert answer.status_code in (400, 404)
