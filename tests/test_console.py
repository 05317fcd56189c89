"""The console's files as the server gives them, and the routes that were made for it."""

import asyncio
import hashlib
import json
import subprocess
from pathlib import Path

import pytest

from server.console import STATIC, assets
from server.history import quantile
from tests.fixtures.api_server import BASE, Api, assert_error, serving
from tests.fixtures.browser import MODULES, ROOT, needs
from tests.fixtures.timing import eventually
from tests.test_auth import ADMIN_KEY, INFER_KEY, OBSERVE_KEY, TENANT_KEY, bearer, ring

SOURCES = ROOT / "console"


def digest_of_sources() -> str:
    """The same as `digestOfSources` of `console/build.mjs`."""
    names = ["build.mjs", "index.html", "package-lock.json", "package.json"]
    names += [path.relative_to(SOURCES).as_posix() for path in (SOURCES / "src").rglob("*") if path.is_file()]
    found = hashlib.sha256()
    for name in sorted(names):
        found.update(f"{name}\0".encode() + (SOURCES / name).read_bytes() + b"\0")
    return found.hexdigest()


def test_the_bundle_is_made_of_the_sources() -> None:
    assert (STATIC / "sources.sha256").read_text().strip() == digest_of_sources(), "run 'make console'"


def test_building_again_makes_the_same_files(tmp_path: Path) -> None:
    needs(MODULES, "npm ci --prefix console")
    subprocess.run(["node", SOURCES / "build.mjs", tmp_path], check=True, capture_output=True)
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_bytes() for path in STATIC.iterdir()}


def test_the_console_is_small() -> None:
    assert sum(path.stat().st_size for path in STATIC.iterdir()) < 300_000


def test_screenshots_are_small() -> None:
    shots = [*(ROOT / "docs" / "images" / "console").iterdir()]
    assert len(shots) > 10 and max(path.stat().st_size for path in shots) <= 150_000


async def test_the_page_and_its_files_need_no_key_and_are_cached(tmp_path: Path) -> None:
    async with serving(tmp_path, keys=ring(tmp_path)) as api:
        page = await api.http.get("/")
        assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
        assert page.headers["cache-control"] == "no-cache"
        named = [name for name in assets() if f"/console/{name}" in page.text]
        assert sorted(Path(name).suffix for name in named) == [".css", ".js"]
        for path in ("/", *(f"/console/{name}" for name in named)):
            answer = await api.http.get(path)
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            assert answer.headers["x-content-type-options"] == "nosniff"
            head = await api.http.head(path)
            assert (head.status_code, head.content) == (200, b"")
            assert int(head.headers["content-length"]) == len(answer.content)
            for known in (answer.headers["etag"], f'"other", W/{answer.headers["etag"]}'):
                unchanged = await api.http.get(path, headers={"if-none-match": known})
                assert (unchanged.status_code, unchanged.content) == (304, b"")
        for name in named:
            assert "immutable" in (await api.http.get(f"/console/{name}")).headers["cache-control"]
        for path in ("/console/index.html", "/console/none.js", "/console/sources.sha256"):
            assert_error(await api.http.get(path), 404, "not_found")


def test_the_page_loads_nothing_from_elsewhere() -> None:
    text = (STATIC / "index.html").read_text()
    assert '<script type="module" src="/console/' in text and "style=" not in text
    for name, asset in assets().items():
        assert b"sourceMappingURL" not in asset.body, name


async def test_a_key_learns_what_it_may_do(tmp_path: Path) -> None:
    may = {
        INFER_KEY: ["infer"],
        ADMIN_KEY: ["admin", "operate"],
        TENANT_KEY: ["infer", "admin"],
        OBSERVE_KEY: ["observe"],
    }
    async with serving(tmp_path, keys=ring(tmp_path)) as api:
        for secret, expected in may.items():
            own = (await api.http.get("/v1/keys/self", headers=bearer(secret))).json()
            assert (own["required"], own["may"]) == (True, expected)
        listed = await api.http.get("/v1/keys", headers=bearer(ADMIN_KEY))
        assert [key["name"] for key in listed.json()["data"]]
        for secret in may:
            assert secret not in listed.text and hashlib.sha256(secret.encode()).hexdigest() not in listed.text


