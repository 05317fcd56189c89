"""`/v1/embeddings`, `/score` and `/rerank`: what is asked of the engine, and what the client gets."""

import asyncio
import base64
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from server.api.fields import HARMLESS_IN_EMBEDDINGS, REFUSED_IN_EMBEDDINGS
from server.api.middleware.auth import Key, KeyRing
from server.api.requests.wire import MAX_CHOICES
from server.api.schemas import EmbeddingList, Ranking, ScoreList
from server.keys_file import digest_of
from tests.fixtures.api_server import BASE, MAX_MODEL_LEN, Api, assert_error, byte_tokenizer, ids, secret, serving


async def post(api: Api, route: str, **fields: Any) -> httpx.Response:
    return await api.http.post(route, json={"model": BASE, **fields})


async def embedded(api: Api, given: Any = "hi", **fields: Any) -> dict[str, Any]:
    answer = await post(api, "/v1/embeddings", input=given, **fields)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    EmbeddingList.model_validate(found)
    return found


def vectors(body: dict[str, Any]) -> list[list[float]]:
    assert [item["index"] for item in body["data"]] == [*range(len(body["data"]))]
    return [item["embedding"] for item in body["data"]]


def counted(*prompts: list[int], dimensions: int = 8) -> list[list[float]]:
    """The fake engine's embeddings, of length 1."""
    counts = np.array([[sum(token % 8 == i for token in prompt) for i in range(8)] for prompt in prompts], np.float64)
    shown = counts[:, :dimensions]
    found: list[list[float]] = (shown / np.linalg.norm(shown, axis=1, keepdims=True)).tolist()
    return found


async def test_inputs_of_every_kind(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        one, two = ids(api.context.tokenizer, "one"), ids(api.context.tokenizer, "two words")
        for given, prompts in (
            ("one", [one]),
            (["one", "two words"], [one, two]),
            (one, [one]),
            ([one, two], [one, two]),
        ):
            body = await embedded(api, given)
            assert vectors(body) == [pytest.approx(each, abs=1e-6) for each in counted(*prompts)]
            assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] == sum(map(len, prompts))
            assert body["model"] == BASE and body["id"].startswith("embd-")
        submitted = api.engine.submitted[-1].sampling
        assert (submitted.pooling, submitted.max_tokens) == ("last", 0)


