"""Adapters of types other than LORA are converted to the delta that PEFT computes, or refused with every reason."""

import copy
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    BeftConfig,
    BOFTConfig,
    C3AConfig,
    DeftConfig,
    DeloraConfig,
    GraloraConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    MissConfig,
    OFTConfig,
    PeftConfig,
    PeftType,
    PveraConfig,
    RoadConfig,
    ShiraConfig,
    TrainableTokensConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
)
from peft.tuners.lokr.layer import factorization
from peft.tuners.oft.layer import OFTLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from adapters.errors import AdapterInvalid, Problem
from adapters.load import load
from adapters.model_spec import ModelSpec
from adapters.peft.lora_config import REFUSED_TYPES, SERVED_TYPES
from adapters.peft.lora_forms import LORA_FORMS
from adapters.runtime.base_factors import with_base
from adapters.runtime.row_maps import row_maps_of
from adapters.traits import Traits
from adapters.validation.inspect import inspect
from adapters.validation.peft_types.convert import PEFT_TYPES
from adapters.validation.peft_types.lycoris import _factorised
from adapters.validation.peft_types.oft import _divisor_near
from adapters.validation.virtual_tokens import VIRTUAL_TYPES
from adapters.weights import AdapterWeights
from tests.fixtures.adapter_factory import spec_of, tiny_llama, with_peft, write_peft_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
Q0, V0, DOWN0 = (f"{PREFIX}model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"))
TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
CONFIGS: dict[str, PeftConfig] = {
    "ADALORA": AdaLoraConfig(init_r=6, lora_alpha=9, total_step=10, **TARGETS),
    "BEFT": BeftConfig(**TARGETS),
    "BOFT": BOFTConfig(boft_block_size=8, **TARGETS),
    "C3A": C3AConfig(block_size=16, block_size_pattern={"v_proj": 8}, **TARGETS),
    "DEFT": DeftConfig(r=5, **TARGETS),
    "DEFT, qr": DeftConfig(r=5, alpha=3, decomposition_method="qr", **TARGETS),
    "DELORA": DeloraConfig(r=5, rank_pattern={"v_proj": 3}, **TARGETS),
    "GRALORA": GraloraConfig(r=6, alpha=5, gralora_k=2, hybrid_r=3, **TARGETS),
    "HRA": HRAConfig(r=6, **TARGETS),
    "HRA, gs": HRAConfig(r=4, apply_GS=True, **TARGETS),
    "IA3": IA3Config(target_modules=["q_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LOHA": LoHaConfig(r=3, alpha=6, **TARGETS),
    "LOKR": LoKrConfig(r=3, alpha=5, decompose_factor=4, **TARGETS),
    "MISS": MissConfig(r=7, **TARGETS),
    "MISS, mini": MissConfig(r=8, mini_r=4, init_weights="mini", **TARGETS),
    "OFT": OFTConfig(oft_block_size=8, **TARGETS),
    "PVERA": PveraConfig(r=12, **TARGETS),
    "ROAD": RoadConfig(group_size=16, **TARGETS),
    "ROAD, 4": RoadConfig(variant="road_4", group_size=8, **TARGETS),
    "SHIRA": ShiraConfig(r=2, **TARGETS),
    "UNILORA": UniLoraConfig(r=4, save_indices=True, **TARGETS),
    "VBLORA": VBLoRAConfig(r=4, num_vectors=20, vector_length=16, topk=3, **TARGETS),
    "VBLORA, weights": VBLoRAConfig(
        r=4, num_vectors=20, vector_length=16, topk=3, save_only_topk_weights=True, **TARGETS
    ),
    "VERA": VeraConfig(r=12, **TARGETS),
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_llama()


@pytest.fixture(scope="module")
def spec(model: LlamaForCausalLM) -> ModelSpec:
    return spec_of(model)


@pytest.fixture(scope="module")
def good(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("good")
    return {name: write_peft_adapter(model, root / name, config) for name, config in CONFIGS.items()}


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def refused(folder: Path, spec: ModelSpec) -> list[Problem]:
    """Return the problems, which are the same for `inspect` and `load`."""
    with pytest.raises(AdapterInvalid) as inspected:
        inspect(folder, spec)
    with pytest.raises(AdapterInvalid) as loaded:
        load(folder, spec)
    assert inspected.value.problems == loaded.value.problems
    assert str(folder) not in str(inspected.value.problems)
    return inspected.value.problems


# --- the tables ---


def test_the_types_that_are_served() -> None:
    assert {"LORA", *PEFT_TYPES, *LORA_FORMS, *VIRTUAL_TYPES} == set(SERVED_TYPES)
    assert {config.peft_type.value for config in CONFIGS.values()} == set(PEFT_TYPES)


def test_every_type_of_peft_is_served_or_refused_by_name() -> None:
    assert sorted([*SERVED_TYPES, *REFUSED_TYPES]) == sorted(kind.value for kind in PeftType)


@pytest.mark.parametrize("config_class", [LNTuningConfig, TrainableTokensConfig])
def test_every_key_of_a_form_of_lora_is_in_exactly_one_table(config_class: type[PeftConfig]) -> None:
    table = LORA_FORMS[config_class().peft_type].keys
    known = [*table.served, *table.harmless, *table.refused]
    assert len(known) == len(set(known))
    assert set(known) == {field.name for field in dataclasses.fields(config_class)}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_of_peft_is_in_exactly_one_table(name: str) -> None:
    table = PEFT_TYPES[CONFIGS[name].peft_type.value].keys
    known = [*table.served, *table.harmless, *table.refused]
    assert len(known) == len(set(known))
    assert set(known) == {field.name for field in dataclasses.fields(CONFIGS[name])}


@pytest.mark.parametrize("peft_type", ["XLORA", "FOURIERFT", "loha"])
def test_another_type_is_refused_with_those_that_are_served(
    peft_type: str, good: dict[str, Path], spec: ModelSpec, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(good["LOHA"], tmp_path / "adapter"))
    change_config(folder, peft_type=peft_type)
    (problem,) = [p for p in refused(folder, spec) if p.where == f"{CONFIG}: peft_type"]
    assert problem.code == "unsupported_feature" and problem.found == peft_type
    assert all(served in problem.expected for served in SERVED_TYPES)
    assert peft_type not in REFUSED_TYPES or problem.expected.endswith(REFUSED_TYPES[peft_type])


# --- what PEFT writes is served as PEFT serves it ---


def delta(folder: Path, spec: ModelSpec, module: str) -> Tensor:
    factors = load(folder, spec).factors[module]
    assert factors.a.dtype == factors.b.dtype == torch.float32
    return factors.b @ factors.a * factors.scaling


def peft_delta(layer: Any) -> Tensor:
    """Return the difference that the layer makes to its base's output weight."""
    inputs = torch.eye(layer.in_features)
    with torch.inference_mode():
        added: Tensor = layer(inputs) - layer.base_layer(inputs)
    return added.T.clone()


def reads_base(weights: AdapterWeights) -> bool:
    """Return True if the factors follow from the base's weights."""
    return bool(weights.reflections or weights.projections)


def assert_deltas_are_pefts(model: nn.Module, folder: Path, max_rank: int = 10_000) -> None:
    spec = spec_of(model, max_rank)
    reference = {
        name.removeprefix(PREFIX): module
        for name, module in with_peft(model, folder).named_modules()
        if hasattr(module, "get_delta_weight")
    }
    weights = load(folder, spec)
    if reads_base(weights):
        weights = with_base(weights, {name: module for name, module in model.named_modules() if name in spec.modules})
    assert weights.factors.keys() == reference.keys()
    for module, factors in weights.factors.items():
        expected = peft_delta(reference[module])
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(factors.b @ factors.a * factors.scaling, expected, atol=1e-6, rtol=1e-5)
        assert len(factors.a) == factors.b.shape[1] <= weights.rank == inspect(folder, spec).rank


MAPPED = {"BEFT", "BOFT", "C3A", "IA3", "OFT", "ROAD", "ROAD, 4", "SHIRA"}  # without factors


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in MAPPED])
def test_deltas_are_pefts(name: str, model: LlamaForCausalLM, good: dict[str, Path]) -> None:
    assert_deltas_are_pefts(model, good[name])


@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("factor", [-1, 0, 2, 5, 8, 100])
@pytest.mark.parametrize("r", [1, 4, 30])
def test_lokr_of_odd_sizes(r: int, factor: int, both: bool, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(13, 64), nn.Linear(64, 96), nn.Linear(96, 60))
    config = LoKrConfig(r=r, alpha=3, decompose_both=both, decompose_factor=factor, target_modules=["0", "1", "2"])
    assert_deltas_are_pefts(model, write_peft_adapter(model, tmp_path, config, scale=0.8))


@pytest.mark.parametrize("name", sorted(MAPPED - {"BEFT", "IA3"}))
def test_row_maps_give_what_pefts_layers_give(name: str, model: LlamaForCausalLM, good: dict[str, Path]) -> None:
    weights = load(good[name], spec_of(model))
    linears = {key: module for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    maps = row_maps_of(weights)
    assert len(maps) == 4 and not weights.factors
    layers = dict(with_peft(model, good[name]).base_model.model.named_modules())
    for module, own in maps.items():
        x, base = torch.randn(7, linears[module].in_features), linears[module]
        with torch.inference_mode():
            expected, plain = layers[module](x), base(x)
            y = base(x if own.before is None else own.before(x)) * weights.weight_scales.get(module, torch.ones(1))
            y = y if own.after is None else own.after(y)
            y = y if own.added is None else y + own.added(x)
        assert (expected - plain).abs().max() > 1e-2
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


def test_block_sizes_are_adjusted_as_peft_does() -> None:
    layer = OFTLayer.__new__(OFTLayer)
    for inputs in (1, 7, 60, 64, 112, 576, 4096):
        for wanted in (1, 2, 3, 5, 8, 24, 31, 32, 60, 100, 5000):
            assert _divisor_near(inputs, wanted) == layer.adjust_oft_parameters(inputs, wanted) or inputs % wanted == 0


@pytest.mark.parametrize("terms", [1, 2, 3, 4, 5, 6, 9])
@pytest.mark.parametrize("more", [{}, {"coft": True, "eps": 0.3}, {"block_share": True}])
def test_oft_rotates_as_peft_does(terms: int, more: dict[str, Any], tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(24, 10))
    config = OFTConfig(oft_block_size=6, num_cayley_neumann_terms=terms, target_modules=["0"], **more)
    folder = write_peft_adapter(model, tmp_path, config)
    (blocks,) = load(folder, spec_of(model)).block_rotations.values()
    rotation = with_peft(model, folder).base_model.model.get_submodule("0").oft_R["default"]
    expected = torch.block_diag(*blocks.expand(4, 6, 6))
    torch.testing.assert_close(rotation.get_weight(), expected, atol=1e-6, rtol=1e-5)


def test_sizes_are_factorised_as_peft_does() -> None:
    for size in [*range(1, 200), 576, 1536, 4096, 49152]:
        for factor in [-3, -1, 0, 1, 2, 5, 7, 8, 16, 64, 300]:
            assert _factorised(size, factor) == factorization(size, factor), (size, factor)


@pytest.mark.parametrize(
    ("name", "rank", "tensors"),
    [
        ("ADALORA", 6, 12),
        ("MISS", 7, 4),
        ("BEFT", 1, 4),
        ("BOFT", 1, 8),
        ("C3A", 1, 4),
        ("OFT", 1, 4),
        ("ROAD", 1, 8),
        ("SHIRA", 1, 8),
        ("DEFT", 5, 8),
        ("GRALORA", 15, 16),
        ("HRA", 6, 4),
        ("PVERA", 12, 10),
        ("UNILORA", 4, 17),
        ("IA3", 1, 6),
        ("LOHA", 9, 16),
        ("LOKR", 12, 12),
        ("VBLORA", 4, 9),
        ("VERA", 12, 10),
    ],
)
def test_reports_what_it_is(name: str, rank: int, tensors: int, good: dict[str, Path], spec: ModelSpec) -> None:
    inspected = inspect(good[name], spec)
    report = inspected.report
    modules = 6 if name == "IA3" else 4
    assert inspected.rank == rank and report["applied"] == {"modules": modules, "tensors": tensors}
    assert report["features"] == [name.lower()]
    additive = name not in ("BEFT", "BOFT", "DEFT", "HRA", "IA3", "OFT", "ROAD")
    mergeable = name != "IA3"
    traits = Traits.of(report)
    assert (traits.additive, traits.scalable, traits.mergeable) == (additive, additive, mergeable)
    assert traits.owned == (
        () if additive else ("down_proj", "q_proj", "v_proj") if name == "IA3" else ("q_proj", "v_proj")
    )
    assert inspected.nbytes == sum(t.nbytes for t in load_file(good[name] / WEIGHTS).values())
    assert load(good[name], spec, inspected.digest).digest == inspected.digest
    with pytest.raises(AdapterInvalid, match="content"):
        load(good[name], spec, "0" * 64)


def test_the_digest_covers_config_and_tensors(good: dict[str, Path], spec: ModelSpec, tmp_path: Path) -> None:
    digests = {inspect(good["LOHA"], spec).digest}
    for index, change in enumerate([{"alpha": 7}, {"inference_mode": False}]):
        folder = Path(shutil.copytree(good["LOHA"], tmp_path / str(index)))
        change_config(folder, **change)
        digests.add(inspect(folder, spec).digest)
    change_tensors(folder, lambda tensors: tensors[f"{Q0}.hada_w1_a"].view(-1)[3:4].add_(1))
    digests.add(inspect(folder, spec).digest)
    assert len(digests) == 4


def test_patterns_are_features(model: LlamaForCausalLM, spec: ModelSpec, tmp_path: Path) -> None:
    config = LoHaConfig(
        r=2, rank_pattern={"v_proj": 5}, alpha_pattern={"q_proj": 9}, layers_to_transform=[1], **TARGETS
    )
    inspected = inspect(write_peft_adapter(model, tmp_path, config), spec)
    assert inspected.rank == 25
    assert inspected.report["features"] == ["loha", "rank_pattern", "alpha_pattern", "layers_to_transform"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_half_precision_is_converted_in_float32(
    name: str, dtype: torch.dtype, good: dict[str, Path], spec: ModelSpec, tmp_path: Path
) -> None:
    """The values are rounded when they are stored, and not again."""
    halves, wide = (Path(shutil.copytree(good[name], tmp_path / kind)) for kind in ("halves", "wide"))

    def to(*dtypes: torch.dtype) -> Callable[[dict[str, Tensor]], object]:
        def change(tensors: dict[str, Tensor]) -> None:
            for key, tensor in tensors.items():
                for one in dtypes if tensor.is_floating_point() else ():
                    tensors[key] = tensors[key].to(one)

        return change

    change_tensors(halves, to(dtype))
    change_tensors(wide, to(dtype, torch.float32))
    one, two = load(halves, spec), load(wide, spec)
    for module, factors in one.factors.items():
        assert torch.equal(factors.a, two.factors[module].a) and torch.equal(factors.b, two.factors[module].b)
    for module, scale in (one.input_scales | one.output_scales).items():
        assert torch.equal(scale, (two.input_scales | two.output_scales)[module])
    for kind in ("reflections", "added_biases"):
        assert all(torch.equal(own, getattr(two, kind)[module]) for module, own in getattr(one, kind).items())


def test_ia3_scales_inputs_and_outputs(good: dict[str, Path], spec: ModelSpec) -> None:
    weights = load(good["IA3"], spec)
    stored = load_file(good["IA3"] / WEIGHTS)
    scales = {**weights.input_scales, **weights.output_scales}
    assert all(torch.equal(scale, stored[f"{PREFIX}{name}.ia3_l"].flatten()) for name, scale in scales.items())
    assert {name.rpartition(".")[2] for name in weights.input_scales} == {"down_proj"}
    assert {name.rpartition(".")[2] for name in weights.output_scales} == {"q_proj", "v_proj"}
    assert not weights.factors and weights.rank == 1


# --- refusals ---


def replace(name: str, *shape: int) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: torch.ones(shape)})


def drop(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.pop(name)


def fill(name: str, value: float, at: slice = slice(1, 2)) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[name].view(-1)[at].fill_(value)


def retype(name: str, dtype: torch.dtype) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


def both(*changes: Callable[[dict[str, Tensor]], object]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: [change(tensors) for change in changes]


BAD_TENSORS: list[tuple[str, Callable[[dict[str, Tensor]], object], str, str]] = [
    ("ADALORA", replace(f"{Q0}.lora_E", 6), f"{Q0}.lora_E", "shape_mismatch"),
    ("ADALORA", replace(f"{Q0}.lora_A", 0, 64), f"{Q0}.lora_A", "shape_mismatch"),
    ("ADALORA", drop(f"{Q0}.lora_E"), f"{Q0}.lora_E", "shape_mismatch"),
    ("ADALORA", replace(f"{Q0}.ranknum", 1), f"{Q0}.ranknum", "unsupported_feature"),
    ("ADALORA", fill(f"{Q0}.lora_B", float("nan")), f"{Q0}.lora_B", "nonfinite"),
    ("ADALORA", both(fill(f"{Q0}.lora_E", 3e30), fill(f"{Q0}.lora_A", 3e30, slice(None))), Q0, "nonfinite"),
    ("BEFT", replace(f"{Q0}.beft_bias", 64), f"{Q0}.beft_bias", "shape_mismatch"),
    ("BEFT", fill(f"{Q0}.beft_bias", float("nan")), f"{Q0}.beft_bias", "nonfinite"),
    ("BOFT", replace(f"{Q0}.boft_R", 2, 8, 8, 8), f"{Q0}.boft_R", "shape_mismatch"),
    ("BOFT", lambda tensors: tensors[f"{Q0}.boft_R"].fill_(float("nan")), f"{Q0}.boft_R", "nonfinite"),
    ("C3A", replace(f"{Q0}.c3a_kernel", 4, 4, 8), f"{Q0}.c3a_kernel", "shape_mismatch"),
    ("OFT", replace(f"{Q0}.oft_R.weight", 8, 8, 8), f"{Q0}.oft_R.weight", "shape_mismatch"),
    ("OFT", replace(f"{Q0}.oft_R", 8, 28), f"{Q0}.oft_R", "unsupported_feature"),
    ("OFT", fill(f"{Q0}.oft_R.weight", 1e30), Q0, "nonfinite"),
    ("ROAD", drop(f"{Q0}.road_alpha"), f"{Q0}.road_alpha", "shape_mismatch"),
    ("SHIRA", fill(f"{Q0}.shira_indices", 64), f"{Q0}.shira_indices", "malformed_file"),
    ("SHIRA", fill(f"{Q0}.shira_indices", -1), f"{Q0}.shira_indices", "malformed_file"),
    ("SHIRA", retype(f"{Q0}.shira_indices", torch.float32), f"{Q0}.shira_indices", "malformed_file"),
    ("SHIRA", drop(f"{Q0}.shira_indices"), f"{Q0}.shira_indices", "shape_mismatch"),
    ("DEFT", drop(f"{Q0}.deft_R"), f"{Q0}.deft_R", "shape_mismatch"),
    ("DEFT", replace(f"{Q0}.deft_P", 64, 4), f"{Q0}.deft_P", "shape_mismatch"),
    ("GRALORA", drop(f"{Q0}.gralora_A_general.weight"), f"{Q0}.gralora_A_general.weight", "shape_mismatch"),
    ("GRALORA", replace(f"{Q0}.gralora_B", 2, 6, 16), f"{Q0}.gralora_B", "shape_mismatch"),
    ("GRALORA", replace(f"{Q0}.gralora_C", 2, 6, 16), f"{Q0}.gralora_C", "unsupported_feature"),
    ("HRA", replace(f"{Q0}.hra_u", 64, 5), f"{Q0}.hra_u", "shape_mismatch"),
    ("HRA", lambda tensors: tensors[f"{Q0}.hra_u"][:, 1].fill_(0), Q0, "nonfinite"),
    ("HRA, gs", lambda tensors: tensors[f"{Q0}.hra_u"].fill_(1), Q0, "nonfinite"),
    ("PVERA", replace(f"{Q0}.pvera_lambda_d", 12), f"{Q0}.pvera_lambda_d", "shape_mismatch"),
    ("UNILORA", drop(f"{Q0}.unilora_scales_A"), f"{Q0}.unilora_scales_A", "shape_mismatch"),
    ("UNILORA", fill(f"{Q0}.unilora_indices_A", 256), f"{Q0}.unilora_indices_A", "malformed_file"),
    ("DELORA", drop(f"{Q0}.delora_w_norm"), f"{Q0}.delora_w_norm", "shape_mismatch"),
    ("DELORA", replace(f"{Q0}.delora_lambda", 5), f"{Q0}.delora_lambda", "shape_mismatch"),
    ("DELORA", fill(f"{Q0}.delora_lambda", float("nan"), slice(0, 1)), f"{Q0}.delora_lambda", "nonfinite"),
    ("IA3", replace(f"{Q0}.ia3_l", 1, 64), f"{Q0}.ia3_l", "shape_mismatch"),
    ("IA3", replace(f"{DOWN0}.ia3_l", 64, 1), f"{DOWN0}.ia3_l", "shape_mismatch"),
    ("IA3", replace(f"{Q0}.bias", 64), f"{Q0}.bias", "unsupported_feature"),
    ("IA3", fill(f"{Q0}.ia3_l", float("inf")), f"{Q0}.ia3_l", "nonfinite"),
    ("LOHA", replace(f"{Q0}.hada_t1", 3, 3, 1, 1), f"{Q0}.hada_t1", "unsupported_feature"),
    ("LOHA", replace(f"{Q0}.hada_w1_a", 64, 300), f"{Q0}.hada_w1_a", "shape_mismatch"),
    ("LOHA", drop(f"{Q0}.hada_w2_b"), f"{Q0}.hada_w2_b", "shape_mismatch"),
    ("LOHA", replace(f"{PREFIX}model.norm.hada_w1_a", 64, 3), f"{PREFIX}model.norm", "base_mismatch"),
    ("LOHA", replace("hada_w1_a", 64, 3), "hada_w1_a", "unsupported_feature"),
    ("LOHA", replace(f"{PREFIX}hada_w1_a", 64, 3), f"{PREFIX}hada_w1_a", "unsupported_feature"),
    ("LOHA", retype(f"{Q0}.hada_w1_a", torch.int64), f"{Q0}.hada_w1_a", "malformed_file"),
    ("LOHA", both(fill(f"{Q0}.hada_w1_a", 3e30), fill(f"{Q0}.hada_w2_a", 3e30)), Q0, "nonfinite"),
    ("LOKR", replace(f"{Q0}.lokr_t2", 3, 3, 1, 1), f"{Q0}.lokr_t2", "unsupported_feature"),
    ("LOKR", replace(f"{Q0}.lokr_w2", 16, 16), f"{Q0}.lokr_w2", "unsupported_feature"),
    ("LOKR", replace(f"{Q0}.lokr_w1", 64, 64), f"{Q0}.lokr_w1", "shape_mismatch"),
    ("LOKR", drop(f"{Q0}.lokr_w1"), f"{Q0}.lokr_w1", "shape_mismatch"),
    ("MISS", replace(f"{Q0}.miss_block", 8, 8, 8), f"{Q0}.miss_block", "shape_mismatch"),
    ("MISS, mini", replace(f"{Q0}.miss_block", 8, 64), f"{Q0}.miss_block", "shape_mismatch"),
    ("VBLORA", drop("base_model.vblora_vector_bank"), "base_model.vblora_vector_bank", "shape_mismatch"),
    ("VBLORA", replace("base_model.vblora_vector_bank", 20, 8), "base_model.vblora_vector_bank", "shape_mismatch"),
    ("VBLORA", fill(f"{Q0}.vblora_logits_A", float("-inf")), f"{Q0}.vblora_logits_A", "nonfinite"),
    ("VBLORA", replace(f"{Q0}.vblora_logits_A_topk_weights", 4, 4, 2), f"{Q0}.vblora_logits_A_topk_weights",
     "unsupported_feature"),
    ("VBLORA, weights", fill(f"{Q0}.vblora_logits_B_topk_indices", 20), f"{Q0}.vblora_logits_B_topk_indices",
     "malformed_file"),
    ("VBLORA, weights", fill(f"{Q0}.vblora_logits_A_topk_indices", 7, slice(0, 2)),
     f"{Q0}.vblora_logits_A_topk_indices", "malformed_file"),
    ("VBLORA, weights", retype(f"{Q0}.vblora_logits_A_topk_indices", torch.float32),
     f"{Q0}.vblora_logits_A_topk_indices", "malformed_file"),
    ("VBLORA, weights", fill(f"{Q0}.vblora_logits_A_topk_weights", -0.5), Q0, "nonfinite"),
    ("VBLORA, weights", fill(f"{Q0}.vblora_logits_A_topk_weights", 1.5), Q0, "nonfinite"),
    ("VERA", drop("base_model.vera_A"), "base_model.vera_A", "shape_mismatch"),
    ("VERA", replace("base_model.vera_B", 64, 40), "base_model.vera_B", "shape_mismatch"),
    ("VERA", replace("base_model.vera_B", 3, 12), "base_model.vera_B", "shape_mismatch"),
    ("VERA", replace(f"{V0}.vera_lambda_b", 64), f"{V0}.vera_lambda_b", "shape_mismatch"),
    ("VERA", fill("base_model.vera_A", float("inf")), "base_model.vera_A", "nonfinite"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "where", "code"), BAD_TENSORS)
def test_refuses_bad_tensors_by_name(
    name: str,
    change: Callable[[dict[str, Tensor]], object],
    where: str,
    code: str,
    good: dict[str, Path],
    spec: ModelSpec,
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(good[name], tmp_path / "adapter"))
    change_tensors(folder, change)
    problems = refused(folder, spec)
    assert (where, code) in [(problem.where, problem.code) for problem in problems]
    assert {problem.code for problem in problems} <= {code, "no_target"}  # a stray module is beyond the targets, too


def test_refuses_indices_below_zero(good: dict[str, Path], spec: ModelSpec, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good["VBLORA, weights"], tmp_path / "adapter"))
    name = f"{Q0}.vblora_logits_A_topk_indices"
    change_tensors(folder, retype(name, torch.int32))
    inspect(folder, spec)
    change_tensors(folder, fill(name, -1))
    (problem,) = refused(folder, spec)
    assert problem.where == name and problem.code == "malformed_file"


BAD_CONFIGS: list[tuple[str, dict[str, Any], str, str]] = [
    *((name, {"modules_to_save": ["lm_head"]}, "modules_to_save", "unsupported_feature") for name in CONFIGS),
    *((name, {"brand_new": 1}, "brand_new", "unknown_key") for name in CONFIGS),
    *((name, {"target_modules": 3}, "target_modules", "malformed_file") for name in CONFIGS),
    *((name, {"target_modules": ["q_proj"]}, V0, "no_target") for name in CONFIGS),
    ("ADALORA", {"bias": "lora_only"}, "bias", "unsupported_feature"),
    ("ADALORA", {"use_dora": True}, "use_dora", "unsupported_feature"),
    ("ADALORA", {"init_r": 0}, "init_r", "malformed_file"),
    ("ADALORA", {"init_r": 5}, f"{Q0}.lora_A", "shape_mismatch"),
    ("ADALORA", {"lora_alpha": "much"}, "lora_alpha", "malformed_file"),
    ("ADALORA", {"rank_pattern": [1]}, "rank_pattern", "malformed_file"),
    ("ADALORA", {"rank_pattern": {"x": [True] * 6}}, "rank_pattern.x", "malformed_file"),
    ("ADALORA", {"rank_pattern": {"x.lora_E": [True] * 5}}, "rank_pattern.x.lora_E", "malformed_file"),
    ("ADALORA", {"rank_pattern": {"x.lora_E": [1] * 6}}, "rank_pattern.x.lora_E", "malformed_file"),
    ("ADALORA", {"rank_pattern": {"x.lora_E": [True] * 6}}, "rank_pattern", "no_target"),
    ("BOFT", {"boft_block_num": 4}, "boft_block_size", "malformed_file"),
    ("BOFT", {"boft_block_size": 5}, "model.layers.0.self_attn.q_proj", "shape_mismatch"),
    ("C3A", {"block_size": 24}, "model.layers.0.self_attn.q_proj", "shape_mismatch"),
    ("OFT", {"oft_block_size": None}, "oft_block_size", "malformed_file"),
    ("OFT", {"r": 4}, "oft_block_size", "malformed_file"),
    ("OFT", {"eps": -1, "coft": True}, "eps", "malformed_file"),
    ("OFT", {"num_cayley_neumann_terms": 1000}, "num_cayley_neumann_terms", "unsupported_feature"),
    ("OFT", {"oft_block_size": 16}, f"{Q0}.oft_R.weight", "shape_mismatch"),
    ("ROAD", {"variant": "road_3"}, "variant", "unsupported_feature"),
    ("ROAD", {"group_size": 7}, "group_size", "malformed_file"),
    ("ROAD", {"group_size": 24}, "model.layers.0.self_attn.q_proj", "shape_mismatch"),
    ("SHIRA", {"r": 3}, f"{Q0}.shira_weight", "shape_mismatch"),
    ("DEFT", {"decomposition_method": "svd"}, "decomposition_method", "unsupported_feature"),
    ("DEFT", {"para": True}, f"{Q0}.deft_R", "unsupported_feature"),
    ("GRALORA", {"gralora_k": 4}, "r", "malformed_file"),
    ("GRALORA", {"gralora_k": 6}, "model.layers.0.self_attn.q_proj", "shape_mismatch"),
    ("GRALORA", {"bias": "all"}, "bias", "unsupported_feature"),
    ("HRA", {"apply_GS": 1}, "apply_GS", "malformed_file"),
    ("PVERA", {"sample_at_inference": True}, "sample_at_inference", "unsupported_feature"),
    ("UNILORA", {"save_indices": False}, "save_indices", "unsupported_feature"),
    ("UNILORA", {"theta_d_length": 255}, "base_model.unilora_theta_d", "shape_mismatch"),
    ("IA3", {"feedforward_modules": 4}, "feedforward_modules", "malformed_file"),
    ("IA3", {"feedforward_modules": ["v_proj"]}, f"{V0}.ia3_l", "shape_mismatch"),
    ("LOHA", {"r": -1}, "r", "malformed_file"),
    ("LOHA", {"r": 9}, "rank of model.layers.0.self_attn.q_proj", "rank_too_large"),
    ("LOHA", {"r": 65536}, "rank of model.layers.0.self_attn.q_proj", "rank_too_large"),
    ("LOHA", {"rank_pattern": {"(?=x)": 2}}, "rank_pattern", "unsupported_feature"),
    ("LOHA", {"alpha": 1e9}, "alpha", "malformed_file"),
    ("LOKR", {"decompose_factor": 2.5}, "decompose_factor", "malformed_file"),
    ("LOKR", {"decompose_factor": 16}, f"{Q0}.lokr_w1", "shape_mismatch"),
    ("LOKR", {"decompose_both": "yes"}, "decompose_both", "malformed_file"),
    ("MISS", {"init_weights": "bat"}, "init_weights", "unsupported_feature"),
    ("MISS, mini", {"mini_r": 5}, "model.layers.0.self_attn.q_proj", "shape_mismatch"),
    ("DELORA", {"r": 6}, f"{Q0}.delora_A", "shape_mismatch"),
    ("VBLORA", {"topk": 21}, "topk", "unsupported_feature"),
    ("VBLORA", {"vector_length": 24}, "model.layers.0.self_attn.q_proj", "shape_mismatch"),
    ("VBLORA", {"save_only_topk_weights": True}, f"{Q0}.vblora_logits_A_topk_weights", "shape_mismatch"),
    ("VBLORA", {"bias": "all"}, "bias", "unsupported_feature"),
    ("VERA", {"save_projection": False}, "save_projection", "unsupported_feature"),
    ("VERA", {"bias": "vera_only"}, "bias", "unsupported_feature"),
    ("VERA", {"r": 65}, "rank of model.layers.0.self_attn.q_proj", "rank_too_large"),
]


@pytest.mark.parametrize(("name", "changes", "where", "code"), BAD_CONFIGS)
def test_refuses_bad_configs_by_key(
    name: str, changes: dict[str, Any], where: str, code: str, good: dict[str, Path], spec: ModelSpec, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(good[name], tmp_path / "adapter"))
    change_config(folder, **changes)
    found = [(problem.where.removeprefix(f"{CONFIG}: "), problem.code) for problem in refused(folder, spec)]
    assert any(at.startswith(where) and found_code == code for at, found_code in found), found


def test_names_the_rank_that_it_would_take(model: LlamaForCausalLM, tmp_path: Path) -> None:
    folder = write_peft_adapter(model, tmp_path, LoHaConfig(r=5, target_modules=["q_proj"], layers_to_transform=[0]))
    (problem,) = refused(folder, spec_of(model, max_rank=24))
    assert (problem.found, problem.expected, problem.code) == ("25 as a LoRA", "at most 24", "rank_too_large")


def test_targets_that_the_base_lacks_are_reported(good: dict[str, Path], spec: ModelSpec, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good["LOHA"], tmp_path / "adapter"))
    change_config(folder, target_modules=["q_proj", "v_proj", "w1"])
    (note,) = inspect(folder, spec).report["notes"]
    assert "w1" in note and "q_proj" not in note


@pytest.mark.parametrize("name", ["LOHA", "IA3", "VERA"])
def test_refuses_a_file_that_lost_a_layer(name: str, good: dict[str, Path], spec: ModelSpec, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good[name], tmp_path / "adapter"))
    change_tensors(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if ".layers.1." in key])
    problems = refused(folder, spec)
    assert {problem.code for problem in problems} == {"no_target"}
    assert "layers.1." in problems[0].found and "targeted modules without tensors" in problems[0].found
    if name != "IA3":  # which has no such key
        change_config(folder, layers_to_transform=[0])
        assert inspect(folder, spec)


