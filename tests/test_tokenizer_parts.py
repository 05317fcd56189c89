"""Tokenizers of strangers: those of the usual families are admitted, programs without bounds are refused unbuilt."""

import base64
import functools
import importlib
import inspect
import json
import pkgutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import transformers.models
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from transformers.tokenization_utils_tokenizers import TokenizersBackend

from adapters.errors import AdapterInvalid
from adapters.peft import tokenizer_files, tokenizer_json
from adapters.peft.known_expressions import REPLACEMENTS, SPLITS
from adapters.peft.tokenizer_files import TokenizerFiles
from adapters.peft.tokenizer_json import admitted

VOCABULARY = {chr(code): code - 97 for code in range(97, 123)} | {"<unk>": 26}
GROWS = {"type": "Replace", "pattern": {"String": "q"}, "content": "q" * 10}
EVIL = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
NESTED = {"type": "Sequence", "decoders": [{"type": "Sequence", "decoders": [GROWS]}]}


def made(**parts: Any) -> dict[str, Any]:
    model = {"type": "WordLevel", "vocab": VOCABULARY, "unk_token": "<unk>"}
    return {"version": "1.0", "added_tokens": [], "model": model, **parts}


def charsmap(*replacements: str) -> dict[str, str]:
    texts = b"".join(text.encode() + b"\0" for text in replacements)
    data = (4).to_bytes(4, "little") + bytes(4) + texts
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def without_index(nbytes: int) -> dict[str, str]:
    """A map whose index claims that many bytes, for which the library would allocate twice as many."""
    data = nbytes.to_bytes(4, "little") + bytes(8)
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(data).decode()}


def sequence(kind: str, *parts: Any) -> dict[str, Any]:
    return {"type": "Sequence", kind: list(parts)}


def added(content: str, number: int = 1) -> list[dict[str, Any]]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return [{"id": 27 + i, "content": content, **flags} for i in range(number)]


def template(*single: str, ids: int = 1) -> dict[str, Any]:
    parts: dict[str, dict[str, Any]] = {
        "A": {"Sequence": {"id": "A", "type_id": 0}},
        "x": {"SpecialToken": {"id": "x", "type_id": 0}},
    }
    tokens = {"x": {"id": "x", "ids": [1] * ids, "tokens": ["x"] * ids}}
    return {
        "type": "TemplateProcessing",
        "single": [parts[one] for one in single],
        "pair": [],
        "special_tokens": tokens,
    }


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"normalizer": sequence("normalizers", *[GROWS] * 9)}, "normalizer"),  # 3 kB that ask for 40 GB
    ({"decoder": sequence("decoders", *[GROWS] * 7)}, "decoder"),  # 8 tokens that become 80 MB
    ({"pre_tokenizer": EVIL}, "pre_tokenizer"),  # exponential, and a panic past `except Exception`
    ({"decoder": NESTED}, "decoder"),
    ({"decoder": {"type": "Sequence", "decoders": 5}}, "decoder"),
    ({"decoder": {"type": "Nope"}}, "decoder"),
    ({"decoder": 5}, "decoder"),
    ({"normalizer": {"type": "Prepend", "prepend": "long"}}, "normalizer"),
    ({"normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}}, "normalizer"),
    ({"normalizer": charsmap("", "x" * 1000)}, ""),
    ({"normalizer": without_index((1 << 32) - 4)}, "normalizer"),
    ({"normalizer": without_index(6)}, "normalizer"),
    ({"normalizer": sequence("normalizers", charsmap("x" * 18), charsmap("x" * 18))}, ""),
    ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "A" * (3 << 20)}}, "normalizer"),
    ({"pre_tokenizer": sequence("pretokenizers", *[BYTES] * 4)}, ""),
    ({"pre_tokenizer": sequence("pretokenizers", *[{"type": "Digits", "individual_digits": True}] * 17)}, "pre_tok"),
    ({"decoder": {"type": "BPEDecoder", "suffix": ""}}, "decoder"),
    ({"decoder": {"type": "Strip", "content": "a", "start": 0, "stop": 1 << 60}}, "decoder"),
    ({"decoder": {"type": "WordPiece", "prefix": "#" * 1000, "cleanup": True}}, "decoder"),
    ({"post_processor": template("A", "x", "A")}, "post_processor"),
    ({"post_processor": template("A", "x", ids=1000)}, "post_processor"),
    ({"post_processor": template("A", *["x"] * 100)}, "post_processor"),
    ({"added_tokens": added("x" * 2000)}, "added_tokens"),
    ({"added_tokens": added("x", (1 << 17) + 1)}, "added_tokens"),
    ({"model": {"type": "WordLevel", "vocab": {"x" * 2000: 0}, "unk_token": "<unk>"}}, "model (WordLevel)"),
    ({"model": {"type": "Unigram", "vocab": [["x" * 65, -1.0]], "unk_id": 0}}, "model (Unigram)"),
    ({"model": {"vocab": [["x" * 65, -1.0]]}}, "model (Unigram)"),
    ({"model": {"type": "BPE", "vocab": VOCABULARY, "merges": [], "dropout": 0.5}}, "model (BPE)"),
    (
        {
            "model": {
                "type": "WordPiece",
                "vocab": VOCABULARY,
                "unk_token": "<unk>",
                "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 10**6,
            }
        },
        "model (WordPiece)",
    ),
]


