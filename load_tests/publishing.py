"""Adapters that a run publishes on the server for itself, and takes away again."""

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
import msgspec

from load_tests.client import FAILURES, Clock

PREFIX = "load-test-"
NEWCOMER = f"{PREFIX}newcomer"


class Change(msgspec.Struct, frozen=True):
    """An adapter replaced, or uploaded and deleted, while traffic ran; or one that could not be deleted afterwards.
    Times in seconds since the start of the run."""

    kind: str
    name: str
    at_s: float
    took_s: float
    error: str | None


class Publisher:
    """Publishes variants of the template adapter: the same tensors, another `lora_alpha`, and so another version."""

    def __init__(self, client: httpx.AsyncClient, template: Path, clock: Clock):
        self.changes: list[Change] = []
        self._client = client
        self._clock = clock
        self._config = json.loads((template / "adapter_config.json").read_text())
        self._tensors = (template / "adapter_model.safetensors").read_bytes()
        self._numbers = itertools.count(1)
        self._published: set[str] = set()

    @asynccontextmanager
    async def publishing(self, count: int) -> AsyncIterator[list[str]]:
        """The names of `count` new adapters; at exit, whatever was published is deleted.

        Raises `httpx.HTTPError` when one is refused; one that cannot be deleted is in `changes`.
        """
        names = [f"{PREFIX}{index:03d}" for index in range(count)]
        try:
            for name in names:
                await self._upload(name)
            yield names
        finally:
            deleted = [await self._change("delete", name, self._delete(name)) for name in sorted(self._published)]
            self.changes += [change for change in deleted if change.error is not None]

    async def churn(self, names: list[str], every_s: float, stop: asyncio.Event) -> None:
        """Replace the adapters in turn, and between two of them upload a new one and delete it, until `stop`."""
        for turn in itertools.count():
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), max(0.0, (turn + 1) * every_s - self._clock()))
                return
            if turn % 2:
                change = await self._change("upload and delete", NEWCOMER, self._upload_and_delete(NEWCOMER))
            else:
                name = names[turn // 2 % len(names)]
                change = await self._change("replace", name, self._upload(name))
            self.changes.append(change)

    async def _change(self, kind: str, name: str, doing: Awaitable[None]) -> Change:
        at_s, error = self._clock(), None
        try:
            await doing
        except FAILURES as failure:
            error = f"{type(failure).__name__}: {failure}"
        return Change(kind, name, at_s, self._clock() - at_s, error)

    async def _upload_and_delete(self, name: str) -> None:
        await self._upload(name)
        await self._delete(name)

    async def _upload(self, name: str) -> None:
        config = {**self._config, "lora_alpha": self._config["lora_alpha"] * (1 + next(self._numbers) / 1024)}
        files = {
            "adapter_config.json": ("adapter_config.json", json.dumps(config).encode()),
            "adapter_model.safetensors": ("adapter_model.safetensors", self._tensors),
        }
        self._published.add(name)  # first: a failed answer does not say that nothing was published
        answer = await self._client.post("/v1/adapters", data={"name": name, "replace": "true"}, files=files)
        answer.raise_for_status()

    async def _delete(self, name: str) -> None:
        answer = await self._client.delete(f"/v1/adapters/{name}")
        if answer.status_code != httpx.codes.NOT_FOUND:
            answer.raise_for_status()
        self._published.discard(name)
