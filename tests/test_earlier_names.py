"""Adapters from before transformers renamed modules and fused experts: applied as PEFT does, or refused by name."""

import dataclasses
import json
import time
import tracemalloc
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from adapters.errors import AdapterInvalid
from adapters.load import load
from adapters.model_spec import ModelSpec
from adapters.peft.earlier_names import MAX_LENGTH, EarlierNames, ExpertTensor
from adapters.validation.inspect import inspect
from server.model.loading.conversions import conversion_of
from tests.fixtures.adapter_factory import greedy, spec_of, tiny_llama, with_peft, write_adapter, write_earlier_adapter
from tests.fixtures.engine_driver import make_driver

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
SIZES |= {"num_hidden_layers": 2, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3}
MIXTRAL = MixtralConfig(**SIZES, num_local_experts=3, num_experts_per_tok=2, eos_token_id=None)
QWEN = {**SIZES, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
EXPERTS = ["w1", "w2", "w3"]
PROMPT = list(range(5, 30))


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(MIXTRAL).eval()


def spec_with_experts(model: Any) -> ModelSpec:
    """What the probe finds out about a model, without an engine."""
    spec = spec_of(model)
    experts = frozenset(name for name in spec.parameters if name.endswith("mlp.experts"))
    return dataclasses.replace(spec, gathered=experts, conversion=conversion_of(model))


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: own.clone() for name, own in change(tensors).items()}, folder / "adapter_model.safetensors")
    return folder


def refusal(folder: Path, spec: ModelSpec) -> str:
    with pytest.raises(AdapterInvalid) as error:
        inspect(folder, spec)
    return str(error.value)


# -- the rules ---------------------------------------------------------------------------------------------------------


def test_a_model_whose_names_never_changed_has_no_rules() -> None:
    assert conversion_of(tiny_llama()) is None


def test_the_rules_are_plain_data_that_the_api_process_can_read() -> None:
    conversion = conversion_of(mixtral())
    assert conversion is not None and conversion.fusions
    spec = ModelSpec({}, 16, conversion=conversion)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(spec), type=ModelSpec) == spec


def test_names_of_the_base_and_of_no_rule_are_kept() -> None:
    names = EarlierNames(spec_with_experts(mixtral()))
    kept = [
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.mlp.experts.base_layer.lora_B.weight",
        "base_model.model.model.layers.0.mlp.nothing.lora_A.weight",
        "base_model.model.model.layers.0.block_sparse_moe.gate.modules_to_save.weight",
        f"base_model.model.{'x' * MAX_LENGTH}.block_sparse_moe.gate.lora_A.weight",
    ]
    assert [names.current(name) for name in kept] == kept


def test_experts_find_their_places() -> None:
    names = EarlierNames(spec_with_experts(mixtral()))
    one = "base_model.model.model.layers.1.block_sparse_moe.experts.12.w3.lora_B.weight"
    assert names.current(one) == ExpertTensor("model.layers.1.mlp.experts", "gate_up_proj", "B", 2, 1, 12)
    router = "base_model.model.model.layers.1.block_sparse_moe.gate.lora_A.weight"
    assert names.current(router) == router.replace("block_sparse_moe", "mlp")


@pytest.mark.parametrize("piece", ["mlp.experts.", ".experts", ".experts.w1", "a.lora_"])
def test_hostile_names_take_bounded_time(piece: str) -> None:
    names = EarlierNames(spec_with_experts(mixtral()))
    hostile = f"base_model.model.{piece * MAX_LENGTH}"[: MAX_LENGTH - 8] + ".lora_."
    before = time.process_time()
    for _ in range(1000):
        names.current(hostile)
    assert time.process_time() - before < 1  # 0.06 s on two cores of a Xeon, 2026-11


# -- multimodal Gemma 3 of transformers 4.51 and before ----------------------------------------------------------------


