"""A version merged into the base weights equals PEFT's merge, rounded once; the base is unchanged."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig
from torch import Tensor, nn

from adapters.errors import AdapterInvalid, MoveRefused
from adapters.load import load
from adapters.runtime.dora import dense_weight, quant_state
from adapters.runtime.stacked_linear import StackedLinear
from adapters.runtime.weight_merge import FreeMemory, MergedModules, merge
from adapters.weights import AdapterWeights, LoraFactors
from server.model.cpu.linear import NativeLinear
from server.model.packed_linear import PackedLinear, packed
from tests.fixtures.adapter_factory import with_peft, write_adapter, write_peft_adapter
from tests.fixtures.engine_driver import Driver, make_driver
from tests.fixtures.parity_cases import GPT2_CASES, LLAMA_CASES, LLAMA_PEFT_TYPES
from tests.test_peft_parity import build

PLENTY = FreeMemory(1 << 40)
LINEAR = ["plain", "rslora", "patterns", "expressions", "lora_bias", "bias lora_only", "bias all", "lora_bias and bias"]
DORA = ["dora", "dora, rslora", "dora, bias all", "dora on lm_head", "dora, bias"]
CASES = [(kind, case) for kind, cases in (("llama", LLAMA_CASES), ("gpt2", GPT2_CASES)) for case in cases]
CASES = [(kind, case) for kind, case in CASES if case in (*LINEAR, *DORA)]
TYPES = "llama PEFT types"
CASES += [(TYPES, case) for case in ("beft", "deft", "deft, qr", "gralora, hybrid", "hra", "hra, gs")]
CASES += [(TYPES, case) for case in ("boft", "c3a", "oft", "oft, shared", "road", "road, 4", "shira")]
Make = Callable[..., tuple[Driver, AdapterWeights, nn.Module]]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    drivers = []

    def made(kind: str, case: str, **settings: Any) -> tuple[Driver, AdapterWeights, nn.Module]:
        """An engine over the base, the adapter's weights, and the base with the adapter merged by PEFT in float32."""
        model = build(kind)
        model.save_pretrained(tmp_path / "model")
        config = {"llama": LLAMA_CASES, "gpt2": GPT2_CASES, TYPES: LLAMA_PEFT_TYPES}[kind][case]
        if isinstance(config, PeftConfig):
            folder = write_peft_adapter(model, tmp_path / "adapter", config)
        else:
            folder = write_adapter(model, tmp_path / "adapter", **config)
        driver = make_driver(tmp_path / "model", tmp_path / "data", **settings)
        drivers.append(driver)
        digest = driver.add_adapter(folder)
        plain = build(kind).float()
        for name, layer in driver.engine._runner.layers.items():  # as the engine holds it: rounded, or dequantised
            module = plain.get_submodule(name)
            weight = dense_weight(layer.base).float()
            module.weight.data = (weight.T if type(module).__name__ == "Conv1D" else weight).clone()
            if layer.base.bias is not None:
                module.bias.data = layer.base.bias.float().clone()
        return driver, load_weights(driver, digest), with_peft(plain, folder).merge_and_unload()

    yield made
    for driver in drivers:
        driver.engine.residency.close()


def load_weights(driver: Driver, digest: str) -> AdapterWeights:
    return load(driver.store.path(digest), driver.info.spec, digest)


def merged(driver: Driver, weights: AdapterWeights, room: FreeMemory = PLENTY, **options: Any) -> MergedModules:
    return merge(weights, driver.engine._runner.layers, room, packed, **options)


def weights_digest(model: nn.Module) -> str:
    """Hash all bits that the model computes with."""
    digest = hashlib.sha256()
    for name, module in sorted(model.named_modules()):
        state = quant_state(module) if "weight" in module._parameters else None
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        own += [module.weight] if isinstance(module, PackedLinear | NativeLinear) else []
        for part in (state, getattr(state, "state2", None)):
            own += [value for value in vars(part).values() if isinstance(value, Tensor)] if part is not None else []
        for tensor in own:
            raw = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode() + raw)
    return digest.hexdigest()


def assert_merged(driver: Driver, reference: nn.Module, steps: float, atol: float) -> None:
    """Check that the engine's weights and biases equal those of `reference`, up to a number of relative steps."""
    for name, layer in driver.engine._runner.layers.items():
        expected = reference.get_submodule(name)
        weight = expected.weight.T if type(expected).__name__ == "Conv1D" else expected.weight
        torch.testing.assert_close(dense_weight(layer.base).float(), weight, rtol=steps, atol=atol)
        assert (layer.bias is None) == (expected.bias is None)
        if layer.bias is not None:
            torch.testing.assert_close(layer.bias.float(), expected.bias, rtol=steps, atol=atol)


