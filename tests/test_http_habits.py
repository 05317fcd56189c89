"""What HTTP clients, browsers and proxies do beside plain requests."""

import gzip
import json
import zlib
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from server.api.inference import streaming
from server.api.middleware.body_limits import MAX_JSON_BYTES
from tests.fixtures.api_server import BASE, Api, assert_error, byte_tokenizer, listening, serving
from tests.fixtures.timing import HANG_SECONDS
from tests.test_auth import ADMIN_KEY, INFER_KEY, OBSERVE_KEY, TENANT_KEY, bearer, ring

CHAT = "/v1/chat/completions"
BODY = json.dumps({"model": BASE, "messages": [{"role": "user", "content": "hi"}]}).encode()
COMMENT = streaming._COMMENT.decode().strip()
ORIGIN = {"origin": "https://chat.example.com"}


async def test_a_key_for_inference_gets_404_for_what_is_no_route(tmp_path: Path) -> None:
    async with serving(tmp_path, keys=ring(tmp_path)) as api:
        for key in (INFER_KEY, TENANT_KEY, OBSERVE_KEY, ADMIN_KEY):
            api.http.headers.update(bearer(key))
            for path in ("/v1/nothing", "/v1/images/generations", "/chat/completions", "/nope", "/v1", "/console"):
                for method in ("GET", "POST"):
                    assert_error(await api.http.request(method, path), 404, "not_found")
        api.http.headers.update(bearer(INFER_KEY))
        assert_error(await api.chat(model="nope"), 404, "model_not_found")
        for path in ("/v1/adapters", "/v1/adapters/nope", "/v1/adapters/nope/pin", "/v1/load_lora_adapter/"):
            assert_error(await api.http.post(path), 403, "insufficient_scope")


async def test_slashes_at_the_end_of_a_path_do_not_count(tmp_path: Path) -> None:
    async with serving(tmp_path, keys=ring(tmp_path)) as api:
        headers = {**bearer(INFER_KEY), "content-type": "application/json"}
        for path in (CHAT + "/", CHAT + "//", "/v1/completions/"):
            assert (await api.http.post(path, content=BODY, headers=headers)).status_code in (200, 400)
        assert (await api.http.get("/v1/models/", headers=headers)).json()["object"] == "list"
        assert (await api.http.get(f"/v1/models/{BASE}/", headers=headers)).json()["id"] == BASE
        assert (await api.http.get("/livez/")).status_code == 200
        assert_error(await api.http.get("/v1/adapters/", headers=headers), 403)


async def test_head_is_get_without_the_body(tmp_path: Path) -> None:
    async with serving(tmp_path, keys=ring(tmp_path)) as api:
        for path in ("/livez", "/readyz", "/health"):
            answer = await api.http.head(path)
            assert (answer.status_code, answer.content) == (200, b"")
            assert int(answer.headers["content-length"]) > 0 and answer.headers["x-request-id"]
        assert (await api.http.head("/v1/models")).status_code == 401
        assert (await api.http.head("/v1/models", headers=bearer(INFER_KEY))).status_code == 200
        assert (await api.http.head("/v1/adapters", headers=bearer(INFER_KEY))).status_code == 403
        assert (await api.http.head(CHAT, headers=bearer(INFER_KEY))).status_code == 405


def test_head_over_a_connection(tmp_path: Path) -> None:
    with listening(tmp_path) as server, httpx.Client(base_url=server.url, timeout=HANG_SECONDS) as client:
        for _ in range(2):  # a body would be read as the next response
            assert client.head("/health").status_code == 200
            assert client.get("/health").json() == {"status": "ready"}


