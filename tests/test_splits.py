"""Aliases over HTTP: who answers, what clients and metrics see of it, and who may change it."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from server.api.middleware.auth import Key, KeyRing
from server.request import ScaledAdapter
from tests.fixtures.api_server import BASE, Api, assert_error, serving
from tests.test_api_composition import digest, identity, upload_two
from tests.test_metrics import samples


async def split(api: Api, alias: str, headers: dict[str, str] | None = None, **weights: Any) -> Any:
    return await api.http.put(f"/v1/adapters/{alias}/split", json={"weights": weights}, headers=headers)


async def test_a_member_answers_under_the_name_that_was_asked(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        one, two = await upload_two(api)
        made = await split(api, "prod", one=90, two=10)
        assert made.status_code == 200
        assert made.json() == (await api.http.get("/v1/adapters/prod")).json()
        assert made.json() | {"created": 0} == {
            "name": "prod",
            "kind": "alias",
            "weights": {"one": 90, "two": 10},
            "created": 0,
        }
        answered = set()
        for i in range(40):
            answer = (await api.chat(model="prod", user=f"user-{i}")).json()
            again = (await api.complete(model="prod", user=f"user-{i}")).json()
            assert answer["model"] == "prod"
            assert answer["system_fingerprint"] == again["system_fingerprint"]
            answered.add(answer["system_fingerprint"])
        assert answered == {f"0123456789ab-{version[:12]}" for version in (one, two)}
        counted = {dict(labels).get("adapter") for name, labels in await samples(api) if name.startswith("loraplex_")}
        assert {"one", "two"} <= counted and not counted & {"prod", "_other", "_unknown"}


async def test_weights_may_be_fractions_and_the_base_model_a_member(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        one, _ = await upload_two(api)
        made = await split(api, "Team/prod", **{"one": 0.1, BASE: 0.9})
        assert made.json()["weights"] == {"one": 0.1, BASE: 0.9}
        for i in range(60):
            answer = (await api.chat(model="Team/prod", user=f"user-{i}")).json()
            assert answer["model"] == "Team/prod"
        chosen = [submit.adapters for submit in api.engine.submitted]
        assert set(chosen) == {(), (ScaledAdapter(one),)} and chosen.count(()) > 40
        assert (await api.chat(model="Team/prod", adapters=[])).status_code == 200
        assert (await api.http.delete("/v1/adapters/Team%2Fprod/split")).status_code == 200


async def test_a_split_with_the_base_survives_a_restart_and_another_name_of_the_base(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await upload_two(api)
        await split(api, "prod", **{BASE: 0.5, "one": 0.5})
    async with serving(tmp_path) as api:
        api.context.base_model = "renamed"
        assert (await api.http.get("/v1/adapters/prod")).json()["weights"] == {"renamed": 0.5, "one": 0.5}


async def test_all_choices_of_a_request_come_from_one_member(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await upload_two(api)
        await split(api, "prod", one=1, two=1)
        for _ in range(20):
            api.engine.submitted.clear()
            await api.complete(["a", "b"], model="prod", n=2)
            assert len(api.engine.submitted) == 4 and len({s.adapters for s in api.engine.submitted}) == 1


async def test_an_alias_can_be_scaled_and_composed(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        one, two = await upload_two(api)
        await split(api, "prod", one=1)
        await api.chat(model="prod", adapter_scale=0.5)
        assert api.engine.submitted[-1].adapters == (ScaledAdapter(one, 0.5),)
        answer = await api.chat(adapters=[{"name": "prod", "scale": 2}, {"name": "two"}])
        assert answer.json()["system_fingerprint"] == identity((one, 2.0), (two, 1.0))
        assert_error(await api.chat(adapters=[{"name": "prod"}, {"name": "one"}]), 400, "invalid_value")


async def test_models_list_the_alias(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await upload_two(api)
        await split(api, "prod", one=1)
        listed = (await api.http.get("/v1/models")).json()["data"]
        assert [model["id"] for model in listed] == [BASE, "one", "two", "prod"]
        assert (listed[-1]["root"], listed[-1]["parent"]) == ("prod", BASE)
        assert (await api.http.get("/v1/models/prod")).json() == listed[-1]
        records = (await api.http.get("/v1/adapters")).json()["data"]
        assert [(record["name"], record["kind"]) for record in records] == [("one", "adapter"), ("two", "adapter")]


async def test_a_split_can_be_changed_and_taken_away(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        _, two = await upload_two(api)
        await split(api, "prod", one=1)
        assert (await split(api, "prod", one=0, two=1)).status_code == 200
        await api.chat(model="prod")
        assert api.engine.submitted[-1].adapters == (ScaledAdapter(two),)
        gone = await api.http.delete("/v1/adapters/prod/split")
        assert (gone.status_code, gone.json()) == (200, {"name": "prod", "deleted": True})
        assert_error(await api.http.delete("/v1/adapters/prod/split"), 404, "model_not_found")
        assert_error(await api.http.delete("/v1/adapters/one/split"), 404, "model_not_found")
        assert_error(await api.chat(model="prod"), 404, "model_not_found")
        assert (await api.upload("prod")).status_code == 201


async def test_a_member_cannot_be_deleted_and_the_alias_is_no_adapter(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        one, _ = await upload_two(api)
        await split(api, "prod", one=1)
        assert_error(await api.http.delete("/v1/adapters/one"), 409, "conflict")
        assert_error(await api.http.post("/v1/unload_lora_adapter", json={"lora_name": "one"}), 400, "conflict")
        assert (await api.chat(model="one")).status_code == 200
        assert_error(await api.upload("prod"), 409, "conflict")
        assert_error(await api.http.delete("/v1/adapters/prod"), 409, "conflict")
        for action in ("load", "unload", "pin", "unpin", "rollback"):
            assert_error(await api.http.post(f"/v1/adapters/prod/{action}"), 409, "conflict")
        assert_error(await api.http.post("/v1/merge", json={"name": "prod"}), 409, "conflict")
        assert_error(await api.chat(model=f"prod@{one[:12]}"), 404, "model_not_found")
        await api.upload("one", seed=2, replace="true")  # a member may have a new version at any time
        await api.chat(model="prod")
        assert api.engine.submitted[-1].adapters == (ScaledAdapter(await digest(api, "one")),)


@pytest.mark.parametrize(
    ("alias", "weights", "status", "code"),
    [
        ("prod", {}, 400, "invalid_value"),
        ("prod", {"one": 0, "two": 0}, 400, "invalid_value"),
        ("prod", {"one": -1}, 400, "invalid_value"),
        ("prod", {"one": float("1e-9"), "two": 10**7}, 400, "invalid_value"),
        ("prod", {"one": 10**12}, 400, "invalid_value"),
        ("prod", {f"a{i}": 1 for i in range(17)}, 400, "invalid_value"),
        ("prod", {"one": 1, "gone": 1}, 404, "model_not_found"),
        ("one", {"two": 1}, 409, "conflict"),
        (BASE, {"one": 1}, 409, "conflict"),
        ("prod duct", {"one": 1}, 400, "invalid_name"),
    ],
)
async def test_splits_that_are_refused(
    alias: str, weights: dict[str, Any], status: int, code: str, tmp_path: Path
) -> None:
    async with serving(tmp_path) as api:
        await upload_two(api)
        assert_error(await split(api, alias, **weights), status, code)
        assert api.context.registry.aliases == {}


def key(name: str, *adapters: str) -> Key:
    sha256 = hashlib.sha256(name.encode()).hexdigest()
    return Key(name, sha256, frozenset({"infer", "admin"}), name, frozenset(adapters) or None)


async def test_keys_use_an_alias_by_its_name_and_change_it_if_they_see_all_of_it(tmp_path: Path) -> None:
    ring = KeyRing([key("all"), key("user", "prod"), key("half", "prod", "one"), key("stranger", "one", "two")])
    async with serving(tmp_path, keys=ring) as api:
        headers = {name: {"authorization": f"Bearer {name}"} for name in ("all", "user", "half", "stranger")}
        api.http.headers.update(headers["all"])
        await upload_two(api)
        assert (await split(api, "prod", one=1, two=1)).status_code == 200

        async def ask(name: str) -> Any:
            body = {"model": "prod", "messages": [{"role": "user", "content": "hi"}]}
            return await api.http.post("/v1/chat/completions", json=body, headers=headers[name])

        for name in ("user", "half"):  # neither sees all members, and nothing of them shows
            answer = await ask(name)
            assert answer.status_code == 200 and "two" not in answer.text
            listed = (await api.http.get("/v1/models", headers=headers[name])).json()["data"]
            assert "prod" in [model["id"] for model in listed]
            assert_error(await api.http.get("/v1/adapters/prod", headers=headers[name]), 404)
            assert_error(await api.http.delete("/v1/adapters/prod/split", headers=headers[name]), 404)
        assert_error(await split(api, "prod", headers["half"], one=1), 403, "insufficient_scope")
        assert_error(await ask("stranger"), 404, "model_not_found")
        assert_error(await split(api, "prod", headers["stranger"], one=1), 403, "insufficient_scope")
        assert_error(await api.http.get("/v1/adapters/prod", headers=headers["stranger"]), 404, "model_not_found")
        assert_error(await split(api, "prod", headers["user"], one=1), 403, "insufficient_scope")
        assert (await api.http.get("/v1/adapters/prod")).json()["weights"] == {"one": 1, "two": 1}


async def test_a_key_cannot_make_members_of_what_it_does_not_see(tmp_path: Path) -> None:
    async with serving(tmp_path, keys=KeyRing([key("all"), key("half", "prod", "one")])) as api:
        api.http.headers["authorization"] = "Bearer all"
        await upload_two(api)
        mine = {"authorization": "Bearer half"}
        assert_error(await split(api, "prod", mine, one=1, two=1), 404, "model_not_found")
        assert (await split(api, "prod", mine, one=1)).status_code == 200
