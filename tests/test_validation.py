"""Adapters as the real PEFT writes them are applied exactly; everything else is refused with every reason."""

import copy
import json
import math
import shutil
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from adapters.errors import AdapterInvalid, Problem
from adapters.load import load
from adapters.model_spec import ModelSpec
from adapters.validation.inspect import check_files, inspect
from tests.fixtures.adapter_factory import spec_of, tiny_llama, with_peft, write_adapter
from tests.fixtures.timing import cpu_seconds

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
K0 = "base_model.model.model.layers.0.self_attn.k_proj"
NORM = "base_model.model.model.norm"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="module")
def spec(model: LlamaForCausalLM) -> ModelSpec:
    return spec_of(model)


@pytest.fixture(scope="module")
def plain(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(model, tmp_path_factory.mktemp("plain"))


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    """A copy of a valid adapter, for a test to corrupt."""
    return Path(shutil.copytree(plain, tmp_path / "adapter"))


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def set_item(name: str, index: int, value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[f"{Q0}.{name}.weight"].view(-1)[index : index + 1 or None].fill_(value)


def replace(name: str, *shape: int) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: torch.ones(shape)})


def drop(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def refused(folder: Path, spec: ModelSpec) -> list[Problem]:
    """Return the problems, which are the same for `inspect` and `load`."""
    with pytest.raises(AdapterInvalid) as inspected:
        inspect(folder, spec)
    with pytest.raises(AdapterInvalid) as loaded:
        load(folder, spec)
    assert inspected.value.problems == loaded.value.problems
    assert str(folder) not in str(inspected.value.problems)
    return inspected.value.problems


# --- what PEFT writes is served as PEFT serves it ---

SERVED: dict[str, dict[str, Any]] = {
    "plain": {},
    "every linear": {"target_modules": "all-linear"},
    "a regular expression": {"target_modules": r".*layers\.1\..*(q|k)_proj"},
    "lm_head": {"target_modules": ["lm_head", "q_proj"]},
    "full names": {"target_modules": ["model.layers.0.self_attn.q_proj", "layers.1.mlp.down_proj"]},
    "rslora": {"use_rslora": True, "r": 6, "lora_alpha": 5},
    "one layer": {"layers_to_transform": [1]},
    "layer number": {"layers_to_transform": 1, "layers_pattern": "layers"},
    "full names and layers": {
        "target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"],
        "layers_to_transform": [1],
    },
    "excluded": {"exclude_modules": ["layers.0.self_attn.q_proj"], "target_modules": ["q_proj"]},
    "excluded targets": {"exclude_modules": ["up_proj", "layers.1.mlp.gate_proj"], "target_modules": "all-linear"},
    "excluded by an expression": {"exclude_modules": r".*\.0\..*|.*down.*", "target_modules": ["q_proj", "down_proj"]},
    "patterns": {
        "use_rslora": True,
        "target_modules": ["q_proj", "v_proj", "gate_proj"],
        "rank_pattern": {"v_proj": 3, "^model.layers.0.self_attn.q_proj": 5, "layers.1.mlp.gate_proj": 16},
        "alpha_pattern": {"layers.1.self_attn.v_proj": 7, "v_proj": 9, "gate_proj": 40},
    },
    "gaussian": {"init_lora_weights": "gaussian"},
    "no task": {"task_type": None},
}


@pytest.mark.parametrize("name", SERVED)
def test_matches_peft(name: str, model: LlamaForCausalLM, spec: ModelSpec, tmp_path: Path) -> None:
    folder = write_adapter(model, tmp_path, **SERVED[name])
    reference = {
        module_name.removeprefix("base_model.model."): module
        for module_name, module in with_peft(model, folder).named_modules()
        if hasattr(module, "lora_A")
    }
    inspected = inspect(folder, spec)
    weights = load(folder, spec, inspected.digest)
    assert weights.factors.keys() == reference.keys()
    for module, factors in weights.factors.items():
        assert factors.scaling == reference[module].scaling["default"]
        assert torch.equal(factors.a, reference[module].lora_A["default"].weight)
        assert torch.equal(factors.b, reference[module].lora_B["default"].weight)
    assert weights.rank == inspected.rank == max(module.r["default"] for module in reference.values())
    assert inspected.report["applied"] == {"modules": len(reference), "tensors": 2 * len(reference)}
    assert weights.nbytes == inspected.nbytes == sum(4 * (f.a.numel() + f.b.numel()) for f in weights.factors.values())
    assert set(inspected.target_modules) == {module.rpartition(".")[2] for module in reference}


