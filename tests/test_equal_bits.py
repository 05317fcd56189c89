"""A sequence has the same tokens and the same log-probabilities, to the bit, whatever is computed beside it."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest
from peft import IA3Config

from adapters.device.forms import NONE
from tests.fixtures.adapter_factory import tiny_llama, write_adapter, write_peft_adapter
from tests.fixtures.engine_driver import MIB, Driver, make_driver
from tests.fixtures.native_forms import form, form_or_none

__all__ = ["form", "form_or_none"]
WIDE = {"hidden_size": 288, "intermediate_size": 768}  # wide enough for a library to change its kernel with the rows
PROMPT = [*range(5, 75)]


@pytest.fixture
def drivers(form_or_none: str, tmp_path: Path) -> Iterator[tuple[Driver, Driver, list[str | None]]]:
    """Two engines in bf16 that cut prompts differently, and what may be served on this form: the base, and adapters."""
    model = tiny_llama(**WIDE)
    copy.deepcopy(model).bfloat16().save_pretrained(tmp_path / "model")  # type: ignore[operator]
    adapter = write_adapter(model, tmp_path / "adapter", r=16, scale=0.3, target_modules="all-linear")
    made = [
        make_driver(tmp_path / "model", tmp_path / str(budget), dtype="bfloat16", max_batch_tokens=budget)
        for budget in (512, 48)
    ]
    digests = {driver.add_adapter(adapter) for driver in made}
    yield made[0], made[1], [None] if form_or_none == NONE else [None, *digests]
    for driver in made:
        driver.engine.close()


def sampled(driver: Driver, name: str, digest: str | None) -> list[object]:
    """Tokens and log-probabilities of one sequence beside whatever else has been submitted."""
    driver.submit(name, PROMPT, digest, max_tokens=12, temperature=1.0, seed=42, logprobs=3)
    driver.run()
    return [(output.token_ids, output.logprobs) for output in driver.outputs[name]]


@pytest.mark.reliability("T55")
def test_a_seeded_sequence_is_the_same_alone_and_beside_others(
    drivers: tuple[Driver, Driver, list[str | None]],
) -> None:
    driver, _, served = drivers
    for digest in served:
        alone = sampled(driver, f"alone {digest}", digest)
        for neighbours in (1, 6):
            for i in range(neighbours):
                driver.submit(
                    f"{digest} {neighbours} {i}", [3 + i] * (9 + 5 * i), served[i % len(served)], max_tokens=20
                )
            assert sampled(driver, f"beside {neighbours} {digest}", digest) == alone


def test_a_seeded_sequence_is_the_same_however_its_prompt_is_cut(
    drivers: tuple[Driver, Driver, list[str | None]],
) -> None:
    whole, cut, served = drivers
    for digest in served:
        if digest is None and len(served) == 1:
            pytest.skip("without native code attention is torch's, whose sums follow the length of a chunk")
        assert sampled(whole, f"whole {digest}", digest) == sampled(cut, f"cut {digest}", digest)


# -- random histories -------------------------------------------------------------------------------------------------

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Request = tuple[list[int], str | None, dict[str, Any]]  # prompt, adapter version, sampling


@dataclass
class World:
    """`alone` computes every request by itself; `crowd` cuts prompts small, has two slots for four adapters and little
    memory for keys and values."""

    alone: Driver
    crowd: Driver
    digests: list[str | None]
    preempted: int = 0

    def random_request(self, random: Random) -> Request:
        """Prompts share prefixes, which the cache may then have."""
        prompt = [*range(5, 5 + random.choice([3, 16, 40, 64])), *(random.randrange(90) for _ in range(4))]
        seeded = {"temperature": 1.0, "top_p": 0.9, "seed": random.randrange(1000)}
        sampling = {"logprobs": 2, "max_tokens": random.randrange(1, 14), **random.choice([{}, seeded])}
        return prompt, random.choice(self.digests), sampling

    def disturb(self, random: Random) -> None:
        """Do what may happen to a sequence between two steps."""
        scheduler = self.crowd.engine.scheduler
        if scheduler.running and random.random() < 0.2:
            scheduler.requeue(random.choice(scheduler.running))
            self.preempted += 1
        if random.random() < 0.05:
            scheduler.blocks.forget_prefixes()


@pytest.fixture
def world(form: str, tmp_path: Path) -> Iterator[World]:
    model = tiny_llama(**WIDE)
    copy.deepcopy(model).bfloat16().save_pretrained(tmp_path / "model")  # type: ignore[operator]
    ia3 = IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"])
    folders = [
        write_adapter(model, tmp_path / "wide", r=16, scale=0.3, target_modules=LINEARS),
        write_adapter(model, tmp_path / "narrow", r=3, scale=0.3, seed=1),
        write_adapter(model, tmp_path / "dora", r=8, scale=0.1, seed=2, target_modules=LINEARS, use_dora=True),
        write_peft_adapter(model, tmp_path / "ia3", ia3, seed=3),
    ]
    made = [
        make_driver(tmp_path / "model", tmp_path / "alone", dtype="bfloat16"),
        make_driver(
            tmp_path / "model", tmp_path / "crowd", dtype="bfloat16", adapter_slots=2, max_batch_tokens=40,
            kv_cache_bytes=MIB // 2, max_num_seqs=5,
        ),
    ]  # fmt: skip
    digests = [{driver.add_adapter(folder) for driver in made}.pop() for folder in folders]
    yield World(*made, [None, *digests])
    for driver in made:
        driver.engine.close()


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 8))])
def test_no_history_changes_a_bit(world: World, seed: int) -> None:
    """Neither neighbours, chunks, cached prefixes, preemptions nor evicted adapters do: a token that was decoded is
    computed in a chunk after a preemption."""
    random = Random(seed)
    requests = [world.random_request(random) for _ in range(24)]
    for number, (prompt, digest, sampling) in enumerate(requests):
        world.alone.engine.scheduler.blocks.forget_prefixes()
        world.alone.submit(f"{number}", prompt, digest, **sampling)
        world.alone.run()
    waiting = list(enumerate(requests))
    while waiting or world.crowd.engine.has_work():
        if waiting and random.random() < 0.4:
            number, (prompt, digest, sampling) = waiting.pop(0)
            world.crowd.submit(f"{number}", prompt, digest, **sampling)
        world.disturb(random)
        world.crowd.step()
    assert world.preempted > 5
    for number in range(len(requests)):
        assert numbers(world.crowd, f"{number}") == numbers(world.alone, f"{number}"), requests[number]


def numbers(driver: Driver, name: str) -> list[object]:
    return [(output.token_ids, output.logprobs) for output in driver.outputs[name] if output.token_ids]