@pytest.mark.parametrize(("kind", "case"), CASES)
@torch.inference_mode()
def test_merged_weights_are_those_of_peft(make: Make, kind: str, case: str) -> None:
    driver, weights, reference = make(kind, case)
    before = weights_digest(driver.engine._runner._model)
    modules = merged(driver, weights)
    assert weights_digest(driver.engine._runner._model) == before
    modules.install()
    assert_merged(driver, reference, 1e-5, 1e-5)
    assert weights_digest(driver.engine._runner._model) != before
    modules.restore()
    assert weights_digest(driver.engine._runner._model) == before


@pytest.mark.parametrize("case", ["plain", "dora, bias all", "lora_bias"])
@torch.inference_mode()
def test_bf16_weights_are_rounded_once_and_packed_again(make: Make, case: str) -> None:
    driver, weights, reference = make("llama", case, dtype="bfloat16")
    before = weights_digest(driver.engine._runner._model)
    modules = merged(driver, weights)
    modules.install()
    assert_merged(driver, reference, 2**-8, 1e-6)
    bases = [group.base for group in driver.engine._runner.groups()]
    kinds = {type(base.inner if isinstance(base, StackedLinear) else base) for base in bases}
    assert kinds == {type(packed(nn.Linear(4, 4, dtype=torch.bfloat16)))}
    modules.restore()
    assert weights_digest(driver.engine._runner._model) == before


@pytest.mark.parametrize("case", ["plain", "dora", "lora_bias and bias"])
@torch.inference_mode()
def test_a_4_bit_layer_is_dequantised(make: Make, case: str) -> None:
    driver, weights, reference = make("llama", case, quantization="nf4")
    before = weights_digest(driver.engine._runner._model)
    modules = merged(driver, weights)
    modules.install()
    assert not modules.requantized
    touched = [driver.engine._runner.layers[name].base for name in weights.factors]
    assert {type(base) for base in touched} == {nn.Linear}
    assert_merged(driver, reference, 1e-5, 1e-5)
    modules.restore()
    assert weights_digest(driver.engine._runner._model) == before


@torch.inference_mode()
def test_a_4_bit_layer_is_quantised_anew_when_memory_is_short_and_only_if_that_is_allowed(make: Make) -> None:
    driver, weights, reference = make("llama", "plain", quantization="nf4")
    layers = driver.engine._runner.layers
    needed = sum(dense_weight(layers[name].base).nbytes for name in weights.factors)
    with pytest.raises(MoveRefused, match="allow_requantize") as refused:
        merged(driver, weights, FreeMemory(needed - 1))
    assert refused.value.code == "no_room"
    assert not merged(driver, weights, FreeMemory(needed), allow_requantize=True).requantized
    modules = merged(driver, weights, FreeMemory(needed - 1), allow_requantize=True)
    modules.install()
    assert modules.requantized
    for name in weights.factors:
        expected = reference.get_submodule(name).weight
        if name == "lm_head":  # not quantised in the first place
            torch.testing.assert_close(layers[name].weight, expected)
        else:
            assert quant_state(layers[name].base) is not None
            error = dense_weight(layers[name].base) - expected
            assert error.norm() < 0.12 * expected.norm()  # NF4's own rounding of random weights
    with pytest.raises(MoveRefused):
        merged(driver, weights, FreeMemory(0), allow_requantize=True)


@torch.inference_mode()
def test_without_memory_for_both_a_plain_base_is_refused_on_one_memory_and_swapped_with_two(make: Make) -> None:
    driver, weights, reference = make("llama", "plain")
    with pytest.raises(MoveRefused, match="more than is free") as refused:
        merged(driver, weights, FreeMemory(0))
    assert refused.value.code == "no_room" and "requantize" not in str(refused.value)
    before = weights_digest(driver.engine._runner._model)
    modules = merged(driver, weights, FreeMemory(0, host=1 << 40))
    modules.install()
    assert_merged(driver, reference, 1e-5, 1e-5)
    modules.restore()
    assert weights_digest(driver.engine._runner._model) == before


@torch.inference_mode()
def test_weights_that_the_base_s_dtype_cannot_hold_are_refused(make: Make) -> None:
    driver, weights, _ = make("llama", "plain", dtype="bfloat16")
    name, factors = next(iter(weights.factors.items()))
    huge = torch.full_like(factors.b, 3e38)
    broken = {name: LoraFactors(torch.full_like(factors.a, 100.0), huge, 1.0)}
    with pytest.raises(AdapterInvalid, match="once merged"):
        merged(driver, AdapterWeights("", 4, broken, 0))


def test_tensors_are_hashed_by_value() -> None:
    linear = nn.Linear(4, 4)
    before = weights_digest(linear)
    bits: Tensor = linear.weight.data.view(torch.int32)
    bits[2, 3] ^= 1
    assert weights_digest(linear) != before