def test_reports_features_and_a_stable_digest(model: LlamaForCausalLM, spec: ModelSpec, tmp_path: Path) -> None:
    one = inspect(write_adapter(model, tmp_path / "1", use_rslora=True, target_modules=["q_proj"]), spec)
    two = inspect(write_adapter(model, tmp_path / "2", use_rslora=True, target_modules=["q_proj"]), spec)
    other = inspect(write_adapter(model, tmp_path / "3", seed=1, use_rslora=True, target_modules=["q_proj"]), spec)
    assert one == two
    assert one.digest != other.digest
    assert one.report == {"applied": {"modules": 2, "tensors": 4}, "features": ["rslora"]}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensors_stay_as_they_are_stored(folder: Path, spec: ModelSpec, dtype: torch.dtype) -> None:
    change_tensors(folder, lambda t: t.update({name: tensor.to(dtype) for name, tensor in t.items()}))
    weights = load(folder, spec)
    assert all(f.a.dtype is dtype and f.b.dtype is dtype for f in weights.factors.values())


def test_names_with_an_adapters_name_inside(folder: Path, spec: ModelSpec) -> None:
    before = load(folder, spec).factors

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace(".weight", ".default.weight")] = tensors.pop(name)

    change_tensors(folder, rename)
    after = load(folder, spec).factors
    assert all(torch.equal(after[module].a, before[module].a) for module in before)


@pytest.mark.reliability("T5")
def test_odd_but_finite_numbers_are_served(folder: Path, spec: ModelSpec) -> None:
    values = torch.tensor([-0.0, 1e-45, 1e-39, -3e38, 3e38])
    change_tensors(folder, lambda t: t[f"{Q0}.lora_A.weight"].view(-1)[:5].copy_(values))
    assert inspect(folder, spec)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True, "modules_to_save": ["norm"]}])
def test_float64_is_rounded_to_float32(
    settings: dict[str, Any], model: LlamaForCausalLM, spec: ModelSpec, tmp_path: Path
) -> None:
    folder = write_adapter(model, tmp_path, **settings)
    single, before = load(folder, spec), inspect(folder, spec)
    nudge = 1 + 1e-12  # less than float32 can hold
    change_tensors(folder, lambda t: t.update({name: tensor.double() * nudge for name, tensor in t.items()}))
    found = inspect(folder, spec)
    assert found.nbytes == before.nbytes and found.digest != before.digest
    (note,) = found.report["notes"]
    assert note == f"{found.report['applied']['tensors']} tensors in float64 were rounded to float32"
    double = load(folder, spec, found.digest)
    assert double.nbytes == found.nbytes
    for module, factors in single.factors.items():
        assert double.factors[module].b.dtype is torch.float32 and torch.equal(double.factors[module].b, factors.b)
    change_tensors(folder, set_item("lora_A", 3, 1e300))
    assert [problem.code for problem in refused(folder, spec)] == ["nonfinite"]
    change_tensors(folder, set_item("lora_A", 3, math.nan))
    assert [problem.code for problem in refused(folder, spec)] == ["nonfinite"]


def test_a_config_may_begin_with_a_byte_order_mark(folder: Path, spec: ModelSpec) -> None:
    plain = inspect(folder, spec)
    (folder / CONFIG).write_bytes(b"\xef\xbb\xbf" + (folder / CONFIG).read_bytes())
    assert inspect(folder, spec) == plain
    check_files(folder)


# --- biases and magnitudes ---


@pytest.fixture(scope="module")
def biased() -> LlamaForCausalLM:
    """A base with biases at its attention's projections and at no other linear."""
    return tiny_llama(attention_bias=True)


VECTORS: dict[str, tuple[dict[str, Any], tuple[str, ...], int]] = {
    "bias lora_only": ({"bias": "lora_only"}, ("bias",), 2 * 2),
    "bias lora_only where there is none": ({"bias": "lora_only", "target_modules": ["up_proj"]}, ("bias",), 0),
    "bias all": ({"bias": "all"}, ("bias",), 2 * 4),
    "lora_bias": ({"lora_bias": True}, ("lora_bias",), 2 * 2),
    "lora_bias and bias": ({"lora_bias": True, "bias": "all"}, ("bias", "lora_bias"), 2 * 2 + 2 * 4),
    "dora": ({"use_dora": True}, ("dora",), 2 * 2),
    "dora, rslora": ({"use_dora": True, "use_rslora": True}, ("dora", "rslora"), 2 * 2),
}


