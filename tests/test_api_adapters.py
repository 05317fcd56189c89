import asyncio
import json
import math
import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.names import ROUTE_WORDS
from server.api.adapters.schemas import AdapterBody
from server.ipc.messages import PinAdapter, ToEngine
from server.request import ScaledAdapter
from tests.fixtures.api_server import BASE, Api, adapter_files, assert_error, events, form, listening, serving
from tests.fixtures.timing import eventually, leap, wait_for

BAD_NAMES = [
    "../x",
    "%2e%2e",
    "a//b",
    ".",
    "..",
    "a/../b",
    "a/versions",
    "nul\0",
    "a\r\nb",
    "x" * 257,
    "аcme",
    "_unknown",
    "",
    "a b",
]


async def digest(api: Api, name: str) -> str:
    version: str = (await api.http.get(f"/v1/adapters/{name}")).json()["version"]
    return version.removeprefix("sha256:")


def staged(api: Api) -> list[Path]:
    return list((api.context.config.data_dir / "data" / "store" / ".staging").iterdir())


async def test_upload_and_serve(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        created = await api.upload("acme")
        assert created.status_code == 201
        record = created.json()
        AdapterBody.model_validate(record)
        assert record["name"] == "acme" and record["state"] == "ready" and record["tier"] == "disk"
        assert record["base_model"] == BASE and record["rank"] == 8 and record["source"] == "upload"
        assert record["target_modules"] == ["q_proj", "v_proj"] and record["report"]["applied"]["modules"] == 4
        assert record["last_used"] is None and record["in_flight"] == 0 and record["error"] is None

        version = record["version"].removeprefix("sha256:")
        for asked in ("acme", f"acme@{version[:12]}", f"acme@{version}"):
            answer = (await api.chat(model=asked)).json()
            assert answer["model"] == asked
            assert answer["system_fingerprint"] == f"0123456789ab-{version[:12]}"
            assert api.engine.submitted[-1].adapters == (ScaledAdapter(version),)
        assert (await api.http.get("/v1/adapters/acme")).json()["last_used"] > 0
        assert staged(api) == []


async def test_same_bytes_again_conflicts_and_replacement(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        assert (await api.upload("acme")).status_code == 201
        first = await digest(api, "acme")
        assert (await api.upload("acme")).status_code == 200
        assert_error(await api.upload("acme", seed=1), 409, "conflict")
        assert await digest(api, "acme") == first
        assert (await api.upload("acme", seed=1, replace="true")).status_code == 201
        assert await digest(api, "acme") != first
        assert_error(await api.upload(BASE), 409, "conflict")
        assert (await api.chat(model=f"acme@{first[:12]}")).status_code == 200


async def test_files_of_any_version_come_back_as_they_were_sent(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.upload("acme")
        first = await digest(api, "acme")
        await api.upload("acme", seed=1, replace="true")
        for params, seed in (({}, 1), ({"version": first}, 0), ({"version": f"sha256:{first[:12]}"}, 0)):
            for name, data in adapter_files(seed).items():
                answer = await api.http.get(f"/v1/adapters/acme/files/{name}", params=params)
                assert answer.status_code == 200 and answer.content == data
                assert answer.headers["content-length"] == str(len(data))
                assert answer.headers["content-type"] == "application/octet-stream"


@pytest.mark.reliability("T6")
async def test_only_an_adapter_s_own_files_are_sent(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.upload("acme")
        place = api.context.registry.store.path(await digest(api, "acme"))
        (place / "secret").write_text("of the server")
        paths = ("secret", "adapter_model.bin", "%2e%2e%2fsecret", "..%2fadapter_config.json", "adapter_config.json%00")
        for file in paths:
            assert_error(await api.http.get(f"/v1/adapters/acme/files/{file}"), 404)
        url = "/v1/adapters/{}/files/adapter_config.json"
        for name in ("nobody", "acme@000000000000", "%2e%2e", BASE):
            assert_error(await api.http.get(url.format(name)), 404)
        assert_error(await api.http.get(url.format("acme"), params={"version": "0" * 64}), 404, "model_not_found")
        for version in ("", "..", "zz"):
            assert_error(await api.http.get(url.format("acme"), params={"version": version}), 400)
        (place / "adapter_config.json").unlink()
        assert_error(await api.http.get(url.format("acme")), 404, "not_found")


async def test_a_dry_run_only_reports(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        answer = await api.http.post("/v1/adapters?dry_run=true", data={"name": "acme"}, files=form())
        assert answer.status_code == 200 and answer.json()["dry_run"] is True
        assert answer.json()["report"]["applied"]["tensors"] == 8
        assert_error(await api.http.get("/v1/adapters/acme"), 404, "model_not_found")


async def test_an_unusable_adapter_lists_its_problems(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        config = json.loads(adapter_files()["adapter_config.json"]) | {"use_dora": True, "r": 999}
        files = form() | {"adapter_config.json": ("adapter_config.json", json.dumps(config).encode())}
        answer = await api.http.post("/v1/adapters", data={"name": "acme"}, files=files)
        problems = assert_error(answer, 422, "adapter_invalid")["problems"]
        assert problems and all(p.keys() == {"where", "found", "expected", "code"} for p in problems)
        assert staged(api) == []
        assert_error(await api.http.get("/v1/adapters/acme"), 404)


@pytest.mark.reliability("T6")
@pytest.mark.parametrize("name", BAD_NAMES)
async def test_names_that_are_no_names(tmp_path: Path, name: str) -> None:
    async with serving(tmp_path) as api:
        assert_error(await api.upload(name), 400)
        body = {"name": name, "source": "file:///nowhere"}
        assert_error(await api.http.post("/v1/adapters", json=body), 400)
        answer = await api.chat(model=name)
        assert_error(answer, 404 if name else 400)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


async def test_forms_that_are_no_upload(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        both = form()
        config = {"adapter_config.json": both["adapter_config.json"]}

        async def post(data: dict[str, Any], files: Any) -> httpx.Response:
            return await api.http.post("/v1/adapters", data=data, files=files)

        assert_error(await post({}, both), 400)
        assert_error(await post({"name": "acme"}, config), 400)
        assert_error(await post({"name": "acme", "replace": "perhaps"}, both), 400)
        assert_error(await post({"name": "x" * 2000}, both), 400)
        assert_error(await post({f"field{i}": "x" for i in range(9)}, both), 400)
        assert_error(await post({"name": "acme"}, both | {"evil": ("../../evil.py", b"x")}), 415)
        assert_error(await post({"name": "acme"}, {"adapter_model.bin": ("adapter_model.bin", b"x"), **config}), 415)
        assert_error(await post({"name": "acme"}, [*both.items(), *config.items()]), 400)
        for kind in ("multipart/form-data", "multipart/form-data; boundary=" + "x" * 300):
            headers = {"content-type": kind}
            assert_error(await api.http.post("/v1/adapters", content=b"xx", headers=headers), 400)
        assert_error(await api.http.post("/v1/adapters", content=b"x", headers={"content-type": "text/plain"}), 415)
        assert_error(await api.http.post("/v1/adapters"), 415)
        assert staged(api) == []


async def test_files_are_known_by_their_own_names_too(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        files = [("files", part) for part in form().values()]
        assert (await api.http.post("/v1/adapters", data={"name": "acme"}, files=files)).status_code == 201


@pytest.mark.reliability("T8")
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.99])
async def test_a_body_cut_short_leaves_nothing(tmp_path: Path, keep: float) -> None:
    async with serving(tmp_path) as api:
        request = api.http.build_request("POST", "/v1/adapters", data={"name": "acme"}, files=form())
        body = await request.aread()
        headers = {"content-type": request.headers["content-type"]}
        answer = await api.http.post("/v1/adapters", content=body[: int(len(body) * keep)], headers=headers)
        assert_error(answer, 400)
        assert staged(api) == []


def test_a_client_that_leaves_during_an_upload_leaves_nothing(tmp_path: Path) -> None:
    staging = tmp_path / "data" / "store" / ".staging"
    with listening(tmp_path) as server:
        for sent in (0, 100, 1000):
            host, port = server.url.removeprefix("http://").split(":")
            head = "POST /v1/adapters HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100000\r\n"
            head += "content-type: multipart/form-data; boundary=b\r\n\r\n"
            part = '--b\r\ncontent-disposition: form-data; name="adapter_config.json"; filename="x"\r\n\r\n'
            with socket.create_connection((host, int(port))) as client:
                client.sendall((head + part).encode()[: len(head) + sent] + b"x" * sent)
                wait_for(lambda: len(list(staging.iterdir())) == 1, "the beginning of the upload")
            wait_for(lambda: not list(staging.iterdir()), "the end of the upload")


async def test_a_late_failure_of_the_upload_keeps_what_was_there(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.upload("acme")
        before = await digest(api, "acme")
        files = form(1) | {"adapter_model.safetensors": ("adapter_model.safetensors", b"no tensors")}
        answer = await api.http.post("/v1/adapters", data={"name": "acme", "replace": "true"}, files=files)
        assert_error(answer, 422, "adapter_invalid")
        assert await digest(api, "acme") == before


async def test_register_from_a_source(tmp_path: Path) -> None:
    source = _folder(tmp_path / "allowed" / "acme")
    async with serving(tmp_path / "server", allow_source=(f"file://{tmp_path}/allowed",)) as api:
        post = lambda **body: api.http.post("/v1/adapters", json=body)  # noqa: E731
        created = await post(name="acme", source=f"file://{source}")
        assert created.status_code == 201 and created.json()["source"] == f"file://{source}"
        assert (await post(name="acme", source=f"file://{source}")).status_code == 200
        for path, status in ((f"{tmp_path}", 403), (f"{tmp_path}/allowed/../allowed/none", 404)):
            assert_error(await post(name="b", source=f"file://{path}"), status, sent=path)
        for source_elsewhere in ("http://169.254.169.254/", "hf://org/repo", "s3://bucket", "/etc", "nonsense"):
            assert_error(await post(name="b", source=source_elsewhere), 403)
        assert_error(await post(name="b"), 400)


async def test_register_lazily(tmp_path: Path) -> None:
    source = _folder(tmp_path / "allowed" / "acme")
    async with serving(tmp_path / "server", allow_source=(f"file://{tmp_path}/allowed",)) as api:
        body = {"name": "acme", "source": f"file://{source}", "lazy": True}
        pending = await api.http.post("/v1/adapters", json=body)
        assert pending.status_code == 202 and pending.json()["state"] == "registered"
        assert_error(await api.chat(model="acme"), 503, "adapter_loading")
        await asyncio.gather(*api.context.fetching.values())
        assert (await api.chat(model="acme")).status_code == 200

        body = {"name": "gone", "source": f"file://{tmp_path}/allowed/gone", "lazy": True}
        assert (await api.http.post("/v1/adapters", json=body)).status_code == 202
        await asyncio.gather(*api.context.fetching.values())
        failed = (await api.http.get("/v1/adapters/gone")).json()
        assert failed["state"] == "failed" and failed["error"]
        names = [r["name"] for r in (await api.http.get("/v1/adapters?state=failed")).json()["data"]]
        assert names == ["gone"]
        assert (await api.http.delete("/v1/adapters/gone")).status_code == 200
        assert_error(await api.http.get("/v1/adapters/gone"), 404)


def _folder(path: Path) -> Path:
    path.mkdir(parents=True)
    for name, data in adapter_files().items():
        (path / name).write_bytes(data)
    return path


async def test_list_with_pages_and_filters(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        for name in ("a", "b", "c"):
            await api.upload(name, seed={"a": 0, "b": 1, "c": 0}[name])

        async def names(query: str) -> tuple[list[str], bool]:
            page = (await api.http.get(f"/v1/adapters?{query}")).json()
            return [record["name"] for record in page["data"]], page["has_more"]

        assert await names("") == (["a", "b", "c"], False)
        assert await names("limit=2") == (["a", "b"], True)
        assert await names("limit=2&after=b") == (["c"], False)
        await api.http.post("/v1/adapters/b/load")
        assert await names("tier=device") == (["b"], False)
        assert await names("tier=disk&limit=1") == (["a"], True)
        assert await names("state=failed") == ([], False)
        for query in ("limit=0", "limit=x", "tier=moon", "state=", "limit=1001"):
            assert_error(await api.http.get(f"/v1/adapters?{query}"), 400)
        models = (await api.http.get("/v1/models")).json()["data"]
        assert [(m["id"], m["parent"]) for m in models] == [(BASE, None), ("a", BASE), ("b", BASE), ("c", BASE)]
        assert (await api.http.get("/v1/models/a")).json()["root"].startswith("a@")


async def test_load_unload_and_pin(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.upload("acme")
        post = lambda action, **body: api.http.post(f"/v1/adapters/acme/{action}", **body)  # noqa: E731
        assert (await post("load")).json()["tier"] == "device"
        assert (await post("unload")).json()["tier"] == "disk"
        assert (await post("load", json={"tier": "host"})).status_code == 200
        assert_error(await post("load", json={"tier": "moon"}), 400)
        assert (await post("pin")).json()["pinned"] is True
        assert api.engine.pinned == {await digest(api, "acme")}
        assert_error(await post("unload"), 409, "conflict")
        assert (await post("unpin")).json()["pinned"] is False
        assert api.engine.pinned == set()
        api.engine.refuse[await digest(api, "acme")] = ("no_room", "All slots are pinned.")
        assert_error(await post("pin"), 409, "conflict")
        assert (await api.http.get("/v1/adapters/acme")).json()["pinned"] is False
        for action in ("load", "unload", "pin", "unpin", "rollback"):
            assert_error(await api.http.post(f"/v1/adapters/nope/{action}"), 404, "model_not_found")


async def test_a_pin_that_cannot_move_along_is_given_up_and_said(tmp_path: Path) -> None:
    """The version that the name left behind is not kept pinned either."""
    async with serving(tmp_path) as api:
        await api.upload("acme", seed=2)
        second = await digest(api, "acme")
        await api.upload("acme", seed=1, replace="true", pinned="true")
        api.engine.refuse[second] = ("no_room", "All slots are in use.")
        assert_error(await api.upload("acme", seed=2, replace="true"), 409, "conflict")
        record = (await api.http.get("/v1/adapters/acme")).json()
        assert (record["version"], record["pinned"]) == (f"sha256:{second}", False)
        assert api.engine.pinned == set()


async def test_a_pinned_name_moves_on_though_its_old_version_has_the_last_pin(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.upload("acme", pinned="true")
        seen: list[set[str]] = []
        send = api.engine.send

        def watch(message: ToEngine) -> None:
            if isinstance(message, PinAdapter):
                seen.append({*api.engine.pinned})
            send(message)

        api.engine.send = watch  # type: ignore[method-assign]
        assert (await api.upload("acme", seed=1, replace="true")).status_code == 201
        assert seen == [set()]  # the old one had let go
        assert api.engine.pinned == {await digest(api, "acme")}


async def test_a_pin_goes_with_its_name_though_another_has_the_same_version(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.upload("acme", pinned="true")
        await api.upload("other")
        shared = await digest(api, "other")
        assert api.engine.pinned == {shared}
        await api.http.delete("/v1/adapters/acme")
        assert api.engine.pinned == set()
        assert shared in api.engine.device
        await api.http.post("/v1/adapters/other/pin")
        assert api.engine.pinned == {shared}


async def test_unload_in_use_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.upload("acme")
        api.waits_after(1)
        running = asyncio.create_task(api.chat(model="acme"))
        await eventually(lambda: api.context.in_flight.count("acme"))
        assert (await api.http.get("/v1/adapters/acme")).json()["in_flight"] == 1
        assert_error(await api.http.post("/v1/adapters/acme/unload"), 409, "conflict")
        api.goes_on()
        assert (await running).status_code == 200


async def test_an_adapter_whose_files_are_damaged(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.upload("acme")
        api.context.registry.damaged["acme"] = "The stored files are gone."
        record = (await api.http.get("/v1/adapters/acme")).json()
        assert record["state"] == "failed" and record["error"] == "The stored files are gone."
        assert [model["id"] for model in (await api.http.get("/v1/models")).json()["data"]] == [BASE]


async def test_versions_and_rollback(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.upload("acme", pinned="true")
        first = await digest(api, "acme")
        assert_error(await api.http.post("/v1/adapters/acme/rollback"), 409, "conflict")
        await api.upload("acme", seed=1, replace="true")
        second = await digest(api, "acme")
        assert api.engine.pinned == {second}  # the pin is the name's
        versions = (await api.http.get("/v1/adapters/acme/versions")).json()["data"]
        assert [(v["version"], v["current"]) for v in versions] == [
            (f"sha256:{second}", True),
            (f"sha256:{first}", False),
        ]
        assert (await api.http.post("/v1/adapters/acme/rollback")).json()["version"] == f"sha256:{first}"
        assert api.engine.pinned == {first}
        back = await api.http.post("/v1/adapters/acme/rollback", json={"version": second[:12]})
        assert back.json()["version"] == f"sha256:{second}"
        unknown = await api.http.post("/v1/adapters/acme/rollback", json={"version": "0" * 12})
        assert_error(unknown, 404, "model_not_found")
        assert_error(await api.http.post("/v1/adapters/acme/rollback", json={"version": "xyz"}), 400)


@pytest.mark.reliability("T57")
async def test_running_requests_finish_on_the_version_they_began_with(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.upload("acme")
        first = await digest(api, "acme")
        api.waits_after(1)
        running = asyncio.create_task(api.chat(model="acme"))
        await eventually(lambda: api.context.in_flight.count("acme"))
        await api.upload("acme", seed=1, replace="true")
        api.goes_on()
        assert (await running).json()["system_fingerprint"].endswith(first[:12])
        later = (await api.chat(model="acme")).json()
        assert later["system_fingerprint"].endswith((await digest(api, "acme"))[:12])


@pytest.mark.reliability("T41")
async def test_delete_drains_then_aborts(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.upload("acme")
        version = await digest(api, "acme")
        await api.http.post("/v1/adapters/acme/load")
        api.waits_after(1)
        stuck = asyncio.create_task(api.chat(model="acme", seed=1, stream=True))
        finishing = asyncio.create_task(api.chat(model="acme"))
        base = asyncio.create_task(api.chat())
        await eventually(lambda: api.generated == 3)
        deleting = asyncio.create_task(api.http.delete("/v1/adapters/acme?drain_timeout=3600"))
        await eventually(lambda: "acme" not in api.context.registry)
        assert_error(await api.chat(model="acme"), 404, "model_not_found")
        api.engine.waits_after = lambda submit: 1 if submit.sampling.seed else math.inf
        await asyncio.gather(finishing, base)
        assert not deleting.done()
        leap(3600)
        assert (await deleting).json() == {"name": "acme", "deleted": True, "drained": 1, "aborted": 1}
        assert (await finishing).status_code == 200 and (await base).status_code == 200
        assert events(await stuck)[-1]["error"]["code"] == "model_not_found"
        assert version not in api.engine.device
        assert version not in api.context.registry.store
        assert_error(await api.http.delete("/v1/adapters/acme"), 404, "model_not_found")
        assert (await api.upload("acme")).status_code == 201


@pytest.mark.reliability("T41")
async def test_delete_keeps_what_another_name_shares(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.upload("a")
        await api.upload("b")
        await api.http.post("/v1/adapters/a/load")
        version = await digest(api, "a")
        assert (await api.http.delete("/v1/adapters/a")).status_code == 200
        assert version in api.engine.device and version in api.context.registry.store
        assert (await api.chat(model="b")).status_code == 200


async def test_vllm_routes(tmp_path: Path) -> None:
    source = _folder(tmp_path / "allowed" / "my acme")
    async with serving(tmp_path / "server", allow_source=(f"file://{tmp_path}/allowed",)) as api:

        async def load(**body: Any) -> httpx.Response:
            return await api.http.post("/v1/load_lora_adapter", json=body)

        loaded = await load(lora_name="acme", lora_path=str(source))
        assert loaded.status_code == 200 and loaded.headers["content-type"].startswith("text/plain")
        assert loaded.text == "Success: LoRA adapter 'acme' added successfully."
        assert_error(await load(lora_name="acme", lora_path=str(source)), 400)
        assert (await load(lora_name="acme", lora_path=str(source), load_inplace=True)).status_code == 200
        refused = assert_error(await load(lora_name="b", lora_path="/etc"), 403, "source_not_allowed")
        assert "--allow-source" in refused["message"]
        assert_error(await load(lora_name="b", lora_path=f"{tmp_path}/allowed/" + "ä" * 1000), 400)  # as a URL too long
        missing = f"{tmp_path}/allowed/none"
        assert_error(await load(lora_name="b", lora_path=missing), 404, sent=missing)
        assert_error(await load(lora_name="b", lora_path="none"), 403, "source_not_allowed")
        assert_error(await load(lora_name="b"), 400)
        unload = lambda name: api.http.post("/v1/unload_lora_adapter", json={"lora_name": name})  # noqa: E731
        assert (await unload("acme")).text == "Success: LoRA adapter 'acme' removed successfully."
        assert_error(await unload("acme"), 404, "model_not_found")


async def test_the_vllm_route_takes_relative_and_home_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _folder(tmp_path / "allowed" / "acme")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    async with serving(tmp_path / "server", allow_source=(f"file://{tmp_path}/allowed", "hf://org")) as api:

        async def load(name: str, path: str) -> httpx.Response:
            return await api.http.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path})

        for number, path in enumerate(("allowed/acme", "./allowed/acme", "~/allowed/acme", "acme")):
            assert (await load(f"org/n{number}", path)).status_code == 200, path
        for path in ("../x", "server", "~/server", "~nobody-here/x", "other/repo", "a\0b", "~"):
            refused = assert_error(await load("b", path), 403, "source_not_allowed")
            assert "--allow-source" in refused["message"]
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert (await load("b", "org/repo")).json()["error"]["code"] != "source_not_allowed"


async def test_names_with_slashes_have_every_route(tmp_path: Path) -> None:
    name = "Acme/Support:v2"
    async with serving(tmp_path) as api:
        assert (await api.upload(name)).status_code == 201
        assert (await api.upload("Acme", seed=1)).status_code == 201
        version = await digest(api, name)
        for path in (name, "Acme%2FSupport%3Av2"):
            at = f"/v1/adapters/{path}"
            assert (await api.http.get(at)).json()["name"] == name
            assert (await api.http.get(f"/v1/models/{path}")).json()["id"] == name
            assert (await api.http.get(f"{at}/versions")).json()["data"][0]["version"] == f"sha256:{version}"
            for action in ("load", "pin", "unpin", "unload"):
                assert (await api.http.post(f"{at}/{action}")).json()["name"] == name
            assert_error(await api.http.post(f"{at}/rollback"), 409, "conflict")
            assert (await api.http.get(f"{at}/files/adapter_config.json")).status_code == 200
        assert_error(await api.http.get("/v1/adapters/Acme/Support:v2/load"), 405)
        assert_error(await api.http.get("/v1/adapters/acme/support:v2"), 404, "model_not_found")
        for wrong in ("Acme//Support:v2", "Acme/../Acme"):
            assert (await api.http.get(f"/v1/adapters/{wrong.replace('..', '%2e%2e')}")).status_code == 404
        assert (await api.chat(model=name)).json()["model"] == name
        assert (await api.chat(model=f"{name}@{version}")).status_code == 200
        assert (await api.http.delete(f"/v1/adapters/{name}")).json()["name"] == name
        assert (await api.http.get("/v1/adapters/Acme")).status_code == 200


async def test_the_words_of_routes_are_those_that_names_avoid(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        paths = {
            path.split("}/")[1].split("/")[0]
            for path in api.app.openapi()["paths"]
            if "adapters/{" in path and "}/" in path
        }
        assert paths == set(ROUTE_WORDS)


@pytest.mark.reliability("T12")
async def test_concurrent_uploads_of_one_name_have_one_winner(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        answers = await asyncio.gather(*(api.upload("acme", seed=i % 2) for i in range(8)))
        statuses = sorted(answer.status_code for answer in answers)
        assert statuses == [200] * 3 + [201] + [409] * 4
