"""Files whose names of tensors PEFT did not write: what they mean is applied and reported, or refused by name."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoHaConfig, PeftConfig, VeraConfig
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from adapters.errors import AdapterInvalid
from adapters.load import load
from adapters.model_spec import ModelSpec
from adapters.peft.spellings import peft_names
from adapters.validation.inspect import inspect
from adapters.weights import AdapterWeights
from tests.fixtures.adapter_factory import spec_of, tiny_llama, write_adapter, write_peft_adapter

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
Rename = Callable[[str], str]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama(attention_bias=True)


@pytest.fixture(scope="module")
def spec(model: LlamaForCausalLM) -> ModelSpec:
    return spec_of(model)


KINDS: dict[str, dict[str, Any] | PeftConfig] = {
    "plain": {},
    "dora": {"use_dora": True, "target_modules": ["q_proj", "embed_tokens"]},
    "lora_bias": {"lora_bias": True},
    "embedding": {"target_modules": ["embed_tokens", "v_proj"]},
    "saved": {"modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    "tokens": {"trainable_token_indices": [3, 5]},
    "loha": LoHaConfig(r=3, target_modules=["q_proj", "v_proj"]),
    "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "vera": VeraConfig(r=3, target_modules=["q_proj", "k_proj"]),
    "adalora": AdaLoraConfig(init_r=3, total_step=10, target_modules=["q_proj"]),
}


@pytest.fixture(scope="module")
def adapters(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, settings in KINDS.items():
        folder = tmp_path_factory.mktemp("adapter")
        is_config = isinstance(settings, PeftConfig)
        found[name] = (
            write_peft_adapter(model, folder, settings) if is_config else write_adapter(model, folder, **settings)
        )
    return found


def with_infix(infix: str) -> Rename:
    """The names of a `PeftModel`'s own state dict, which has the adapter's name in each of its tensors."""
    parameters = ("lora_magnitude_vector", "lora_embedding_A", "lora_embedding_B", "trainable_tokens_delta", "ia3_l")
    shared = ("vera_A", "vera_B", "vera_lambda_b", "vera_lambda_d", "lora_E", "lora_A", "lora_B", "ranknum")

    def rename(name: str) -> str:
        if name.endswith((".lora_A.weight", ".lora_B.weight", ".lora_B.bias")):
            head, _, last = name.rpartition(".")
            return f"{head}.{infix}.{last}"
        if name.endswith((*parameters, *shared)) or ".hada_" in name:
            return f"{name}.{infix}"
        head, _, last = name.rpartition(".")
        return f"{head}.modules_to_save.{infix}.{last}"

    return rename


def renamed(folder: Path, into: Path, rename: Rename) -> Path:
    shutil.copytree(folder, into)
    tensors = {rename(name): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, into / WEIGHTS)
    return into


def assert_same(one: AdapterWeights, other: AdapterWeights) -> None:
    for kind in ("factors", "embeddings", "replaced", "tokens", "input_scales", "output_scales", "biases"):
        found, expected = getattr(one, kind), getattr(other, kind)
        assert found.keys() == expected.keys()
        for module in expected:
            torch.testing.assert_close(_plain(found[module]), _plain(expected[module]), rtol=0, atol=0)


def _plain(value: Any) -> Any:
    """Tensors, and whatever contains them, as `assert_close` compares them."""
    if hasattr(value, "__slots__") and not isinstance(value, torch.Tensor):
        value = {name: getattr(value, name) for name in value.__slots__}
    if isinstance(value, dict):
        return {name: _plain(own) for name, own in value.items() if own is not None}
    return value


def before(prefix: str) -> Rename:
    return lambda name: prefix + name


SPELLINGS: dict[str, tuple[Rename, str]] = {
    "default": (with_infix("default"), "the name of the adapter"),
    "another adapter's name": (with_infix("policy"), "the name of the adapter"),
    "torch.compile": (before("_orig_mod."), "_orig_mod"),
    "torch.compile inside": (lambda name: name.replace(PREFIX, f"{PREFIX}_orig_mod."), "_orig_mod"),
    "FSDP": (lambda name: name.replace(".layers.", "._fsdp_wrapped_module.layers."), "_fsdp_wrapped_module"),
    "checkpoints": (
        lambda name: name.replace(".self_attn", "._checkpoint_wrapped_module.self_attn"),
        "_checkpoint_wrapped_module",
    ),
    "DDP": (before("module."), "module"),
    "DDP of a compiled model": (before("module._orig_mod."), "_orig_mod"),
    "no prefix": (lambda name: name.removeprefix(PREFIX), PREFIX),
    "no prefix, wrapped": (lambda name: "_orig_mod." + name.removeprefix(PREFIX), PREFIX),
    "two prefixes": (lambda name: name.replace(PREFIX, PREFIX * 2), PREFIX),
    "all of them": (lambda name: "module." + with_infix("default")(name).replace(PREFIX, PREFIX * 2), "module"),
}
NOT_THERE = {("vera", "no prefix"), ("vera", "no prefix, wrapped")}  # base_model.vera_A tells that there is one
OF_LAYERS = ("FSDP", "checkpoints")


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_is_read_as_what_it_means(
    kind: str, spelling: str, adapters: dict[str, Path], spec: ModelSpec, tmp_path: Path
) -> None:
    rename, note = SPELLINGS[spelling]
    folder = renamed(adapters[kind], tmp_path / "renamed", rename)
    if (kind, spelling) in NOT_THERE:
        with pytest.raises(AdapterInvalid):
            inspect(folder, spec)
        return
    plain, found = inspect(adapters[kind], spec), inspect(folder, spec)
    assert "notes" not in plain.report
    assert any(note in text for text in found.report["notes"]) and found.digest != plain.digest
    assert {**found.report, "notes": []} == {**plain.report, "notes": []}
    assert_same(load(folder, spec, found.digest), load(adapters[kind], spec))


MAGNITUDES = ["lora_magnitude_vector.weight", "lora_magnitude_vector.default.weight", "lora_magnitude_vector.default"]


@pytest.mark.parametrize("spelled", MAGNITUDES)
def test_magnitudes_have_had_other_names(
    spelled: str, adapters: dict[str, Path], spec: ModelSpec, tmp_path: Path
) -> None:
    kind = "dora"
    folder = renamed(adapters[kind], tmp_path / "x", lambda name: name.replace("lora_magnitude_vector", spelled))
    assert_same(load(folder, spec), load(adapters[kind], spec))


@pytest.mark.parametrize(
    ("kind", "first", "second"),
    [
        ("plain", "q_proj.lora_A.weight", "q_proj.lora_A.default.weight"),
        ("plain", "base_model.model.model", "module.base_model.model.model"),
        ("plain", "base_model.model.", "base_model.model.base_model.model."),
        ("dora", "lora_magnitude_vector", "lora_magnitude_vector.weight"),
        ("embedding", "lora_embedding_A", "lora_embedding_A.default"),
        ("tokens", "trainable_tokens_delta", "trainable_tokens_delta.default"),
        ("loha", "q_proj.hada_w1_a", "q_proj.hada_w1_a.default"),
        ("vera", "base_model.vera_A", "base_model.vera_A.default"),
        ("ia3", "model.layers", "_orig_mod.model.layers"),
    ],
)
def test_a_tensor_is_spelled_once(
    kind: str, first: str, second: str, adapters: dict[str, Path], spec: ModelSpec, tmp_path: Path
) -> None:
    folder = renamed(adapters[kind], tmp_path / "x", str)
    tensors = load_file(folder / WEIGHTS)
    name = next(name for name in tensors if first in name)
    save_file({**tensors, name.replace(first, second): tensors[name].clone()}, folder / WEIGHTS)
    with pytest.raises(AdapterInvalid) as caught:
        inspect(folder, spec)
    (problem,) = caught.value.problems
    assert problem.code == "malformed_file" and "another spelling of" in problem.found


def test_a_base_that_has_such_names_keeps_them() -> None:
    """The rules are for names that the base model does not have."""
    modules = {"module.q", "x._orig_mod.q", "base_model.model.q"}
    names = [f"{PREFIX}{module}.lora_A.weight" for module in modules]
    assert peft_names(names, modules).names == {name: name for name in names}
    assert peft_names(names, ()).names != {name: name for name in names}


def test_a_file_with_and_without_the_prefix_is_refused(
    adapters: dict[str, Path], spec: ModelSpec, tmp_path: Path
) -> None:
    rename = SPELLINGS["no prefix"][0]
    folder = renamed(adapters["plain"], tmp_path / "x", lambda name: rename(name) if ".1." in name else name)
    with pytest.raises(AdapterInvalid) as caught:
        inspect(folder, spec)
    misnamed = [p for p in caught.value.problems if p.where.startswith("model.layers.1.")]
    assert len(misnamed) == 4 and all(PREFIX in problem.expected for problem in misnamed)
