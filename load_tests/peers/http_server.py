"""A peer that is a server: the same streamed requests for all of them, with what each calls an adapter."""

import asyncio
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from load_tests.client import Clock, Record, complete, new_client
from load_tests.peers.process import Group, PeerFailed
from load_tests.peers.setting import NEW_TOKENS, Case, Measured
from load_tests.schedule import Planned

START_S = 600
REQUEST_S = 600


class HTTPServer:
    """`command` makes it listen on a port; `health` answers 200 once it can be asked."""

    def __init__(self, command: Sequence[str], health: str, log: Path, env: Mapping[str, str] | None = None):
        self._url = f"http://127.0.0.1:{_free_port()}"
        port = self._url.rpartition(":")[2]
        self._group = Group([*command, "--host", "127.0.0.1", "--port", port], log, env)
        self.pause, self.resume, self.stop = self._group.pause, self._group.resume, self._group.stop
        try:
            self._group.wait_for(lambda: _answers(self._url + health), START_S)
        except PeerFailed:
            self.stop()
            raise

    def fields(self, model: str) -> dict[str, Any]:
        """How a request names whom it asks; may be overridden."""
        return {"model": model}

    def run(self, case: Case, round_: int, new_tokens: int = NEW_TOKENS) -> Measured:
        """Raises `PeerFailed` when an answer fails, or has another length."""
        asked = [
            Planned(0, "", "", prompt, new_tokens, self.fields(model))
            for model, prompt in zip(case.models(), case.prompts(round_), strict=True)
        ]
        return summary(asyncio.run(_ask(self._url, asked)), new_tokens)


async def _ask(url: str, asked: Sequence[Planned]) -> list[Record]:
    async with new_client(url, timeout_s=REQUEST_S) as client:
        clock = Clock()
        answers = (
            complete(client, "completions", one, clock, scheduled_s=0, timeout_s=REQUEST_S)  # all at once
            for one in asked
        )
        return list(await asyncio.gather(*answers))


def summary(records: Sequence[Record], new_tokens: int) -> Measured:
    """Times count from the start of the run. Raises `PeerFailed` when an answer fails, or has another length."""
    ttft_s, ends_s = [], []
    for record in records:
        if record.error or record.output_tokens != new_tokens:
            raise PeerFailed(f"{record.error or record.output_tokens} {record.detail or 'tokens came'}")
        assert record.first_token_s is not None
        assert record.last_token_s is not None
        ttft_s.append(record.first_token_s)
        ends_s.append(record.last_token_s)
    gaps_s = [(end - first) / max(new_tokens - 1, 1) for first, end in zip(ttft_s, ends_s, strict=True)]
    return Measured(len(records) * new_tokens / max(ends_s), ttft_s, gaps_s)


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
