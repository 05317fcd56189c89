"""A sequence has the same tokens and the same log-probabilities, to the bit, whatever is computed beside it."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.device.forms import NONE
from tests.fixtures.adapter_factory import tiny_llama, write_adapter
from tests.fixtures.engine_driver import Driver, make_driver
from tests.fixtures.native_forms import form_or_none

__all__ = ["form_or_none"]
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
