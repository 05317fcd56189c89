"""Limits of keys and adapters: what is refused, when to come back, and that coming back then works."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from server.api.errors import ApiError
from server.api.middleware.auth import KeyRing
from server.api.middleware.rate_limits import Bucket, Lease, Limits, RateLimits
from tests.fixtures.api_server import BASE, Api, assert_error, secret, serving
from tests.fixtures.timing import Clock, eventually
from tests.test_auth import bearer, ring


@pytest.fixture
def clock() -> Clock:
    return Clock()


@asynccontextmanager
async def standing_still(folder: Path, **settings: Any) -> AsyncIterator[Api]:
    """The API, with limits whose clock does not move: what is used up stays so."""
    async with serving(folder, **settings) as api:
        api.context.rate_limits._clock = Clock()
        yield api


def begin(rates: RateLimits, limits: Limits, *adapters: str, tokens: int = 1, key: str = "k") -> Lease:
    return rates.begin_request(key, limits, adapters, tokens)


def refused(rates: RateLimits, limits: Limits, *adapters: str, tokens: int = 1, key: str = "k") -> tuple[int, str]:
    """The seconds of `Retry-After` and the message."""
    with pytest.raises(ApiError) as error:
        rates.begin_request(key, limits, adapters, tokens)
    assert error.value.status_code == 429 and error.value.code == "rate_limit_exceeded"
    assert error.value.headers is not None
    return int(error.value.headers["retry-after"]), str(error.value.detail)


def test_a_bucket_holds_a_minute_and_fills_steadily(clock: Clock) -> None:
    bucket = Bucket(60, clock)
    clock.now += 1000
    bucket.take(60)
    assert bucket.wait(1) == pytest.approx(1)
    assert bucket.wait(30) == pytest.approx(30)
    clock.now += 12.5
    assert bucket.wait(12) == 0
    assert bucket.wait(13) == pytest.approx(0.5)


def test_what_is_larger_than_the_bucket_goes_when_it_is_full_and_is_paid_back(clock: Clock) -> None:
    bucket = Bucket(60, clock)
    assert bucket.wait(600) == 0
    bucket.take(600)
    assert bucket.wait(1) == pytest.approx(541)
    assert bucket.wait(600) == pytest.approx(600)


def test_no_limits_refuse_nothing_and_keep_nothing(clock: Clock) -> None:
    rates = RateLimits(Limits(), clock)
    for _ in range(1000):
        begin(rates, Limits(), "a", tokens=10_000)
    assert not rates._keys and not rates._adapters


def test_requests_at_once(clock: Clock) -> None:
    rates, limits = RateLimits(Limits(), clock), Limits(max_concurrent=2)
    first, _ = begin(rates, limits), begin(rates, limits)
    seconds, message = refused(rates, limits)
    assert seconds == 1 and "2 concurrent requests" in message and "this key" in message
    first.close()
    first.close()
    begin(rates, limits)
    refused(rates, limits)
    begin(rates, limits, key="another")


def test_requests_per_minute(clock: Clock) -> None:
    rates, limits = RateLimits(Limits(), clock), Limits(requests_per_minute=4)
    for _ in range(4):
        begin(rates, limits).close()
    assert refused(rates, limits)[0] == 15
    clock.now += 14.9
    assert refused(rates, limits)[0] == 1
    clock.now += 0.1
    begin(rates, limits)


def test_tokens_per_minute_count_prompt_and_answer(clock: Clock) -> None:
    rates, limits = RateLimits(Limits(), clock), Limits(tokens_per_minute=600)
    lease = begin(rates, limits, tokens=500)
    begin(rates, limits, tokens=100)
    lease.generated(50)
    assert refused(rates, limits, tokens=10)[0] == 6
    lease.generated(100)
    assert refused(rates, limits, tokens=10)[0] == 16


def test_the_reason_that_lasts_longest_is_given(clock: Clock) -> None:
    rates = RateLimits(Limits(tokens_per_minute=60), clock)
    begin(rates, Limits(max_concurrent=1), "a", tokens=90)
    seconds, message = refused(rates, Limits(max_concurrent=1), "a")
    assert seconds == 31 and "60 tokens per minute" in message and "the requested adapter" in message


def test_each_adapter_and_the_key_have_their_own_and_a_refusal_takes_from_none(clock: Clock) -> None:
    rates, limits = RateLimits(Limits(requests_per_minute=2), clock), Limits(requests_per_minute=4)
    begin(rates, limits, "a")
    begin(rates, limits, "a", "b")
    for _ in range(10):
        refused(rates, limits, "a", "b")
    begin(rates, limits, "b")
    refused(rates, limits, "b")
    begin(rates, limits)
    assert "this key" in refused(rates, limits)[1]


def test_a_deleted_adapter_leaves_nothing_and_what_runs_for_it_may_end(clock: Clock) -> None:
    rates = RateLimits(Limits(max_concurrent=1), clock)
    lease = begin(rates, Limits(), "a")
    rates.forget("a")
    rates.forget("never heard of")
    lease.generated(5)
    lease.close()
    assert not rates._adapters


@pytest.mark.reliability("T36")
@pytest.mark.parametrize("seed", range(10))
def test_coming_back_when_told_to_works_and_coming_earlier_does_not(seed: int, clock: Clock) -> None:
    """Unless others use it up meanwhile. `Retry-After` is in whole seconds: at most one too long."""
    chance = random.Random(seed)
    rates = RateLimits(Limits(tokens_per_minute=chance.randint(1, 5000)), clock)
    limits = Limits(requests_per_minute=chance.randint(1, 100), tokens_per_minute=chance.randint(1, 5000))
    for _ in range(200):
        tokens = chance.randint(1, 6000)
        try:
            lease = begin(rates, limits, "a", tokens=tokens)
        except ApiError:
            seconds, _ = refused(rates, limits, "a", tokens=tokens)
            arrived = clock.now
            clock.now = arrived + seconds - 1.001
            if clock.now > arrived:
                refused(rates, limits, "a", tokens=tokens)
            clock.now = arrived + seconds
            lease = begin(rates, limits, "a", tokens=tokens)
        lease.generated(chance.randint(0, 100))
        lease.close()
        clock.now += chance.random() * 3


def limited(folder: Path, **limits: int) -> KeyRing:
    lines = [f"{name} = {value}" for name, value in limits.items()]
    text = "\n".join(
        ["[[keys]]", "name = 'a'", f"key = '{secret('x')}'", *lines, "[[keys]]", "name = 'b'", f"key = '{secret('y')}'"]
    )
    return ring(folder, text)


@pytest.mark.reliability("T36")
async def test_a_key_at_its_limit_gets_429_and_others_do_not(tmp_path: Path) -> None:
    async with standing_still(tmp_path, keys=limited(tmp_path, requests_per_minute=2)) as api:
        api.http.headers.update(bearer(secret("x")))
        for request in (api.chat, api.complete):
            assert (await request()).status_code == 200
        for request in (api.chat, api.complete):
            answer = await request(stream=True)
            error = assert_error(answer, 429, "rate_limit_exceeded")
            assert error["type"] == "rate_limit_exceeded" and answer.headers["retry-after"] == "30"
        assert len(api.engine.submitted) == 2
        assert (await api.http.get("/v1/models")).status_code == 200
        api.http.headers.update(bearer(secret("y")))
        assert (await api.chat()).status_code == 200


async def test_requests_that_end_in_any_way_give_their_place_back(tmp_path: Path) -> None:
    async with serving(tmp_path, keys=limited(tmp_path, max_concurrent=1)) as api:
        api.http.headers.update(bearer(secret("x")))
        assert (await api.chat(n=3)).status_code == 200  # one request, whatever it asks for
        assert (await api.chat(stream=True)).status_code == 200
        assert (await api.chat(model="nope")).status_code == 404
        assert (await api.chat(max_tokens=10_000)).status_code == 400
        api.engine.fail_after = 1
        assert (await api.chat()).status_code == 500
        api.engine.fail_after = None
        api.waits_after(1)
        running = asyncio.create_task(api.chat())
        await eventually(lambda: len(api.context.in_flight))
        assert_error(await api.chat(), 429)
        api.goes_on()
        assert (await running).status_code == 200
        api.waits_after(1)
        running = asyncio.create_task(api.chat())
        await eventually(lambda: len(api.context.in_flight))
        api.goes_on()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert (await api.chat()).status_code == 200


async def test_answers_use_up_tokens(tmp_path: Path) -> None:
    async with standing_still(tmp_path, keys=limited(tmp_path, tokens_per_minute=30)) as api:
        api.http.headers.update(bearer(secret("x")))
        used = (await api.complete("abcdefgh")).json()["usage"]["total_tokens"]
        answer = await api.complete("abcdefghijklmnop")
        assert_error(answer, 429)
        missing = used + 16 - 30
        assert int(answer.headers["retry-after"]) == missing * 2


async def test_adapters_have_their_own_limits_and_the_base_has_none(tmp_path: Path) -> None:
    async with standing_still(tmp_path, adapter_rpm=1) as api:
        for name, seed in (("acme", 0), ("beta", 1)):
            await api.upload(name, seed=seed)
            assert (await api.chat(model=name)).status_code == 200
        answer = await api.chat(model="acme")
        message = assert_error(answer, 429)["message"]
        assert "requested adapter" in message and "acme" not in message  # it may be an alias's hidden member
        assert answer.headers["retry-after"] == "60"
        composed = await api.chat(adapters=[{"name": "beta"}])
        assert "requested adapter" in assert_error(composed, 429)["message"]
        for _ in range(3):
            assert (await api.chat(model=BASE)).status_code == 200
        metrics = (await api.http.get("/metrics")).text
        assert 'adapter="acme",route="/v1/chat/completions",status="429"' in metrics
        await api.http.delete("/v1/adapters/acme")
        await api.upload("acme")
        assert (await api.chat(model="acme")).status_code == 200


@pytest.mark.parametrize("line", ["max_concurrent = 0", "requests_per_minute = -1", "tokens_per_minute = 1.5"])
def test_limits_that_cannot_be_meant(tmp_path: Path, line: str) -> None:
    from server.config import ConfigError

    with pytest.raises(ConfigError):
        ring(tmp_path, f"[[keys]]\nname = 'a'\nkey = '{secret('x')}'\n{line}")


@pytest.mark.reliability("T36")
async def test_refused_requests_count_and_429_do_not(tmp_path: Path) -> None:
    async with standing_still(tmp_path, keys=limited(tmp_path, requests_per_minute=3)) as api:
        api.http.headers.update(bearer(secret("x")))
        assert_error(await api.chat(model="nope"), 404)
        assert_error(await api.http.post("/v1/completions", json={"model": 1}), 400)
        assert (await api.chat()).status_code == 200
        for _ in range(3):
            answer = await api.http.post("/v1/completions", content=b"not read", headers={"content-type": "text/plain"})
            assert_error(answer, 429, "rate_limit_exceeded")
            assert answer.headers["retry-after"] == "20"
        assert (await api.http.get("/v1/models")).status_code == 200
