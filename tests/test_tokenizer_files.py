"""An adapter's tokenizer files: their content, and the reasons to refuse them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import AdapterInvalid
from adapters.peft.tokenizer_files import (
    BaseTokens,
    TokenizerFiles,
    check_tokenizer,
    examine_tokenizer,
    read_tokenizer_files,
)
from adapters.traits import Traits
from adapters.validation.inspect import inspect
from tests.fixtures.adapter_factory import spec_of, tiny_llama, write_adapter
from tests.fixtures.api_server import EOS, TEMPLATE, tokenizer_files

JSON = json.loads(tokenizer_files("<tool>")["tokenizer.json"])
LETTER, END, TOOL = 64, 256, 258  # "a" of the 256 bytes, <|end|>, and after <|start|> the added one


def write(folder: Path, files: Mapping[str, Any]) -> Path:
    """Write objects as JSON, and everything else unchanged."""
    for name, content in files.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name).write_bytes(data)
    return folder


def problems(folder: Path, files: Mapping[str, Any], vocab_size: int | None = None) -> list[str]:
    found = check_tokenizer(write(folder, files), vocab_size)
    return [f"{problem.where}: {problem.found}; {problem.expected}" for problem in found]


def test_reads_what_transformers_saves(tmp_path: Path) -> None:
    files = tokenizer_files("<tool>", bos_token="<tool>")
    assert problems(tmp_path, files) == []
    found = read_tokenizer_files(tmp_path)
    assert found.chat_template == TEMPLATE and found.features == ("tokenizer", "chat_template")
    assert found.special_tokens["eos_token"] == EOS and found.special_tokens["bos_token"] == "<tool>"
    assert found.build().encode("a<tool>").ids[-1] == TOOL


def test_an_empty_folder_declares_nothing(tmp_path: Path) -> None:
    assert problems(tmp_path, {}) == []
    assert read_tokenizer_files(tmp_path) == TokenizerFiles() and TokenizerFiles().features == ()


def test_the_report_lists_them(tmp_path: Path) -> None:
    model = tiny_llama(vocab_size=300)
    write_adapter(model, tmp_path)
    plain = inspect(tmp_path, spec_of(model))
    assert "traits" not in plain.report
    write(tmp_path, tokenizer_files("<tool>"))
    found = inspect(tmp_path, spec_of(model))
    assert found.report["features"] == ["tokenizer", "chat_template"] and found.digest != plain.digest
    assert Traits.of(found.report) == Traits(tokenizer=True, chat_template=True)
    write(tmp_path, {"chat_template.jinja": b"<tool>"})
    with pytest.raises(AdapterInvalid, match=f"token id {TOOL}, expected ids below {TOOL}"):
        inspect(tmp_path, spec_of(tiny_llama(vocab_size=TOOL)))
    write(tmp_path, tokenizer_files("<tool>"))
    (note,) = inspect(tmp_path, spec_of(tiny_llama(vocab_size=TOOL))).report["notes"]
    assert f"<tool> ({TOOL})" in note
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterInvalid) as refused:
        inspect(tmp_path, spec_of(model))
    assert {"tokenizer.json"} < {problem.where for problem in refused.value.problems}


def test_no_class_that_a_config_names_matters(tmp_path: Path) -> None:
    config = {"auto_map": {"AutoTokenizer": ["x--y.Z", None]}, "trust_remote_code": True, "tokenizer_class": "Evil"}
    assert problems(tmp_path, {"tokenizer.json": JSON, "tokenizer_config.json": config}) == []


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, [LETTER]),
        ({"bos_token": EOS}, [LETTER]),
        ({"bos_token": EOS, "add_bos_token": True}, [END, LETTER]),
        ({"eos_token": {"content": EOS}, "add_eos_token": True, "add_bos_token": True}, [LETTER, END]),
        ({"bos_token": EOS, "add_bos_token": False}, [LETTER]),
    ],
)
def test_bos_and_eos_around_a_text(tmp_path: Path, config: dict[str, Any], expected: list[int]) -> None:
    files = {"tokenizer.json": JSON, "tokenizer_config.json": config}
    assert problems(tmp_path, files) == []
    assert read_tokenizer_files(tmp_path).build().encode("a").ids == expected


def test_a_named_token_becomes_a_special_one(tmp_path: Path) -> None:
    write(tmp_path, {"tokenizer.json": JSON, "special_tokens_map.json": {"eos_token": "a"}})
    tokenizer = read_tokenizer_files(tmp_path).build()
    assert tokenizer.decode(tokenizer.encode("bab").ids, skip_special_tokens=True) == "bb"


def test_nothing_is_cut_or_padded(tmp_path: Path) -> None:
    padding = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
    }
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    write(tmp_path, {"tokenizer.json": {**JSON, "truncation": cut, "padding": {**padding, "pad_token": "a"}}})
    assert len(read_tokenizer_files(tmp_path).build().encode("abcd").ids) == 4


def test_templates_have_several_places(tmp_path: Path) -> None:
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    write(tmp_path, {"tokenizer_config.json": {"chat_template": several}})
    assert read_tokenizer_files(tmp_path).chat_template == "d"
    assert read_tokenizer_files(tmp_path).features == ("chat_template",)
    write(tmp_path, {"chat_template.jinja": b"j"})
    assert read_tokenizer_files(tmp_path).chat_template == "j"


def test_ids_stay_within_the_vocabulary(tmp_path: Path) -> None:
    assert problems(tmp_path, {"tokenizer.json": JSON}, TOOL + 1) == []
    assert problems(tmp_path, {}, TOOL) == []  # an added token without an embedding, which no prompt need have
    assert problems(tmp_path, {}, LETTER) == [f"tokenizer.json: token id {END - 1}; ids below {LETTER}"]
    huge = {**JSON, "model": {**JSON["model"], "vocab": {**JSON["model"]["vocab"], "zz": 1 << 31}}}
    assert problems(tmp_path, {"tokenizer.json": huge}) == ["tokenizer.json: token id 2147483648; ids below 1048576"]


@pytest.mark.parametrize(
    "beside",
    [
        {"chat_template.jinja": b"{{ x }}<tool>"},
        {"tokenizer_config.json": {"eos_token": "<tool>"}},
        {"tokenizer_config.json": {"bos_token": "<tool>", "add_bos_token": True}},
        {"tokenizer.json": {**JSON, "model": {**JSON["model"], "vocab": {**JSON["model"]["vocab"], "zz": TOOL + 5}}}},
    ],
)
def test_a_token_that_is_used_needs_an_embedding(tmp_path: Path, beside: dict[str, Any]) -> None:
    (problem,) = problems(tmp_path, {"tokenizer.json": JSON, **beside}, TOOL)
    assert f"; ids below {TOOL}" in problem


def test_a_token_for_padding_alone_may_lie_beyond_the_vocabulary(tmp_path: Path) -> None:
    pad = {"pad_token": "<tool>"}
    files = {"tokenizer.json": JSON, "tokenizer_config.json": pad, "added_tokens.json": {"<tool>": TOOL}}
    assert problems(tmp_path, files, TOOL) == []
    assert examine_tokenizer(tmp_path, TOOL + 1) == ([], [])
    _, (note,) = examine_tokenizer(tmp_path, TOOL)
    assert (
        note == f"tokenizer.json: the model has no embedding for <tool> ({TOOL}); a prompt with such a token is refused"
    )


BASE_TOKENS = BaseTokens({"<s>": 1, "</s>": 2, "<tool>": TOOL, "a": LETTER}.get, "</s>")


@pytest.mark.parametrize(
    ("files", "found", "notes"),
    [
        ({"added_tokens.json": {"<tool>": TOOL}}, [], []),
        ({"added_tokens.json": {"<tool>": TOOL, "[PAD]": TOOL + 1}}, [], ["[PAD]"]),
        ({"added_tokens.json": {"<tool>": TOOL - 1}}, ["added_tokens.json: <tool> as 257, which is no token"], []),
        ({"added_tokens.json": {"<new>": 9}}, ["added_tokens.json: <new> as 9, which is no token"], []),
        ({"tokenizer_config.json": {"eos_token": "a"}}, [], []),
        ({"tokenizer_config.json": {"eos_token": "<none>"}}, [], ["eos_token <none>"]),
        ({"added_tokens.json": {}, "special_tokens_map.json": {"eos_token": "</s>", "pad_token": "</s>"}}, [], []),
    ],
)
def test_a_slow_tokenizer_has_the_tokens_of_the_base(
    tmp_path: Path, files: dict[str, Any], found: list[str], notes: list[str]
) -> None:
    """Its tokenizer.model is not read: the base's tokenizer is used, with the end token of the configs."""
    reasons, said = examine_tokenizer(write(tmp_path, files), TOOL + 1, BASE_TOKENS)
    texts = [f"{problem.where}: {problem.found}" for problem in reasons]
    assert len(texts) == len(found) and all(a.startswith(b) for a, b in zip(texts, found, strict=True))
    assert len(said) == len(notes) and all(b in a for a, b in zip(said, notes, strict=True))
    if reasons:
        assert "save_pretrained" in reasons[0].expected


