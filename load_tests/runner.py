"""A run: requests go out when the schedule says, whatever the server does."""

import asyncio
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import httpx
import msgspec

from load_tests.client import Clock, Record, complete
from load_tests.publishing import Change, Publisher
from load_tests.scenarios import Closed, Scenario
from load_tests.schedule import Planned, build


class Run(msgspec.Struct):
    """What a run saw: all that a report is made of."""

    scenario: Scenario
    seed: int
    url: str
    records: list[Record]
    changes: list[Change]


async def run(scenario: Scenario, client: httpx.AsyncClient, *, template: Path, seed: int) -> Run:
    """Publish what the scenario needs, send its schedule, wait for every answer.

    Raises `ScenarioError` when the schedule cannot be drawn, `httpx.HTTPError` when the server cannot be prepared;
    failures of requests and of changes are in the result.
    """
    base, adapters = await models(client)
    clock, ended = Clock(), asyncio.Event()
    publisher = Publisher(client, template, clock) if scenario.models.published else None
    async with publisher.publishing(scenario.models.published) if publisher else nullcontext(adapters) as asked:
        schedule = build(scenario, base, asked, seed)
        clock.start()
        async with asyncio.TaskGroup() as group:
            if publisher and scenario.churn:
                group.create_task(publisher.churn(asked, scenario.churn.every_s, ended))
            records = await send(scenario, schedule, client, clock)
            ended.set()
    return Run(scenario, seed, str(client.base_url), records, publisher.changes if publisher else [])


async def models(client: httpx.AsyncClient) -> tuple[str, list[str]]:
    """The base's name and the adapters'."""
    answer = await client.get("/v1/models")
    answer.raise_for_status()
    listed = answer.json()["data"]
    base = next((model["id"] for model in listed if not model.get("parent")), None)
    if base is None:
        raise httpx.DecodingError("the server lists no base model", request=answer.request)
    return base, sorted(model["id"] for model in listed if model.get("parent"))


async def send(
    scenario: Scenario, schedule: Sequence[Planned], client: httpx.AsyncClient, clock: Clock
) -> list[Record]:
    """The records, in the schedule's order. Every request is bounded by the scenario's `request_timeout_s`."""
    if isinstance(scenario.arrivals, Closed):
        return await _closed_loop(scenario, scenario.arrivals.streams, schedule, client, clock)
    async with asyncio.TaskGroup() as group:
        tasks = []
        for planned in schedule:
            await asyncio.sleep(max(0.0, planned.offset_s - clock()))
            tasks.append(group.create_task(_one(scenario, planned, client, clock, planned.offset_s)))
    return [task.result() for task in tasks]


async def _closed_loop(
    scenario: Scenario, streams: int, schedule: Sequence[Planned], client: httpx.AsyncClient, clock: Clock
) -> list[Record]:
    """Each stream takes the schedule's next request; a request is scheduled for the moment its stream is free."""
    until_s = scenario.bounds.warm_up_s + scenario.bounds.duration_s
    upcoming = iter(schedule)
    records: list[Record] = []

    async def stream() -> None:
        for planned in upcoming:
            if clock() >= until_s:
                return
            records.append(await _one(scenario, planned, client, clock, clock()))

    async with asyncio.TaskGroup() as group:
        for _ in range(streams):
            group.create_task(stream())
    return records


async def _one(
    scenario: Scenario, planned: Planned, client: httpx.AsyncClient, clock: Clock, scheduled_s: float
) -> Record:
    timeout_s = scenario.bounds.request_timeout_s
    return await complete(client, scenario.endpoint, planned, clock, scheduled_s=scheduled_s, timeout_s=timeout_s)
