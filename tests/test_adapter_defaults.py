"""Defaults of adapters: what applies where a request leaves a field out, and what is stored and shown of them."""

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest

from adapters.registry.db import DATABASE
from adapters.registry.registry import AdapterRegistry
from server.api.message_formats.parser import BY_NAME
from server.api.middleware.auth import Key, KeyRing
from server.api.requests.defaults import Defaults, ToolFormat
from server.api.requests.sampling import Sampling
from server.keys_file import digest_of
from server.request import SamplingParams
from tests.fixtures.api_server import (
    BASE,
    MAX_MODEL_LEN,
    Api,
    adapter_files,
    assert_error,
    form,
    last_prompt,
    listening,
    secret,
    serving,
)
from tests.fixtures.timing import eventually

ROUTES = ("chat", "completions", "messages", "responses", "generate")


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    async with serving(tmp_path, allow_source=(f"file://{tmp_path}",)) as found:
        await found.upload("acme")
        yield found


def written(folder: Path) -> str:
    """Write an adapter's files and return the folder's address."""
    folder.mkdir()
    for file, data in adapter_files(1).items():
        (folder / file).write_bytes(data)
    return folder.as_uri()


async def patch(api: Api, name: str = "acme", **settings: Any) -> dict[str, Any]:
    answer = await api.http.patch(f"/v1/adapters/{name}", json=settings)
    assert answer.status_code == 200, answer.text
    record: dict[str, Any] = answer.json()
    return record


async def ask(api: Api, route: str, model: str = "acme", **fields: Any) -> httpx.Response:
    """Send a request in the format of a route. `fields` have the same name in all of them."""
    if route == "generate":
        limit = {"max_new_tokens": fields.pop("max_tokens")} if "max_tokens" in fields else {}
        parameters = {"adapter_id": model, **fields, **limit}
        return await api.http.post("/generate", json={"inputs": "hi", "parameters": parameters})
    message = [{"role": "user", "content": "hi"}]
    path, body = {
        "chat": ("/v1/chat/completions", {"messages": message}),
        "completions": ("/v1/completions", {"prompt": "hi"}),
        "messages": ("/v1/messages", {"messages": message, "max_tokens": 9}),
        "responses": ("/v1/responses", {"input": "hi"}),
    }[route]
    return await api.http.post(path, json={"model": model, **body, **fields})


async def sampled(api: Api, route: str = "chat", model: str = "acme", **fields: Any) -> SamplingParams:
    answer = await ask(api, route, model, **fields)
    assert answer.status_code == 200, answer.text
    return api.engine.submitted[-1].sampling


@pytest.mark.parametrize("route", ROUTES)
async def test_a_default_applies_unless_the_request_has_the_field(api: Api, route: str) -> None:
    plain = await sampled(api, route)
    await patch(api, defaults={"temperature": 0.25, "top_k": 7, "seed": 3})
    found = await sampled(api, route)
    assert (found.temperature, found.top_k, found.seed) == (0.25, 7, 3)
    asked = await sampled(api, route, temperature=1.5, top_k=2, seed=4)
    assert (asked.temperature, asked.top_k, asked.seed) == (1.5, 2, 4)
    assert await sampled(api, route, model=BASE) == plain
    await patch(api, defaults=None)
    assert await sampled(api, route) == plain


async def test_every_default_changes_what_is_sampled(api: Api) -> None:
    changes: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.5,
        "presence_penalty": 1,
        "frequency_penalty": 1,
        "logit_bias": {"5": 1},
        "seed": 1,
        "top_k": 5,
        "min_p": 0.5,
        "repetition_penalty": 1.5,
        "stop_token_ids": [40],
        "max_tokens": 3,
    }
    assert changes.keys() == (Sampling.model_fields.keys() | {"max_tokens"}) - {"stop"}
    plain = await sampled(api)
    for name, value in changes.items():
        await patch(api, defaults={name: value})
        assert await sampled(api) != plain, name
        await patch(api, defaults={name: None})
        assert await sampled(api) == plain, name


async def test_stop_strings_and_the_number_of_tokens(api: Api) -> None:
    await patch(api, defaults={"stop": "wor", "max_tokens": 3})
    assert (await api.chat(model="acme")).json()["choices"][0]["message"]["content"] == "Hel"
    for fields in ({"max_tokens": -1}, {"max_completion_tokens": -1}):
        assert (await api.chat(model="acme", **fields)).json()["choices"][0]["message"]["content"] == "Hello "
    whole = await api.chat(model="acme", max_tokens=-1, stop=[])
    assert whole.json()["choices"][0]["message"]["content"] == "Hello world"
    await patch(api, defaults={"max_tokens": 10 * MAX_MODEL_LEN})  # cut to the context, as a request's own is not
    found = await sampled(api, "completions")
    assert found.max_tokens == MAX_MODEL_LEN - 2
    assert_error(await ask(api, "completions", max_tokens=10 * MAX_MODEL_LEN), 400, "context_length_exceeded")


