from pathlib import Path
from typing import Any

import pytest

from server.api.schemas import Completion, CompletionChunk
from tests.fixtures.api_server import BASE, MAX_MODEL_LEN, assert_error, events, ids, scripted, serving


async def test_answers_in_openai_shape(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        body = (await api.complete("hi")).json()
        Completion.model_validate(body)
        assert body["object"] == "text_completion" and body["id"].startswith("cmpl-") and body["model"] == BASE
        assert body["choices"] == [{"index": 0, "text": "Hello world", "logprobs": None, "finish_reason": "stop"}]
        assert body["usage"]["prompt_tokens"] == 2


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [[64, 65]]),
        (["ab", "c"], [[64, 65], [66]]),
        ([3, 4], [[3, 4]]),
        ([[3], [4, 5]], [[3], [4, 5]]),
    ],
)
async def test_prompt_forms(tmp_path: Path, prompt: Any, expected: list[list[int]]) -> None:
    async with serving(tmp_path) as api:
        assert (await api.complete(prompt)).status_code == 200
        submitted = [submit.token_ids for submit in api.engine.submitted]
        assert submitted == expected


async def test_choices_are_numbered_prompt_by_prompt(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        api.engine.script = scripted(api.context.tokenizer, ["a", "b", "c", "d"], api.engine.info.eos_token_ids)
        body = (await api.complete(["x", "yz"], n=2)).json()
        assert [(c["index"], c["text"]) for c in body["choices"]] == [(0, "a"), (1, "b"), (2, "c"), (3, "d")]
        assert [submit.token_ids for submit in api.engine.submitted[::2]] == [
            ids(api.context.tokenizer, "x"),
            ids(api.context.tokenizer, "yz"),
        ]
        assert body["usage"]["prompt_tokens"] == 3
        assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 8  # four per prompt


async def test_max_tokens_is_16_unless_asked(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        api.says("x", end=False)
        assert (await api.complete()).json()["usage"]["completion_tokens"] == 16
        assert (await api.complete(max_tokens=20)).json()["usage"]["completion_tokens"] == 20
        nearly_full = [0] * (MAX_MODEL_LEN - 3)
        assert (await api.complete(nearly_full)).json()["usage"]["completion_tokens"] == 3


async def test_streams_chunks(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        chunks = events(await api.complete(stream=True, stream_options={"include_usage": True}))
        for chunk in chunks:
            CompletionChunk.model_validate(chunk)
        assert "".join(c["choices"][0]["text"] for c in chunks[:-1]) == "Hello world"
        assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
        assert chunks[-1]["usage"]["total_tokens"] == 14
        assert "usage" not in events(await api.complete(stream=True))[0]


async def test_logprobs(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        api.says("hey")
        logprobs = (await api.complete(logprobs=2)).json()["choices"][0]["logprobs"]
        assert logprobs["tokens"] == ["h", "e", "y"]
        assert logprobs["token_logprobs"] == [-0.5] * 3
        assert logprobs["text_offset"] == [0, 1, 2]
        assert set(logprobs["top_logprobs"][0].values()) == {-0.5, -1.5}
        streamed = [c["choices"][0]["logprobs"] for c in events(await api.complete(logprobs=0, stream=True))]
        assert [offset for part in streamed for offset in part["text_offset"]] == [0, 1, 2]


async def test_several_tokens_at_once_are_one_event(tmp_path: Path) -> None:
    """A reader that lags gets fewer, larger events."""
    async with serving(tmp_path) as api:
        queue_all = api.context.engine.submit

        def submit_and_finish(request: Any, stream: Any) -> Any:
            queue_all(request, stream)
            while request.seq_id in api.engine._running:
                stream.put(api.engine._advance(*api.engine._running[request.seq_id]))
            return stream

        api.context.engine.submit = submit_and_finish  # type: ignore[method-assign]
        chunks = events(await api.complete(stream=True))
        assert [chunk["choices"][0]["text"] for chunk in chunks] == ["Hello world"]


async def test_prompts_that_cannot_be_used(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        assert_error(await api.complete(""), 400)
        assert_error(await api.complete([]), 400)
        assert_error(await api.complete([[]]), 400)
        assert_error(await api.complete([10_000]), 400)
        assert_error(await api.complete([-1]), 400)
        assert_error(await api.complete([0] * MAX_MODEL_LEN), 400, "context_length_exceeded")
        assert_error(await api.complete(["x"] * 20, n=8), 400)
        assert (await api.complete(" ")).status_code == 200