@pytest.mark.parametrize("name", ["LOHA", "IA3", "VERA"])
def test_float64_is_rounded_to_float32(name: str, good: dict[str, Path], spec: ModelSpec, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good[name], tmp_path / "adapter"))
    change_tensors(folder, lambda t: t.update({key: tensor.double() for key, tensor in t.items()}))
    one, other = inspect(folder, spec), inspect(good[name], spec)
    assert one.nbytes == other.nbytes and "float64" in one.report["notes"][0]
    weights, expected = load(folder, spec, one.digest), load(good[name], spec)
    assert all(torch.equal(weights.factors[m].a, expected.factors[m].a) for m in expected.factors)
    assert weights.factors.keys() == expected.factors.keys()
    change_tensors(folder, lambda t: next(iter(t.values())).view(-1)[:1].fill_(1e300))
    assert "nonfinite" in {problem.code for problem in refused(folder, spec)}


def test_says_where_empty_tensors_come_from(good: dict[str, Path], spec: ModelSpec, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good["LOHA"], tmp_path / "adapter"))
    change_tensors(folder, lambda tensors: tensors.update({name: torch.ones(0) for name in tensors}))
    assert all("zero_to_fp32" in problem.expected for problem in refused(folder, spec))


def test_vera_without_its_projections(model: LlamaForCausalLM, spec: ModelSpec, tmp_path: Path) -> None:
    config = VeraConfig(r=4, save_projection=True, **TARGETS)
    folder = write_peft_adapter(model, tmp_path, config)
    change_config(folder, save_projection=False)
    change_tensors(folder, lambda t: (t.pop("base_model.vera_A"), t.pop("base_model.vera_B")))
    problem = refused(folder, spec)[0]
    assert problem.where == f"{CONFIG}: save_projection" and "true" in problem.expected