async def test_a_greedy_route_stays_greedy_unless_there_is_a_temperature(api: Api) -> None:
    assert (await sampled(api, "generate")).temperature == 0
    assert (await sampled(api, "generate", do_sample=True)).temperature == 1
    await patch(api, defaults={"temperature": 0.5})
    assert (await sampled(api, "generate")).temperature == 0.5
    assert (await sampled(api, "generate", do_sample=False)).temperature == 0


async def test_a_system_prompt_comes_first_unless_the_conversation_has_one(api: Api) -> None:
    await patch(api, defaults={"system_prompt": "Be kind."})
    for route in ("chat", "messages", "responses"):
        await ask(api, route)
        assert last_prompt(api).startswith("<|start|>system\nBe kind.<|end|>\n<|start|>user\nhi"), route
    own = [{"role": "developer", "content": "Be short."}, {"role": "user", "content": "hi"}]
    for route, fields in (
        ("chat", {"messages": own}),
        ("messages", {"system": "Be short."}),
        ("responses", {"instructions": "Be short."}),
    ):
        await ask(api, route, **fields)
        assert "Be kind" not in last_prompt(api) and "Be short." in last_prompt(api), route
    for route in ("completions", "generate"):
        await ask(api, route)
        assert last_prompt(api) == "hi"
    tokens = await api.http.post("/tokenize", json={"model": "acme", "messages": [{"role": "user", "content": "hi"}]})
    await ask(api, "chat")
    assert tokens.json()["tokens"] == api.engine.submitted[-1].token_ids


async def test_a_chat_template_and_its_variables(api: Api) -> None:
    template = "{{ messages[-1].content }} {{ mood }} {{ pace }}"
    await patch(api, defaults={"chat_template": template, "chat_template_kwargs": {"mood": "calm", "pace": "slow"}})
    await ask(api, "chat", chat_template_kwargs={"mood": "glad"})
    assert last_prompt(api) == "hi glad slow"
    assert (await api.http.get("/tokenizer_info", params={"model": "acme"})).json()["chat_template"] == template
    await patch(api, defaults={"chat_template": "{{ messages[-1].content }}!"})
    await ask(api, "chat")
    assert last_prompt(api) == "hi!"
    await patch(api, defaults={"chat_template": None, "chat_template_kwargs": None})
    await ask(api, "chat")
    assert last_prompt(api).startswith("<|start|>user")


async def test_the_format_of_calls(api: Api) -> None:
    assert set(get_args(ToolFormat)) == BY_NAME.keys()
    tools = [{"type": "function", "function": {"name": "f"}}]
    await patch(api, defaults={"chat_template": "{{ tools | length }}"})
    api.says('[TOOL_CALLS][{"name": "f", "arguments": {}}]')
    for format, is_call in (("hermes", False), ("mistral", True), (None, False)):
        await patch(api, defaults={"tool_format": format})
        message = (await api.chat(model="acme", tools=tools, max_tokens=-1)).json()["choices"][0]["message"]
        assert ("tool_calls" in message) is is_call, format


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"defaults": {"temperature": 3}}, "defaults.temperature"),
    ({"defaults": {"top_p": "high"}}, "defaults.top_p"),
    ({"defaults": {"stop": [""]}}, "defaults.stop"),
    ({"defaults": {"max_tokens": -2}}, "defaults.max_tokens"),
    ({"defaults": {"system_prompt": ""}}, "defaults.system_prompt"),
    ({"defaults": {"tool_format": "xml"}}, "defaults.tool_format"),
    ({"defaults": {"stop_token_ids": [1 << 20]}}, "defaults.stop_token_ids"),
    ({"defaults": {"logit_bias": {"999999": 1}}}, "defaults.logit_bias"),
    ({"defaults": {"chat_template": "{% if"}}, "defaults.chat_template"),
    ({"defaults": {"model": "other"}}, "defaults.model"),
    ({"defaults": []}, "defaults"),
    ({"labels": {"team": 1}}, "labels.team"),
    ({"labels": {str(i): "" for i in range(65)}}, "labels"),
    ({"description": "x" * 5000}, "description"),
    ({"pinned": True}, "pinned"),
]


