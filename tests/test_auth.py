import hashlib
import socket
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from fastapi.routing import APIRoute

from server.api.middleware.auth import KeyRing, check_bind
from server.config import ConfigError, ServeConfig
from server.console import assets
from tests.fixtures.api_server import Api, assert_error, listening, secret, serving

INFER_KEY, ADMIN_KEY, TENANT_KEY, OBSERVE_KEY, ALL_KEY = map(secret, ("infer", "admin", "tenant", "observe", "all"))
KEYS = f"""
[[keys]]
name = "app"
key = "{INFER_KEY}"

[[keys]]
name = "ops"
sha256 = "{hashlib.sha256(ADMIN_KEY.encode()).hexdigest()}"
scopes = ["admin"]
tenant = "operations"

[[keys]]
name = "tenant"
key = "{TENANT_KEY}"
scopes = ["infer", "admin"]
adapters = ["mine"]

[[keys]]
name = "scraper"
key = "{OBSERVE_KEY}"
scopes = ["observe"]
"""
OPEN = {"/", "/console/{file}", "/livez", "/readyz", "/health", "/version"}
KNOWN = {"/v1/keys/self"}
OBSERVE = {"/metrics", "/v1/stats", "/v1/stats/history", "/v1/trace", "/v1/usage", "/is_paused", "/openapi.json"}
INFER = {
    "/v1/chat/completions",
    "/v1/completions",
    *("/v1/embeddings", "/score", "/v1/score", "/rerank", "/v1/rerank"),
    "/v1/messages",
    "/generate",
    "/generate_stream",
    "/v1/responses",
    "/v1/models",
    "/v1/models/{model:path}",
    "/tokenize",
    "/detokenize",
    "/tokenizer_info",
}
ADMIN = {
    "/v1/adapters",
    "/v1/adapters/{name}",
    *(f"/v1/adapters/{{name}}/{action}" for action in ("load", "unload", "pin", "unpin", "versions", "rollback")),
    "/v1/adapters/{alias}/split",
    "/v1/adapters/{name}/files/{file}",
    "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter",
    "/v1/aliases",
}
OPERATE = {"/v1/merge", "/v1/keys", "/pause", "/resume", "/reset_prefix_cache"}
ALLOWED = {
    INFER_KEY: OPEN | KNOWN | INFER,
    ADMIN_KEY: OPEN | KNOWN | ADMIN | OPERATE,
    TENANT_KEY: OPEN | KNOWN | INFER | ADMIN,
    OBSERVE_KEY: OPEN | KNOWN | OBSERVE,
}


def ring(folder: Path, text: str = KEYS, api_key: str = "") -> KeyRing:
    path = folder / "keys.toml"
    path.write_text(text)
    return KeyRing.load(ServeConfig(keys_file=path, api_key=api_key))


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def routes(api: Api) -> list[tuple[str, str]]:
    listed = [
        (route.path.replace(":adapter}", "}"), method)
        for route in _flat(api.app.routes)
        for method in sorted(route.methods)
    ]
    return [*listed, ("/openapi.json", "GET")]


def _flat(found: list) -> list[APIRoute]:  # type: ignore[type-arg]
    routers = [getattr(route, "original_router", None) for route in found]
    own = [route for route in found if isinstance(route, APIRoute)]
    return own + [route for router in routers if router is not None for route in _flat(router.routes)]


@pytest.mark.reliability("T30")
async def test_every_route_asks_for_what_it_should(tmp_path: Path) -> None:
    async with serving(tmp_path, keys=ring(tmp_path)) as api:
        assert {path for path, _ in routes(api)} == OPEN | KNOWN | OBSERVE | INFER | ADMIN | OPERATE
        for path, method in routes(api):
            url = path.replace("{name}", "x").replace("{model:path}", "x")
            url = {"/console/{file}": f"/console/{next(iter(assets()))}", "/v1/trace": "/v1/trace?seconds=0.01"}.get(
                path, url
            )
            for headers in ({}, bearer("wrong"), {"authorization": f"Basic {INFER_KEY}"}, bearer("")):
                answer = await api.http.request(method, url, headers=headers)
                if path in OPEN:
                    assert answer.status_code == 200
                else:
                    assert_refused(path, answer, 401, "invalid_api_key")
                    assert answer.headers["www-authenticate"] == "Bearer"
            for sent, allowed in ALLOWED.items():
                answer = await api.http.request(method, url, headers=bearer(sent))
                assert (answer.status_code not in (401, 403)) is (path in allowed), (sent, method, path)
                if path not in allowed:
                    assert_refused(path, answer, 403, "insufficient_scope")


def assert_refused(path: str, answer: httpx.Response, status: int, code: str) -> None:
    if path in ("/generate", "/generate_stream"):  # which have LoRAX's errors
        assert answer.status_code == status and answer.json()["error_type"] == "validation"
    else:
        assert_error(answer, status, code)


