import json
from pathlib import Path
from typing import Any

import pytest

from server.api.text.adapter_tokenizers import AdapterTokenizers
from tests.fixtures.api_server import BASE, Api, assert_error, serving
from tests.test_metrics import samples


async def digest_of(api: Api, name: str) -> str:
    version: str = (await api.http.get(f"/v1/adapters/{name}")).json()["version"]
    return version.removeprefix("sha256:")


async def merge(api: Api, name: str, **fields: bool) -> None:
    answer = await api.http.post("/v1/merge", json={"name": name, **fields})
    assert answer.status_code == 200, answer.text


async def test_an_adapter_is_merged_shown_and_unmerged(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.upload("acme")
        digest = await digest_of(api, "acme")
        nothing = {"state": "none", "adapter": None, "version": None, "asked_by": None, "requantized": False}
        nothing |= {"policy": "off", "others": "wait"}
        assert (await api.http.get("/v1/merge")).json() == nothing
        answer = await api.http.post("/v1/merge", json={"name": "acme", "drain": True, "allow_requantize": True})
        expected = {**nothing, "state": "merged", "adapter": "acme", "version": f"sha256:{digest}"}
        assert (answer.status_code, answer.json()) == (200, {**expected, "asked_by": "request"})
        assert (api.engine.merges[0].drain, api.engine.merges[0].allow_requantize) == (True, True)
        assert (await api.http.get("/v1/merge")).json() == answer.json()
        found = await samples(api)
        labels = (("adapter", "acme"), ("version", digest[:12]))
        assert found["loraplex_merged_adapter_info", labels] == 1
        assert (await api.http.delete("/v1/merge")).json() == nothing
        found = await samples(api)
        assert "loraplex_merged_adapter_info" not in {name for name, _ in found}
        for direction in ("merge", "unmerge"):
            labels = (("direction", direction), ("reason", "request"))
            assert found["loraplex_merge_switches_total", labels] == 1
        assert (await api.http.delete("/v1/merge")).status_code == 200


async def test_what_cannot_be_merged_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path) as api:
        await api.upload("acme")
        await api.upload("beta", seed=1)
        assert_error(await api.http.post("/v1/merge", json={"name": "nobody"}), 404, "model_not_found")
        assert_error(await api.http.post("/v1/merge", json={"name": BASE}), 404, "model_not_found")
        assert_error(await api.http.post("/v1/merge", json={}), 400)
        for code in ("busy", "no_room", "not_mergeable"):
            api.engine.refuse[await digest_of(api, "acme")] = (code, "it cannot be")
            assert_error(await api.http.post("/v1/merge", json={"name": "acme"}), 409, "conflict")
        await merge(api, "beta")
        api.engine.refuse.clear()
        error = assert_error(await api.http.post("/v1/merge", json={"name": "acme"}), 409, "conflict")
        assert "beta" not in error["message"]
        await merge(api, "beta")  # once more changes nothing
        await api.http.delete("/v1/merge")
        version = api.context.registry.resolve("acme").version
        object.__setattr__(version, "report_json", json.dumps({"traits": {"mergeable": False}}))
        error = assert_error(await api.http.post("/v1/merge", json={"name": "acme"}), 409, "conflict")
        assert "linear layers" in error["message"]


@pytest.mark.parametrize("others", ["wait", "refuse"])
async def test_others_wait_or_are_refused(tmp_path: Path, others: str) -> None:
    async with serving(tmp_path, merge_others=others) as api:
        await api.upload("acme")
        await api.upload("same")
        await api.upload("beta", seed=1)
        await merge(api, "acme")
        for model in ("acme", "same"):  # one version under two names
            assert (await api.chat(model=model)).status_code == 200
        for model in (BASE, "beta"):
            answers = [
                await api.chat(model=model),
                await api.complete(model=model),
                await api.chat(model=model, stream=True),
            ]
            for answer in answers:
                if others == "wait":
                    assert answer.status_code == 200
                else:
                    assert_error(answer, 409, "merged")
        assert_error(await api.chat(model="nobody"), 404)
        await api.http.delete("/v1/merge")
        assert (await api.chat()).status_code == 200


async def test_a_merge_between_resolving_and_submitting_refuses_the_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(tmp_path, merge_others="refuse") as api:
        await api.upload("acme")
        encode = AdapterTokenizers.of

        async def slowly(*asked: Any) -> Any:
            await merge(api, "acme")
            return await encode(*asked)

        with monkeypatch.context() as slow:
            slow.setattr(AdapterTokenizers, "of", slowly)
            assert_error(await api.chat(), 409, "merged")
        assert not api.engine.submitted
        await api.http.delete("/v1/merge")
        assert (await api.chat()).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_the_engine_refuses_like_the_api(tmp_path: Path, stream: bool) -> None:
    """A request that passed the API before the merge was requested and reached the engine after it."""
    async with serving(tmp_path, merge_others="refuse") as api:
        await api.upload("acme")
        await merge(api, "acme")
        by_api = await api.chat(stream=stream)
        await api.http.delete("/v1/merge")
        api.engine.fail_after, api.engine.failure_reason = 0, "merged"
        by_engine = await api.chat(stream=stream)
        assert (by_engine.status_code, by_engine.json()) == (409, by_api.json())


async def test_a_merge_that_fails_or_takes_too_long_is_the_engine_s_fault(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.upload("acme")
        for code, status in (("failed", 500), ("timeout", 503)):
            api.engine.refuse[await digest_of(api, "acme")] = (code, "it is the engine")
            assert_error(await api.http.post("/v1/merge", json={"name": "acme"}), status, "engine_error")


async def test_a_refused_merge_refuses_nobody(tmp_path: Path) -> None:
    async with serving(tmp_path, merge_others="refuse") as api:
        await api.upload("acme")
        api.engine.refuse[await digest_of(api, "acme")] = ("no_room", "it cannot be")
        assert_error(await api.http.post("/v1/merge", json={"name": "acme"}), 409)
        assert (await api.chat()).status_code == 200


async def test_deleting_the_merged_adapter_unmerges_it(tmp_path: Path) -> None:
    async with serving(tmp_path, merge_others="refuse") as api:
        await api.upload("acme")
        await merge(api, "acme")
        await api.http.delete("/v1/adapters/acme")
        assert api.engine.merged is None and (await api.chat()).status_code == 200
        assert "acme" not in (await api.http.get("/metrics")).text


async def test_a_new_version_under_the_merged_name_is_another(tmp_path: Path) -> None:
    async with serving(tmp_path, merge_others="refuse") as api:
        await api.upload("acme")
        await merge(api, "acme")
        await api.upload("acme", seed=1, replace="true")
        assert (await api.chat(model="acme")).status_code == 200  # the engine was told that the old one is retired
        assert (await api.chat()).status_code == 200
