"""Requests for several adapters, scaled ones and activated ones: what reaches the engine, and what is refused."""

import asyncio
import hashlib
import json
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from adapters.peft.lora_config import LoraSettings
from adapters.traits import Traits
from server.api.middleware.auth import KeyRing
from server.config import ServeConfig
from server.request import ScaledAdapter
from tests.fixtures.api_server import BASE, Api, assert_error, events, made_files, secret, serving
from tests.fixtures.timing import eventually
from tests.test_metrics import samples

HALF_AND_HALF = [{"name": "one", "scale": 0.5}, {"name": "two", "scale": -2}]


async def digest(api: Api, name: str) -> str:
    version: str = (await api.http.get(f"/v1/adapters/{name}")).json()["version"]
    return version.removeprefix("sha256:")


async def upload_two(api: Api) -> tuple[str, str]:
    for seed, name in enumerate(("one", "two")):
        assert (await api.upload(name, seed=seed)).status_code == 201
    return await digest(api, "one"), await digest(api, "two")


def identity(*adapters: tuple[str, float]) -> str:
    """As the contract has it: over the sorted list."""
    text = json.dumps(sorted([digest, scale] for digest, scale in adapters), separators=(",", ":"))
    return f"0123456789ab-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@pytest.mark.parametrize("route", ["chat", "complete"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_composition_reaches_the_engine_whole(tmp_path: Path, route: str, stream: bool) -> None:
    async with serving(tmp_path) as api:
        one, two = await upload_two(api)
        answer = await getattr(api, route)(adapters=HALF_AND_HALF, n=2, stream=stream)
        assert answer.status_code == 200
        body = events(answer)[0] if stream else answer.json()
        assert body["model"] == BASE
        assert body["system_fingerprint"] == identity((one, 0.5), (two, -2.0))
        expected = tuple(sorted([ScaledAdapter(one, 0.5), ScaledAdapter(two, -2.0)]))
        assert [submit.adapters for submit in api.engine.submitted] == [expected] * 2
        assert not len(api.context.in_flight) and api.context.in_flight.count("one") == 0


async def test_the_order_means_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await upload_two(api)
        answers = [(await api.chat(adapters=parts)).json() for parts in (HALF_AND_HALF, HALF_AND_HALF[::-1])]
        assert answers[0]["system_fingerprint"] == answers[1]["system_fingerprint"]
        first, second = api.engine.submitted
        assert first.adapters == second.adapters


async def test_one_adapter_with_scale_one_is_that_adapter(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        one, _ = await upload_two(api)
        for fields in (
            {"model": "one"},
            {"model": "one", "adapter_scale": 1},
            {"model": "one", "adapters": []},
            {"adapters": [{"name": "one"}]},
            {"adapters": [{"name": f"one@{one[:12]}", "scale": 1.0}], "adapter_scale": 1},
        ):
            body = (await api.chat(**fields)).json()
            assert body["system_fingerprint"] == f"0123456789ab-{one[:12]}"
            assert api.engine.submitted[-1].adapters == (ScaledAdapter(one),)
        assert not any("_composed" in str(labels) for _, labels in await samples(api))


async def test_an_adapter_can_be_scaled(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        one, _ = await upload_two(api)
        for fields in ({"model": "one", "adapter_scale": 0.25}, {"adapters": [{"name": "one", "scale": 0.25}]}):
            body = (await api.chat(**fields)).json()
            assert body["system_fingerprint"] == identity((one, 0.25))
            assert api.engine.submitted[-1].adapters == (ScaledAdapter(one, 0.25),)


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "one", "adapters": HALF_AND_HALF},
        {"adapters": HALF_AND_HALF, "adapter_scale": 0.5},
        {"adapter_scale": 0.5},
        {"adapters": [{"name": "one"}, {"name": "one", "scale": 0.5}]},
        {"adapters": [{"name": "one"}, {"name": "same"}]},
        {"adapters": [{"name": f"{i}"} for i in range(9)]},
        {"adapters": [{"name": "one", "scale": 100.5}]},
        {"adapters": [{"name": "one", "scale": "x"}]},
        {"adapters": [{"name": ""}]},
        {"adapters": [{"scale": 1}]},
        {"adapters": {"one": 1}},
        {"adapters": "one"},
        {"model": "one", "adapter_scale": -101},
    ],
)
async def test_compositions_that_make_no_sense(tmp_path: Path, fields: dict[str, Any]) -> None:
    async with serving(tmp_path) as api:
        await upload_two(api)
        await api.upload("same")
        assert_error(await api.chat(**fields), 400, "invalid_value")
        assert_error(await api.complete(**fields), 400, "invalid_value")
        assert not api.engine.submitted and not len(api.context.in_flight)