@pytest.mark.parametrize("name", VECTORS)
def test_vectors_are_read_as_peft_wrote_them(name: str, biased: LlamaForCausalLM, tmp_path: Path) -> None:
    settings, features, count = VECTORS[name]
    folder = write_adapter(biased, tmp_path, **settings)
    stored = load_file(folder / WEIGHTS)
    weights = load(folder, spec_of(biased))
    found = {f"base_model.model.{m}.lora_B.bias": f.bias for m, f in weights.factors.items()}
    found |= {f"base_model.model.{m}.lora_magnitude_vector": f.magnitude for m, f in weights.factors.items()}
    infixes = {m: ".base_layer" * (m in weights.factors) for m in weights.biases}
    found |= {f"base_model.model.{m}{infixes[m]}.bias": bias for m, bias in weights.biases.items()}
    vectors = {name: tensor for name, tensor in found.items() if tensor is not None}
    assert vectors.keys() == {name for name in stored if stored[name].ndim == 1} and len(vectors) == count
    assert all(torch.equal(vectors[name], stored[name]) for name in vectors)
    report = inspect(folder, spec_of(biased)).report
    assert set(report["features"]) == set(features)
    assert report["applied"] == {
        "modules": len(weights.factors.keys() | weights.biases.keys()),
        "tensors": 2 * len(weights.factors) + count,
    }


BAD_VECTORS: dict[str, tuple[dict[str, Any], Callable[[dict[str, Tensor]], object], str, str]] = {
    "no magnitude": ({"use_dora": True}, drop(f"{Q0}.lora_magnitude_vector"), "shape_mismatch", Q0),
    "a short magnitude": ({"use_dora": True}, replace(f"{Q0}.lora_magnitude_vector", 63), "shape_mismatch", Q0),
    "an old magnitude": ({"use_dora": True}, replace(f"{Q0}.lora_magnitude_vector", 1, 64), "shape_mismatch", Q0),
    "no lora_bias": ({"lora_bias": True}, drop(f"{Q0}.lora_B.bias"), "shape_mismatch", Q0),
    "a long lora_bias": ({"lora_bias": True}, replace(f"{Q0}.lora_B.bias", 65), "shape_mismatch", Q0),
    "no bias": ({"bias": "lora_only"}, drop(f"{Q0}.base_layer.bias"), "shape_mismatch", Q0),
    "a short bias": ({"bias": "lora_only"}, replace(f"{Q0}.base_layer.bias", 63), "shape_mismatch", Q0),
    "too many biases": ({"bias": "lora_only"}, replace(f"{K0}.bias", 32), "unsupported_feature", f"{K0}.bias"),
    "a bias missing of all": (
        {"bias": "all"},
        drop(f"{K0}.bias"),
        "shape_mismatch",
        "adapter_model.safetensors: model",
    ),
    "a short bias of all": ({"bias": "all"}, replace(f"{K0}.bias", 31), "shape_mismatch", f"{K0}.bias"),
    "a bias that PEFT would drop": ({"bias": "all"}, replace(f"{Q0}.bias", 64), "unsupported_feature", f"{Q0}.bias"),
    "a bias that the base lacks": (
        {"bias": "all"},
        replace("base_model.model.lm_head.bias", 97),
        "unsupported_feature",
        "base_model.model.lm_head.bias",
    ),
    "NaN": (
        {"use_dora": True},
        lambda tensors: tensors[f"{Q0}.lora_magnitude_vector"].fill_(math.nan),
        "nonfinite",
        f"{Q0}.lora_magnitude_vector",
    ),
    "scaled to infinity": (
        {"lora_bias": True},
        lambda tensors: tensors[f"{Q0}.lora_B.bias"].fill_(3e38),
        "nonfinite",
        f"{Q0}.lora_B.bias",
    ),
}


@pytest.mark.parametrize("name", BAD_VECTORS)
def test_refuses_vectors_that_are_not_what_the_config_declares(
    name: str, biased: LlamaForCausalLM, tmp_path: Path
) -> None:
    settings, change, code, where = BAD_VECTORS[name]
    folder = write_adapter(biased, tmp_path, **settings)
    change_tensors(folder, change)
    (problem,) = refused(folder, spec_of(biased))
    assert problem.code == code
    assert problem.where.startswith(where)


@pytest.mark.parametrize("name", ["lora_magnitude_vector", "lora_B.bias", "base_layer.bias"])
def test_refuses_vectors_of_a_layer_without_factors(name: str, folder: Path, spec: ModelSpec) -> None:
    change_tensors(folder, replace(f"{K0}.{name}", 32))
    problems = refused(folder, spec)
    assert [problem.code for problem in problems] == ["shape_mismatch", "no_target"]
    assert {problem.where for problem in problems} == {f"{K0}.{name}"}


def test_refuses_the_biases_of_norms(tmp_path: Path) -> None:
    """GPT-2's LayerNorms have biases, and those that PEFT saves with bias="all" cannot be served."""
    config = GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=97, bos_token_id=1, eos_token_id=2)
    model = GPT2LMHeadModel(config)
    folder = write_adapter(model, tmp_path, target_modules=["c_attn"], fan_in_fan_out=True, bias="all")
    blocks = {"attn.c_attn": (64, 192), "attn.c_proj": (64, 64), "mlp.c_fc": (64, 256), "mlp.c_proj": (256, 64)}
    sizes = {f"transformer.h.0.{name}": size for name, size in blocks.items()}
    problems = refused(folder, ModelSpec(sizes, 64, frozenset(sizes)))
    assert {problem.where.removeprefix("base_model.model.transformer.") for problem in problems} == {
        "h.0.ln_1.bias",
        "h.0.ln_2.bias",
        "ln_f.bias",
    }