async def test_without_keys_everyone_may_do_everything(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        own = (await api.http.get("/v1/keys/self")).json()
        assert own == {"required": False, "key": None, "may": ["infer", "observe", "admin", "operate"]}
        assert (await api.http.get("/v1/keys")).json() == {"object": "list", "required": False, "data": []}


async def test_adapters_are_searched_by_a_part_of_their_names(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        for number, name in enumerate(("acme/support", "acme/sales", "other")):
            await api.upload(name, seed=number)

        async def names(**query: str) -> tuple[list[str], bool]:
            page = (await api.http.get("/v1/adapters", params=query)).json()
            return [record["name"] for record in page["data"]], page["has_more"]

        assert await names(search="ACME") == (["acme/sales", "acme/support"], False)
        assert await names(search="s", limit="1") == (["acme/sales"], True)
        assert await names(search="s", limit="1", after="acme/sales") == (["acme/support"], False)
        assert await names(search="nothing") == ([], False)


async def test_a_record_has_its_traffic(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.upload("mine")
        assert (await api.http.get("/v1/adapters/mine")).json()["traffic"] is None
        await api.chat(model="mine")
        traffic = (await api.http.get("/v1/adapters/mine")).json()["traffic"]
        assert traffic["requests"] == 1 and traffic["generated_tokens"] > 5 and traffic["tokens_per_second"] > 0


async def test_versions_have_the_reports_that_they_were_published_with(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        reports = [(await api.upload("mine", seed=seed, replace=True)).json()["report"] for seed in range(2)]
        versions = (await api.http.get("/v1/adapters/mine/versions")).json()["data"]
        assert [version["report"] for version in versions] == reports[::-1]
        assert all(version["rank"] and version["bytes"] and version["target_modules"] for version in versions)


async def test_aliases_are_listed(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        assert (await api.http.get("/v1/aliases")).json()["data"] == []
        await api.upload("a")
        await api.http.put("/v1/adapters/mixed/split", json={"weights": {"a": 9, BASE: 1}})
        listed = (await api.http.get("/v1/aliases")).json()["data"]
        assert [(alias["name"], alias["weights"]) for alias in listed] == [("mixed", {"a": 9, BASE: 1})]


async def test_statistics_of_the_busiest_and_of_one(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        for number, name in enumerate(("a", "b")):
            await api.upload(name, seed=number)
            for _ in range(number + 1):
                await api.chat(model=name)

        async def names(**query: str) -> list[str]:
            return [one["name"] for one in (await api.http.get("/v1/stats", params=query)).json()["adapters"]]

        assert await names() == ["a", "b"]
        assert await names(limit="1") == ["b"]
        assert await names(adapter="a") == ["a"] and await names(adapter="never") == []
        assert_error(await api.http.get("/v1/stats", params={"limit": 0}), 400)


async def test_the_history_has_rates_latencies_and_gauges(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        history = api.context.history
        history.add_point()
        await api.chat()
        history.add_point()
        body = (await api.http.get("/v1/stats/history")).json()
        columns = {name: values for name, values in body.items() if name != "interval_seconds"}
        assert {len(values) for values in columns.values()} == {2}
        assert columns["tokens_per_second"][0] == 0 < columns["tokens_per_second"][1]
        assert columns["ttft_p50"][0] is None and 0 < columns["ttft_p50"][1] <= columns["ttft_p95"][1]
        later = (await api.http.get("/v1/stats/history", params={"after": body["time"][0]})).json()
        assert later["time"] == body["time"][1:]


def test_quantiles_are_interpolated_as_prometheus_does() -> None:
    counts = {"0.1": 0.0, "0.2": 10.0, "0.4": 10.0, "+Inf": 20.0}
    assert quantile(counts, 0.25) == pytest.approx(0.15)
    assert quantile(counts, 0.5) == pytest.approx(0.2)
    assert quantile(counts, 0.95) == pytest.approx(0.4)  # nothing is known beyond the last bound
    assert quantile({"+Inf": 0.0}, 0.5) is None and quantile({}, 0.5) is None


async def traced(api: Api, seconds: float) -> list[dict[str, object]]:
    answer = await api.http.get("/v1/trace", params={"seconds": seconds})
    assert answer.headers["content-type"].startswith("application/x-ndjson")
    return [json.loads(line) for line in answer.text.splitlines()]


async def test_a_trace_has_rows_by_version_and_loads(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        version = (await api.upload("mine")).json()["version"].removeprefix("sha256:")[:12]
        tracing = asyncio.create_task(traced(api, 1.0))
        await eventually(lambda: api.context.traces == 1)
        await api.http.post("/v1/adapters/mine/load")
        await asyncio.gather(api.chat(model="mine"), api.chat())
        lines = await tracing
        assert lines[0]["kind"] == "run" and lines[0]["base_model"] == BASE
        steps = [line["rows"] for line in lines if line["kind"] == "step"]
        assert {f"mine@{version}": 1, BASE: 1} in steps
        moves = [(line["adapter"], line["from"], line["to"]) for line in lines if line["kind"] == "move"]
        assert ("mine", "disk", "device") in moves
        assert api.context.traces == 0


async def test_traces_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.api.trace._MAX_TRACES", 0)
    async with serving(tmp_path) as api:
        assert_error(await api.http.get("/v1/trace"), 503, "traces_busy")
        for seconds in ("0", "-1", "nan", "1e9"):
            assert_error(await api.http.get("/v1/trace", params={"seconds": seconds}), 400)
