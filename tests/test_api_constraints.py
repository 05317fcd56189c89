"""Structured output through the API: every spelling, its bounds, and grammars that are meant to harm."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from server.api.inference.constraints import MAX_ENUM, MAX_PATTERN_CHARS, MAX_SCHEMA_DEPTH, MAX_SOURCE_BYTES
from server.api.text import grammar_compiler, worker_pool
from server.api.text.grammar_compiler import GrammarCompiler, GrammarSource
from server.api.text.grammar_worker import MAX_MEMORY_BYTES
from server.ipc.messages import Submit
from server.request import Constraint
from tests.fixtures.api_server import Api, assert_error, byte_tokenizer, serving, tokenizer_files
from tests.fixtures.timing import leap

POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
EBNF = 'root ::= "a" | "b"'


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    async with serving(tmp_path) as found:
        yield found


def submitted(api: Api) -> Constraint | None:
    sent = api.engine.submitted[-1]
    assert isinstance(sent, Submit)
    return sent.sampling.constraint


# -- spellings ---------------------------------------------------------------------------------------------------------

SPELLINGS: list[list[dict[str, Any]]] = [
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "point", "strict": True, "schema": POINT}}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "point", "schema": POINT}}},
        {"structured_outputs": {"json": POINT}},
        {"structured_outputs": {"json": json.dumps(POINT), "regex": None, "json_object": False}},
        {"guided_json": POINT},
        {"guided_json": json.dumps(POINT)},
        {"json_schema": json.dumps(POINT)},
    ],
    [{"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}],
    [{"structured_outputs": {"regex": "a+"}}, {"guided_regex": "a+"}, {"regex": "a+"}],
    [{"structured_outputs": {"choice": ["a", "b"]}}, {"guided_choice": ["a", "b"]}],
    [{"structured_outputs": {"grammar": EBNF}}, {"guided_grammar": EBNF}, {"ebnf": EBNF}],
]


@pytest.mark.parametrize("same", SPELLINGS)
async def test_every_spelling_is_the_same_constraint(api: Api, same: list[dict[str, Any]]) -> None:
    for fields in same:
        for send in (api.chat, api.complete):
            answer = await send(**fields)
            assert answer.status_code == 200, answer.text
            assert "x-loraplex-ignored" not in answer.headers
    found = {sent.sampling.constraint for sent in api.engine.submitted}
    assert len(found) == 1 and None not in found


async def test_text_and_nulls_are_no_constraint(api: Api) -> None:
    for fields in ({"response_format": {"type": "text"}}, {"response_format": None}, {"structured_outputs": None}):
        assert (await api.chat(**fields)).status_code == 200
        assert submitted(api) is None


async def test_all_choices_have_it(api: Api) -> None:
    await api.chat(n=3, regex="a+", stream=True)
    assert len({sent.sampling.constraint for sent in api.engine.submitted}) == 1 and len(api.engine.submitted) == 3


async def test_an_adapter_s_own_tokenizer_is_named(api: Api) -> None:
    await api.upload("own", beside=tokenizer_files())
    await api.upload("plain", seed=1)
    for model in ("own", "plain"):
        assert (await api.chat(model=model, regex="a+")).status_code == 200
    own, plain = (sent.sampling.constraint for sent in api.engine.submitted)
    assert own.tokenizer == api.engine.submitted[0].adapters[0].digest and plain.tokenizer == ""
    assert own.grammar == plain.grammar


async def test_the_output_is_content_as_a_whole(tmp_path: Path) -> None:
    """Also where the template opens the model's reasoning."""
    template = "{{ messages[0].content }}{{ tools }}<think>\n{# until </think> #}"
    async with serving(tmp_path, tokenizer=byte_tokenizer(template)) as api:
        api.says('{"name": "f", "arguments": {}}')
        for fields in ({"response_format": {"type": "json_object"}}, {"regex": ".*"}):
            (choice,) = (await api.chat(**fields)).json()["choices"]
            assert json.loads(choice["message"]["content"])["name"] == "f" and choice["finish_reason"] == "stop"
        (choice,) = (await api.chat()).json()["choices"]
        assert not choice["message"]["content"]


async def test_what_the_engine_refuses_is_the_request_s_fault(api: Api) -> None:
    api.engine.fail_after, api.engine.failure_reason = 0, "refused"
    api.engine.failure = "outputs of this model's tokenizer cannot be constrained"
    assert "tokenizer" in assert_error(await api.chat(regex="a+"), 400, "unsupported")["message"]


# -- what is refused ---------------------------------------------------------------------------------------------------

DEEP: dict[str, Any] = {"type": "integer"}
for _ in range(MAX_SCHEMA_DEPTH):
    DEEP = {"type": "array", "items": DEEP}

REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "json_schema"}}, "response_format", "needs it"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema.schema",
        "",
    ),
    ({"response_format": {"type": "grammar"}}, "response_format.type", ""),
    ({"response_format": {"type": "json_object"}, "regex": "a"}, "regex", "one constraint"),
    ({"structured_outputs": {}}, "structured_outputs", "required"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice", "one constraint"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag", "not supported"),
    ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern", ""),
    ({"guided_json": "{"}, "guided_json", "not valid JSON"),
    ({"guided_json": "[" * 60_000}, "guided_json", "not valid JSON"),
    ({"guided_json": "[1]"}, "guided_json", "JSON schema"),
    ({"guided_json": {"type": "strin"}}, "guided_json", "strin"),
    ({"guided_json": {"not": {"type": "string"}}}, "guided_json", "not"),
    ({"guided_json": {"not": {}, "x-guidance": {"lenient": True}}}, "guided_json", "not"),
    ({"guided_json": {"$ref": "http://127.0.0.1:1/schema"}}, "guided_json", "retriev"),
    ({"guided_json": DEEP}, "guided_json", "deep"),
    ({"guided_json": {"enum": [*range(MAX_ENUM + 1)]}}, "guided_json", "enum"),
    ({"guided_json": {"pattern": "a" * (MAX_PATTERN_CHARS + 1)}}, "guided_json", "pattern"),
    ({"guided_json": {"patternProperties": {"a" * (MAX_PATTERN_CHARS + 1): {}}}}, "guided_json", "pattern"),
    ({"guided_json": {"title": "x" * MAX_SOURCE_BYTES}}, "guided_json", "KiB"),
    ({"guided_regex": "("}, "guided_regex", "unclosed"),
    ({"guided_regex": "^$"}, "guided_regex", "no text"),
    ({"guided_regex": "a" * (MAX_PATTERN_CHARS + 1)}, "guided_regex", "characters"),
    ({"guided_choice": []}, "guided_choice", ""),
    ({"guided_choice": [str(i) for i in range(1001)]}, "guided_choice", ""),
    ({"guided_json": '{"title": "\\ud800"}'}, "guided_json", "surrogate"),
    ({"guided_grammar": "root ::= root"}, "guided_grammar", "cannot be applied"),
    ({"guided_grammar": "what is this"}, "guided_grammar", "cannot be applied"),
    ({"ebnf": "x" * (MAX_SOURCE_BYTES + 1)}, "ebnf", ""),
]


@pytest.mark.parametrize(("fields", "param", "reason"), REFUSED, ids=[str(fields)[:60] for fields, *_ in REFUSED])
async def test_a_constraint_that_cannot_be_applied_is_named(
    api: Api, fields: dict[str, Any], param: str, reason: str
) -> None:
    error = assert_error(await api.chat(**fields), 400)
    assert error["param"] == param and reason in error["message"] and len(error["message"]) < 1000
    assert not api.engine.submitted


# -- hostile grammars --------------------------------------------------------------------------------------------------

HOSTILE: dict[str, dict[str, Any]] = {
    "products": {
        "guided_json": {
            "allOf": [{"anyOf": [{"properties": {f"p{i}_{j}": {}}} for j in range(8)]} for i in range(12)],
        }
    },
    "many optional properties": {"guided_json": {"properties": {f"p{i}": {"type": "string"} for i in range(1500)}}},
    "a loop of references": {"guided_json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}},
    "nested repetition": {"guided_regex": "((((a{1,999}){1,999}){1,999}){1,999}){1,999}"},
    "classes": {"guided_regex": "\\w{900}\\W{900}\\p{L}{900}\\p{Greek}{900}"},
    "no end": {"guided_grammar": 'root ::= a\na ::= b\nb ::= a "x"'},
}


@pytest.mark.reliability("T23")
@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_grammar_is_answered_and_harms_nobody(
    api: Api, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is refused, or it is compiled within its limits. The limit on time is the server's own."""
    monkeypatch.setattr(grammar_compiler, "COMPILE_SECONDS", 4.0)
    hostile = asyncio.create_task(api.chat(**HOSTILE[name]))
    assert (await api.chat()).status_code == 200  # nobody waits for it
    answer = await hostile
    if answer.status_code != 200:
        (param,) = HOSTILE[name]
        assert assert_error(answer, 400)["param"] == param
    assert (await api.chat(regex="a+")).status_code == 200


@pytest.mark.reliability("T23")
async def test_a_grammar_that_takes_too_long_is_stopped(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_compiler, "COMPILE_SECONDS", 0.0)
    started = time.monotonic()
    error = assert_error(await api.chat(regex="a+"), 400)
    assert error["param"] == "regex" and "longer than" in error["message"]
    leap(time.monotonic() - started)
    monkeypatch.undo()
    assert (await api.chat(regex="a+")).status_code == 200


@pytest.mark.reliability("T23")
async def test_the_worker_s_memory_is_bounded(api: Api) -> None:
    """One that needs more is ended by its allocator, like any worker that ends its process."""
    assert (await api.chat(regex="a+")).status_code == 200
    (worker,) = api.context.grammars._workers._idle
    assert psutil.Process(worker.pid).rlimit(psutil.RLIMIT_AS) == (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES)
    worker.kill()
    await worker.wait()
    error = assert_error(await api.chat(regex="b+"), 400)
    assert error["param"] == "regex" and "ended its process" in error["message"]
    assert (await api.chat(regex="b+")).status_code == 200


async def test_a_grammar_is_compiled_once(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    exchange = worker_pool.exchange

    async def noted(worker: Any, question: dict[str, Any], seconds: float) -> dict[str, str]:
        asked.append(question["source"])
        return await exchange(worker, question, seconds)

    monkeypatch.setattr(worker_pool, "exchange", noted)
    for _ in range(3):
        await api.chat(regex="a+")
    assert asked == ["a+"]


async def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_compiler, "_KEPT_CHARS", 1000)
    compiler = GrammarCompiler()
    try:
        for i in range(20):
            await compiler.compile(GrammarSource("regex", "a" * (i + 1)))
        assert 0 < len(compiler._kept) < 20
        kept = sum(len(source.text) + len(grammar) for source, grammar in compiler._kept.items())
        assert compiler._kept_chars == kept <= 1000
    finally:
        await compiler.close()