# --- refusals ---


BAD_TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str, str]] = {
    "NaN first": (set_item("lora_A", 0, math.nan), "nonfinite", Q0),
    "NaN last": (set_item("lora_B", -1, math.nan), "nonfinite", Q0),
    "infinity": (set_item("lora_A", 100, math.inf), "nonfinite", Q0),
    "minus infinity": (set_item("lora_A", 99, -math.inf), "nonfinite", Q0),
    "scaled to infinity": (set_item("lora_B", 3, 3e38), "nonfinite", Q0),
    "scaled to minus infinity": (set_item("lora_B", 3, -3e38), "nonfinite", Q0),
    "A too wide": (replace(f"{Q0}.lora_A.weight", 8, 65), "shape_mismatch", Q0),
    "A too narrow": (replace(f"{Q0}.lora_A.weight", 8, 63), "shape_mismatch", Q0),
    "A of rank 4": (replace(f"{Q0}.lora_A.weight", 4, 64), "shape_mismatch", Q0),
    "A turned": (replace(f"{Q0}.lora_A.weight", 64, 8), "shape_mismatch", Q0),
    "A as vector": (replace(f"{Q0}.lora_A.weight", 512), "shape_mismatch", Q0),
    "A as convolution": (replace(f"{Q0}.lora_A.weight", 8, 64, 1, 1), "shape_mismatch", Q0),
    "A as scalar": (replace(f"{Q0}.lora_A.weight"), "shape_mismatch", Q0),
    "B too tall": (replace(f"{Q0}.lora_B.weight", 65, 8), "shape_mismatch", Q0),
    "no B": (lambda tensors: tensors.pop(f"{Q0}.lora_B.weight"), "shape_mismatch", f"{Q0}.lora_A"),
    "no A": (lambda tensors: tensors.pop(f"{Q0}.lora_A.weight"), "shape_mismatch", f"{Q0}.lora_B"),
    "a second A": (replace(f"{Q0}.lora_A.default.weight", 8, 64), "malformed_file", f"{Q0}.lora_A"),
    "DoRA's magnitude": (replace(f"{Q0}.lora_magnitude_vector", 64), "unsupported_feature", Q0),
    "lora_bias": (replace(f"{Q0}.lora_B.bias", 64), "unsupported_feature", f"{Q0}.lora_B.bias"),
    "the bias of an adapted layer": (replace(f"{Q0}.base_layer.bias", 64), "unsupported_feature", f"{Q0}.base_layer"),
    "the bias of another layer": (replace(f"{K0}.bias", 32), "unsupported_feature", f"{K0}.bias"),
    "the bias of a norm": (
        replace("base_model.model.model.norm.bias", 64),
        "unsupported_feature",
        "base_model.model.model.norm.bias",
    ),
    "a saved head of another width": (
        replace("base_model.model.lm_head.weight", 97, 65),
        "shape_mismatch",
        "base_model.model.lm_head",
    ),
    "a saved norm of another size": (replace(f"{NORM}.weight", 63), "shape_mismatch", NORM),
    "an adapted layer's weight where PEFT does not look": (
        replace(f"{Q0}.weight", 64, 64),
        "unsupported_feature",
        f"{Q0}.weight",
    ),
    "a copy that says something else": (
        lambda tensors: tensors.update(
            {f"{NORM}.weight": torch.ones(64), f"{NORM}.modules_to_save.weight": torch.full((64,), 2.0)}
        ),
        "malformed_file",
        f"{NORM}.modules_to_save",
    ),
    "a weight that nothing takes the place of": (
        replace(f"{NORM}.original_module.weight", 64),
        "unsupported_feature",
        f"{NORM}.original_module",
    ),
    "a parameter that the base lacks": (replace(f"{NORM}.gain", 64), "unsupported_feature", f"{NORM}.gain"),
    "rows of tokens": (
        replace("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", 2, 64),
        "unsupported_feature",
        "base_model.model.model.embed_tokens",
    ),
    "the base's own layer": (
        replace("base_model.model.lm_head.base_layer.weight", 97, 64),
        "unsupported_feature",
        "base",
    ),
    "no prefix": (replace("model.layers.0.self_attn.k_proj.lora_A.weight", 8, 64), "unsupported_feature", "model."),
}