def test_collects_everything_at_once(good: dict[str, Path], spec: ModelSpec, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good["LOHA"], tmp_path / "adapter"))
    change_config(folder, modules_to_save=["lm_head"], brand_new=1, target_modules=["q_proj", "v_proj", "k_proj"])
    change_tensors(folder, replace(f"{Q0}.hada_w1_a", 3, 3))
    change_tensors(folder, replace(f"{Q0}.hada_t1", 3, 3))
    change_tensors(folder, fill(f"{V0}.hada_w2_a", float("nan")))
    codes = [problem.code for problem in refused(folder, spec)]
    assert sorted(codes) == [
        "no_target", "nonfinite", "shape_mismatch", "unknown_key", "unsupported_feature", "unsupported_feature",
    ]  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_refuses_another_base_and_broken_files(
    name: str, good: dict[str, Path], spec: ModelSpec, tmp_path: Path
) -> None:
    other = ModelSpec({"transformer.h.0.attn.c_attn": (64, 192)}, max_rank=64)
    assert {problem.code for problem in refused(good[name], other)} == {"no_target"}
    folder = Path(shutil.copytree(good[name], tmp_path / "adapter"))
    (folder / WEIGHTS).write_bytes(b"nothing")
    change_config(folder, brand_new=1)
    assert [problem.code for problem in refused(folder, spec)] == ["unknown_key", "malformed_file"]
    (folder / WEIGHTS).unlink()
    assert "malformed_file" in [problem.code for problem in refused(folder, spec)]