@pytest.mark.reliability("T30")
@pytest.mark.parametrize(
    "path",
    [
        "/nope",
        "//v1/models",
        "/v1%2f..%2flivez",
        "/LIVEZ",
        "/livez;x",
        "/livez%2f..%2fv1",
        "/%2Fv1/models",
        "/console",
        "/console/x%2f..%2f..%2fv1%2fadapters",
        "/console/x/y",
    ],
)
async def test_what_is_not_listed_is_closed(tmp_path: Path, path: str) -> None:
    async with serving(tmp_path, keys=ring(tmp_path)) as api:
        for method in ("GET", "POST", "OPTIONS", "HEAD", "DELETE"):
            headers = {"host": "x/livez?", "x-forwarded-prefix": "/livez", "x-http-method-override": "GET"}
            assert (await api.http.request(method, path, headers=headers)).status_code == 401
        assert_error(await api.http.get(path, headers=bearer(ADMIN_KEY)), 404)


@pytest.mark.reliability("T32")
@pytest.mark.parametrize(
    "target",
    ["/v1/../livez", "/livez/../v1/models", "http://x/v1/models", "//livez", "/v1/models?x=/livez", "/v1/models#"],
)
def test_raw_targets_do_not_get_around_it(tmp_path: Path, target: str) -> None:
    """An HTTP client would tidy these up before they are sent."""
    with listening(tmp_path, keys=ring(tmp_path)) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            client.sendall(f"GET {target} HTTP/1.1\r\nhost: /livez?\r\nconnection: close\r\n\r\n".encode())
            assert client.recv(1024).split()[1] in (b"401", b"400")


@pytest.mark.reliability("T8")
async def test_a_refused_upload_is_not_read(tmp_path: Path) -> None:
    read = 0

    async def body():  # type: ignore[no-untyped-def]
        nonlocal read
        for _ in range(100):
            read += 1
            yield b"x" * 65536

    async with serving(tmp_path, keys=ring(tmp_path)) as api:
        headers = {"content-type": "multipart/form-data; boundary=x", "content-length": str(100 * 65536)}
        assert_error(await api.http.post("/v1/adapters", content=body(), headers=headers), 401)
        assert read <= 1


@pytest.mark.reliability("T30")
async def test_an_allow_list_hides_everything_else(tmp_path: Path) -> None:
    async with serving(tmp_path, keys=ring(tmp_path, api_key=ALL_KEY)) as api:
        api.http.headers.update(bearer(ALL_KEY))
        await api.upload("mine")
        await api.upload("theirs", seed=1)
        api.http.headers.update(bearer(TENANT_KEY))
        models = (await api.http.get("/v1/models")).json()["data"]
        assert [model["id"] for model in models] == ["tiny-base", "mine"]
        records = (await api.http.get("/v1/adapters")).json()["data"]
        assert [record["name"] for record in records] == ["mine"]
        assert (await api.chat(model="mine")).status_code == 200
        hidden, unknown = await api.chat(model="theirs"), await api.chat(model="theirz")
        assert hidden.text.replace("theirs", "theirz") == unknown.text
        assert_error(hidden, 404, "model_not_found")
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/pin"), ("GET", "/versions")):
            assert_error(await api.http.request(method, f"/v1/adapters/theirs{path}"), 404, "model_not_found")
        assert_error(await api.upload("theirs", seed=1, replace="true"), 403)
        assert_error(await api.http.get("/v1/models/theirs"), 404)


@pytest.mark.reliability("T51")
async def test_tenants_do_not_share_prefixes(tmp_path: Path) -> None:
    async with serving(tmp_path, keys=ring(tmp_path)) as api:
        for sent in (INFER_KEY, TENANT_KEY):
            api.http.headers.update(bearer(sent))
            await api.chat()
        assert [submit.cache_salt for submit in api.engine.submitted] == ["app", "tenant"]


async def test_the_tenant_s_weight_goes_with_its_requests(tmp_path: Path) -> None:
    text = f"[[keys]]\nname = 'a'\nkey = '{secret('x')}'\nweight = 2.5\n[[keys]]\nname = 'b'\nkey = '{secret('y')}'"
    async with serving(tmp_path, keys=ring(tmp_path, text)) as api:
        for name in ("x", "y"):
            api.http.headers.update(bearer(secret(name)))
            await api.chat()
        assert [submit.weight for submit in api.engine.submitted] == [2.5, 1.0]