@pytest.mark.reliability("T24")
@pytest.mark.parametrize(("parts", "where"), REFUSED)
def test_refused_by_name_before_anything_is_built(
    parts: dict[str, Any], where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer_files.Tokenizer, "from_str", pytest.fail)
    with pytest.raises(AdapterInvalid) as refused:
        TokenizerFiles(json.dumps(made(**parts))).build()
    (problem,) = refused.value.problems
    assert problem.where.startswith(f"tokenizer.json: {where}" if where else "tokenizer.json")
    assert problem.code == "unsupported_feature" and len(str(refused.value)) < 700


@pytest.mark.parametrize("limit", ["MAX_TOKENS", "MAX_MERGES"])
def test_a_model_has_a_limited_number_of_tokens_and_merges(limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    merges = [["a", "b"], ["a", "c"], ["a", "d"]]
    model = {"type": "BPE", "vocab": VOCABULARY | {"ab": 27, "ac": 28, "ad": 29}, "merges": merges}
    text = json.dumps(made(model=model))
    assert Tokenizer.from_str(admitted(text)).encode("ab").tokens == ["ab"]
    monkeypatch.setattr(tokenizer_json, limit, 2)
    with pytest.raises(AdapterInvalid, match="at most 2"):
        admitted(text)


def test_a_large_model_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_json, "MAX_TOKENS", 2)
    monkeypatch.setattr(tokenizer_json, "MAX_MERGES", 2)
    with pytest.raises(AdapterInvalid, match="27 entries"):
        admitted(json.dumps(made(model={"type": "WordLevel", "vocab": {token: 0 for token in VOCABULARY}})))


def test_what_is_built_is_what_was_checked() -> None:
    """Of a key that a file has twice the library could read another one."""
    text = json.dumps(made(normalizer=GROWS))[:-1] + ', "normalizer": null}'
    assert Tokenizer.from_str(admitted(text)).normalizer is None


def test_a_sentencepiece_map_is_admitted() -> None:
    parts = charsmap("x" * 18), {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}
    assert admitted(json.dumps(made(normalizer=sequence("normalizers", *parts))))


def families() -> Iterator[type[TokenizersBackend]]:
    """Yield the tokenizers that transformers builds: those of all families whose models it has."""
    for package in pkgutil.iter_modules(transformers.models.__path__):
        name = f"transformers.models.{package.name}.tokenization_{package.name}"
        try:
            module = importlib.import_module(name)
        except (
            ImportError,
            NameError,
        ):  # a model without a tokenizer of its own, or of a package that is not installed
            continue
        for _, member in inspect.getmembers(module, inspect.isclass):
            if issubclass(member, TokenizersBackend) and member.__module__ == name:
                yield member


@functools.cache
def built() -> dict[str, str]:
    found = {}
    for family in families():
        try:
            tokenizer = family()
        except (ImportError, TypeError, ValueError):  # needs files or packages
            continue
        found[family.__name__] = str(tokenizer.backend_tokenizer.to_str())  # type: ignore[attr-defined]
    return found


QUADRATIC = {"SeamlessM4TTokenizer"}  # " +▁" looks at every rest of a run of spaces
NAMED = "Llama Gemma Qwen2 Qwen3_5 GPT2 GPTNeoX Cohere CodeLlama CLIP Bert Roberta T5 XLMRoberta XGLM Whisper"
FAMILIES = [f"{name}Tokenizer" for name in NAMED.split(" ")]