@pytest.mark.reliability("T16")
@pytest.mark.parametrize("name", BAD_TENSORS)
def test_refuses_bad_tensors_by_name(name: str, folder: Path, spec: ModelSpec) -> None:
    change, code, where = BAD_TENSORS[name]
    change_tensors(folder, change)
    (problem,) = refused(folder, spec)
    assert problem.code == code
    assert problem.where.startswith(where)


def test_half_precision_overflows_at_its_own_limit(folder: Path, spec: ModelSpec) -> None:
    def halve(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.half() for name, tensor in tensors.items()})
        tensors[f"{Q0}.lora_B.weight"][0, 0] = 40_000  # times the scaling of 2

    change_tensors(folder, halve)
    (problem,) = refused(folder, spec)
    assert (problem.code, problem.where) == ("nonfinite", f"{Q0}.lora_B.weight")


@pytest.mark.reliability("T5")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("position", [0, 12_345, 2_100_000, 2_199_999])
def test_finds_one_nan_among_millions(dtype: torch.dtype, position: int, tmp_path: Path, plain: Path) -> None:
    a, b = torch.zeros(8, 275_000, dtype=dtype), torch.zeros(4, 8, dtype=dtype)
    a.view(-1)[position] = math.nan
    save_file({"base_model.model.big.lora_A.weight": a, "base_model.model.big.lora_B.weight": b}, tmp_path / WEIGHTS)
    shutil.copy(plain / CONFIG, tmp_path)
    change_config(tmp_path, target_modules=["big"])
    (problem,) = refused(tmp_path, ModelSpec({"big": (275_000, 4)}, max_rank=8))
    assert problem.code == "nonfinite"


@pytest.mark.reliability("T16")
@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 32},
        {"hidden_size": 128},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"head_dim": 32},
    ],
)
def test_refuses_another_base_smaller_or_larger(changes: dict[str, Any], plain: Path) -> None:
    problems = refused(plain, spec_of(tiny_llama(**changes)))
    assert {problem.code for problem in problems} == {"shape_mismatch"}


@pytest.mark.reliability("T16")
def test_refuses_a_deeper_base(model: LlamaForCausalLM, spec: ModelSpec, tmp_path: Path) -> None:
    folder = write_adapter(tiny_llama(num_hidden_layers=3), tmp_path)
    problems = refused(folder, spec)
    assert {problem.code for problem in problems} == {"base_mismatch"}
    assert all("layers.2." in problem.where for problem in problems)
    assert len(problems) == 2  # q_proj and v_proj


@pytest.mark.reliability("T17")
def test_refuses_an_adapter_that_touches_nothing(folder: Path) -> None:
    problems = refused(folder, ModelSpec({"transformer.h.0.attn.c_attn": (64, 192)}, max_rank=64))
    assert [problem.code for problem in problems] == ["no_target"]


@pytest.mark.parametrize("layers", [1, [1], [1, 7]])
@pytest.mark.parametrize("layers_pattern", [None, "layers", ["h", "model.layers"]])
def test_refuses_tensors_of_other_layers(layers: Any, layers_pattern: Any, folder: Path, spec: ModelSpec) -> None:
    change_config(folder, layers_to_transform=layers, layers_pattern=layers_pattern)  # PEFT would drop them in silence
    problems = refused(folder, spec)
    assert len(problems) == 2 and all("layers.0." in problem.where for problem in problems)


@pytest.mark.parametrize("layers", ["1", [True], 0.5, {"0": 1}, ["0"]])
def test_refuses_layers_that_are_no_numbers(layers: Any, folder: Path, spec: ModelSpec) -> None:
    change_config(folder, layers_to_transform=layers)
    assert "layers_to_transform" in refused(folder, spec)[0].where


@pytest.mark.parametrize(("layers", "layers_pattern"), [([0, 1], None), ([], None), ([1], "(h|layer)s?"), (None, None)])
def test_serves_the_layers_of_layers_to_transform(
    layers: Any, layers_pattern: Any, folder: Path, spec: ModelSpec
) -> None:
    change_config(folder, layers_to_transform=layers, layers_pattern=layers_pattern)
    assert inspect(folder, spec).report["applied"]["modules"] == 4


@pytest.mark.parametrize("exclude_modules", [["layers.0.self_attn.q_proj"], r".*\.0\..*q_proj"])
def test_refuses_tensors_of_excluded_modules(exclude_modules: Any, folder: Path, spec: ModelSpec) -> None:
    change_config(folder, exclude_modules=exclude_modules)  # PEFT would drop them in silence
    (problem,) = refused(folder, spec)
    assert problem.where.startswith(Q0) and problem.code == "no_target"