async def test_browsers_need_an_allowed_origin(tmp_path: Path) -> None:
    preflight = {**ORIGIN, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    async with serving(tmp_path / "without", keys=ring(tmp_path)) as api:
        assert_error(await api.http.options(CHAT, headers=preflight), 401)
        assert "access-control-allow-origin" not in (await api.http.get("/livez", headers=ORIGIN)).headers
    async with serving(tmp_path / "with", keys=ring(tmp_path), cors_origin=(ORIGIN["origin"],)) as api:
        allowed = await api.http.options(CHAT, headers=preflight)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == ORIGIN["origin"]
        assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
        other = await api.http.options(CHAT, headers={**preflight, "origin": "https://evil.example.com"})
        assert other.status_code == 400 and "access-control-allow-origin" not in other.headers
        refused = await api.http.post(CHAT, content=BODY, headers={**ORIGIN, "content-type": "application/json"})
        assert_error(refused, 401)  # which the page may read
        assert refused.headers["access-control-allow-origin"] == ORIGIN["origin"]
        assert "x-loraplex-ignored" in refused.headers["access-control-expose-headers"].lower()


async def send(api: Api, body: bytes, encoding: str, path: str = CHAT) -> httpx.Response:
    headers = {"content-type": "application/json", "content-encoding": encoding}
    return await api.http.post(path, content=body, headers=headers)


@pytest.mark.parametrize(("encoding", "encode"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
async def test_compressed_bodies_are_read(tmp_path: Path, encoding: str, encode: Callable[[bytes], bytes]) -> None:
    async with serving(tmp_path) as api:
        assert (await send(api, encode(BODY), encoding)).status_code == 200
        assert (await send(api, encode(BODY), encoding.upper())).status_code == 200
        assert (await send(api, BODY, "identity")).status_code == 200
        for broken in (BODY, encode(BODY)[:-9], encode(BODY)[:5]):
            assert_error(await send(api, broken, encoding), 400, "invalid_value")
        bomb = encode(b" " * (50 * MAX_JSON_BYTES))
        assert len(bomb) < MAX_JSON_BYTES
        assert_error(await send(api, bomb, encoding), 413, "too_large")


async def test_encodings_that_are_not_read_are_415(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        for encoding in ("br", "zstd", "gzip, gzip", "x"):
            error = await send(api, BODY, encoding)
            assert_error(error, 415, "unsupported_media_type")
            assert "gzip" in error.headers["accept-encoding"]


async def test_a_body_that_is_no_json_says_where(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        answer = await api.http.post(CHAT, content=b'{"model":"x",}', headers={"content-type": "application/json"})
        error = assert_error(answer, 400, "invalid_value")
        assert error["param"] is None and "not valid JSON" in error["message"] and "13" in error["message"]


async def test_a_context_that_is_too_long_has_the_wording_that_clients_look_for(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        for answer, param in (
            (await api.chat(max_tokens=100_000), "messages"),
            (await api.chat("x" * 100_000), "messages"),
            (await api.complete([1] * 300), "prompt"),
            (await api.complete("x" * 100_000), "prompt"),
        ):
            error = assert_error(answer, 400, "context_length_exceeded")
            assert error["message"].startswith("This model's maximum context length is 256 tokens. However, ")
            assert error["param"] == param


async def test_a_template_s_own_reason_is_in_the_error(tmp_path: Path) -> None:
    template = "{{ raise_exception('System role not supported.') }}"
    async with serving(tmp_path, tokenizer=byte_tokenizer(template)) as api:
        error = assert_error(await api.chat(), 400)
        assert error["message"] == "The model's chat template failed: System role not supported."
        assert error["param"] == "messages"


async def test_models_say_how_long_their_context_is(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.upload("acme")
        for model in (await api.http.get("/v1/models")).json()["data"]:
            assert model["max_model_len"] == 256
            assert model["permission"][0]["allow_sampling"] is True


def test_a_stream_begins_before_its_first_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The role comes first, then comments until there is output, and none after it."""
    monkeypatch.setattr(streaming, "HEAD_SECONDS", 0.01)
    monkeypatch.setattr(streaming, "COMMENT_SECONDS", 0.01)
    with listening(tmp_path) as server, httpx.Client(base_url=server.url, timeout=HANG_SECONDS) as client:
        server.engine.waits_after = lambda _: 0
        with client.stream("POST", CHAT, json={**json.loads(BODY), "stream": True}) as answer:
            assert answer.status_code == 200
            lines = answer.iter_lines()
            assert '"role":"assistant"' in next(lines)
            assert [next(lines) for _ in range(5)][1::2] == [COMMENT] * 2
            server.engine.waits_after = lambda _: float("inf")
            rest = list(lines)
        first = next(i for i, line in enumerate(rest) if line.startswith("data: "))
        assert all(not line.startswith(":") for line in rest[first:])
        assert rest[-2:] == ["data: [DONE]", ""]
        server.wait_idle()


@pytest.mark.reliability("T40")
def test_a_client_that_leaves_before_the_first_token_ends_its_sequence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "HEAD_SECONDS", 0.01)
    with listening(tmp_path) as server, httpx.Client(base_url=server.url, timeout=HANG_SECONDS) as client:
        server.engine.waits_after = lambda _: 0
        with client.stream("POST", CHAT, json={**json.loads(BODY), "stream": True}):
            pass
        server.wait_idle()
        assert len(server.engine.aborted) == 1


@pytest.mark.reliability("T63")
def test_a_failure_after_the_head_is_an_error_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "HEAD_SECONDS", 0.01)
    with listening(tmp_path) as server, httpx.Client(base_url=server.url, timeout=HANG_SECONDS) as client:
        server.engine.waits_after, server.engine.fail_after = lambda _: 0, 0
        with client.stream("POST", CHAT, json={**json.loads(BODY), "stream": True}) as answer:
            assert answer.status_code == 200
            server.engine.waits_after = lambda _: float("inf")
            frames = [line for line in answer.iter_lines() if line.startswith("data: ")]
        assert json.loads(frames[-2].removeprefix("data: "))["error"]["code"] == "internal_error"
        assert frames[-1] == "data: [DONE]"