def test_the_tokenizers_of_all_families_are_admitted_unchanged() -> None:
    assert set(FAMILIES) <= built().keys() and len(built()) > 40
    refused = set()
    for name, text in built().items():
        try:
            known = json.loads(Tokenizer.from_str(admitted(text)).to_str())
        except AdapterInvalid:
            refused.add(name)
            continue
        given = json.loads(text)
        assert known == {**given, "truncation": None, "padding": None}, name
    assert refused == QUADRATIC


WRITTEN: dict[str, dict[str, Any]] = {
    "Llama 2, Mistral, Phi-3": {
        "normalizer": sequence(
            "normalizers",
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ),
        "post_processor": template("x", "A"),
        "decoder": sequence(
            "decoders",
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ),
    },
    "Llama 3": {
        "pre_tokenizer": sequence(
            "pretokenizers",
            {
                "type": "Split",
                "pattern": {
                    "Regex": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                },
                "behavior": "Isolated",
                "invert": False,
            },
            BYTES,
        ),
        "post_processor": sequence("processors", BYTES, template("x", "A")),
        "decoder": BYTES,
    },
    "T5": {
        "normalizer": charsmap("x" * 18),
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["▁", -2.0]], "byte_fallback": False},
    },
    "GPT-2's file without a type": {
        "pre_tokenizer": BYTES,
        "model": {"dropout": None, "unk_token": None, "fuse_unk": False, "vocab": VOCABULARY, "merges": []},
    },
    "SmolLM2": {"pre_tokenizer": sequence("pretokenizers", {"type": "Digits", "individual_digits": True}, BYTES)},
}


@pytest.mark.parametrize("name", WRITTEN)
def test_files_as_hubs_have_them_are_admitted(name: str) -> None:
    text = admitted(json.dumps(made(**WRITTEN[name])))
    if name != "T5":  # whose map here is no real one
        assert Tokenizer.from_str(text).encode("a b").ids


LINEAR = 32  # times as long for a text of 8 times the length
TEXTS = ["a", " ", "\n", "A", "aA", "1", "é", "世", "\u0301", "!", "'s", " x", "▁", "\t \n", "\ufdfa", "a\u0301 "]


def growth(work: Callable[[str], object], unit: str) -> float:
    """Return by which factor the time grows when a text grows 8-fold; 8 is linear, 64 is quadratic."""
    small, large = unit * (1000 // len(unit)), unit * (8000 // len(unit))
    return _seconds(work, large) / _seconds(work, small)


def _seconds(work: Callable[[str], object], text: str) -> float:
    def once() -> float:
        began = time.thread_time()
        work(text)
        return time.thread_time() - began

    return max(min(once() for _ in range(3)), 2e-5)


def test_the_measure_sees_a_quadratic_expression() -> None:
    """Else the tests below could not fail."""
    assert growth(normalizers.Replace(Regex(r" +▁"), "").normalize_str, " ") > LINEAR


@pytest.mark.reliability("T24")
@pytest.mark.slow
@pytest.mark.parametrize("expression", sorted(SPLITS))
def test_the_known_expressions_are_linear(expression: str) -> None:
    split = pre_tokenizers.Split(Regex(expression), "isolated")
    for unit in TEXTS:
        assert growth(lambda text: split.pre_tokenize_str(text + "x"), unit) < LINEAR, unit


@pytest.mark.reliability("T24")
@pytest.mark.parametrize("replacement", sorted(REPLACEMENTS))
def test_the_known_replacements_are_linear_and_never_grow(replacement: tuple[str, str, str]) -> None:
    kind, pattern, content = replacement
    replace = normalizers.Replace(Regex(pattern) if kind == "Regex" else pattern, content)
    for unit in TEXTS:
        text = unit * 100 + pattern + "x"
        assert len(replace.normalize_str(text)) <= len(text)
        assert growth(lambda text: replace.normalize_str(text + "x"), unit) < LINEAR, unit


@pytest.mark.reliability("T24")
@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_admitted_tokenizers_are_linear(name: str) -> None:
    tokenizer = Tokenizer.from_str(admitted(built()[name]))
    tokenizer.no_truncation()
    for unit in TEXTS:
        assert growth(tokenizer.encode, unit) < LINEAR, unit
        some = tokenizer.encode(unit * 8).ids or [0]
        assert growth(lambda text, some=some: tokenizer.decode(some * len(text)), "x") < LINEAR, unit  # type: ignore[misc]