@pytest.mark.parametrize("exclude_modules", [["layers.0.mlp.up_proj"], r".*layers\.0.*", r"(?!x).*up_proj"])
def test_excluding_a_part_of_a_target_does_not_excuse_it(exclude_modules: Any, folder: Path, spec: ModelSpec) -> None:
    change_config(folder, exclude_modules=exclude_modules, target_modules=["q_proj", "v_proj", "up_proj"])
    problems = refused(folder, spec)
    assert [p.found for p in problems if "target_modules" in p.where] == ["up_proj without a tensor"]


@pytest.mark.reliability("T17")
def test_refuses_declared_targets_without_tensors(folder: Path, spec: ModelSpec) -> None:
    change_config(folder, target_modules=["q_proj", "v_proj", "k_proj", "gate_proj"])
    problems = refused(folder, spec)
    assert [problem.code for problem in problems] == ["no_target"] * 2
    assert ["gate_proj" in problems[0].found, "k_proj" in problems[1].found] == [True, True]


SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = {
    "Phi-3": (Phi3ForCausalLM, Phi3Config, {"pad_token_id": 0}, SEVEN),
    "Mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 2}, SEVEN),
    "Llama": (LlamaForCausalLM, LlamaConfig, {}, [*SEVEN, "qkv_proj", "Wqkv"]),
}


@pytest.mark.parametrize("name", FUSED)
def test_targets_that_the_base_lacks_are_reported(name: str, tmp_path: Path) -> None:
    """PEFT writes them all into the config and adapts those that match."""
    kind, config, changes, targets = FUSED[name]
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 2}
    fused = kind(config(**sizes, num_attention_heads=4, num_key_value_heads=2, **changes))
    folder = write_adapter(fused, tmp_path, target_modules=targets)
    inspected = inspect(folder, spec_of(fused))
    present = {name.rpartition(".")[2] for name, module in fused.named_modules() if isinstance(module, nn.Linear)}
    reference = [m for m in with_peft(fused, folder).modules() if hasattr(m, "lora_A")]
    assert inspected.report["applied"]["modules"] == len(reference)
    (note,) = inspected.report["notes"]
    words = note.replace(",", " ").replace(";", " ").split()
    assert all((target in words) == (target not in present) for target in targets)
    assert load(folder, spec_of(fused), inspected.digest)


def test_a_base_without_any_target_is_refused(plain: Path, folder: Path, spec: ModelSpec) -> None:
    change_config(folder, target_modules=["Wqkv", "q_proj"])
    assert {problem.code for problem in refused(folder, spec)} == {"no_target"}  # v_proj is beyond the targets
    change_config(folder, target_modules=["Wqkv"])
    assert {problem.code for problem in refused(folder, spec)} == {"no_target"}


LOST: dict[str, tuple[dict[str, Any], str, int]] = {
    "a layer": ({"target_modules": SEVEN}, ".layers.1.", 7),
    "one module of one layer": ({"target_modules": SEVEN}, ".layers.0.mlp.up_proj.", 1),
    "the attention of a layer": ({"target_modules": SEVEN}, ".0.self_attn.", 4),
    "a regular expression": ({"target_modules": r".*(q|k|v)_proj"}, ".1.self_attn.k_proj.", 1),
    "a layer beside another that is not adapted": ({"layers_to_transform": [1], "r": 4}, ".1.self_attn.q_proj.", 1),
    "an embedding": ({"target_modules": r".*q_proj|.*embed_tokens"}, ".embed_tokens.", 1),
}


@pytest.mark.reliability("T17")
@pytest.mark.parametrize("name", LOST)
def test_refuses_a_file_that_lost_modules(name: str, model: LlamaForCausalLM, spec: ModelSpec, tmp_path: Path) -> None:
    settings, lost, count = LOST[name]
    folder = write_adapter(model, tmp_path, **settings)
    assert inspect(folder, spec)
    change_tensors(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if lost in key])
    (problem,) = [p for p in refused(folder, spec) if "without tensors" in p.found or "without a tensor" in p.found]
    assert problem.code == "no_target"
    if name != "a layer beside another that is not adapted":  # then the name has no tensor at all
        assert problem.found.startswith(f"{count} targeted module") and lost.strip(".") in problem.found


def test_eva_leaves_out_targets(tmp_path: Path) -> None:
    """EVA drops modules that get no rank, and PEFT shortens the names of the others to endings that match them, too."""
    deep = tiny_llama(num_hidden_layers=4)
    config = LoraConfig(
        r=4, target_modules=SEVEN, init_lora_weights="eva", eva_config=EvaConfig(), task_type="CAUSAL_LM"
    )
    peft_model = get_peft_model(copy.deepcopy(deep), config, low_cpu_mem_usage=True)
    inputs = {name: module.in_features for name, module in deep.named_modules() if name.endswith(tuple(SEVEN))}
    ranks = dict.fromkeys(inputs, 4) | {"model.layers.2.mlp.up_proj": 0}
    state = {f"base_model.model.{name}": torch.randn(rank, inputs[name]) for name, rank in ranks.items()}
    initialize_lora_eva_weights(peft_model, eva_state_dict=state)
    peft_model.save_pretrained(tmp_path)
    assert "up_proj" in json.loads((tmp_path / CONFIG).read_text())["target_modules"]
    assert inspect(tmp_path, spec_of(deep)).report["applied"]["modules"] == len(ranks) - 1


