"""Nothing is published that the engine did not compute right."""

import asyncio
from pathlib import Path

import httpx
import pytest

from server.api.context import MAX_SELFTESTS, MAX_UPLOADS
from server.ipc.messages import SelfTest
from tests.fixtures.api_server import Api, assert_error, form, made_files, serving
from tests.fixtures.timing import eventually


def stored(api: Api) -> list[str]:
    return api.context.registry.store.digests()


async def test_the_report_carries_the_largest_difference(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        record = (await api.upload("acme")).json()
        assert record["report"]["selftest"] == {"max_abs_logit_diff": 2e-6}


async def test_a_dry_run_is_tried_and_leaves_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        answer = await api.http.post("/v1/adapters?dry_run=true", data={"name": "acme"}, files=form())
        assert answer.status_code == 200 and answer.json()["report"]["selftest"] == {"max_abs_logit_diff": 2e-6}
        assert stored(api) == []


@pytest.mark.parametrize(
    ("selftest", "code"),
    [(SelfTest(0.5, 0.1, 1e-3), "base_mismatch"), (SelfTest(float("nan"), float("nan"), 1e-3), "nonfinite")],
)
async def test_beyond_tolerance_it_is_refused(tmp_path: Path, selftest: SelfTest, code: str) -> None:
    async with serving(tmp_path) as api:
        api.engine.selftest = selftest
        error = assert_error(await api.upload("acme"), 422, "adapter_invalid")
        (problem,) = error["problems"]
        assert (problem["where"], problem["code"]) == ("selftest", code)
        assert_error(await api.http.get("/v1/adapters/acme"), 404)
        assert stored(api) == []


async def upload_other(api: Api) -> httpx.Response:
    """Replace the adapter by one of another structure."""
    files = {name: (name, data) for name, data in made_files(1, lora_alpha=8).items()}
    return await api.http.post("/v1/adapters", data={"name": "acme", "replace": "true"}, files=files)


@pytest.mark.reliability("T18")
async def test_a_replacement_that_fails_keeps_what_was_there(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        before = (await api.upload("acme")).json()["version"]
        api.engine.selftest = SelfTest(0.5, 0.1, 1e-3)
        assert_error(await upload_other(api), 422)
        assert_error(await api.upload("again"), 422)  # the same content under another name
        assert (await api.http.get("/v1/adapters/acme")).json()["version"] == before
        assert stored(api) == [before.removeprefix("sha256:")]


async def test_what_the_engine_cannot_load_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        api.engine.selftest_error = ("invalid", "weights beyond torch.bfloat16")
        (problem,) = assert_error(await api.upload("acme"), 422, "adapter_invalid")["problems"]
        assert problem["found"] == "weights beyond torch.bfloat16"
        assert stored(api) == []


async def test_a_test_that_raises_is_no_fault_of_the_adapter_and_publishes_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        api.engine.selftest_error = ("failed", "an unexpected error occurred in the engine")
        assert_error(await api.upload("acme"), 500, "engine_error")
        assert stored(api) == []
        api.engine.selftest_error = None
        assert (await api.upload("acme")).status_code == 201


async def test_a_full_device_is_no_fault_of_the_adapter(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        api.engine.selftest_error = ("no_room", "no device slot became free")
        record = (await api.upload("acme")).json()
        assert record["report"]["selftest"] == {"skipped": "no device slot became free"}


async def test_uploads_beyond_the_bound_are_refused_with_when_to_try_again(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        async with api.context.selftests, api.context.selftests:  # every self-test waits
            uploads = [asyncio.create_task(api.upload(f"n{i}", seed=i)) for i in range(MAX_UPLOADS)]
            await eventually(api.context.uploads.locked)
            assert_error(await api.upload("late"), 503, "uploads_busy")
            body = {"name": "late", "source": "file:///srv/late"}
            assert_error(await api.http.post("/v1/adapters", json=body), 503, "uploads_busy")
            assert (await api.chat()).status_code == 200
        assert {answer.status_code for answer in await asyncio.gather(*uploads)} == {201}
        assert (await api.upload("late")).status_code == 201


async def test_few_self_tests_are_in_the_engine_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path) as api:
        running: set[object] = set()
        most = 0
        run_selftest = api.context.engine.run_selftest

        async def counted(digest: str, *, verify: bool) -> SelfTest:
            nonlocal most
            running.add(token := object())
            most = max(most, len(running))
            await asyncio.sleep(0.01)
            try:
                return await run_selftest(digest, verify=verify)
            finally:
                running.discard(token)

        monkeypatch.setattr(api.context.engine, "run_selftest", counted)
        answers = await asyncio.gather(*(api.upload(f"n{i}", seed=i) for i in range(6)))
        assert {answer.status_code for answer in answers} == {201}
        assert 1 <= most <= MAX_SELFTESTS
