"""Attacks by web pages on a server that asks for no key: cross-site requests and rebound host names."""

from pathlib import Path

import httpx
import pytest
from fastapi.routing import APIRoute
from starlette.datastructures import Headers

from server.api.middleware.auth import Key, KeyRing
from server.api.middleware.browser_guard import comes_from_here, is_allowed_host
from tests.fixtures.api_server import Api, assert_error, form, serving

FOREIGN = [
    {"origin": "https://evil.example"},
    {"origin": "null"},
    {"origin": "http://localhost:81"},
    {"origin": "http://localhost.evil.example"},
    {"sec-fetch-site": "cross-site"},
    {"sec-fetch-site": "same-site"},
    {"origin": "http://localhost", "sec-fetch-site": "cross-site"},
]


def routes(api: Api) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    todo = list(api.app.routes)
    while todo:
        route = todo.pop()
        if isinstance(route, APIRoute):
            found += [(route.path, method) for method in route.methods]
        elif (router := getattr(route, "original_router", None)) is not None:
            todo += router.routes
    return found


@pytest.mark.reliability("T30")
@pytest.mark.parametrize("headers", FOREIGN)
async def test_a_foreign_page_changes_nothing_on_any_route(tmp_path: Path, headers: dict[str, str]) -> None:
    async with serving(tmp_path) as api:
        unsafe = [(path, method) for path, method in routes(api) if method not in ("GET", "HEAD", "OPTIONS")]
        assert len(unsafe) > 10
        for path, method in [*unsafe, ("/v1/adapters/x/files/adapter_model.safetensors", "GET")]:
            answer = await api.http.request(method, path.replace("{name}", "x"), headers=headers)
            if path.startswith("/generate"):  # in LoRAX's shape
                assert answer.status_code == 403 and answer.json()["error_type"]
            else:
                assert_error(answer, 403, "cross_site")


async def test_a_cross_site_form_does_not_replace_an_adapter(tmp_path: Path) -> None:
    """A form of files is what browsers send without asking first."""
    async with serving(tmp_path) as api:
        before = (await api.upload("mine")).json()["version"]
        data = {"name": "mine", "replace": "true"}
        attack = {"origin": "https://evil.example", "sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
        assert_error(await api.http.post("/v1/adapters", data=data, files=form(1), headers=attack), 403, "cross_site")
        assert (await api.http.get("/v1/adapters/mine")).json()["version"] == before


@pytest.mark.reliability("T32")
@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "10.0.0.1", ""]
)
async def test_a_rebound_name_reads_nothing(tmp_path: Path, host: str) -> None:
    async with serving(tmp_path) as api:
        await api.upload("mine")
        for path in ("/v1/adapters/mine/files/adapter_model.safetensors", "/v1/models", "/metrics", "/livez"):
            assert_error(await api.http.get(path, headers={"host": host}), 403, "host_not_allowed")


async def test_the_server_s_own_page_and_programs_are_served(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        for number, headers in enumerate(
            [
                {},
                {"origin": "http://localhost"},
                {"origin": "http://localhost:8000", "host": "localhost:8000", "sec-fetch-site": "same-origin"},
                {"origin": "http://[::1]:8000", "host": "[::1]:8000", "sec-fetch-site": "same-origin"},
                {"host": "127.0.0.1:9", "sec-fetch-site": "none"},
                {"host": "LOCALHOST."},
            ]
        ):
            api.http.headers = httpx.Headers(headers)
            assert (await api.upload(f"a-{number}")).status_code == 201, headers
            path = f"/v1/adapters/a-{number}/files/adapter_model.safetensors"
            assert (await api.http.get(path)).status_code == 200


async def test_other_names_are_allowed_by_a_setting_or_where_a_key_is_needed(tmp_path: Path) -> None:
    named = {"host": "models.example:8000"}
    async with serving(tmp_path / "a", allowed_host=("models.example",)) as api:
        assert (await api.http.get("/v1/models", headers=named)).status_code == 200
        assert_error(await api.http.get("/v1/models", headers={"host": "other.example"}), 403, "host_not_allowed")
    ring = KeyRing([Key("a", "0" * 64, frozenset({"infer"}))])
    async with serving(tmp_path / "b", keys=ring) as api:
        assert (await api.http.get("/livez", headers=named)).status_code == 200
        attack = {"origin": "https://evil.example"}
        assert_error(await api.http.post("/v1/completions", json={}, headers=attack), 403, "cross_site")


def test_origins_can_be_allowed() -> None:
    headers = Headers({"origin": "https://app.example", "sec-fetch-site": "cross-site", "host": "localhost"})
    assert comes_from_here(headers, {"https://app.example"}) and comes_from_here(headers, {"*"})
    assert not comes_from_here(headers, {"https://other.example"}) and not comes_from_here(headers, ())


def test_host_headers() -> None:
    for host in ("localhost", "localhost:8000", "127.0.0.1", "127.9.9.9:1", "[::1]:8000", "a.example", "A.example:1"):
        assert is_allowed_host(host, {"a.example"})
    for host in ("", "b.example", "a.example.b", "localhost:8000@evil", "127.0.0.1.nip.io", "[::1].evil", "1.2.3.4"):
        assert not is_allowed_host(host, {"a.example"})