@pytest.mark.parametrize(
    "explained",
    [
        {"layers_to_transform": [0]},
        {"layers_to_transform": 0, "layers_pattern": "layers"},
        {"exclude_modules": ["layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj"]},
        {"exclude_modules": r".*layers\.1\..*"},
        {"exclude_modules": r"(?!.*\.0\.).*"},  # RE2 does not accept it: the tensors show the targets
        {"target_modules": r".*layers\.0.*(q|v)_proj"},
        {"target_modules": ["layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj"]},
    ],
)
def test_the_config_may_explain_what_a_file_lacks(explained: dict[str, Any], folder: Path, spec: ModelSpec) -> None:
    change_tensors(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if ".layers.1." in key])
    refused(folder, spec)
    change_config(folder, **explained)
    assert inspect(folder, spec).report["applied"]["modules"] == 2


@pytest.mark.reliability("T17")
def test_refuses_tensors_that_peft_would_drop(folder: Path, spec: ModelSpec) -> None:
    change_config(folder, target_modules=["q_proj"])
    problems = refused(folder, spec)
    assert [problem.code for problem in problems] == ["no_target"] * 2
    assert all("v_proj" in problem.where for problem in problems)


@pytest.mark.reliability("T16")
def test_refuses_a_rank_above_the_limit(model: LlamaForCausalLM, tmp_path: Path) -> None:
    folder = write_adapter(model, tmp_path, rank_pattern={"layers.1.self_attn.v_proj": 9})
    problems = refused(folder, spec_of(model, max_rank=8))
    assert [(problem.code, problem.found, problem.expected) for problem in problems] == [
        ("rank_too_large", "9", "at most 8")
    ]
    assert "--max-adapter-rank" in problems[0].where


@pytest.mark.reliability("T16")
def test_refuses_a_rank_that_the_tensors_do_not_have(folder: Path, spec: ModelSpec) -> None:
    change_config(folder, rank_pattern={"q_proj": 4})
    problems = refused(folder, spec)
    assert {problem.code for problem in problems} == {"shape_mismatch"}
    assert len(problems) == 4 and all("q_proj" in problem.where for problem in problems)


def test_collects_everything_at_once(folder: Path, spec: ModelSpec) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[f"{Q0}.lora_A.weight"][0, 0] = math.nan
        tensors[f"{Q0}.lora_B.weight"] = torch.ones(3, 3)
        tensors["base_model.model.nowhere.lora_A.weight"] = torch.ones(8, 64)
        tensors["extra"] = torch.ones(1)

    change_tensors(folder, spoil)
    change_config(
        folder, use_bdlora={"nblocks": 2}, tomorrow=1, target_modules=["q_proj", "v_proj", "nowhere", "k_proj"]
    )
    codes = [problem.code for problem in refused(folder, spec)]
    assert sorted(codes) == sorted(
        [
            "unsupported_feature",  # use_bdlora
            "unknown_key",  # tomorrow
            "unsupported_feature",  # extra
            "base_mismatch",  # nowhere
            "shape_mismatch",  # nowhere has no B
            "no_target",  # k_proj
            "shape_mismatch",  # B
            "nonfinite",  # A
        ]
    )


def test_tensors_are_checked_also_beside_a_broken_config(folder: Path, spec: ModelSpec) -> None:
    (folder / CONFIG).write_text("{")
    change_tensors(folder, set_item("lora_A", 0, math.nan))
    assert sorted(problem.code for problem in refused(folder, spec)) == ["malformed_file", "nonfinite"]