async def test_base64_is_the_same_numbers(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        plain = vectors(await embedded(api, ["a", "bc"]))
        packed = (await embedded(api, ["a", "bc"], encoding_format="base64"))["data"]
        found = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4").tolist() for item in packed]
        assert found == plain


async def test_dimensions_are_the_first_ones_at_length_one(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        prompt = ids(api.context.tokenizer, "several words")
        (found,) = vectors(await embedded(api, "several words", dimensions=5))
        assert found == pytest.approx(counted(prompt, dimensions=5)[0], abs=1e-6)
        error = assert_error(await post(api, "/v1/embeddings", input="x", dimensions=9), 400, "invalid_value")
        assert error["param"] == "dimensions" and "8" in error["message"]
        assert_error(await post(api, "/v1/embeddings", input="x", dimensions=0), 400, "invalid_value")


async def test_pooling_adapters_and_places_are_those_of_the_request(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.upload("own")
        await embedded(api, "a", model="own", pooling="mean", cache_salt="s", priority=2, timeout=50)
        await embedded(api, "a", adapter_id="own")
        first, second = api.engine.submitted
        assert first.sampling.pooling == "mean" and (first.request_salt, first.priority) == ("s", 2)
        assert first.deadline is not None and first.adapters == second.adapters != ()
        used = (await api.http.get("/metrics")).text
        assert 'loraplex_requests_total{adapter="own",route="/v1/embeddings",status="200"} 2.0' in used
        assert_error(await post(api, "/v1/embeddings", input="a", model="none"), 404, "model_not_found")


async def test_inputs_that_cannot_be_computed(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        too_long = [1] * (MAX_MODEL_LEN + 1)
        error = assert_error(await post(api, "/v1/embeddings", input=too_long), 400, "context_length_exceeded")
        assert error["param"] == "input"
        for given in ("", [], [[]], ["a", ""], [1, "a"], None, [10**8], ["a"] * 2049):
            error = assert_error(await post(api, "/v1/embeddings", input=given), 400, "invalid_value")
            assert error["param"].startswith("input"), given
        assert not api.engine.submitted
        assert len(vectors(await embedded(api, [1] * MAX_MODEL_LEN))) == 1  # the whole context


async def test_more_inputs_than_a_request_may_have_at_once_follow(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        prompts = [[i % 90 + 1, i // 90 + 1] for i in range(3 * MAX_CHOICES)]
        most, submit = 0, api.engine.send

        def counting(message: Any) -> None:
            nonlocal most
            submit(message)
            most = max(most, len(api.engine._running))

        api.engine.send = counting  # type: ignore[method-assign]
        found = vectors(await embedded(api, prompts))
        assert found == [pytest.approx(each, abs=1e-6) for each in counted(*prompts)]
        assert most == MAX_CHOICES and not len(api.context.in_flight)


async def test_a_failure_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        api.engine.fail_after, api.engine.failure = 0, "the model produced numbers that are not finite"
        assert_error(await post(api, "/v1/embeddings", input=["a", "b"]), 500, "engine_error")
        api.engine.failure_reason = "timeout"
        assert_error(await post(api, "/v1/embeddings", input=["a", "b"]), 504, "deadline_exceeded")
        assert not len(api.context.in_flight)


async def test_the_queue_and_draining_apply(tmp_path: Path) -> None:
    async with serving(tmp_path, max_queue=3) as api:
        api.waits_after(0)
        running = asyncio.create_task(post(api, "/v1/embeddings", input=["a"] * 3))
        while len(api.context.in_flight) < 3:
            await asyncio.sleep(0.001)
        assert_error(await post(api, "/v1/embeddings", input="a"), 503, "queue_full")
        api.goes_on()
        assert (await running).status_code == 200
        api.context.accepting = False
        assert_error(await post(api, "/v1/embeddings", input="a"), 503, "draining")


@pytest.mark.parametrize("route", ["/v1/embeddings", "/score", "/v1/score", "/rerank", "/v1/rerank"])
async def test_a_key_needs_the_scope_and_sees_its_adapters(tmp_path: Path, route: str) -> None:
    fields = {"input": "a"} if "emb" in route else {"text_1": "a", "text_2": "b", "query": "a", "documents": ["b"]}
    keys = [
        Key("infers", digest_of(secret("infers")), frozenset({"infer"}), adapters=frozenset()),
        Key("observes", digest_of(secret("observes")), frozenset({"observe"})),
    ]
    async with serving(tmp_path, keys=KeyRing(keys)) as api:
        headers = {name: {"authorization": f"Bearer {secret(name)}"} for name in ("infers", "observes")}
        answer = await api.http.post(route, json={"model": BASE, **fields}, headers=headers["infers"])
        assert answer.status_code == 200, answer.text
        refused = await api.http.post(route, json={"model": BASE, **fields}, headers=headers["observes"])
        assert_error(refused, 403, "insufficient_scope")
        assert_error(await api.http.post(route, json={"model": BASE, **fields}), 401, "invalid_api_key")
        hidden = await api.http.post(route, json={"model": "own", **fields}, headers=headers["infers"])
        assert_error(hidden, 404, "model_not_found")


async def test_fields_are_applied_refused_or_harmless(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        for name in REFUSED_IN_EMBEDDINGS:
            error = assert_error(await post(api, "/v1/embeddings", **{"input": "a", name: "x"}), 400, "unsupported")
            assert error["param"] == name
        for name, refusal in REFUSED_IN_EMBEDDINGS.items():
            for value in (None, *refusal.neutral):
                assert (await post(api, "/v1/embeddings", **{"input": "a", name: value})).status_code == 200
        for name in HARMLESS_IN_EMBEDDINGS:
            assert "x-loraplex-ignored" not in (await post(api, "/v1/embeddings", **{"input": "a", name: "x"})).headers
        unknown = await post(api, "/v1/embeddings", input="a", colour="red")
        assert unknown.headers["x-loraplex-ignored"] == "colour"


async def test_special_tokens_are_added_unless_they_are_not_wanted(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    start = tokenizer.backend.token_to_id("<|start|>")
    tokenizer.backend.post_processor = TemplateProcessing("<|start|> $A", special_tokens=[("<|start|>", start)])
    async with serving(tmp_path, tokenizer=tokenizer) as api:
        for fields in ({}, {"add_special_tokens": False}, {"add_special_tokens": True}):
            await embedded(api, "hi", **fields)
        assert [len(submit.token_ids) for submit in api.engine.submitted] == [3, 2, 3]


async def test_scores_are_cosines_in_vllm_s_shape(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        texts = ["first", "second text", "third"]
        all_of_them = np.array(counted(*(ids(api.context.tokenizer, text) for text in texts)))
        for route in ("/score", "/v1/score"):
            body = (await post(api, route, text_1=texts[0], text_2=texts[1:])).json()
            ScoreList.model_validate(body)
            found = [item["score"] for item in body["data"]]
            assert found == pytest.approx((all_of_them[1:] @ all_of_them[0]).tolist(), abs=1e-6)
            assert body["usage"]["total_tokens"] == sum(map(len, texts))
        pairs = (await post(api, "/score", text_1=texts[:2], text_2=texts[1:])).json()["data"]
        expected = [float(all_of_them[i] @ all_of_them[i + 1]) for i in range(2)]
        assert [item["score"] for item in pairs] == pytest.approx(expected, abs=1e-6)
        same = (await post(api, "/score", text_1="same", text_2="same", pooling="mean")).json()["data"]
        assert same[0]["score"] == pytest.approx(1) and api.engine.submitted[-1].sampling.pooling == "mean"
        error = assert_error(await post(api, "/score", text_1=texts, text_2=texts[:2]), 400, "invalid_value")
        assert error["param"] == "text_1"


async def test_rerank_orders_documents(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        documents = ["zzzz", "query", "quer"]
        for route in ("/rerank", "/v1/rerank"):
            body = (await post(api, route, query="query", documents=documents)).json()
            Ranking.model_validate(body)
            assert [result["index"] for result in body["results"]] == [1, 2, 0]
            assert body["results"][0]["relevance_score"] == pytest.approx(1)
            assert body["results"][1]["document"] == {"text": "quer"}
        best = (await post(api, "/rerank", query="query", documents=documents, top_n=1)).json()["results"]
        assert [result["index"] for result in best] == [1]
        bare = (await post(api, "/rerank", query="query", documents=documents, return_documents=False)).json()
        assert all("document" not in result for result in bare["results"])
        for fields in ({"documents": []}, {"documents": ["a"], "top_n": -1}, {"documents": [""]}):
            assert_error(await post(api, "/rerank", query="a", **fields), 400, "invalid_value")
