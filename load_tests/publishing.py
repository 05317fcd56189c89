"""Adapters that a run publishes on the server for itself, and takes away again."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
import msgspec

from load_tests.client import Clock

PREFIX = "load-test-"
NEWCOMER = f"{PREFIX}newcomer"


class Change(msgspec.Struct, frozen=True):
    """One adapter replaced, or uploaded and deleted, while traffic ran. Times in seconds since the start of the run."""

    kind: str
    name: str
    at_s: float
    took_s: float
    error: str | None


class Publisher:
    """Publishes variants of the template adapter: the same tensors, another `lora_alpha`, and so another version."""

    def __init__(self, client: httpx.AsyncClient, template: Path):
        self._client = client
        self._config = json.loads((template / "adapter_config.json").read_text())
        self._tensors = (template / "adapter_model.safetensors").read_bytes()
        self._numbers = itertools.count(1)

    @asynccontextmanager
    async def publishing(self, count: int) -> AsyncIterator[list[str]]:
        """The names of `count` new adapters; they are deleted at exit. Raises `httpx.HTTPError` when one is refused."""
        names = [f"{PREFIX}{index:03d}" for index in range(count)]
        try:
            for name in names:
                await self._upload(name)
            yield names
        finally:
            for name in (*names, NEWCOMER):
                await self._client.delete(f"/v1/adapters/{name}")

    async def churn(
        self, names: list[str], every_s: float, clock: Clock, changes: list[Change], stop: asyncio.Event
    ) -> None:
        """Replace the adapters in turn, and between two of them upload a new one and delete it, until `stop`."""
        for turn in itertools.count():
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), max(0.0, (turn + 1) * every_s - clock()))
                return
            if turn % 2:
                changes.append(await self._change("upload and delete", NEWCOMER, clock))
            else:
                changes.append(await self._change("replace", names[turn // 2 % len(names)], clock))

    async def _change(self, kind: str, name: str, clock: Clock) -> Change:
        at_s, error = clock(), None
        try:
            await self._upload(name)
            if kind != "replace":
                (await self._client.delete(f"/v1/adapters/{name}")).raise_for_status()
        except httpx.HTTPError as failure:
            error = f"{type(failure).__name__}: {failure}"
        return Change(kind, name, at_s, clock() - at_s, error)

    async def _upload(self, name: str) -> None:
        config = {**self._config, "lora_alpha": self._config["lora_alpha"] * (1 + next(self._numbers) / 1024)}
        files = {
            "adapter_config.json": ("adapter_config.json", json.dumps(config).encode()),
            "adapter_model.safetensors": ("adapter_model.safetensors", self._tensors),
        }
        answer = await self._client.post("/v1/adapters", data={"name": name, "replace": "true"}, files=files)
        answer.raise_for_status()