def test_a_config_is_checked_also_beside_a_broken_file(folder: Path, spec: ModelSpec) -> None:
    change_config(folder, use_bdlora={"nblocks": 2})
    (folder / WEIGHTS).write_bytes(b"PK\x03\x04")
    assert [problem.code for problem in refused(folder, spec)] == ["unsupported_feature", "malformed_file"]


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.reliability("T1")
@pytest.mark.parametrize(
    ("data", "found", "expected"),
    [
        (LFS, "git-lfs pointer", "git lfs pull"),
        (b"PK\x03\x04\x00\x00\x08\x08" + b"adapter_model/data.pkl", "zip", "loraplex convert"),
        (b"\x80\x02}q\x00X\x10\x00\x00\x00", "pickle", "loraplex convert"),
        (b"GGUF\x03\x00\x00\x00\x01\x00", "GGUF", "loraplex convert"),
        (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00", "gzip", "tar"),
        (b"<!DOCTYPE html><html><body>Not found", "web page", "hf download"),
    ],
)
def test_says_what_a_file_is_and_what_helps(
    data: bytes, found: str, expected: str, folder: Path, spec: ModelSpec
) -> None:
    (folder / WEIGHTS).write_bytes(data)
    (problem,) = refused(folder, spec)
    assert found in problem.found and expected in problem.expected and problem.where == WEIGHTS


def test_a_config_may_be_a_pointer_too(folder: Path, spec: ModelSpec) -> None:
    (folder / CONFIG).write_bytes(LFS)
    (problem,) = refused(folder, spec)
    assert problem.where == CONFIG and "git-lfs" in problem.found and "git lfs pull" in problem.expected


@pytest.mark.reliability("T1")
def test_a_pickle_instead_of_the_weights_is_named(folder: Path, spec: ModelSpec) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    assert inspect(folder, spec)  # beside the weights it is not read
    (folder / WEIGHTS).unlink()
    (problem,) = refused(folder, spec)
    assert "adapter_model.bin" in problem.found and problem.where == WEIGHTS
    assert "loraplex convert" in problem.expected


@pytest.mark.parametrize("name", ["adapters.safetensors", "lora-f16.gguf"])
def test_weights_in_another_format_are_named(name: str, folder: Path, spec: ModelSpec) -> None:
    (folder / WEIGHTS).rename(folder / name)
    (problem,) = refused(folder, spec)
    assert name in problem.found and "loraplex convert" in problem.expected and problem.where == WEIGHTS


def test_the_config_of_mlx_is_named(folder: Path, spec: ModelSpec) -> None:
    (folder / CONFIG).write_text('{"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 20.0}}')
    (problem,) = refused(folder, spec)
    assert "MLX" in problem.found and "loraplex convert" in problem.expected and problem.where == CONFIG


def test_the_folders_of_named_adapters_are_named(folder: Path, spec: ModelSpec) -> None:
    named = folder / "french"
    named.mkdir()
    for name in (CONFIG, WEIGHTS):
        (folder / name).rename(named / name)
    config, weights = refused(folder, spec)
    assert "french" in config.found and (config.where, weights.where) == (CONFIG, WEIGHTS)


@pytest.mark.parametrize("shape", [(0,), (0, 64)])
def test_says_where_empty_tensors_come_from(shape: tuple[int, ...], folder: Path, spec: ModelSpec) -> None:
    change_tensors(folder, lambda tensors: tensors.update({name: torch.ones(shape) for name in tensors}))
    (problem,) = refused(folder, spec)
    assert "ZeRO-3" in problem.found and "stage3_gather_16bit_weights_on_model_save" in problem.expected


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
def test_refuses_a_missing_file(missing: str, folder: Path, spec: ModelSpec) -> None:
    (folder / missing).unlink()
    (problem,) = refused(folder, spec)
    assert (problem.where, problem.code) == (missing, "malformed_file")


def test_a_config_above_the_cap_is_not_read(folder: Path, spec: ModelSpec) -> None:
    (folder / CONFIG).write_bytes(b" " * (1 << 20))
    (problem,) = refused(folder, spec)
    assert (problem.where, problem.code) == (CONFIG, "malformed_file")


def test_load_refuses_content_that_changed(folder: Path, spec: ModelSpec) -> None:
    digest = inspect(folder, spec).digest
    load(folder, spec, digest)
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-3] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    with pytest.raises(AdapterInvalid) as caught:
        load(folder, spec, digest)
    assert [problem.code for problem in caught.value.problems] == ["malformed_file"]


@pytest.mark.reliability("T3")
def test_a_config_imports_nothing(folder: Path, spec: ModelSpec) -> None:
    change_config(folder, auto_mapping={"base_model_class": "x", "parent_library": "antigravity"})
    before = set(sys.modules)
    inspect(folder, spec)
    assert set(sys.modules) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_inspects_at_the_speed_of_reading(dtype: torch.dtype, tmp_path: Path, plain: Path) -> None:
    inputs = (64 << 20) // dtype.itemsize // 8
    a, b = torch.zeros(8, inputs, dtype=dtype), torch.zeros(4, 8, dtype=dtype)
    save_file({"base_model.model.big.lora_A.weight": a, "base_model.model.big.lora_B.weight": b}, tmp_path / WEIGHTS)
    shutil.copy(plain / CONFIG, tmp_path)
    change_config(tmp_path, target_modules=["big"])
    spec = ModelSpec({"big": (inputs, 4)}, max_rank=8)
    hashing = cpu_seconds(lambda: sha256((tmp_path / WEIGHTS).read_bytes()))
    assert cpu_seconds(lambda: inspect(tmp_path, spec)) < 10 * hashing  # it hashes, too, and takes about as long
