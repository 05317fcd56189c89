"""Tokenizers that would stall or break the API's process, and adapters whose numbers are not finite, over the API."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend

from server.api.text.tokenizer import Tokenizer
from server.quarantine import LIMIT
from tests.fixtures.api_server import BASE, Api, assert_error, events, serving
from tests.test_adapter_tokenizers import publish, widen
from tests.test_tokenizer_parts import EVIL, GROWS, made, sequence

ATTACKS = {
    "normalizer": made(normalizer=sequence("normalizers", *[GROWS] * 9)),
    "decoder": made(decoder=sequence("decoders", *[GROWS] * 7)),
    "pre_tokenizer": made(pre_tokenizer=EVIL),
}


@pytest.mark.reliability("T24")
@pytest.mark.parametrize("kind", ATTACKS)
async def test_an_attack_is_refused_by_name_at_upload(kind: str, tmp_path: Path) -> None:
    files = {"tokenizer.json": json.dumps(ATTACKS[kind]).encode(), "tokenizer_config.json": b"{}"}
    async with serving(tmp_path) as api:
        error = assert_error(await api.upload("bad", beside=files), 422, "adapter_invalid")
        (problem,) = error["problems"]
        assert problem["where"] == f"tokenizer.json: {kind}" and problem["code"] == "unsupported_feature"
        assert_error(await api.chat(model="bad"), 404, "model_not_found")


async def test_one_that_an_earlier_version_stored_is_refused_at_its_use(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        widen(api)
        digest = await publish(api, "acme", "<tool>")
        stored = api.context.registry.store.path(digest) / "tokenizer.json"
        stored.chmod(0o600)
        given = json.loads(stored.read_text())
        stored.write_text(json.dumps({**given, "pre_tokenizer": EVIL}))
        for answer in (await api.chat(model="acme"), await api.chat(model="acme", stream=True)):
            assert "pre_tokenizer" in assert_error(answer, 503, "adapter_failed")["message"]
        answer = await api.http.post("/tokenize", json={"model": "acme", "prompt": "a"})
        assert_error(answer, 503, "adapter_failed")
        assert (await api.chat()).status_code == 200


def panicking() -> Tokenizer:
    """A tokenizer whose expression makes the library panic."""
    return Tokenizer(Backend.from_str(json.dumps(made(pre_tokenizer=EVIL))), None, {}, ())


PANIC = "a" * 34 + "!"


async def test_a_panic_is_the_requests_error(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        api.context.base_tokenizer, sound = panicking(), api.context.base_tokenizer
        assert_error(await api.complete(PANIC), 400)
        api.context.base_tokenizer = sound
        assert (await api.complete("hi")).status_code == 200


@pytest.mark.reliability("T24")
async def test_a_panic_anywhere_becomes_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(tmp_path) as api:

        def panic(*_: Any) -> None:
            panicking().backend.encode(PANIC)

        monkeypatch.setattr("server.api.inference.admission.resolve_target", panic)
        with caplog.at_level(logging.ERROR):
            assert_error(await api.complete("hi"), 500)
        assert "PanicException" in caplog.text
        monkeypatch.undo()
        assert (await api.complete("hi")).status_code == 200


def nonfinite(api: Api, *, after: int | None = 0) -> None:
    api.engine.fail_after, api.engine.failure_reason = after, "nonfinite"
    api.engine.failure = "the model produced numbers that are not finite"


@pytest.mark.reliability("T58")
async def test_an_adapter_that_is_not_finite_is_put_aside_until_it_is_loaded(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.upload("acme")
        await api.upload("other", 1)
        api.context.registry.split("prod", {"acme": 1})
        nonfinite(api)
        for _ in range(LIMIT):
            assert_error(await api.chat(model="acme"), 500, "engine_error")
        submitted = len(api.engine.submitted)
        assert "not finite" in assert_error(await api.chat(model="acme"), 503, "adapter_failed")["message"]
        assert_error(await api.chat(adapters=[{"name": "acme"}, {"name": "other"}]), 503, "adapter_failed")
        assert "acme" not in assert_error(await api.chat(model="prod"), 503, "adapter_failed")["message"]
        assert len(api.engine.submitted) == submitted
        shown = (await api.http.get("/v1/adapters/acme")).json()
        assert shown["state"] == "failed" and "not finite" in shown["error"]
        nonfinite(api, after=None)
        assert (await api.chat(model="other")).status_code == 200
        assert (await api.http.post("/v1/adapters/acme/load")).json()["state"] == "ready"
        assert (await api.chat(model="acme")).status_code == 200


async def test_an_upload_of_it_tries_again_as_well(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.upload("acme")
        nonfinite(api)
        for _ in range(LIMIT):
            await api.chat(model="acme")
        nonfinite(api, after=None)
        assert_error(await api.chat(model="acme"), 503, "adapter_failed")
        await api.upload("acme")
        assert (await api.chat(model="acme")).status_code == 200


async def test_only_failures_in_a_row_count_and_never_the_bases(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.upload("acme")
        for _ in range(LIMIT):
            for _ in range(LIMIT - 1):
                nonfinite(api)
                assert_error(await api.chat(model="acme"), 500, "engine_error")
                assert_error(await api.chat(model=BASE), 500, "engine_error")
            nonfinite(api, after=None)
            assert (await api.chat(model="acme")).status_code == 200
        assert not api.context.quarantine.reasons


async def test_a_scale_that_overflows_is_the_clients_error(tmp_path: Path) -> None:
    async with serving(tmp_path) as api:
        await api.upload("acme")
        await api.upload("other", 1)
        nonfinite(api)
        both = [{"name": "acme", "scale": 1}, {"name": "other", "scale": -50}]
        for _ in range(LIMIT + 1):
            error = assert_error(await api.chat(model="acme", adapter_scale=100), 422, "scales_overflow")
            assert error["param"] == "adapter_scale" and "100" in error["message"]
            assert assert_error(await api.chat(adapters=both), 422, "scales_overflow")["param"] == "adapters"
        assert_error(await api.chat(model="acme", adapter_scale=1e30), 400)
        nonfinite(api, after=2)
        ending = events(await api.chat(model="acme", adapter_scale=100, stream=True))[-1]
        assert ending["error"]["code"] == "scales_overflow"
        nonfinite(api, after=None)
        assert (await api.chat(model="acme")).status_code == 200