def gemma() -> Gemma3ForConditionalGeneration:
    torch.manual_seed(0)
    text = {**SIZES, "head_dim": 8, "sliding_window": 64}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    images = {"mm_tokens_per_image": 4, "image_token_index": 5, "boi_token_index": 6, "eoi_token_index": 7}
    vision |= {"image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, **images, tie_word_embeddings=False)
    model = Gemma3ForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # PEFT wraps the vision tower, too
def test_names_of_gemma_3_from_before_its_language_model_moved(tmp_path: Path) -> None:
    model = gemma()
    folder = write_adapter(
        model, tmp_path / "adapter", scale=1.0, target_modules=r".*language_model.*\.(q_proj|up_proj)"
    )
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj", "up_proj"]}))
    rewritten(folder, lambda own: {k.replace(".model.language_model.", ".language_model.model."): own[k] for k in own})
    model.save_pretrained(tmp_path / "model")
    driver = make_driver(tmp_path / "model", tmp_path / "data")
    try:
        driver.submit("adapted", PROMPT, driver.add_adapter(folder), max_tokens=6)
        driver.submit("base", PROMPT, max_tokens=6)
        driver.run()
        assert driver.tokens("adapted") == greedy(with_peft(model, folder), PROMPT, 6)
        assert driver.tokens("base") == greedy(model, PROMPT, 6) != driver.tokens("adapted")
    finally:
        driver.engine.residency.close()


# -- experts -----------------------------------------------------------------------------------------------------------


def test_gate_and_up_without_down_do_what_the_file_means(tmp_path: Path) -> None:
    """PEFT looks for these in the place of a wrapper that it does not make, and serves the base model in silence."""
    model = mixtral()
    folder = write_earlier_adapter(model, tmp_path / "adapter", target_modules=["w1", "w3"], scale=0.3, r=4)
    model.save_pretrained(tmp_path / "model")
    tensors = load_file(folder / "adapter_model.safetensors")
    with torch.no_grad():
        for (index, layer), (half, name) in product(enumerate(model.model.layers), enumerate(("w1", "w3"))):
            for expert, weight in enumerate(layer.mlp.experts.gate_up_proj):
                own = f"base_model.model.model.layers.{index}.block_sparse_moe.experts.{expert}.{name}"
                a, b = (tensors[f"{own}.lora_{kind}.weight"] for kind in "AB")
                weight[half * 48 : (half + 1) * 48] += 16 / 4 * b @ a
    driver = make_driver(tmp_path / "model", tmp_path / "data")
    try:
        driver.submit("adapted", PROMPT, driver.add_adapter(folder), max_tokens=6)
        driver.run()
        assert driver.tokens("adapted") == greedy(model, PROMPT, 6)
    finally:
        driver.engine.residency.close()


def test_factors_are_stacked_as_peft_stacks_them(tmp_path: Path) -> None:
    model = mixtral()
    folder = write_earlier_adapter(model, tmp_path, target_modules=EXPERTS, r=2, lora_alpha=6)
    theirs = {name: own for name, own in with_peft(model, folder).named_parameters() if "lora_" in name}
    ours = load(folder, spec_with_experts(model)).parameters["model.layers.1.mlp.experts"]
    prefix = "base_model.model.model.layers.1.mlp.experts"
    for parameter, place in (("gate_up_proj", f"{prefix}.base_layer"), ("down_proj", prefix)):
        assert torch.equal(ours[parameter].a, theirs[f"{place}.lora_A.default.weight"])
        assert torch.equal(ours[parameter].b, theirs[f"{place}.lora_B.default.weight"])
        assert ours[parameter].scaling == 3


def test_the_report_counts_what_was_read_under_earlier_names(tmp_path: Path) -> None:
    model = mixtral()
    folder = write_earlier_adapter(model, tmp_path, target_modules=["q_proj", *EXPERTS])
    found = inspect(folder, spec_with_experts(model))
    assert found.rank == 8
    assert found.report["notes"] == ["the names of 36 tensors are those of an earlier transformers"]
    assert found.report["features"] == ["target_parameters"]
    assert found.report["traits"] == {"additive": False, "mergeable": False}


REFUSED: dict[str, tuple[dict[str, Any], Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "one of two that are fused": (
        {"target_modules": ["w1", "q_proj"]},
        dict,
        "target_modules: found w1, expected w3 as well",
    ),
    "all tensors of an expert lost": (
        {"target_modules": EXPERTS},
        lambda own: {k: t for k, t in own.items() if "layers.0.block_sparse_moe.experts.1.w2" not in k},
        "layers.0.mlp.experts.down_proj: found 2 of 6 factors missing",
    ),
    "all experts of a layer lost": (
        {"target_modules": EXPERTS},
        lambda own: {k: t for k, t in own.items() if "layers.0.block_sparse_moe.experts" not in k},
        "model.layers.0.mlp.experts",
    ),
    "the router of a layer lost": (
        {"target_modules": ["gate"]},
        lambda own: {k: t for k, t in own.items() if "layers.0." not in k},
        "1 targeted module without tensors: model.layers.0.mlp.gate",
    ),
    "an expert too many": (
        {"target_modules": EXPERTS},
        lambda own: own | {k.replace("experts.2.", "experts.7."): t for k, t in own.items() if "experts.2.w2" in k},
        "experts.7.w2.lora_A.weight: found an expert the base model lacks",
    ),
    "no target": ({"target_modules": ["q_proj"], "written": ["q_proj", *EXPERTS]}, dict, "found a module beyond them"),
    "DoRA": ({"target_modules": EXPERTS, "use_dora": True}, dict, "found DoRA or lora_bias on experts"),
    "a rank that the config does not have": (
        {"target_modules": EXPERTS, "r": 4},
        lambda own: {k: t[:3] if "0.w1.lora_A" in k else t for k, t in own.items()},
        "experts.0.w1.lora_A.weight: found [3, 32], expected [4, 32]",
    ),
    "a pattern for one of two that are fused": (
        {"target_modules": EXPERTS, "rank_pattern": {"w1": 3}},
        dict,
        "w1.lora_A.weight: found [3, 32], expected [8, 32]",
    ),
    "too large a rank": ({"target_modules": EXPERTS, "r": 65}, dict, "(--max-adapter-rank): found 65"),
    "an unknown projection": (
        {"target_modules": EXPERTS},
        lambda own: {k.replace("experts.0.w2", "experts.0.w4"): t for k, t in own.items()},
        "experts.0.w4.lora_A.weight: found a module the base model lacks",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_cannot_convert_is_refused_by_name(case: str, tmp_path: Path) -> None:
    settings, change, reason = REFUSED[case]
    model = mixtral()
    folder = rewritten(write_earlier_adapter(model, tmp_path, **settings), change)
    assert reason in refusal(folder, spec_with_experts(model))


@pytest.mark.parametrize("targets", [["gate_proj", "up_proj", "down_proj"], "all-linear"])
def test_dense_layers_that_peft_forgets_are_refused(targets: Any, tmp_path: Path) -> None:
    """PEFT looks for these targets among the experts' parameters alone, and drops the tensors of the dense layers."""
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**QWEN, mlp_only_layers=[0])).eval()
    written = ["gate_proj", "up_proj", "down_proj", "gate"]
    if targets == "all-linear":
        written += ["q_proj", "k_proj", "v_proj", "o_proj"]
    folder = tmp_path / "dense"
    write_earlier_adapter(model, folder, target_modules=targets, written=written)
    found = refusal(folder, spec_with_experts(model))
    assert "layers.0.mlp.down_proj" in found and "found a module beyond them, expected only targeted modules" in found


# -- size --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_header_of_many_experts_takes_bounded_time_and_memory(tmp_path: Path) -> None:
    """48 layers of 128 experts with three projections: 36,864 tensors, 5 MB of names."""
    torch.manual_seed(0)
    with torch.device("meta"):
        conversion = conversion_of(Qwen3MoeForCausalLM(Qwen3MoeConfig(**QWEN)))
    layers, experts, size = 48, 128, 8
    shapes = {"gate_up_proj": (experts, 2 * size, size), "down_proj": (experts, size, size)}
    parameters = {f"model.layers.{layer}.mlp.experts": shapes for layer in range(layers)}
    spec = ModelSpec({}, 16, parameters=parameters, gathered=frozenset(parameters), conversion=conversion)  # type: ignore[arg-type]
    names = ["gate_proj", "up_proj", "down_proj"]
    header: dict[str, Any] = {}
    for layer, expert, name, kind in product(range(layers), range(experts), names, "AB"):
        start = len(header) * 4 * size
        entry = {"dtype": "F32", "shape": [1, size] if kind == "A" else [size, 1], "data_offsets": [start, start + 32]}
        header[f"base_model.model.model.layers.{layer}.mlp.experts.{expert}.{name}.lora_{kind}.weight"] = entry
    text = json.dumps(header).encode()
    assert len(header) == 36_864 and len(text) > 4 << 20
    data = bytes(len(header) * 4 * size)
    (tmp_path / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "target_modules": names}))
    before = time.process_time()
    found = inspect(tmp_path, spec)
    assert time.process_time() - before < 20  # 2 s on two cores of a Xeon, 2026-11
    assert found.report["applied"] == {"modules": layers, "tensors": len(header)}
    tracemalloc.start()
    inspect(tmp_path, spec)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80 << 20  # 37 MB