async def test_without_keys_everything_is_open(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        for path in ("/metrics", "/version", "/v1/stats", "/v1/adapters", "/v1/models"):
            assert (await api.http.get(path)).status_code == 200


@pytest.mark.reliability("T31")
def test_only_loopback_without_keys(tmp_path: Path) -> None:
    for host in ("127.0.0.1", "::1", "localhost", "127.1.2.3"):
        check_bind(ServeConfig(host=host), KeyRing())
    for host in ("0.0.0.0", "::", "192.168.1.1", "example.org", ""):
        with pytest.raises(ConfigError):
            check_bind(ServeConfig(host=host), KeyRing())
        check_bind(ServeConfig(host=host), ring(tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "keys = 3",
        "keys = [3]",
        f"[[keys]]\nkey = '{secret('x')}'",
        "[[keys]]\nname = 'a'",
        "[[keys]]\nname = 'a'\nkey = ''",
        f"[[keys]]\nname = 'a'\nkey = '{secret('x')}'\nsha256 = 'y'",
        "[[keys]]\nname = 'a'\nsha256 = 'short'",
        f"[[keys]]\nname = 'a'\nkey = '{secret('x')}'\nscopes = ['root']",
        f"[[keys]]\nname = 'a'\nkey = '{secret('x')}'\nscopes = 'infer'",
        f"[[keys]]\nname = 'a'\nkey = '{secret('x')}'\nadapters = 'mine'",
        f"[[keys]]\nname = 'a'\nkey = '{secret('x')}'\nrole = 'root'",
        f"[[keys]]\nname = 'a'\nkey = '{secret('x')}'\nweight = 0",
        f"[[keys]]\nname = 'a'\nkey = '{secret('x')}'\nweight = nan",
        f"[[keys]]\nname = 'a'\nkey = '{secret('x')}'\nweight = inf",
        f"[[keys]]\nname = 'a'\nkey = '{secret('x')}'\nweight = 2\n"
        f"[[keys]]\nname = 'b'\nkey = '{secret('y')}'\ntenant = 'a'",
        "[[keys",
        "[[keys]]\nname = 'a'\nkey = 'short-and-guessable'",
        "[[keys]]\nname = 'a'\nkey = 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa'",
        f"[[keys]]\nname = 'a'\nkey = '{secret('x')}'\nexpires = 2030-01-01",
        f"[[keys]]\nname = 'a'\nkey = '{secret('x')}'\nscopes = ['observe']\nadapters = ['mine']",
    ],
)
def test_keys_files_that_cannot_be_used(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError):
        ring(tmp_path, text)


def test_a_missing_keys_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        KeyRing.load(ServeConfig(keys_file=tmp_path / "none.toml"))


def test_a_weak_api_key_is_refused() -> None:
    with pytest.raises(ConfigError, match="128 bits"):
        KeyRing.load(ServeConfig(api_key="secret"))
    for strong in ("0123456789abcdef" * 2, ALL_KEY):
        assert KeyRing.load(ServeConfig(api_key=strong)).find(strong)


async def test_keys_change_while_the_server_runs(tmp_path: Path) -> None:
    keys = ring(tmp_path)
    async with serving(tmp_path, keys=keys) as api:
        assert (await api.http.get("/v1/models", headers=bearer(INFER_KEY))).status_code == 200
        assert not keys.is_outdated
        (tmp_path / "keys.toml").write_text(f"[[keys]]\nname = 'b'\nkey = '{secret('new')}'")
        assert keys.is_outdated
        keys.reload()
        assert not keys.is_outdated
        assert_error(await api.http.get("/v1/models", headers=bearer(INFER_KEY)), 401)
        assert (await api.http.get("/v1/models", headers=bearer(secret("new")))).status_code == 200
        (tmp_path / "keys.toml").write_text("[[keys")
        with pytest.raises(ConfigError):
            keys.reload()
        assert (await api.http.get("/v1/models", headers=bearer(secret("new")))).status_code == 200
        (tmp_path / "keys.toml").write_text("keys = []")
        keys.reload()
        assert_error(await api.http.get("/v1/models", headers=bearer(secret("new"))), 401)
        assert_error(await api.http.get("/v1/models"), 401)


async def test_a_key_expires(tmp_path: Path) -> None:
    def text(when: datetime) -> str:
        return f"[[keys]]\nname = 'a'\nkey = '{secret('x')}'\nexpires = {when.isoformat()}"

    now = datetime.now(UTC)
    async with serving(tmp_path / "a", keys=ring(tmp_path, text(now + timedelta(hours=1)))) as api:
        assert (await api.http.get("/v1/models", headers=bearer(secret("x")))).status_code == 200
    async with serving(tmp_path / "b", keys=ring(tmp_path, text(now))) as api:
        error = assert_error(await api.http.get("/v1/models", headers=bearer(secret("x"))), 401)
        assert "expired" in error["message"]
    assert now.timestamp() <= time.time()


async def test_limits_that_change_with_the_file_hold_at_once(tmp_path: Path) -> None:
    def write(limit: int) -> str:
        return f"[[keys]]\nname = 'a'\nkey = '{secret('x')}'\nrequests_per_minute = {limit}"

    keys = ring(tmp_path, write(1))
    async with serving(tmp_path, keys=keys) as api:
        api.http.headers.update(bearer(secret("x")))
        assert [(await api.chat()).status_code for _ in range(2)] == [200, 429]
        (tmp_path / "keys.toml").write_text(write(3))
        keys.reload()
        assert [(await api.chat()).status_code for _ in range(4)] == [200, 200, 200, 429]
