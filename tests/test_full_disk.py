"""A full disk: deletion still works and gives the space back, and uploads leave some free."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from adapters.errors import NoSpace
from adapters.records import Inspected, PendingAdapter
from adapters.registry import spare_space
from adapters.registry.registry import AdapterRegistry
from adapters.registry.store import AdapterStore
from tests.fixtures.api_server import adapter_files, assert_error, secret, serving
from tests.test_auth import bearer, ring
from tests.test_store import ONE, put

IN_A_SMALL_DISK = """
import os, pathlib, subprocess, sys
folder = pathlib.Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], check=True)
from adapters.errors import NoSpace
from adapters.registry.registry import AdapterRegistry
from tests.test_full_disk import publish
registry = AdapterRegistry(folder / "data")
publish(registry, "big", 1 << 20)
publish(registry, "small", 1 << 10)
with open(folder / "junk", "wb", buffering=0) as file:
    try:
        while file.write(b"x" * 4096):
            pass
    except OSError:
        pass
assert os.statvfs(folder).f_bavail == 0
try:
    publish(registry, "more", 1 << 10)
except NoSpace:
    print("refused")
for name in ("big", "small"):
    registry.retire(name)
registry.collect_garbage()
assert len(registry) == 0 and registry.store.digests() == []
free = os.statvfs(folder)
print(free.f_bavail * free.f_frsize)
publish(registry, "again", 1 << 10)
registry.close()
again = AdapterRegistry(folder / "data")
print([record.name for record in again.walk()])
again.close()
"""


def publish(registry: AdapterRegistry, name: str, nbytes: int) -> None:
    digest = f"{abs(hash(name)) & 0xFFFF:064x}"
    with registry.store.stage() as folder:
        (folder / "adapter_config.json").write_bytes(b"{}")
        (folder / "adapter_model.safetensors").write_bytes(b"x" * nbytes)
        registry.publish(name, Inspected(digest, 1, ("q_proj",), nbytes, {}), folder)


@pytest.mark.reliability("T11")
def test_adapters_can_be_deleted_from_a_full_disk(tmp_path: Path) -> None:
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    command = [*unshare, sys.executable, "-c", IN_A_SMALL_DISK, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert ended.returncode == 0, ended.stderr
    refused, freed, names = ended.stdout.split("\n")[:3]
    assert refused == "refused" and int(freed) >= 1 << 19 and names == "['again']"


def test_space_is_set_aside_spent_and_set_aside_again(tmp_path: Path) -> None:
    spare = spare_space.SpareSpace(tmp_path)
    file = tmp_path / "spare-space"
    assert file.stat().st_blocks * 512 >= 1 << 20
    outcomes = iter([NoSpace("full"), None])

    def deletion() -> str:
        error = next(outcomes)
        if error is not None:
            raise error
        assert not file.exists()
        return "deleted"

    assert spare.spend_on(deletion) == "deleted"
    spare.fill()
    assert file.exists()
    with pytest.raises(NoSpace):
        spare.spend_on(lambda: (_ for _ in ()).throw(NoSpace("still full")))


@pytest.mark.reliability("T11")
def test_an_upload_leaves_space_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = AdapterStore(tmp_path / "store")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(spare_space.shutil, "disk_usage", lambda _: usage._replace(free=1 << 20))
    with pytest.raises(NoSpace):
        put(store, ONE)
    assert ONE not in store


def test_a_deletion_that_finds_no_room_for_a_new_name_removes_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = AdapterStore(tmp_path / "store")
    put(store, ONE)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    store.delete(ONE)
    assert ONE not in store and not store.path(ONE).exists()


async def test_all_adapters_together_have_a_quota(tmp_path: Path) -> None:
    size = len(adapter_files(0)["adapter_model.safetensors"])
    async with serving(tmp_path, adapter_store_bytes=2 * size) as api:
        for seed in (0, 1):
            assert (await api.upload(f"a-{seed}", seed=seed)).status_code == 201
        error = assert_error(await api.upload("a-2", seed=2), 507, "insufficient_storage")
        assert "delete some" in error["message"]
        assert (await api.upload("again", seed=1)).status_code == 201  # stored already
        assert (await api.http.delete("/v1/adapters/a-0")).status_code == 200
        assert (await api.upload("a-2", seed=2)).status_code == 201


QUOTAS = """
[[keys]]
name = "tenant"
key = "{key}"
scopes = ["infer", "admin"]
adapters = ["a-0", "a-1", "a-2"]
{limit}

[[keys]]
name = "other"
key = "{other}"
scopes = ["infer", "admin"]
"""


@pytest.mark.reliability("T11")
async def test_the_adapters_of_a_key_have_a_quota_of_number_and_bytes(tmp_path: Path) -> None:
    size = len(adapter_files(0)["adapter_model.safetensors"])
    mine, other = secret("tenant"), secret("other")
    for limit, says in (("max_adapters = 2", "2 adapters"), (f"max_adapter_bytes = {5 * size // 2}", "bytes")):
        keys = ring(tmp_path, QUOTAS.format(key=mine, other=other, limit=limit))
        async with serving(tmp_path / says, keys=keys) as api:
            api.http.headers.update(bearer(mine))
            for seed in (0, 1):
                assert (await api.upload(f"a-{seed}", seed=seed)).status_code == 201
            assert says in assert_error(await api.upload("a-2", seed=2), 507, "insufficient_storage")["message"]
            assert (await api.upload("a-1", seed=0, replace="true")).status_code == 201  # has no new bytes or name
            api.http.headers.update(bearer(other))
            assert (await api.upload("b", seed=2)).status_code == 201
            api.http.headers.update(bearer(mine))
            assert (await api.http.delete("/v1/adapters/a-1")).status_code == 200
            assert (await api.upload("a-2", seed=2)).status_code == 201


async def test_adapters_that_are_fetched_in_the_background_count(tmp_path: Path) -> None:
    keys = ring(tmp_path, QUOTAS.format(key=secret("tenant"), other=secret("other"), limit="max_adapters = 1"))
    async with serving(tmp_path / "server", keys=keys, allow_source=(f"file://{tmp_path}",)) as api:
        api.http.headers.update(bearer(secret("tenant")))
        api.context.registry.remember(PendingAdapter("a-0", "file:///x", replacing=False, pinned=False, created=1))
        body = {"name": "a-1", "source": f"file://{tmp_path}/x", "lazy": True}
        assert_error(await api.http.post("/v1/adapters", json=body), 507, "insufficient_storage")
        assert_error(await api.upload("a-1"), 507, "insufficient_storage")
        assert (await api.upload("a-0")).status_code == 201