def test_a_layer_that_lost_every_rank(model: LlamaForCausalLM, spec: ModelSpec, tmp_path: Path) -> None:
    """AdaLoRA saves such a layer as empty tensors."""
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    pattern = {f"{names[0]}.lora_E": [False] * 4, f"{names[1]}.lora_E": [True, False, True, True]}
    config = AdaLoraConfig(init_r=4, total_step=9, target_modules=["q_proj"], rank_pattern=copy.deepcopy(pattern))
    folder = write_peft_adapter(model, tmp_path, config)
    assert inspect(folder, spec).rank == 3
    assert delta(folder, spec, names[0]).count_nonzero() == 0
    reference = with_peft(model, folder).base_model.model.get_submodule(names[1])
    torch.testing.assert_close(delta(folder, spec, names[1]), peft_delta(reference), atol=1e-6, rtol=1e-5)


# --- forms of a LORA ---

LN0, NORM, TOKENS = (
    f"{PREFIX}model.layers.0.input_layernorm.ln_tuning_layers.weight",
    f"{PREFIX}model.norm.ln_tuning_layers.weight",
    f"{PREFIX}model.embed_tokens.trainable_tokens_delta",
)
FORMS: dict[str, PeftConfig] = {
    "LN_TUNING": LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "TRAINABLE_TOKENS": TrainableTokensConfig(token_indices=[3, 40], task_type="CAUSAL_LM"),
}


