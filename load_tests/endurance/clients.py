"""Clients of a long run: those of the random operations, and what only a network and a hub can do."""

import socket
import struct
from pathlib import Path

import httpx

from load_tests.endurance.faults import Faults
from load_tests.operations import Client
from load_tests.right_answers import State
from load_tests.world import World

SOURCE = "hf://org/repo@main"
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close sends a reset


class EnduringClient(Client):
    """`registered` is the digest of what the hub has. A crash is a fault of those that `faults` has, in turn."""

    def __init__(self, world: World, seed: str, registered: str, faults: Faults | None):
        super().__init__(world, seed)
        self._registered, self._faults = registered, faults
        self._operations |= {self.register: 2, self.reset: 4}

    def register(self) -> str:
        """Publish what a hub has."""
        name = self._name()
        body = {"name": name.text, "source": SOURCE, "replace": True}

        def outcomes(before: State) -> dict[int, State]:
            if before.current == self._registered:
                return {200: before}
            after = before.published(self._registered)
            return {201: after} | ({409: after._replace(pinned=False)} if after.pinned else {})

        return self._change(name, outcomes, lambda: self._http.post("/v1/adapters", json=body))

    def reset(self) -> str:
        """A stream whose client resets the connection."""
        asked = self._ask(1)
        url = httpx.URL(self._world.server.url)
        request = self._http.build_request("POST", "/v1/completions", json=asked.body(stream=True))
        head = f"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(request.content)}\r\n"
        with socket.create_connection((url.host, url.port or 80)) as connection:
            connection.sendall(f"{head}content-type: application/json\r\n\r\n".encode() + request.content)
            connection.recv(self._rng.randrange(1, 2000))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        return "reset"

    def crash(self) -> str:
        """Let the next fault happen, and tell how long the server took to recover."""
        if self._faults is None:
            return super().crash()
        return self._faults.next(self._http)


def hub_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