@pytest.mark.parametrize(("settings", "param"), WRONG, ids=[param for _, param in WRONG])
async def test_what_is_wrong_is_named_and_changes_nothing(
    api: Api, tmp_path: Path, settings: dict[str, Any], param: str
) -> None:
    source = written(tmp_path / "source")
    before = await patch(api, defaults={"top_k": 2}, labels={"a": "b"})
    assert assert_error(await api.http.patch("/v1/adapters/acme", json=settings), 400)["param"] == param
    if param != "pinned":
        whole = {key: value if key == "description" else json.dumps(value) for key, value in settings.items()}
        error = assert_error(await api.upload("acme", seed=1, replace="true", **whole), 400)
        assert error["param"] == param
        error = assert_error(
            await api.http.post("/v1/adapters", json={"name": "acme", "source": source, "replace": True, **settings}),
            400,
        )
        assert error["param"] == param
    assert (await api.http.get("/v1/adapters/acme")).json() == before


async def test_null_removes_one_and_the_rest_stays(api: Api) -> None:
    record = await patch(
        api, description="Support", labels={"team": "search", "tier": "gold"}, defaults={"top_k": 2, "seed": 1}
    )
    assert record["description"] == "Support" and record["defaults"] == {"top_k": 2, "seed": 1}
    record = await patch(api, labels={"tier": None, "owner": "ann"}, defaults={"seed": None, "top_k": 3})
    assert record["labels"] == {"team": "search", "owner": "ann"} and record["defaults"] == {"top_k": 3}
    record = await patch(api, labels=None, description=None)
    assert (record["description"], record["labels"], record["defaults"]) == (None, {}, {"top_k": 3})
    assert await patch(api) == record


async def test_models_show_what_is_set(api: Api) -> None:
    defaults = {"system_prompt": "Be kind.", "temperature": 0.5}
    await patch(api, description="Support", labels={"team": "search"}, defaults={**defaults, "chat_template": "x"})
    listed = {model["id"]: model for model in (await api.http.get("/v1/models")).json()["data"]}
    shown = {"description": "Support", "labels": {"team": "search"}, "defaults": defaults}
    assert {key: listed["acme"][key] for key in shown} == shown and not shown.keys() & listed[BASE].keys()
    one = (await api.http.get("/v1/models/acme")).json()
    assert one == listed["acme"] and one["max_model_len"] == MAX_MODEL_LEN and one["permission"]
    record = (await api.http.get("/v1/adapters")).json()["data"][0]
    assert record["defaults"]["chat_template"] == "x" and record["labels"] == {"team": "search"}


async def test_settings_belong_to_the_name(api: Api, tmp_path: Path) -> None:
    """All versions share them, a new adapter of the name does not."""
    await patch(api, defaults={"top_k": 7})
    first = (await api.http.get("/v1/adapters/acme")).json()["version"]
    await api.upload("acme", seed=1, replace="true")
    assert (await sampled(api)).top_k == 7
    assert (await sampled(api, model=f"acme@{first.removeprefix('sha256:')[:12]}")).top_k == 7
    await api.http.post("/v1/adapters/acme/rollback")
    assert (await sampled(api)).top_k == 7 and (await api.http.get("/v1/adapters/acme")).json()["version"] == first
    await api.upload("acme", defaults='{"top_k": 8}', labels='{"a": "b"}')  # the same bytes
    record = (await api.http.get("/v1/adapters/acme")).json()
    assert record["defaults"] == {"top_k": 8} and record["labels"] == {"a": "b"}
    await api.http.delete("/v1/adapters/acme")
    await api.upload("acme")
    assert (await api.http.get("/v1/adapters/acme")).json()["defaults"] == {}


async def test_an_alias_has_those_of_the_member_and_a_composition_none(api: Api) -> None:
    await api.upload("beta", seed=1)
    await patch(api, defaults={"top_k": 7, "system_prompt": "Be kind."})
    await api.http.put("/v1/adapters/both/split", json={"weights": {"acme": 1, "beta": 0}})
    assert (await sampled(api, model="both")).top_k == 7
    await api.http.put("/v1/adapters/both/split", json={"weights": {"acme": 0, "beta": 1}})
    assert (await sampled(api, model="both")).top_k == 0
    assert_error(await api.http.patch("/v1/adapters/both", json={"description": "x"}), 409)
    alone = await sampled(api, model=BASE, adapters=[{"name": "acme", "scale": 0.5}])
    assert alone.top_k == 7 and "Be kind." in last_prompt(api)
    composed = await sampled(api, model=BASE, adapters=[{"name": "acme"}, {"name": "beta"}])
    assert composed.top_k == 0 and "Be kind." not in last_prompt(api)