@pytest.fixture(scope="module")
def forms(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("forms")
    return {name: write_peft_adapter(model, root / name, config) for name, config in FORMS.items()}


def test_ln_tuning_has_whole_norms(forms: dict[str, Path], spec: ModelSpec) -> None:
    inspected, weights = inspect(forms["LN_TUNING"], spec), load(forms["LN_TUNING"], spec)
    stored = load_file(forms["LN_TUNING"] / WEIGHTS)
    assert len(weights.replaced) == len(stored) == 3 and not weights.factors
    assert torch.equal(weights.replaced["model.norm"]["weight"], stored[NORM])
    assert inspected.report["features"] == ["ln_tuning"] and inspected.report["applied"]["modules"] == 3
    owned = ("input_layernorm", "norm")
    assert Traits.of(inspected.report) == Traits(additive=False, owned=owned, mergeable=False)
    assert load(forms["LN_TUNING"], spec, inspected.digest).digest == inspected.digest


def test_trainable_tokens_have_rows(forms: dict[str, Path], spec: ModelSpec) -> None:
    inspected, weights = inspect(forms["TRAINABLE_TOKENS"], spec), load(forms["TRAINABLE_TOKENS"], spec)
    (rows,) = weights.tokens.values()
    assert rows.ids == (3, 40) and torch.equal(rows.values, load_file(forms["TRAINABLE_TOKENS"] / WEIGHTS)[TOKENS])
    assert inspected.report["features"] == ["trainable_tokens"]


@pytest.mark.parametrize(
    ("name", "change", "where", "code"),
    [
        ("LN_TUNING", drop(LN0), f"{CONFIG}: target_modules", "no_target"),
        ("LN_TUNING", replace(NORM, 63), NORM, "shape_mismatch"),
        ("LN_TUNING", fill(NORM, float("nan")), NORM, "nonfinite"),
        ("LN_TUNING", replace(f"{PREFIX}model.norm.weight", 64), f"{PREFIX}model.norm.weight", "unsupported_feature"),
        ("LN_TUNING", replace(f"{Q0}.ln_tuning_layers.weight", 64, 64), f"{Q0}.ln_tuning_layers.weight", "no_target"),
        ("TRAINABLE_TOKENS", replace(TOKENS, 3, 64), TOKENS, "shape_mismatch"),
        ("TRAINABLE_TOKENS", replace(f"{Q0}.lora_A.weight", 4, 64), f"{Q0}.lora_A.weight", "no_target"),
    ],
)
def test_forms_refuse_bad_tensors(
    name: str,
    change: Callable[[dict[str, Tensor]], object],
    where: str,
    code: str,
    forms: dict[str, Path],
    spec: ModelSpec,
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(forms[name], tmp_path / "adapter"))
    change_tensors(folder, change)
    assert (where, code) in [(problem.where, problem.code) for problem in refused(folder, spec)]


@pytest.mark.parametrize(
    ("name", "changes", "where", "code"),
    [
        ("LN_TUNING", {"target_modules": None}, "target_modules", "unsupported_feature"),
        ("LN_TUNING", {"target_modules": ["norm"]}, LN0, "no_target"),
        ("LN_TUNING", {"modules_to_save": ["lm_head"]}, "modules_to_save", "unsupported_feature"),
        ("LN_TUNING", {"peft_type": "LORA"}, LN0, "unsupported_feature"),
        ("TRAINABLE_TOKENS", {"token_indices": [3]}, TOKENS, "shape_mismatch"),
        ("TRAINABLE_TOKENS", {"token_indices": [3, 97]}, TOKENS, "shape_mismatch"),
        ("TRAINABLE_TOKENS", {"token_indices": "3"}, "trainable_token_indices", "malformed_file"),
        ("TRAINABLE_TOKENS", {"target_modules": ["lm_head"]}, TOKENS, "unsupported_feature"),
        ("TRAINABLE_TOKENS", {"brand_new": 1}, "brand_new", "unknown_key"),
    ],
)
def test_forms_refuse_bad_configs(
    name: str,
    changes: dict[str, Any],
    where: str,
    code: str,
    forms: dict[str, Path],
    spec: ModelSpec,
    tmp_path: Path,
) -> None:
    folder = Path(shutil.copytree(forms[name], tmp_path / "adapter"))
    change_config(folder, **changes)
    found = [(problem.where.removeprefix(f"{CONFIG}: "), problem.code) for problem in refused(folder, spec)]
    assert (where, code) in found, found
