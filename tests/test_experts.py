"""LoRA on stacked experts, gathered: equal to experts with the factors added, in the memory of the factors alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AriaTextConfig, GptOssConfig, MixtralConfig, MixtralForCausalLM, NemotronHConfig
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from adapters.kernels.segments import SlotRows
from adapters.runtime import experts as gathered
from adapters.runtime.experts import ExpertFactors, experts_forward, is_gathered
from adapters.runtime.low_rank_weight import LowRankParameters, LowRankWeight, is_low_rank
from adapters.weights import LoraFactors
from tests.fixtures.adapter_factory import write_adapter, write_earlier_adapter
from tests.fixtures.engine_driver import Driver, make_driver

EXPERTS, HIDDEN, INNER, TOP_K, RANK = 5, 32, 24, 2, 3
SIZES = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": 4, "num_key_value_heads": 2}
COUNTS = {"num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K}
KINDS: dict[str, Any] = {
    "gate and up side by side": lambda: MixtralExperts(MixtralConfig(**SIZES, **COUNTS)),
    "transposed, interleaved, with biases": lambda: GptOssExperts(GptOssConfig(**SIZES, **COUNTS)),
    "transposed": lambda: AriaExperts(AriaTextConfig(**SIZES, moe_num_experts=EXPERTS, moe_topk=TOP_K)),
    "without a gate": lambda: NemotronHExperts(
        NemotronHConfig(hidden_size=HIDDEN, moe_intermediate_size=INNER, n_routed_experts=EXPERTS, num_hidden_layers=1)
    ),
}


def made(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    module = KINDS[kind]().to(dtype).eval().requires_grad_(False)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    module.config._experts_implementation = "grouped_mm"
    return module


def routing(rows: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, HIDDEN, generator=generator)
    index = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in range(rows)])
    return x, index, torch.rand(rows, TOP_K, generator=generator)


def factors(module: Any, seed: int, *names: str) -> dict[str, LoraFactors]:
    """Random factors in PEFT's layout."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name in names:
        _, outputs, inputs = getattr(module, name).shape
        if module.is_transposed:
            outputs, inputs = inputs, outputs
        a = torch.randn(EXPERTS * RANK, inputs, generator=generator)
        found[name] = LoraFactors(a, 0.3 * torch.randn(outputs, RANK * EXPERTS, generator=generator), 0.7)
    return found


