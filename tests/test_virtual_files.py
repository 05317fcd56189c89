"""Files of virtual tokens: every key of PEFT is in a table, and what cannot be served is refused by name."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.errors import AdapterInvalid, Problem
from adapters.load import load
from adapters.model_spec import ModelSpec
from adapters.peft.lora_config import SERVED_TYPES, VIRTUAL_TOKEN_TYPES
from adapters.traits import Traits
from adapters.validation.inspect import check_files, inspect
from adapters.validation.virtual_tokens import VIRTUAL_TYPES
from tests.fixtures.adapter_factory import spec_of, tiny_llama, with_peft
from tests.fixtures.virtual_tokens import virtual_configs, write_virtual

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOKENS = 6
CONFIGS = virtual_configs(TOKENS)


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    return spec_of(tiny_llama())


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("virtual")
    return {name: write_virtual(tiny_llama(), root / name, name, TOKENS) for name in CONFIGS}


def changed(folder: Path, target: Path, **config: Any) -> Path:
    shutil.copytree(folder, target)
    own = {**json.loads((target / CONFIG).read_text()), **config}
    (target / CONFIG).write_text(json.dumps(own))
    return target


def refused(folder: Path, spec: ModelSpec) -> list[Problem]:
    """The problems, which `load` finds as `inspect` does."""
    with pytest.raises(AdapterInvalid) as inspected:
        inspect(folder, spec)
    with pytest.raises(AdapterInvalid) as loaded:
        load(folder, spec)
    assert inspected.value.problems == loaded.value.problems
    return inspected.value.problems


def test_the_types() -> None:
    assert {config.peft_type.value for config in CONFIGS.values()} == set(VIRTUAL_TYPES) == set(VIRTUAL_TOKEN_TYPES)
    assert set(VIRTUAL_TYPES) < set(SERVED_TYPES)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_key_of_peft_is_in_exactly_one_table(name: str) -> None:
    table = VIRTUAL_TYPES[CONFIGS[name].peft_type.value].keys
    known = [*table.served, *table.harmless, *table.refused]
    assert len(known) == len(set(known))
    assert set(known) == {field.name for field in dataclasses.fields(CONFIGS[name])}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_values_are_those_of_peft_s_prompt(name: str, written: dict[str, Path], spec: ModelSpec) -> None:
    peft = with_peft(tiny_llama(), written[name])
    tokens = load(written[name], spec).virtual
    assert tokens is not None
    task = {"task_ids": torch.tensor([0])} if name.startswith("MULTI") else {}
    prompt = peft.get_prompt(1, **task)
    if tokens.is_prefix:
        expected = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in prompt.layers])
        assert torch.equal(tokens.values, expected.permute(3, 0, 1, 2, 4))  # of [layers, 2, heads, tokens, head_dim]
    else:
        assert torch.equal(tokens.values, prompt[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_report(name: str, written: dict[str, Path], spec: ModelSpec) -> None:
    inspected = inspect(written[name], spec)
    check_files(written[name])
    is_prefix = name.startswith(("PREFIX", "CARTRIDGE"))
    traits = Traits(additive=False, mergeable=False, virtual_tokens=TOKENS, has_prefix=is_prefix)
    assert Traits.of(inspected.report) == traits
    assert inspected.report["applied"]["tensors"] == (3 if name.startswith("MULTI") else 1)
    assert (inspected.rank, inspected.target_modules) == (1, ())


@pytest.mark.parametrize(
    ("name", "config", "where", "code"),
    [
        ("PROMPT_TUNING", {"task_type": "SEQ_2_SEQ_LM", "num_transformer_submodules": 2}, "task_type", None),
        ("PROMPT_TUNING", {"num_transformer_submodules": 2}, "num_transformer_submodules", "unsupported_feature"),
        ("P_TUNING", {"task_type": "SEQ_CLS"}, "task_type", "unsupported_feature"),
        ("P_TUNING", {"task_type": None}, "task_type", "unsupported_feature"),
        ("PREFIX_TUNING", {"task_type": "TOKEN_CLS"}, "task_type", "unsupported_feature"),
        ("CARTRIDGE", {"modules_to_save": ["lm_head"]}, "modules_to_save", "unsupported_feature"),
        ("CARTRIDGE", {"num_layers": 3}, "num_layers", "base_mismatch"),
        ("CARTRIDGE", {"num_attention_heads": 4}, "num_attention_heads", "base_mismatch"),
        ("PREFIX_TUNING", {"token_dim": 64}, "token_dim", "base_mismatch"),
        ("CPT", {"token_dim": 32}, "token_dim", "base_mismatch"),
        ("CPT", {"cpt_token_ids": [1, 2]}, "prompt_embeddings", "shape_mismatch"),
        ("CPT", {"cpt_token_ids": "text"}, "cpt_token_ids", "malformed_file"),
        ("PROMPT_TUNING", {"num_virtual_tokens": 7}, "prompt_embeddings", "shape_mismatch"),
        ("PROMPT_TUNING", {"num_virtual_tokens": 0}, "num_virtual_tokens", "malformed_file"),
        ("PROMPT_TUNING", {"num_virtual_tokens": "6"}, "num_virtual_tokens", "malformed_file"),
        ("PROMPT_TUNING", {"a_new_key": 1}, "a_new_key", "unknown_key"),
        ("MULTITASK_PROMPT_TUNING", {"num_tasks": 2}, "num_tasks", "unsupported_feature"),
        ("MULTITASK_PROMPT_TUNING", {"num_ranks": 3}, "prefix_task_cols", "shape_mismatch"),
        ("PROMPT_TUNING", {"peft_type": "PREFIX_TUNING"}, "token_dim", "base_mismatch"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    name: str, config: dict[str, Any], where: str, code: str | None, written: dict[str, Path], spec: ModelSpec,
    tmp_path: Path,
) -> None:  # fmt: skip
    problems = refused(changed(written[name], tmp_path / "adapter", **config), spec)
    (found,) = [problem for problem in problems if problem.where.endswith(where)]
    assert code is None or found.code == code


Change = Callable[[dict[str, torch.Tensor]], None]
TENSORS: dict[str, tuple[Change, str, str]] = {
    "none": (lambda t: t.update(other=t.pop("prompt_embeddings")), "prompt_embeddings", "shape_mismatch"),
    "another": (lambda t: t.update(more=torch.zeros(2)), "more", "unsupported_feature"),
    "too few": (
        lambda t: t.update(prompt_embeddings=t["prompt_embeddings"][1:]), "prompt_embeddings", "shape_mismatch",
    ),
    "NaN": (lambda t: t["prompt_embeddings"].fill_(np.nan), "prompt_embeddings", "nonfinite"),
    "infinity": (lambda t: t["prompt_embeddings"].fill_(np.inf), "prompt_embeddings", "nonfinite"),
    "beyond float32": (
        lambda t: t.update(prompt_embeddings=t["prompt_embeddings"].double() + 1e200), "prompt_embeddings", "nonfinite",
    ),
    "emptied": (
        lambda t: t.update(prompt_embeddings=torch.zeros(0)), "prompt_embeddings", "shape_mismatch",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
@pytest.mark.parametrize("name", ["P_TUNING", "CARTRIDGE"])
def test_tensors_that_are_not_those_of_the_config(
    name: str, case: str, written: dict[str, Path], spec: ModelSpec, tmp_path: Path
) -> None:
    change, where, code = TENSORS[case]
    folder = changed(written[name], tmp_path / "adapter")
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    problems = {(problem.where, problem.code) for problem in refused(folder, spec)}
    assert problems - {("other", "unsupported_feature")} == {(where, code)}


def test_a_product_beyond_float32(written: dict[str, Path], spec: ModelSpec, tmp_path: Path) -> None:
    folder = changed(written["MULTITASK_PROMPT_TUNING"], tmp_path / "adapter")
    save_file({name: t.sign() * 1e30 for name, t in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    (problem,) = refused(folder, spec)
    assert (problem.where, problem.code) == ("prompt_embeddings", "nonfinite")


@pytest.mark.parametrize("kv", [(), ((2, 16), (2, 32))], ids=["unknown", "layers that differ"])
def test_a_prefix_needs_layers_of_one_shape(
    kv: tuple[tuple[int, int], ...], written: dict[str, Path], spec: ModelSpec
) -> None:
    (problem,) = refused(written["CARTRIDGE"], dataclasses.replace(spec, kv=kv))
    assert problem.where == f"{CONFIG}: peft_type" and "one shape" in problem.expected
    inspect(written["P_TUNING"], dataclasses.replace(spec, kv=kv))


def test_embeddings_need_a_base_that_reads_its_tokens_once(written: dict[str, Path], spec: ModelSpec) -> None:
    rereading = dataclasses.replace(spec, rereads_tokens=True)
    (problem,) = refused(written["CPT"], rereading)
    assert problem.where == f"{CONFIG}: peft_type" and "input embedding alone" in problem.expected
    inspect(written["CARTRIDGE"], rereading)


def test_float64_is_rounded_and_said(written: dict[str, Path], spec: ModelSpec, tmp_path: Path) -> None:
    folder = changed(written["CPT"], tmp_path / "adapter")
    save_file({name: t.double() for name, t in load_file(folder / WEIGHTS).items()}, folder / WEIGHTS)
    assert "float64" in inspect(folder, spec).report["notes"][0]


def test_sizes_that_the_config_leaves_to_the_base(written: dict[str, Path], spec: ModelSpec, tmp_path: Path) -> None:
    sizes = dict.fromkeys(("token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules"))
    inspect(changed(written["CARTRIDGE"], tmp_path / "adapter", **sizes), spec)
