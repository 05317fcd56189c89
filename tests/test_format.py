"""Names, digests and the config table: PEFT's meaning, without PEFT."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file

from adapters.errors import Problem
from adapters.peft.config_keys import HARMLESS_KEYS, REFUSED_KEYS, SERVED_KEYS
from adapters.peft.config_reader import KNOWN_PEFT, MAX_CONFIG_BYTES
from adapters.peft.digest import scan
from adapters.peft.lora_config import LoraSettings, parse_config
from adapters.peft.patterns import ModulePatterns
from adapters.peft.safetensors_header import read_header
from adapters.peft.tensor_names import parse_tensor_name
from tests.fixtures.timing import cpu_seconds

PLAIN = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"]}


def parse(**changes: Any) -> tuple[LoraSettings | None, list[Problem]]:
    return parse_config(json.dumps({**PLAIN, **changes}).encode())


def settings_of(**changes: Any) -> LoraSettings:
    found, problems = parse(**changes)
    assert found is not None and not problems, problems
    return found


# --- the table ---


def test_every_key_of_peft_is_in_exactly_one_table() -> None:
    known = [*SERVED_KEYS, *HARMLESS_KEYS, *REFUSED_KEYS]
    assert len(known) == len(set(known))
    assert set(known) == {field.name for field in dataclasses.fields(peft.LoraConfig)}


def test_pefts_own_defaults_are_served() -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"]).to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    found, problems = parse_config(json.dumps(config).encode())
    assert found is not None and not problems
    assert (found.r, found.lora_alpha, found.use_rslora, found.features) == (4, 8, False, ())


def test_absent_keys_have_pefts_defaults() -> None:
    found, problems = parse_config(b'{"peft_type": "LORA"}')
    assert found is not None and not problems
    defaults = peft.LoraConfig()
    assert (found.r, found.lora_alpha, found.target_modules) == (defaults.r, defaults.lora_alpha, None)


@pytest.mark.reliability("T3")
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bias", "bias_only"),
        ("bias", True),
        ("bias", ["all"]),
        ("layer_replication", [[0, 4], [2, 5]]),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 1}),
        ("velora_config", {"num_groups": 64}),
        ("monteclora_config", {"num_samples": 8}),
        ("corda_config", {"corda_method": "ipm"}),
        ("loftq_config", {"loftq_bits": 4}),
        ("lora_ga_config", {"direction": "ArBr"}),
        ("megatron_config", {"hidden_size": 1}),
        ("megatron_core", "os.path"),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", "brand new"),
        ("init_lora_weights", 0),
        ("peft_type", "OFT"),
        ("peft_type", None),
        ("peft_type", ["LORA"]),
        ("rank_pattern", {"(?=x)q_proj": 4}),
        ("alpha_pattern", {"(a)\\1": 4}),
        ("rank_pattern", {"(": 4}),
        ("rank_pattern", {"": 4}),
        ("rank_pattern", {"a" * 1001 + "*": 4}),
        ("rank_pattern", {f"a{i}*": 4 for i in range(65)}),
        ("rank_pattern", {"q_proj\n": 4}),
    ],
)
def test_refuses_a_feature_by_its_name(key: str, value: Any) -> None:
    _, problems = parse(**{key: value})
    (problem,) = problems
    assert problem.code == "unsupported_feature"
    assert problem.where == f"adapter_config.json: {key}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, empty) for key in REFUSED_KEYS for empty in (None, False, [], {})),
        ("bias", "none"),
        ("bias", "lora_only"),
        ("bias", "all"),
        ("bias", None),
        ("lora_bias", True),
        ("use_dora", True),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1, 2]),
        ("trainable_token_indices", {"embed_tokens": [1]}),
        ("target_parameters", ["experts.gate_up_proj"]),
        ("use_qalora", True),
        ("ensure_weight_tying", True),
        ("alora_invocation_tokens", [1]),
        ("megatron_core", "megatron.core"),
        ("init_lora_weights", True),
        ("init_lora_weights", "gaussian"),
        ("init_lora_weights", "orthogonal"),
        ("init_lora_weights", "eva"),
        ("init_lora_weights", "mica"),
        ("rank_pattern", {"(.+)+x": 4}),
        ("alpha_pattern", {".*q_proj": 4}),
        ("rank_pattern", {"q_proj|v_proj": 4, "layers\\.0\\..*": 3}),
        ("eva_config", {"rho": 2.0}),
        ("auto_mapping", {"base_model_class": "os.system", "parent_library": "antigravity"}),
        ("lora_dropout", 0.1),
        ("layers_to_transform", 0),
        ("target_modules", "all-linear"),
        ("target_modules", "(.+)+x"),
        ("a_key_of_tomorrow", None),
        ("a_key_of_tomorrow", False),
        ("a_key_of_tomorrow", ""),
        ("_comment", "trained on Monday"),
        ("merge_weights", True),
        ("lorap_lr_ratio", 16.0),
    ],
)
def test_serves_what_can_be_applied(key: str, value: Any) -> None:
    settings_of(**{key: value})


@pytest.mark.parametrize("value", [True, 1, 0, 0.0, "x", [0], {"a": None}])
def test_refuses_unknown_keys_with_a_value(value: Any) -> None:
    _, problems = parse(a_key_of_tomorrow=value)
    assert [problem.code for problem in problems] == ["unknown_key"]


def test_an_unknown_key_is_refused_with_the_versions() -> None:
    assert peft.__version__.startswith(f"{KNOWN_PEFT}.")
    _, (problem,) = parse(a_key_of_tomorrow=1, peft_version="0.99.1")
    assert f"PEFT {KNOWN_PEFT}" in problem.expected and "PEFT 0.99.1" in problem.expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("r", value) for value in (0, -1, 1.5, 8.0, True, "8", None, [8], 2**31, 10**4000)),
        *(("lora_alpha", value) for value in (0, -16, 10_001, True, "16", None, {}, 10**400, -(10**400))),
        ("use_dora", "yes"),
        ("lora_bias", 1),
        ("use_rslora", "yes"),
        ("use_rslora", 1),
        ("rank_pattern", [4]),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"q_proj": None}),
        ("alpha_pattern", {"q_proj": -1}),
        ("alpha_pattern", "q_proj"),
        ("target_modules", [1]),
        ("modules_to_save", "lm_head"),
        ("modules_to_save", [["lm_head"]]),
        ("target_parameters", {"experts": 1}),
        ("trainable_token_indices", [-1]),
        ("trainable_token_indices", {"embed_tokens": [True]}),
        ("trainable_token_indices", {"embed_tokens": 5}),
        ("alora_invocation_tokens", "<go>"),
        ("alora_invocation_tokens", [1] * 5000),
        ("target_modules", {"q_proj": 1}),
    ],
)
def test_refuses_meaningless_values(key: str, value: Any) -> None:
    _, problems = parse(**{key: value})
    (problem,) = problems
    assert problem.code == "malformed_file"
    assert problem.where.startswith(f"adapter_config.json: {key}")
    assert len(problem.found) <= 80


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"\xff\xfe",
        b'{"r": NaN}',
        b'{"lora_alpha": Infinity}',
        b'{"lora_alpha": -Infinity}',
        b'{"lora_alpha": 1e999}',
        b'{"r": 8, "r": 9}',
        b'{"rank_pattern": {"a": 1, "a": 2}}',
        b'{"r": ' + b"9" * 10_000 + b"}",
        b'{"a": ' + b"[" * 30_000 + b"]" * 30_000 + b"}",
        b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
        b'{"a": "' + b"x" * MAX_CONFIG_BYTES + b'"}',
    ],
)
def test_refuses_a_config_that_is_no_json_object(data: bytes) -> None:
    found, problems = parse_config(data)
    assert found is None
    assert [problem.code for problem in problems] == ["malformed_file"]


def test_lists_every_problem_of_a_config() -> None:
    _, problems = parse(use_bdlora={"n": 2}, bias="some", r=0, rank_pattern={"(": 1}, tomorrow=1)
    assert sorted(problem.code for problem in problems) == [
        "malformed_file",
        "unknown_key",
        "unsupported_feature",
        "unsupported_feature",
        "unsupported_feature",
    ]


def test_untrusted_text_is_escaped() -> None:
    _, problems = parse_config(b'{"peft_type": "LORA", "a\\r\\n\\ud800": "' + b"x" * 1000 + b'"}')
    (problem,) = problems
    assert problem.where.isprintable() and problem.where.isascii()
    json.dumps(problem.as_dict(), ensure_ascii=False).encode()


config_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from(["q_proj", 16]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)
config_keys = st.sampled_from(sorted({*SERVED_KEYS, *REFUSED_KEYS, *HARMLESS_KEYS})) | st.text(max_size=5)


@pytest.mark.reliability("T9")
@settings(max_examples=300, deadline=None)
@given(st.dictionaries(config_keys, config_values, max_size=6))
def test_any_config_is_settings_or_problems(config: dict[str, Any]) -> None:
    found, problems = parse_config(json.dumps(config).encode())
    assert found is not None or problems
    for problem in problems:
        json.dumps(problem.as_dict(), ensure_ascii=False).encode()
    if found is not None:
        assert math.isfinite(found.scaling("model.layers.0.self_attn.q_proj"))


@pytest.mark.reliability("T9")
@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=100))
def test_any_bytes_are_settings_or_problems(data: bytes) -> None:
    found, problems = parse_config(data)
    assert found is not None or problems


# --- patterns and scaling ---

dotted = st.lists(st.sampled_from(["a", "b", "ab", "q_proj", "0", "1"]), min_size=1, max_size=4).map(".".join)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["", "^"]), dotted).map("".join), unique=True, max_size=6), dotted)
def test_patterns_match_as_pefts_do(patterns: list[str], module: str) -> None:
    # PEFT lets a dot in a pattern stand for any character; with dots only between the parts of names both agree.
    theirs = get_pattern_key(patterns, module)
    numbers = {pattern: float(position) for position, pattern in enumerate(patterns)}
    assert ModulePatterns(numbers).get(module, -1.0) == numbers.get(theirs, -1.0)


EXPRESSIONS = [r".*\.layers\.(0|1)\..*q_proj", r"(q|k)_proj", r"a+b?", r"[^.]*_proj", "q_proj", r"layers\.\d+\.q_proj"]
NAMES = ["q_proj", "k_proj", "model.layers.0.q_proj", "model.layers.11.q_proj", "x.ab", "aab", "b.layers.1.mlp.q_proj"]


@pytest.mark.parametrize("first", range(len(EXPRESSIONS)))
@pytest.mark.parametrize("module", NAMES)
def test_expressions_match_as_pefts_do(first: int, module: str) -> None:
    patterns = EXPRESSIONS[first:] + EXPRESSIONS[:first]
    numbers = {pattern: float(position) for position, pattern in enumerate(patterns)}
    assert ModulePatterns(numbers).get(module, -1.0) == numbers.get(get_pattern_key(patterns, module), -1.0)


def test_a_hostile_expression_costs_time_linear_in_the_name() -> None:
    hostile = settings_of(rank_pattern={"(a|a)*" * 20 + f"{i}": 1 for i in range(60)}, alpha_pattern={"(a*)*b": 4})

    def cost(length: int) -> float:
        return cpu_seconds(lambda: [hostile.scaling("model." + "a" * length) for _ in range(20)])

    assert cost(960) < 5 * 16 * cost(60)


def test_the_first_pattern_that_matches_counts() -> None:
    wide_first = settings_of(alpha_pattern={"q_proj": 8, "layers.0.q_proj": 80})
    narrow_first = settings_of(alpha_pattern={"layers.0.q_proj": 80, "q_proj": 8})
    assert wide_first.scaling("model.layers.0.q_proj") == 1.0
    assert narrow_first.scaling("model.layers.0.q_proj") == 10.0
    assert wide_first.canonical != narrow_first.canonical


def test_scaling_of_plain_and_rank_stabilised_lora() -> None:
    assert settings_of().scaling("q_proj") == 2.0
    assert settings_of(use_rslora=True).scaling("q_proj") == 16 / math.sqrt(8)
    assert settings_of(rank_pattern={"q_proj": 2}).scaling("x.q_proj") == 8.0
    assert settings_of(rank_pattern={"^q_proj": 2}).scaling("x.q_proj") == 2.0


def test_many_patterns_cost_nothing_per_module() -> None:
    def cost(patterns: int) -> float:
        found = settings_of(rank_pattern={f"p{i}": 1 for i in range(patterns)}, alpha_pattern={})
        return cpu_seconds(lambda: [found.rank(f"model.layers.{layer}.self_attn.q_proj") for layer in range(4000)])

    assert cost(5000) < 10 * cost(50)


def test_reports_the_features_in_use() -> None:
    found = settings_of(use_rslora=True, rank_pattern={"a": 1}, alpha_pattern={"a": 1}, layers_to_transform=0)
    assert found.features == ("rslora", "rank_pattern", "alpha_pattern", "layers_to_transform")
    assert settings_of(use_dora=True, bias="lora_only").features == ("bias", "dora")
    assert settings_of(lora_bias=True, bias="none").features == ("lora_bias",)


def test_dora_and_lora_bias_exclude_each_other_as_in_peft() -> None:
    with pytest.raises(ValueError, match="lora_bias"):
        peft.LoraConfig(use_dora=True, lora_bias=True)
    _, problems = parse(use_dora=True, lora_bias=True)
    assert [(p.where, p.code) for p in problems] == [("adapter_config.json: lora_bias", "unsupported_feature")]


# --- tensor names ---


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("base_model.model.lm_head.lora_A.weight", ("lm_head", "A")),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight", ("model.layers.0.mlp.up_proj", "B")),
        ("base_model.model.q.lora_A.default.weight", ("q", "A")),
        ("base_model.model.q.lora_B.my-adapter_2.weight", ("q", "B")),
        ("base_model.model.q.lora_B.bias", ("q", "lora_bias")),
        ("base_model.model.q.lora_B.default.bias", ("q", "lora_bias")),
        ("base_model.model.q.base_layer.bias", ("q", "base_bias")),
        ("base_model.model.q.bias", ("q", "bias")),
        ("base_model.model.bias", None),
        ("base_model.model.embed_tokens.lora_embedding_A", ("embed_tokens", "embedding_A")),
        ("base_model.model.embed_tokens.lora_embedding_B", ("embed_tokens", "embedding_B")),
        ("base_model.model.e.token_adapter.trainable_tokens_delta", ("e", "tokens")),
        ("base_model.model.q.lora_magnitude_vector", ("q", "magnitude")),
        ("base_model.model.q.weight", ("q", "parameter")),
        ("base_model.model.q.base_layer.weight", ("q.base_layer", "parameter")),
        ("base_model.model.experts.base_layer.lora_A.weight", ("experts.base_layer", "A")),
        ("model.q.lora_A.weight", None),
        ("base_model.model.weight", None),
        ("base_model.model.q.we-ight", None),
        ("base_model.model.q.lora_A.weight\n", None),
        ("", None),
    ],
)
def test_tensor_names(name: str, expected: tuple[str, str] | None) -> None:
    assert parse_tensor_name(name) == expected


@pytest.mark.parametrize("filler", [".lora_A", "lora_A.", ".", "a.b"])
def test_a_long_name_costs_time_linear_in_its_length(filler: str) -> None:
    parse = parse_tensor_name.__wrapped__  # which remembers nothing

    def cost(length: int) -> float:
        name = ("base_model.model." + filler * length)[:length] + "!"
        assert parse(name) is None
        return cpu_seconds(lambda: [parse(name) for _ in range(20)])

    assert cost(1600) < 5 * 16 * cost(100)


# --- digest ---


def digest(
    folder: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None, **config: Any
) -> str:
    path = folder / "adapter_model.safetensors"
    save_file(tensors, path, metadata)
    return scan(settings_of(**config).canonical, read_header(path), path).digest


def test_the_digest_covers_the_tokenizer_beside_the_weights(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2)}
    found = [digest(tmp_path, tensors)]
    (tmp_path / "README.md").write_text("x")
    assert digest(tmp_path, tensors) == found[0]
    for name, text in (("tokenizer.json", "x"), ("tokenizer.json", "y"), ("chat_template.jinja", "y")):
        (tmp_path / name).write_text(text)
        found.append(digest(tmp_path, tensors))
    (tmp_path / "tokenizer.json").unlink()
    found.append(digest(tmp_path, tensors))
    (tmp_path / "chat_template.jinja").rename(tmp_path / "added_tokens.json")
    found.append(digest(tmp_path, tensors))
    assert len(set(found)) == 6


def test_the_digest_is_the_content(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(4.0)}
    base = digest(tmp_path, tensors)
    assert re.fullmatch("[0-9a-f]{64}", base)
    assert digest(tmp_path, tensors, {"format": "pt"}) == base
    others = [
        digest(tmp_path, {**tensors, "b": tensors["b"] + 1}),
        digest(tmp_path, {**tensors, "a": tensors["a"].reshape(3, 2)}),
        digest(tmp_path, {"a": tensors["a"], "c": tensors["b"]}),
        digest(tmp_path, {"a": tensors["a"]}),
        digest(tmp_path, {**tensors, "b": tensors["b"].view(torch.bfloat16).contiguous()}),
        digest(tmp_path, tensors, lora_alpha=32),
        digest(tmp_path, tensors, revision="x"),
    ]
    assert len({base, *others}) == 1 + len(others)


def test_order_in_the_file_and_white_space_do_not_count(tmp_path: Path) -> None:
    one, two = b"\0" * 8, b"\1" * 8
    found = []
    for order in ("xy", "yx"):
        places = {name: [8 * order.index(name), 8 * order.index(name) + 8] for name in "xy"}
        header = {name: {"dtype": "F32", "shape": [2], "data_offsets": places[name]} for name in order}
        text = json.dumps(header).encode()
        path = tmp_path / order
        path.write_bytes(len(text).to_bytes(8, "little") + text + (one + two if order == "xy" else two + one))
        config = dict(sorted(PLAIN.items(), reverse=order == "xy"))
        parsed, _ = parse_config(json.dumps(config, indent=order.index("x")).encode())
        assert parsed is not None
        found.append(scan(parsed.canonical, read_header(path), path).digest)
    assert found[0] == found[1]


def test_a_tensor_larger_than_a_chunk(tmp_path: Path) -> None:
    big = torch.arange(3_000_001, dtype=torch.float32)
    changed = big.clone()
    changed[-1] += 1
    assert digest(tmp_path, {"a": big}) == digest(tmp_path, {"a": big.clone()}) != digest(tmp_path, {"a": changed})