def added(module: Any, own: dict[str, LoraFactors]) -> Any:
    """The module with the factors added to its parameters, one expert after the other."""
    clone = type(module).__new__(type(module))
    vars(clone).update({**vars(module), "_parameters": dict(module._parameters)})
    for name, lora in own.items():
        weight = getattr(module, name).clone()
        for expert in range(EXPERTS):
            delta = lora.scaling * lora.b[:, expert::EXPERTS] @ lora.a[expert * RANK : (expert + 1) * RANK]
            weight[expert] += delta.T if module.is_transposed else delta
        clone._parameters[name] = nn.Parameter(weight, requires_grad=False)
    return clone


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_takes_the_factors_of_its_own_adapter(kind: str) -> None:
    module, (x, index, weights) = made(kind), routing(11)
    up = "gate_up_proj" if module.has_gate else "up_proj"
    adapters = [factors(module, 2, up, "down_proj"), factors(module, 3, "down_proj"), factors(module, 4, up)]
    rows = [SlotRows(0, 1, 4), SlotRows(1, 4, 5), SlotRows(2, 7, 11)]
    owned = [(r, ExpertFactors(EXPERTS, own, torch.float32)) for r, own in zip(rows, adapters, strict=True)]
    found = experts_forward(module, x, index, weights, owned)
    expected = module(x, index, weights)
    for r, own in zip(rows, adapters, strict=True):
        alone = added(module, own)(x, index, weights)
        assert (alone - expected)[r.start : r.end].abs().max() > 0.1
        expected[r.start : r.end] = alone[r.start : r.end]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_factors_have_the_bits_of_the_base(kind: str) -> None:
    module, (x, index, weights) = made(kind), routing(9)
    own = ExpertFactors(EXPERTS, factors(module, 2, "down_proj"), torch.float32)
    beside = experts_forward(module, x, index, weights, [(SlotRows(0, 3, 6), own)])
    expected = module(x, index, weights)
    assert torch.equal(beside[:3], expected[:3]) and torch.equal(beside[6:], expected[6:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ranks_are_padded_for_the_grouped_product(dtype: torch.dtype) -> None:
    module = made("gate and up side by side", dtype)
    pair = ExpertFactors(EXPERTS, factors(module, 2, "down_proj"), dtype).pair("down_proj")
    assert pair is not None
    padded = 16 // dtype.itemsize * -(-RANK * dtype.itemsize // 16)
    assert pair[0].shape == (EXPERTS, padded, INNER) and pair[1].shape == (EXPERTS, HIDDEN, padded)
    assert not pair[0][:, RANK:].any() and not pair[1][:, :, RANK:].any()


def test_other_modules_and_other_parameters_are_not_gathered() -> None:
    module = made("transposed, interleaved, with biases")
    assert is_gathered(module, ["gate_up_proj", "down_proj"])
    assert not is_gathered(module, ["gate_up_proj_bias"])
    assert not is_gathered(nn.Linear(2, 2))


# -- routers -----------------------------------------------------------------------------------------------------------


class Router(nn.Module):
    """Multiplies by its weight in float32, as some routers do, and with `linear`, as the others."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        in_float = nn.functional.linear(x.float(), self.weight.type(torch.float32))
        return nn.functional.linear(x, self.weight), in_float


def test_a_router_computes_with_its_factors_however_it_uses_its_weight() -> None:
    torch.manual_seed(0)
    router, x = Router().requires_grad_(False), torch.randn(5, 8)
    own = {"weight": LoraFactors(torch.randn(3, 8), torch.randn(4, 3), 0.5)}
    assert is_low_rank(router, own)
    override = LowRankParameters(router, own, torch.float32)
    expected = x @ (router.weight + 0.5 * own["weight"].b @ own["weight"].a).T
    for found in override(None, x):
        torch.testing.assert_close(found, expected)
    assert sum(t.nbytes for t in (*override.parameters(), *override.buffers())) == 4 * 3 * (8 + 4)
    assert not isinstance(router.weight, LowRankWeight)


def test_embeddings_are_looked_up_and_not_multiplied() -> None:
    own = {"weight": LoraFactors(torch.randn(3, 8), torch.randn(4, 3), 0.5)}
    assert not is_low_rank(nn.Embedding(4, 8), own)


# -- in the engine -----------------------------------------------------------------------------------------------------


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    torch.manual_seed(0)
    config = MixtralConfig(
        **SIZES, **COUNTS, vocab_size=97, num_hidden_layers=2, max_position_embeddings=128, initializer_range=0.3
    )
    model = MixtralForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    targets = ["gate", "w1", "w2", "w3"]
    for seed, name in enumerate(("one", "two", "three")):
        write_earlier_adapter(model, tmp_path / name, seed=seed, target_modules=targets, r=4, scale=0.3)
    write_adapter(model, tmp_path / "plain")
    made = make_driver(tmp_path / "model", tmp_path / "data", adapter_slots=2)
    yield made
    made.engine.residency.close()


def test_an_adapter_of_experts_takes_the_memory_of_its_factors(driver: Driver, tmp_path: Path) -> None:
    pool, slots = driver.engine._runner.pool, driver.engine.residency.slots
    digest = driver.add_adapter(tmp_path / "one")
    driver.submit("a", [5, 6, 7], digest, max_tokens=2)
    driver.run()
    slot = slots.get(digest)
    assert slot is not None
    up = EXPERTS * 8 * (HIDDEN + 2 * INNER)  # the ranks of both parts, side by side
    down = EXPERTS * 4 * (INNER + HIDDEN)
    router = 4 * (HIDDEN + EXPERTS)
    assert slot.extra_bytes == sum(t.nbytes for t in pool.extra_tensors(slot.index)) == 2 * 4 * (up + down + router)
    assert driver.engine.residency.slots.extra_bytes == slot.extra_bytes


def test_what_an_adapter_of_experts_had_is_freed_with_its_slot(driver: Driver, tmp_path: Path) -> None:
    pool = driver.engine._runner.pool
    digests = [driver.add_adapter(tmp_path / name) for name in ("one", "two", "three", "plain", "plain")]
    for index, digest in enumerate([*digests, digests[0], digests[3]]):
        driver.submit(f"s{index}", [5, 6, 7, index], digest, max_tokens=3)
        driver.run()  # checks the books after every step
        owned = {slot.index: slot.extra_bytes for slot in driver.engine.residency.slots.slots() if slot.extra_bytes}
        assert pool.extra_bytes() == owned
    assert len(pool.extra_bytes()) == 1  # that of digests[0]; the plain adapter has nothing beside its pages


def test_the_base_multiplies_once_for_all_adapters(
    driver: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of several adapters of experts costs one product of the base, and two small ones for each."""
    digests = [driver.add_adapter(tmp_path / name) for name in ("one", "two")]
    for digest in digests:  # on the device first
        driver.submit(f"warm {digest}", [5, 6], digest, max_tokens=1)
        driver.run()
    sizes: list[int] = []
    grouped = gathered._grouped_linear

    def counted(given: Tensor, weight: Tensor, *more: Any) -> Tensor:
        sizes.append(min(weight.shape[1:]))
        found: Tensor = grouped(given, weight, *more)
        return found

    monkeypatch.setattr(gathered, "_grouped_linear", counted)
    for index, digest in enumerate((None, *digests)):
        driver.submit(f"s{index}", [5, 6, 7], digest, max_tokens=1)
    driver.run()
    layers, projections = 2, 2
    ranks = [size for size in sizes if size <= 8]
    assert len(sizes) - len(ranks) == layers * projections
    assert len(ranks) == layers * projections * 2 * len(digests)


def test_the_probe_finds_the_experts_that_are_gathered(driver: Driver) -> None:
    spec = driver.info.spec
    assert spec.gathered == {f"model.layers.{layer}.mlp.experts" for layer in range(2)}