def test_an_end_token_alone_is_a_trait(tmp_path: Path) -> None:
    model = tiny_llama(vocab_size=300)
    write_adapter(model, tmp_path)
    for end, traits in (("a", Traits(eos_token=True)), ("</s>", Traits()), ("<none>", Traits())):
        write(tmp_path, {"tokenizer_config.json": {"eos_token": end}})
        report = inspect(tmp_path, spec_of(model), BASE_TOKENS).report
        assert Traits.of(report) == traits and report["features"] == ["eos_token"] * traits.eos_token


def around(token_id: int, **changes: Any) -> dict[str, Any]:
    """A tokenizer that begins every text with a token that may not exist."""
    special = {"Q": {"id": "Q", "ids": [token_id], "tokens": ["Q"]}}
    single = [{"SpecialToken": {"id": "Q", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    processor = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": special, **changes}
    return {**JSON, "post_processor": processor}


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"tokenizer.json": b"\xff"}, "tokenizer.json: bytes that are not UTF-8"),
        ({"tokenizer.json": b"{}"}, "tokenizer.json: Object missing required field `model`"),
        ({"tokenizer.json": b"[" * 100_000}, "tokenizer.json: "),
        ({"tokenizer.json": {**JSON, "pre_tokenizer": {"type": "Nope"}}}, "tokenizer.json: "),
        ({"tokenizer.json": around(1 << 30)}, "tokenizer.json: token id 1073741824 around a text"),
        ({"tokenizer.json": around(1, special_tokens={})}, "tokenizer.json: "),  # a panic in the library
        ({"tokenizer.json": JSON, "added_tokens.json": {"<tool>": 7}}, f"tokenizer.json: id {TOOL}"),
        ({"tokenizer.json": JSON, "added_tokens.json": {"<x>": 300}}, "tokenizer.json: no such id"),
        ({"added_tokens.json": {"<tool>": TOOL}}, "added_tokens.json: tokens without a tokenizer"),
        ({"added_tokens.json": {"<tool>": "7"}}, "added_tokens.json: a value that is no number"),
        ({"tokenizer.json": JSON, "tokenizer_config.json": {"eos_token": "<x>"}}, "tokenizer.json: no such id"),
        (
            {"tokenizer.json": JSON, "tokenizer_config.json": {"added_tokens_decoder": {"5": {"content": "<tool>"}}}},
            f"tokenizer.json: id {TOOL}",
        ),
        (
            {"tokenizer_config.json": {"added_tokens_decoder": {"-5": "x"}}},
            "tokenizer_config.json: added_tokens_decoder",
        ),
        ({"tokenizer_config.json": b"{"}, "tokenizer_config.json: no JSON"),
        ({"tokenizer_config.json": b"[" * 100_000}, "tokenizer_config.json: no JSON"),
        ({"tokenizer_config.json": b'{"a": 1, "a": 2}'}, "tokenizer_config.json: no JSON"),
        ({"tokenizer_config.json": b'{"eos_token": "\\ud800"}'}, "tokenizer_config.json: no JSON"),
        ({"tokenizer_config.json": [1]}, "tokenizer_config.json: a list"),
        ({"tokenizer_config.json": {"eos_token": 5}}, "tokenizer_config.json: eos_token: 5"),
        ({"special_tokens_map.json": {"bos_token": ""}}, "special_tokens_map.json: bos_token: "),
        ({"tokenizer_config.json": {"chat_template": 5}}, "tokenizer_config.json: chat_template: 5"),
        ({"tokenizer_config.json": {"chat_template": [{"name": "x"}]}}, "tokenizer_config.json: chat_template: a list"),
        ({"chat_template.jinja": b"\xff"}, "chat_template.jinja: bytes that are not UTF-8"),
    ],
)
def test_refusals(tmp_path: Path, files: dict[str, Any], found: str) -> None:
    (problem,) = problems(tmp_path, files)
    assert problem.startswith(found) and problem.isprintable() and len(problem) < 500