async def test_scales_are_numbers(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await upload_two(api)
        for raw in ("NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 5000, "[]"):
            for field in (f'"adapters": [{{"name": "one", "scale": {raw}}}]', f'"adapter_scale": {raw}'):
                content = f'{{"model": "{BASE}", "prompt": "x", {field}}}'
                answer = await api.http.post(
                    "/v1/completions", content=content, headers={"content-type": "application/json"}
                )
                assert_error(answer, 400)


async def test_more_adapters_than_slots(tmp_path: Path) -> None:
    async with serving(tmp_path, adapter_slots=1) as api:
        await upload_two(api)
        error = assert_error(await api.chat(adapters=HALF_AND_HALF), 400, "invalid_value")
        assert "1" in error["message"] and "2" in error["message"]


async def test_no_room_beside_pinned_adapters(tmp_path: Path) -> None:
    async with serving(tmp_path, adapter_slots=2) as api:
        await upload_two(api)
        await api.upload("three", seed=2)
        await api.http.post("/v1/adapters/three/pin")
        assert_error(await api.chat(adapters=HALF_AND_HALF), 503, "no_room")
        pair = [{"name": "one"}, {"name": "three"}]  # the pinned one is part of it
        assert (await api.chat(adapters=pair)).status_code == 200


async def test_ranks_that_do_not_fit_together(tmp_path: Path) -> None:
    async with serving(tmp_path, adapter_slots=4) as api:
        await upload_two(api)
        await api.upload("three", seed=2)
        await api.http.post("/v1/adapters/three/pin")
        info = api.engine.info
        for pages, status, code in ((1, 400, "invalid_value"), (2, 503, "no_room"), (3, 200, None)):
            api.context.engine._supervisor.info = msgspec.structs.replace(info, adapter_pages=pages)
            answer = await api.chat(adapters=HALF_AND_HALF)
            assert answer.status_code == status
            if code is not None:
                assert_error(answer, status, code)
        assert (await api.chat(model="one")).status_code == 200


async def test_what_no_longer_fits_when_its_turn_comes_may_be_tried_again(tmp_path: Path) -> None:
    """The engine gives up a composition that waits when another adapter is pinned."""
    async with serving(tmp_path, adapter_slots=2) as api:
        await upload_two(api)
        await api.upload("three", seed=2)
        api.engine.fail_after, api.engine.failure = 0, "2 do not fit beside the pinned ones"
        api.waits_after(0)
        waiting = asyncio.create_task(api.chat(adapters=HALF_AND_HALF))
        await eventually(lambda: api.context.in_flight.count("one"))
        await api.http.post("/v1/adapters/three/pin")
        api.goes_on()
        assert_error(await waiting, 503, "no_room")


async def test_every_adapter_must_be_known_and_visible(tmp_path: Path) -> None:
    keys = tmp_path / "keys.toml"
    keys.write_text(f'[[keys]]\nname = "k"\nkey = "{secret("k")}"\nscopes = ["infer", "admin"]\nadapters = ["one"]\n')
    async with serving(tmp_path) as open_api:
        await upload_two(open_api)
    async with serving(tmp_path, keys=KeyRing.load(ServeConfig(keys_file=keys))) as api:
        api.http.headers["authorization"] = f"Bearer {secret('k')}"
        hidden = assert_error(await api.chat(adapters=HALF_AND_HALF), 404, "model_not_found")
        unknown = assert_error(await api.chat(adapters=[{"name": "one"}, {"name": "nope"}]), 404, "model_not_found")
        assert hidden["message"].replace("two", "nope") == unknown["message"]
        assert (await api.chat(adapters=HALF_AND_HALF[:1])).status_code == 200


@pytest.mark.parametrize(
    ("traits", "why"),
    [
        (Traits(additive=False), "does more than add"),
        (Traits(additive=False, invocation_tokens=(1, 2)), "applies to a part of the prompt only"),
    ],
)
async def test_what_does_more_than_add_is_not_scaled_or_composed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, traits: Traits, why: str
) -> None:
    async with serving(tmp_path) as api:
        await api.upload("two", seed=1)
        monkeypatch.setattr(LoraSettings, "traits", lambda _: traits)
        await api.upload("one")
        for fields in (
            {"adapters": HALF_AND_HALF},
            {"adapters": [{"name": "two"}, {"name": "one"}]},
            {"adapters": [{"name": "one", "scale": 0.5}]},
            {"model": "one", "adapter_scale": 0},
        ):
            error = assert_error(await api.chat(**fields), 400, "invalid_value")
            assert "'one'" in error["message"] and why in error["message"]
        for fields in ({"model": "one"}, {"model": "one", "adapter_scale": 1.0}, {"adapters": [{"name": "one"}]}):
            assert (await api.chat(**fields)).status_code == 200


async def test_a_module_has_one_owner_in_a_composition(tmp_path: Path) -> None:
    """An adapter with a saved head composes with a plain one, and its factors can be scaled; not with another head."""
    heads: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    async with serving(tmp_path) as api:
        await upload_two(api)
        configs = {"head": heads, "other": heads, "norm": {"modules_to_save": ["norm"]}, "dora": {"use_dora": True}}
        configs["dora2"] = {"use_dora": True, "target_modules": ["v_proj"]}
        for seed, (name, config) in enumerate(configs.items()):
            files = {file: (file, data) for file, data in made_files(seed + 3, **config).items()}
            assert (await api.http.post("/v1/adapters", data={"name": name}, files=files)).status_code == 201
        for fields in (
            {"adapters": [{"name": "head", "scale": 0.5}, {"name": "two", "scale": -2}]},
            {"adapters": [{"name": "head"}, {"name": "norm"}, {"name": "dora"}]},
            {"model": "head", "adapter_scale": 2},
        ):
            assert (await api.chat(**fields)).status_code == 200
        for pair, module in ((("head", "other"), "lm_head"), (("dora", "dora2"), "v_proj")):
            answer = await api.chat(adapters=[{"name": name} for name in pair])
            message = assert_error(answer, 422, "adapters_conflict")["message"]
            assert all(f"'{word}'" in message for word in (*pair, module))
        for fields in ({"model": "dora", "adapter_scale": 0.5}, {"model": "head", "adapter_scale": 0}):
            assert_error(await api.chat(**fields), 400, "invalid_value")


async def test_an_activated_adapter_begins_at_its_last_invocation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each prompt of a request for itself; a prompt without one is the base model's."""
    async with serving(tmp_path) as api:
        monkeypatch.setattr(LoraSettings, "traits", lambda _: Traits(additive=False, invocation_tokens=(7, 8, 7)))
        await api.upload("one")
        version = await digest(api, "one")
        places = {
            (1, 7, 8, 7, 2): 1,
            (7, 8, 7): 0,
            (7, 8, 7, 1, 7, 8, 7): 4,
            (7, 8, 7, 8, 7, 3): 2,
            (7, 8, 7, 7, 8): 0,
            (7, 8): None,
            (1, 8, 7, 7): None,
        }
        answer = (await api.complete([list(prompt) for prompt in places], model="one")).json()
        assert answer["system_fingerprint"] == f"0123456789ab-{version[:12]}"
        for submit, (prompt, start) in zip(api.engine.submitted, places.items(), strict=True):
            assert submit.token_ids == list(prompt)
            adapters = () if start is None else (ScaledAdapter(version),)
            assert (submit.adapters, submit.active_from) == (adapters, start or 0)


# -- accounting --------------------------------------------------------------------------------------------------------


async def test_deleting_one_of_a_composition_drains_it(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        one, two = await upload_two(api)
        api.waits_after(1)
        running = asyncio.create_task(api.chat(adapters=HALF_AND_HALF))
        await eventually(lambda: api.context.in_flight.count("two"))
        assert api.context.in_flight.digests() == {one, two}
        for name in ("one", "two"):
            assert (await api.http.get(f"/v1/adapters/{name}")).json()["in_flight"] == 1
            assert_error(await api.http.post(f"/v1/adapters/{name}/unload"), 409, "conflict")
        deleting = asyncio.create_task(api.http.delete("/v1/adapters/two?drain_timeout=3600"))
        await eventually(lambda: "two" not in api.context.registry)
        api.goes_on()
        assert (await deleting).json() == {"name": "two", "deleted": True, "drained": 1, "aborted": 0}
        assert (await running).status_code == 200
        assert_error(await api.chat(adapters=HALF_AND_HALF), 404, "model_not_found")
        assert (await api.chat(model="one")).status_code == 200


async def test_deleting_one_of_a_composition_aborts_what_takes_too_long(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await upload_two(api)
        api.waits_after(1)
        stuck = asyncio.create_task(api.chat(adapters=HALF_AND_HALF))
        other = asyncio.create_task(api.chat(model="one"))
        await eventually(lambda: len(api.context.in_flight) == 2)
        deleted = await api.http.delete("/v1/adapters/two?drain_timeout=0.05")
        assert deleted.json() == {"name": "two", "deleted": True, "drained": 0, "aborted": 1}
        assert_error(await stuck, 404, "model_not_found")
        api.goes_on()
        assert (await other).status_code == 200
        assert api.context.in_flight.count("one") == 0


async def test_a_version_that_was_replaced_stays_for_its_composition(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        one, _ = await upload_two(api)
        await api.upload("one", seed=5, replace="true")
        assert await digest(api, "one") != one
        parts = [{"name": f"one@{one[:12]}"}, {"name": "one"}]  # two versions of one name
        api.waits_after(1)
        running = asyncio.create_task(api.chat(adapters=parts))
        await eventually(lambda: len(api.context.in_flight))
        assert api.context.in_flight.count("one") == 1
        assert api.context.in_flight.digests() == {one, await digest(api, "one")}
        api.goes_on()
        assert (await running).status_code == 200
        assert api.context.in_flight.count("one") == 0


async def test_every_adapter_of_a_composition_was_used(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await upload_two(api)
        answer: httpx.Response = await api.chat(adapters=HALF_AND_HALF)
        usage = answer.json()["usage"]
        stats = {entry["name"]: entry for entry in (await api.http.get("/v1/stats")).json()["adapters"]}
        assert stats.keys() == {"one", "two"}
        for entry in stats.values():
            assert entry["requests"] == 1 and entry["last_used"] is not None
            assert entry["prompt_tokens"] == usage["prompt_tokens"]
            assert entry["generated_tokens"] == usage["completion_tokens"]
        found = await samples(api)
        assert found["loraplex_generated_tokens_total", (("adapter", "_composed"),)] == usage["completion_tokens"]
        counted = [dict(labels)["adapter"] for name, labels in found if name == "loraplex_requests_total"]
        assert counted == ["_composed"]
