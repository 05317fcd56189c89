"""What must hold of a server when nothing runs: nothing is left in memory, on disk or among processes but what its
names need, and the registry is the model's."""

from pathlib import Path
from typing import Any

import psutil

from load_tests.right_answers import ABSENT
from load_tests.world import SLOTS, Mismatch, World, found_state
from tests.fixtures.timing import wait_for

SWEEPER = "sweeper"


class Invariants:
    """Of one server, in whose data folder and temporary folder nobody else writes."""

    def __init__(self, world: World, data_dir: Path, temporary: Path):
        self._world, self._store, self._temporary = world, data_dir / "store", temporary
        self._http = world.server.client()
        self._quiet_files, self._quiet_processes = self._leftovers()

    def close(self) -> None:
        self._http.close()

    def check(self) -> None:
        """Raises `Mismatch` with what does not hold."""
        try:
            self._wait_until_quiet()
            self._compare_registry()
            self._unload_everything()
            self._compare_disk()
            self._compare_metrics()
        except AssertionError as error:
            raise Mismatch(f"invariant: {error}") from error

    def _stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = self._http.get("/v1/stats").json()
        return stats

    def _wait_until_quiet(self) -> None:
        """No request, block, load; every pin in its slot (after a crash they take a moment)."""

        def found() -> tuple[Any, ...]:
            now = self._stats()
            in_flight = {use["name"]: use["in_flight"] for use in now["adapters"] if use["in_flight"]}
            queue, tiers = now["queue"], now["tiers"]
            moving = (queue["running"], queue["waiting"], now["kv_cache"]["blocks_used"], tiers["loading"])
            return (*moving, in_flight, now["slots"]["pinned"])

        wanted: tuple[Any, ...] = (0, 0, 0, 0, {}, self._pins())
        try:
            wait_for(lambda: found() == wanted, "quiet")
        except AssertionError:
            raise Mismatch(f"running, waiting, blocks, loading, in flight, pins: {found()}, not {wanted}") from None

    def _pinned(self) -> set[str]:
        states = [name.state for name in self._world.names]
        return {state.current for state in states if state.pinned and state.current}

    def _pins(self) -> int:
        """The pins that the engine has. A server that was killed may have stored one that finds no slot any more."""
        return min(len(self._pinned()), SLOTS - 1)

    def _compare_registry(self) -> None:
        states = {name.text: name.state for name in self._world.names if name.state != ABSENT}
        listed = self._http.get("/v1/adapters", params={"limit": 1000}).json()["data"]
        assert [record["name"] for record in listed] == sorted(states), f"listed {listed}, not {sorted(states)}"
        for name in self._world.names:
            found = found_state(self._http, name)
            assert found == name.state, f"{name.text} is {found}, not {name.state}"
        assert not [record["state"] for record in listed if record["state"] != "ready"], listed
        merged = self._http.get("/v1/merge").json()
        assert merged["state"] in ("none", "merged") and (merged["version"] is None) == (merged["adapter"] is None), (
            merged
        )

    def _unload_everything(self) -> None:
        """What nobody uses can be unloaded; then the pins are all that is in memory."""
        for name in self._world.names:
            if name.state.current is not None:
                answer = self._http.post(f"/v1/adapters/{name.text}/unload")
                is_right = answer.status_code == 200 or name.state.current in self._pinned()
                assert is_right, f"{name.text} is quiet and was not unloaded: {answer.text}"
        now, pins = self._stats(), self._pins()
        assert now["slots"]["used"] == now["tiers"]["device"] == pins, f"{now['slots']} {now['tiers']} with {pins} pins"
        assert now["tiers"]["host"] <= pins, now["tiers"]

    def _compare_disk(self) -> None:
        """Files of versions that were in use when their last name let go are taken by the next change of any name."""
        folder = next(iter(self._world.answers.folders.values()))
        self._world.server.upload(self._http, SWEEPER, folder).raise_for_status()
        self._http.delete(f"/v1/adapters/{SWEEPER}").raise_for_status()
        needed = {digest for name in self._world.names for digest in name.state.history}
        stored = {path.name for path in self._store.glob("??/*")}
        assert stored == needed, f"stored but not needed: {stored - needed}; missing: {needed - stored}"
        wait_for(lambda: not list((self._store / ".staging").iterdir()), "staging becoming empty")
        files, processes = self._leftovers()
        assert files == self._quiet_files, f"temporary files: {files}"
        assert processes == self._quiet_processes, f"processes: {processes}"

    def _leftovers(self) -> tuple[int, int]:
        """Temporary files and child processes: how many, since an engine that was restarted has others."""
        children = psutil.Process(self._world.server.process.pid).children(recursive=True)
        return len(list(self._temporary.iterdir())), len(children)

    def _compare_metrics(self) -> None:
        """A deleted adapter's series are gone, and nothing runs."""
        absent = [name.text for name in self._world.names if name.state == ABSENT]
        lines = self._http.get("/metrics").text.splitlines()
        left = [line for line in lines if any(f'adapter="{name}"' in line for name in absent)]
        assert not left, left
        assert "loraplex_requests_running 0.0" in lines and "loraplex_requests_waiting 0.0" in lines
