import asyncio
import json
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api.middleware.auth import KeyRing
from server.api.middleware.body_limits import MAX_JSON_BYTES
from server.config import ServeConfig
from server.departures import LONGEST_WAIT
from tests.fixtures.api_server import BASE, Api, LiveServer, assert_error, events, listening, secret, serving
from tests.fixtures.timing import cpu_seconds, eventually, leap

CHAT = "/v1/chat/completions"
EXTREMES = ["NaN", "Infinity", "-Infinity", "1e999", "-1", "0", str(2**31), str(2**63), str(10**4000), "1" + "0" * 5000]
NUMERIC_FIELDS = [
    *("temperature", "top_p", "n", "max_tokens", "max_completion_tokens", "presence_penalty", "frequency_penalty"),
    *("seed", "top_logprobs", "top_k", "min_p", "repetition_penalty", "min_tokens", "adapter_scale", "best_of"),
    "priority",
]


async def post(api: Api, raw: str | bytes, path: str = CHAT) -> httpx.Response:
    return await api.http.post(path, content=raw, headers={"content-type": "application/json"})


def with_field(name: str, raw: str) -> str:
    return f'{{"model": "{BASE}", "messages": [{{"role": "user", "content": "x"}}], "logprobs": true, "{name}": {raw}}}'


@pytest.mark.reliability("T20")
async def test_numeric_extremes_never_fail_the_server(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        for name in NUMERIC_FIELDS:
            for raw in (*EXTREMES, '"1"', '"x"', "true", "null", "[]", "{}"):
                answer = await post(api, with_field(name, raw))
                if answer.status_code != 200:
                    assert_error(answer, 400)
                    assert len(answer.content) < 2048
        assert_error(await post(api, with_field("logit_bias", '{"1": NaN}')), 400)
        assert_error(await post(api, with_field("logit_bias", '{"99999": 1}')), 400)
        assert_error(await post(api, with_field("stop_token_ids", "[99999]")), 400)


@pytest.mark.reliability("T21")
@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"\xff\xfe",
        b'{"model": NaN}',
        b'{"model": "\\ud800", "messages": []}',
        b"[" * 60_000,
        b'{"a":' * 50_000,
        b'{"model": "tiny-base", "messages": [{"role": "user", "content": "\\udfff"}]}',
    ],
)
async def test_bodies_that_are_no_request(tmp_path: Path, raw: bytes) -> None:
    async with serving(tmp_path) as api:
        for path in (CHAT, "/v1/completions", "/v1/adapters", "/v1/load_lora_adapter"):
            assert_error(await post(api, raw, path), 400)