async def test_a_registration_has_them_at_once_or_later(api: Api, tmp_path: Path) -> None:
    for name in ("now", "later"):
        settings = {"description": name, "defaults": {"top_k": 5}}
        body = {"name": name, "source": written(tmp_path / name), "lazy": name == "later", **settings}
        answer = await api.http.post("/v1/adapters", json=body)
        assert answer.status_code in (201, 202), answer.text
        assert (answer.json()["description"], answer.json()["defaults"]) == (name, {"top_k": 5})
    await eventually(lambda: "later" in api.context.registry)
    record = (await api.http.get("/v1/adapters/later")).json()
    assert record["state"] == "ready" and record["defaults"] == {"top_k": 5}
    assert not api.context.registry.pending
    wrong = {"name": "wrong", "source": written(tmp_path / "wrong"), "defaults": {"stop_token_ids": [1 << 20]}}
    assert (await api.http.post("/v1/adapters", json={**wrong, "lazy": True})).status_code == 202
    await eventually(lambda: api.context.registry.pending["wrong"].error)
    assert "vocabulary" in (await api.http.get("/v1/adapters/wrong")).json()["error"]
    assert_error(await api.http.patch("/v1/adapters/wrong", json={"description": "x"}), 409, "conflict")
    many = {"labels": {f"a{i}": "" for i in range(40)}}
    await patch(api, "now", **many)
    for _ in range(2):  # the same again are no more
        await patch(api, "now", **many)
    more = {"labels": {f"b{i}": "" for i in range(40)}}
    assert_error(await api.http.patch("/v1/adapters/now", json=more), 400)


async def test_the_document_describes_them(api: Api) -> None:
    document = (await api.http.get("/openapi.json")).json()
    references = re.findall(r'"\$ref": "#/components/schemas/([^"]+)"', json.dumps(document))
    assert "Defaults" in references and set(references) <= document["components"]["schemas"].keys()
    assert "$defs" not in json.dumps(document)


async def test_a_dry_run_stores_none(api: Api) -> None:
    fields = {"name": "acme", "defaults": '{"top_k": 5}'}
    answer = await api.http.post("/v1/adapters?dry_run=true", data=fields, files=form())
    assert answer.status_code == 200
    assert (await api.http.get("/v1/adapters/acme")).json()["defaults"] == {}


async def test_who_may_change_them(tmp_path: Path) -> None:
    scopes = {"admin": frozenset({"admin"}), "infer": frozenset({"infer"})}
    keys = [Key(name, digest_of(secret(name)), scope) for name, scope in scopes.items()]  # type: ignore[arg-type]
    narrow = Key("narrow", digest_of(secret("narrow")), scopes["admin"], adapters=frozenset({"other"}))  # type: ignore[arg-type]
    async with serving(tmp_path, keys=KeyRing([*keys, narrow])) as api:
        bearer = {name: {"authorization": f"Bearer {secret(name)}"} for name in ("admin", "infer", "narrow")}
        await api.http.post("/v1/adapters", data={"name": "acme"}, files=form(), headers=bearer["admin"])
        url, body = "/v1/adapters/acme", {"defaults": {"chat_template": "x"}}
        assert_error(await api.http.patch(url, json=body), 401)
        assert_error(await api.http.patch(url, json=body, headers=bearer["infer"]), 403)
        assert_error(await api.http.patch(url, json=body, headers=bearer["narrow"]), 404, "model_not_found")
        assert (await api.http.patch(url, json=body, headers=bearer["admin"])).status_code == 200


async def test_defaults_of_a_later_version_are_refused_by_name(api: Api) -> None:
    settings = json.dumps({"defaults": {"not_yet_known": 1}})
    api.context.registry.set_settings("acme", settings)
    assert "defaults" in assert_error(await api.chat(model="acme"), 503, "adapter_failed")["message"]
    assert (await patch(api, defaults=None))["defaults"] == {}
    assert (await api.chat(model="acme")).status_code == 200


def test_settings_survive_a_restart_and_a_lost_database(tmp_path: Path) -> None:
    for _ in range(2):
        with listening(tmp_path, port=0) as live:
            url = f"{live.url}/v1/adapters"
            if "acme" not in live.context.registry:
                httpx.post(url, data={"name": "acme"}, files=form()).raise_for_status()
                httpx.patch(f"{url}/acme", json={"defaults": {"top_k": 7}}).raise_for_status()
            assert httpx.get(f"{url}/acme").json()["defaults"] == {"top_k": 7}
    data = tmp_path / "data"
    (data / DATABASE).unlink()
    registry = AdapterRegistry(data)
    assert "acme" not in registry
    registry.rebuild()
    assert registry.record("acme").settings == {"defaults": {"top_k": 7}}
    registry.close()


def test_defaults_have_the_bounds_of_requests() -> None:
    from server.api.requests.chat import ChatCompletionRequest

    shared = Defaults.model_fields.keys() & ChatCompletionRequest.model_fields.keys()
    assert shared == Defaults.model_fields.keys() - {"system_prompt", "chat_template", "tool_format"}
    for name in shared:
        ours, theirs = Defaults.model_fields[name], ChatCompletionRequest.model_fields[name]
        assert (ours.annotation, ours.metadata) == (theirs.annotation, theirs.metadata), name
