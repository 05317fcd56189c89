"""The constraint of a request: which field has it, its bounds, and its compiled grammar."""

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from server.api.context import AppContext
from server.api.errors import bad_request
from server.api.inference.forced_calls import calls_schema
from server.api.inference.targets import Target
from server.api.requests.inference import GenerationRequest
from server.api.text.grammar_compiler import GrammarInvalid, GrammarSource
from server.request import Constraint

MAX_SOURCE_BYTES = 64 << 10
MAX_SCHEMA_DEPTH = 32
MAX_ENUM = 1000
MAX_PATTERN_CHARS = 512
_ANY_OBJECT = {"type": "object"}


class Requested(NamedTuple):
    """A grammar and the field that has it, as errors name it."""

    param: str
    source: GrammarSource


async def constraint_of(context: AppContext, target: Target, body: GenerationRequest) -> Constraint | None:
    """Return the constraint of a request, None if it has none. Raises 400 for one that cannot be applied."""
    requested = list(_requested(body))
    if not requested:
        return None
    if len(requested) > 1:
        names = " and ".join(f"'{each.param}'" for each in requested)
        raise bad_request(f"The output can have one constraint, but {names} have one each.", requested[1].param)
    return await constrain(context, target, *requested[0])


async def constrain(context: AppContext, target: Target, param: str, source: GrammarSource) -> Constraint:
    """Compile a grammar for the outputs of `target`. Raises 400, which names `param`, if that is not possible."""
    try:
        grammar = await context.grammars.compile(source)
    except GrammarInvalid as invalid:
        raise bad_request(f"'{param}' cannot be applied: {invalid}.", param) from None
    own_tokenizer = target.adapters[0].digest if target.traits.tokenizer else ""
    return Constraint(grammar, own_tokenizer)


def json_schema(schema: Any, param: str) -> Requested:
    """Return the grammar of a JSON schema, given as JSON or as its text. Raises 400 if it exceeds the bounds."""
    if isinstance(schema, str):
        _check_size(schema, param)
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise bad_request(f"'{param}' is not valid JSON: {error}.", param) from None
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise bad_request(f"'{param}' must be a JSON schema.", param)
    _check_schema(schema, param)
    text = json.dumps(schema, ensure_ascii=False)
    _check_size(text, param)
    return Requested(param, GrammarSource("json", text))


def _requested(body: GenerationRequest) -> Iterator[Requested]:
    if body.forced_functions:
        yield json_schema(calls_schema(body.forced_functions, one=body.calls_one_function), "tool_choice")
    wanted = body.response_format
    if wanted is not None and wanted.type == "json_object":
        yield json_schema(_ANY_OBJECT, "response_format")
    if wanted is not None and wanted.json_schema is not None:
        yield json_schema(wanted.json_schema.schema_, "response_format.json_schema.schema")
    outputs = body.structured_outputs
    if outputs is not None:
        given = (outputs.json_, outputs.regex, outputs.choice, outputs.grammar)
        yield from _of_kinds("structured_outputs.", ("json", "regex", "choice", "grammar"), given)
        if outputs.json_object:
            yield json_schema(_ANY_OBJECT, "structured_outputs.json_object")
    given = (body.guided_json, body.guided_regex, body.guided_choice, body.guided_grammar)
    yield from _of_kinds("guided_", ("json", "regex", "choice", "grammar"), given)
    yield from _of_kinds("", ("json_schema", "regex", "ebnf"), (body.json_schema, body.regex, body.ebnf))


def _of_kinds(prefix: str, names: tuple[str, ...], values: tuple[Any, ...]) -> Iterator[Requested]:
    for name, value in zip(names, values, strict=True):
        if value is not None:
            yield _BY_NAME[name](value, prefix + name)


def _regex(pattern: str, param: str) -> Requested:
    if len(pattern) > MAX_PATTERN_CHARS:
        raise bad_request(f"'{param}' has more than {MAX_PATTERN_CHARS} characters.", param)
    return Requested(param, GrammarSource("regex", pattern))


def _choice(choices: list[str], param: str) -> Requested:
    text = json.dumps(choices, ensure_ascii=False)
    _check_size(text, param)
    return Requested(param, GrammarSource("choice", text))


def _grammar(text: str, param: str) -> Requested:
    _check_size(text, param)
    return Requested(param, GrammarSource("grammar", text))


_BY_NAME: dict[str, Callable[[Any, str], Requested]] = {
    "json": json_schema,
    "json_schema": json_schema,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
    "ebnf": _grammar,
}


def _check_size(text: str, param: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise bad_request(f"'{param}' has a lone surrogate, which is no character.", param) from None
    if size > MAX_SOURCE_BYTES:
        raise bad_request(f"'{param}' has more than {MAX_SOURCE_BYTES >> 10} KiB.", param)


def _check_schema(schema: dict[str, Any], param: str) -> None:
    """Raise 400 for a schema that is too deep, or that has too many choices or too long a pattern."""
    todo: list[tuple[Any, int]] = [(schema, 1)]
    while todo:
        value, depth = todo.pop()
        if depth > MAX_SCHEMA_DEPTH:
            raise bad_request(f"'{param}' is nested more than {MAX_SCHEMA_DEPTH} deep.", param)
        if isinstance(value, dict):
            _check_keywords(value, param)
            todo += [(each, depth + 1) for each in value.values() if isinstance(each, dict | list)]
        elif isinstance(value, list):
            todo += [(each, depth + 1) for each in value if isinstance(each, dict | list)]


def _check_keywords(schema: dict[str, Any], param: str) -> None:
    choices, pattern, keys = schema.get("enum"), schema.get("pattern"), schema.get("patternProperties")
    if isinstance(choices, list) and len(choices) > MAX_ENUM:
        raise bad_request(f"'{param}' has an enum of more than {MAX_ENUM} values.", param)
    patterns = [pattern, *(keys if isinstance(keys, dict) else ())]
    if any(isinstance(each, str) and len(each) > MAX_PATTERN_CHARS for each in patterns):
        raise bad_request(f"'{param}' has a pattern of more than {MAX_PATTERN_CHARS} characters.", param)
