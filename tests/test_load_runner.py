"""The generator against made-up servers: an open loop waits for nobody."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest

from load_tests.client import Clock
from load_tests.publishing import NEWCOMER
from load_tests.runner import Run, run, send
from load_tests.scenarios import Bounds, Churn, Closed, Models, Poisson
from load_tests.schedule import Planned
from tests.fixtures.load_run import scenario
from tests.fixtures.timing import HANG_SECONDS

ANSWER = (
    'data: {"choices": [{"text": "a"}]}\n\n'
    'data: {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1}}\n\n'
    "data: [DONE]\n\n"
)
Handler = Callable[[httpx.Request], Coroutine[None, None, httpx.Response]]


def client_of(handler: Handler) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url="http://test", transport=httpx.MockTransport(handler))


def planned(count: int) -> list[Planned]:
    return [Planned(0.001 * index, "a", "adapter", f"prompt {index}", 1) for index in range(count)]


async def test_all_are_sent_though_none_is_answered() -> None:
    """The server answers only when every request has arrived: whoever waits for an answer first, waits for ever."""
    arrived: list[str] = []
    everyone = asyncio.Event()

    async def handler(request: httpx.Request) -> httpx.Response:
        arrived.append(json.loads(request.content)["prompt"])
        if len(arrived) == 50:
            everyone.set()
        await everyone.wait()
        return httpx.Response(200, text=ANSWER)

    async with client_of(handler) as client:
        records = await send(scenario(), planned(50), client, Clock())
    assert [record.error for record in records] == [None] * 50
    assert [record.scheduled_s for record in records] == [p.offset_s for p in planned(50)]
    assert all(record.sent_s >= record.scheduled_s for record in records)


async def test_a_closed_loop_has_never_more_in_flight_than_streams() -> None:
    in_flight, most = 0, 0

    async def handler(request: httpx.Request) -> httpx.Response:
        nonlocal in_flight, most
        in_flight += 1
        most = max(most, in_flight)
        await asyncio.sleep(0)
        in_flight -= 1
        return httpx.Response(200, text=ANSWER)

    async with client_of(handler) as client:
        records = await send(scenario(arrivals=Closed(3)), planned(20), client, Clock())
    assert len(records) == 20 and most == 3


async def test_a_request_that_never_ends_is_given_up() -> None:
    async def handler(request: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError

    bounds = Bounds(duration_s=1.0, request_timeout_s=0.01)
    async with client_of(handler) as client:
        (record,) = await send(scenario(bounds=bounds), planned(1), client, Clock())
    assert record.error == "timeout"


class Adapters:
    """A server that knows adapters; `refusing` refuses to publish, `keeping` to delete. It answers nobody before that
    many `uploads` were tried, so that a run with changes lasts as long as they take."""

    def __init__(
        self, refusing: Callable[[int], bool] = lambda _: False, keeping: bool = False, uploads: int = 0
    ) -> None:
        self.published: set[str] = set()
        self.versions: list[tuple[str, float]] = []
        self._refusing = refusing
        self._keeping = keeping
        self._left = uploads
        self._changed = asyncio.Event()
        self._count(0)

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "own", "parent": "base"}, {"id": "base", "parent": None}]})
        if request.url.path == "/v1/adapters":
            self._count(1)
            return self._publish((await request.aread()).decode(errors="replace"))
        if request.method == "DELETE" and self._keeping:
            return httpx.Response(503, json={})
        if request.method == "DELETE":
            name = request.url.path.rpartition("/")[2]
            found = name in self.published
            self.published.discard(name)
            return httpx.Response(200 if found else 404)
        await self._changed.wait()
        known = json.loads(request.content)["model"] in {*self.published, "own", "base"}
        return httpx.Response(200, text=ANSWER) if known else httpx.Response(404, json={})

    def _count(self, uploads: int) -> None:
        self._left -= uploads
        if self._left <= 0:
            self._changed.set()

    def _publish(self, form: str) -> httpx.Response:
        if self._refusing(len(self.versions)):
            return httpx.Response(507, json={})
        name = form.split('name="name"\r\n\r\n')[1].split("\r\n")[0]
        alpha = json.loads("{" + form.split("{", 1)[1].split("}")[0] + "}")["lora_alpha"]
        self.published.add(name)
        self.versions.append((name, alpha))
        return httpx.Response(201, json={})


@pytest.fixture
def template(tmp_path: Path) -> Path:
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 16}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"tensors")
    return tmp_path


async def run_against(server: Adapters, template: Path, **settings: Any) -> Run:
    async with client_of(server) as client:
        return await run(scenario(**settings), client, template=template, seed=0)


async def test_without_published_adapters_the_server_s_own_are_asked(template: Path) -> None:
    seen = await run_against(
        Adapters(), template, arrivals=Poisson(1e4), bounds=Bounds(duration_s=9.0, max_requests=40)
    )
    assert {record.model for record in seen.records} == {"own"}
    assert not [record for record in seen.records if record.error]


async def test_published_adapters_are_all_different_and_taken_away(template: Path) -> None:
    server = Adapters()
    bounds = Bounds(duration_s=9.0, max_requests=60)
    seen = await run_against(server, template, arrivals=Poisson(1e4), models=Models(published=3), bounds=bounds)
    assert {record.model for record in seen.records} == {name for name, _ in server.versions}
    assert len({alpha for _, alpha in server.versions}) == 3
    assert not server.published


async def test_churn_replaces_and_brings_newcomers(template: Path) -> None:
    server = Adapters(uploads=2 + 4)
    seen = await run_against(
        server,
        template,
        arrivals=Poisson(200.0),
        models=Models(published=2),
        bounds=Bounds(duration_s=0.1, request_timeout_s=HANG_SECONDS),
        churn=Churn(0.01),
    )
    changes = [(change.kind, change.name) for change in seen.changes[:4]]
    first, second = (name for name, _ in server.versions[:2])
    assert changes == [
        *(("replace", first), ("upload and delete", NEWCOMER)),
        *(("replace", second), ("upload and delete", NEWCOMER)),
    ]
    assert not [record for record in seen.records if record.error]
    assert not server.published


async def test_a_change_that_fails_is_recorded(template: Path) -> None:
    server = Adapters(refusing=lambda published: published >= 2, uploads=2 + 1)
    seen = await run_against(
        server,
        template,
        arrivals=Poisson(200.0),
        models=Models(published=2),
        bounds=Bounds(duration_s=0.1, request_timeout_s=HANG_SECONDS),
        churn=Churn(0.02),
    )
    assert seen.changes and all("507" in (change.error or "") for change in seen.changes)


async def test_when_the_adapters_cannot_be_published_nothing_is_sent_and_nothing_stays(template: Path) -> None:
    server = Adapters(refusing=lambda published: published >= 1)
    with pytest.raises(httpx.HTTPStatusError, match="507"):
        await run_against(server, template, models=Models(published=2))
    assert not server.published


async def test_an_adapter_that_stays_is_a_failed_change_and_the_run_is_kept(template: Path) -> None:
    bounds = Bounds(duration_s=9.0, max_requests=5)
    seen = await run_against(
        Adapters(keeping=True), template, arrivals=Poisson(1e4), models=Models(published=2), bounds=bounds
    )
    assert [record.error for record in seen.records] == [None] * 5
    assert [change.kind for change in seen.changes if "503" in (change.error or "")] == ["delete", "delete"]