@pytest.mark.reliability("T20")
@pytest.mark.parametrize(
    "fields",
    [
        {"messages": []},
        {"messages": [{"role": "tool", "content": "x"}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
        {"model": ""},
        {"model": None},
        {"model": "x" * 330},
        {"n": 129},
        {"stop": ["a"] * 65},
        {"stop": ""},
        {"stop": "x" * 257},
        {"logit_bias": {str(i): 1 for i in range(301)}},
        {"logit_bias": {"x": 1}},
        {"stream_options": {"include_usage": True}},
        {"min_tokens": 3, "max_tokens": 2},
    ],
)
async def test_values_out_of_bounds(tmp_path: Path, fields: dict[str, Any]) -> None:
    async with serving(tmp_path) as api:
        assert_error(await api.chat(**fields), 400, "invalid_value")


@pytest.mark.parametrize(
    "fields",
    [
        {"functions": [{"name": "f"}]},
        {"modalities": ["text", "audio"]},
        {"chat_template": "{{ 1 }}"},
        {"best_of": 2},
        {"messages": [{"role": "assistant", "content": "x", "function_call": {"name": "f"}}]},
    ],
)
async def test_what_would_change_the_answer_is_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    async with serving(tmp_path) as api:
        error = assert_error(await api.chat(**fields), 400, "unsupported")
        assert next(iter(fields)) in error["message"] or "tool_calls" in error["message"]


async def test_neutral_values_and_novelties_are_accepted(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        neutral = {"tools": [], "response_format": {"type": "text"}, "adapter_scale": 1.0, "modalities": ["text"]}
        answer = await api.chat(**neutral, adapters=None, best_of=1, store=True, brand_new_field={"a": 1})
        assert answer.status_code == 200
        assert answer.headers["x-loraplex-ignored"] == "brand_new_field"
        nameless = await api.chat(**{"a b": 1, "": 1})
        assert nameless.headers["x-loraplex-ignored"] == 'a%20b, ""'  # h11 sends no header that ends in a space
        assert_error(await api.chat(echo=True), 400, "unsupported")
        assert_error(await api.complete(suffix="x"), 400, "unsupported")


@pytest.mark.reliability("T21")
async def test_many_wrong_items_cost_no_more_than_their_json(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        bodies = ({"messages": [1] * 60_000}, {"stop": [1] * 60_000}, {"stop_token_ids": ["x"] * 60_000})
        for fields in bodies:
            reading = cpu_seconds(lambda fields=fields: json.loads(json.dumps(fields)))  # type: ignore[misc]
            started = time.process_time()
            answer = await api.chat(**fields)
            assert time.process_time() - started < 10 * reading
            assert_error(answer, 400)
            assert len(answer.content) < 2048
        for prompt in ([None] * 60_000, ["x", None] * 30_000, [[None] * 60_000]):
            assert_error(await api.complete(prompt), 400)


@pytest.mark.reliability("T6")
async def test_unknown_models_and_routes(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        for model in ("nope", "../etc/passwd", "/etc/passwd", "http://169.254.169.254/", "a\r\nb", "nope@" + "0" * 12):
            error = assert_error(await api.chat(model=model), 404, "model_not_found")
            assert error["param"] == "model"
        assert_error(await api.http.get("/v1/models/nope"), 404, "model_not_found")
        assert_error(await api.http.get("/nope"), 404, "not_found")
        assert_error(await api.http.get(CHAT), 405, "method_not_allowed")
        for path, allowed in ((CHAT, "POST"), ("/v1/adapters", "GET, POST"), ("/v1/merge", "GET, POST, DELETE")):
            assert (await api.http.request("OPTIONS", path)).headers["allow"] == allowed
        assert_error(await api.http.request("OPTIONS", CHAT), 405)


async def test_content_types(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
            answer = await api.http.post(CHAT, content=b"{}", headers={"content-type": kind})
            assert_error(answer, 415, "unsupported_media_type")


@pytest.mark.reliability("T8")
async def test_body_limits(tmp_path: Path) -> None:
    async with serving(tmp_path, max_upload_bytes=1024) as api:
        assert_error(await post(api, b" " * (MAX_JSON_BYTES + 1)), 413, "too_large")

        async def chunks() -> Any:
            for _ in range(5):
                yield b" " * (1 << 20)

        answer = await api.http.post(CHAT, content=chunks(), headers={"content-type": "application/json"})
        assert_error(answer, 413, "too_large")
        headers = {"content-type": "multipart/form-data; boundary=x"}
        assert_error(await api.http.post("/v1/adapters", content=chunks(), headers=headers), 411)
        big = await api.http.post("/v1/adapters", content=b"x" * 100_000, headers=headers)
        assert_error(big, 413, "too_large")


@pytest.mark.reliability("T21")
@pytest.mark.parametrize(
    "raw",
    [
        b'{"model":"tiny-base","prompt":[' + b"[]," * 1_300_000 + b"[]]}",
        b'{"model":"tiny-base","prompt":"x","unknown":[' + b"{}," * 1_300_000 + b"{}]}",
        b'{"model":"tiny-base","prompt":[' + b"1," * 2_000_000 + b"1]}",
        b'{"a":' * 800_000,
    ],
)
async def test_bodies_of_too_many_values_are_refused_before_they_are_parsed(tmp_path: Path, raw: bytes) -> None:
    """Parsing such a body takes more than a second, in which no stream gets a token."""
    async with serving(tmp_path) as api:
        reading = cpu_seconds(lambda: raw.count(b",") + raw.count(b"["))
        started = time.process_time()
        answer = await post(api, raw, "/v1/completions")
        assert time.process_time() - started < 0.1 + 20 * reading
        assert_error(answer, 413, "too_large")


async def test_a_body_in_many_chunks_reaches_the_application_in_one(tmp_path: Path) -> None:
    async def chunks() -> Any:
        for byte in json.dumps({"model": BASE, "prompt": "hello"}).encode():
            yield bytes([byte])

    async with serving(tmp_path) as api:
        answer = await api.http.post("/v1/completions", content=chunks(), headers={"content-type": "application/json"})
        assert answer.status_code == 200


async def test_a_long_text_is_refused_by_its_length_and_not_by_its_commas(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        text = "However, this is prose [1], with the brackets {and commas} of prose. " * 10_000
        assert_error(await api.complete(text), 400, "context_length_exceeded")


@pytest.mark.reliability("T35")
async def test_request_ids(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        for given, kept in (("abc-1.2_x", True), ("a b", False), ("x" * 65, False), ("é".encode(), False)):
            answer = await api.http.get("/livez", headers={"x-request-id": given})
            assert (answer.headers["x-request-id"] == given) is kept


@pytest.mark.reliability("T34")
async def test_what_nobody_foresaw_is_a_500_without_details(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(tmp_path) as api:

        def broken(_: str) -> None:
            raise RuntimeError("secret at /home/someone")

        api.context.registry.resolve = broken  # type: ignore[method-assign,assignment]
        answer = await api.chat(model="x")
        assert_error(answer, 500, "internal_error")
        assert answer.headers["x-request-id"] in caplog.text and "secret" in caplog.text
        assert "secret" not in answer.text


@pytest.mark.reliability("T60")
async def test_an_engine_that_dies(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        api.engine.comes_back = False
        api.waits_after(1)
        streams = [asyncio.create_task(api.chat(stream=True)) for _ in range(2)]
        await eventually(lambda: api.generated == 2)
        api.waits_after(0)
        early = asyncio.create_task(api.chat())
        await eventually(lambda: len(api.context.in_flight) == 3)
        api.engine.die()
        for stream in streams:
            assert events(await stream)[-1]["error"]["code"] == "engine_unavailable"
        for answer in (await early, await api.chat(), await api.http.get("/readyz"), await api.upload("acme")):
            assert_error(answer, 503, "engine_unavailable")
        assert (await api.http.get("/livez")).status_code == 200
        assert len(api.context.in_flight) == 0


@pytest.mark.reliability("T62")
async def test_a_full_queue(tmp_path: Path) -> None:
    async with serving(tmp_path, max_queue=2) as api:
        api.waits_after(0)
        first = [asyncio.create_task(api.chat()) for _ in range(2)]
        await eventually(lambda: len(api.context.in_flight) == 2)
        assert_error(await api.chat(), 503, "queue_full")
        assert_error(await api.http.get("/readyz"), 503, "queue_full")
        api.goes_on()
        assert [answer.status_code for answer in await asyncio.gather(*first)] == [200, 200]
        assert (await api.http.get("/readyz")).status_code == 200


@pytest.mark.reliability("T36")
async def test_one_tenant_s_backlog_is_not_everyone_s(tmp_path: Path) -> None:
    """Five requests of 64 sequences from one key; then eight of another."""
    names = ("greedy", "patient")
    file = tmp_path / "keys.toml"
    file.write_text("".join(f'[[keys]]\nname = "{name}"\nkey = "{secret(name)}"\n' for name in names))
    async with serving(tmp_path, keys=KeyRing.load(ServeConfig(keys_file=file))) as api:
        api.waits_after(0)

        def ask(name: str, **fields: Any) -> "asyncio.Task[httpx.Response]":
            headers, body = {"authorization": f"Bearer {secret(name)}"}, {"model": BASE, "max_tokens": 1, **fields}
            return asyncio.create_task(api.http.post("/v1/completions", json=body, headers=headers))

        heavy = [ask("greedy", prompt=["hi"] * 8, n=8) for _ in range(5)]
        await eventually(lambda: sum(task.done() for task in heavy) == 3)
        assert len(api.context.in_flight) == 128
        for task in heavy[2:]:
            assert_error(await task, 429, "queue_share")
            assert 1 <= int(task.result().headers["retry-after"]) <= LONGEST_WAIT
        light = [ask("patient", prompt="hi") for _ in range(8)]
        await eventually(lambda: len(api.context.in_flight) == 136)
        assert (await api.http.get("/readyz")).status_code == 200
        assert_error(await ask("patient", prompt=["hi"] * 8, n=8), 429, "queue_share")
        api.goes_on()
        assert {answer.status_code for answer in await asyncio.gather(*heavy[:2], *light)} == {200}


@pytest.mark.reliability("T62")
async def test_drain_finishes_then_aborts(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        api.waits_after(1)
        stuck = asyncio.create_task(api.chat(stream=True))
        short = asyncio.create_task(api.chat(max_tokens=5))
        await eventually(lambda: len(api.context.in_flight) == 2)
        api.context.draining = True
        assert_error(await api.http.get("/readyz"), 503, "draining")
        draining = asyncio.create_task(api.context.drain(timeout=3600))
        await asyncio.sleep(0)
        assert_error(await api.chat(), 503, "draining")
        api.engine.waits_after = lambda submit: 5 if submit.sampling.max_tokens == 5 else 1
        assert (await short).json()["usage"]["completion_tokens"] == 5
        assert not draining.done()
        leap(3600)
        await draining
        assert events(await stuck)[-1]["error"]["code"] == "aborted"
        assert len(api.context.in_flight) == 0


async def test_the_openapi_document_describes_everything(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        document = (await api.http.get("/openapi.json")).json()
        schemas = document["components"]["schemas"]
        assert {"ErrorBody", "ChatCompletionRequest", "ChatCompletionChunk", "AdapterBody", "Stats"} <= schemas.keys()
        assert "HTTPValidationError" not in json.dumps(document)
        create = document["paths"]["/v1/adapters"]["post"]
        assert create["requestBody"]["content"].keys() == {"multipart/form-data", "application/json"}
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                assert any(status >= "400" for status in operation["responses"]), (method, path)
        for reference in set(_references(document)):
            assert reference.removeprefix("#/components/schemas/") in schemas
        for path, name in (
            ("/v1/messages", "AnthropicErrorBody"),
            ("/generate", "LoraxErrorBody"),
            (CHAT, "ErrorBody"),
        ):
            refused = document["paths"][path]["post"]["responses"]["400"]["content"]["application/json"]["schema"]
            assert refused["$ref"] == f"#/components/schemas/{name}"
        is_open = {path for path, found in document["paths"].items() if found.get("get", {}).get("security") == []}
        assert is_open == {"/livez", "/readyz", "/health", "/version", "/", "/console/{file}"}  # all others need a key


def _references(node: Any) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if "$ref" in node else []
        return own + [ref for value in node.values() for ref in _references(value)]
    return [ref for value in node for ref in _references(value)] if isinstance(node, list) else []


def live_address(live: LiveServer) -> tuple[str, int]:
    host, port = live.url.removeprefix("http://").split(":")
    return host, int(port)


@pytest.mark.reliability("T25")
@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/adapters"])
def test_a_body_that_stops_arriving_is_given_up(route: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.api.middleware.body_limits.IDLE_SECONDS", 0.2)
    kind = "multipart/form-data; boundary=b" if route == "/v1/adapters" else "application/json"
    with listening(tmp_path) as live, socket.create_connection(live_address(live)) as connection:
        head = f"POST {route} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: 1000\r\n\r\n"
        connection.sendall(head.encode() + b"--b")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")
