"""Function calls and reasoning in the text of models, however it is divided."""

import json
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.api.message_formats.parser import MessageFormat, MessageParser, call_format
from server.api.message_formats.pieces import Arguments, CallStart, Content, Piece, Reasoning

NAMES = frozenset({"weather", "time"})
TEMPLATES = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]", "harmony": "<|channel|>", "json": "<|eot_id|>"}
PARIS = '{"city": "Paris"}'
NESTED = '{"a": [{"b": "}]\\"<tool_call>"}, 1.5], "ü": null}'

# Format, output, content, reasoning, and calls as names and arguments.
CASES: list[tuple[str, str, str, str, list[tuple[str, str]]]] = [
    ("hermes", "Hello.", "Hello.", "", []),
    ("hermes", " Two  words \n", " Two  words \n", "", []),
    ("hermes", f'<tool_call>\n{{"name": "weather", "arguments": {PARIS}}}\n</tool_call>', "", "", [("weather", PARIS)]),
    (
        "hermes",
        f'Wait.\n<tool_call>{{"name": "weather", "arguments": {NESTED}}}</tool_call>',
        "Wait.",
        "",
        [("weather", NESTED)],
    ),
    (
        "hermes",
        f'<tool_call>{{"name": "weather", "arguments": {PARIS}}}</tool_call>\n'
        '<tool_call>{"name": "time", "arguments": {}}</tool_call>\nDone',
        "Done",
        "",
        [("weather", PARIS), ("time", "{}")],
    ),
    ("hermes", f'<tool_call>{{"arguments": {PARIS}, "name": "weather"}}</tool_call>', "", "", [("weather", PARIS)]),
    ("hermes", '<tool_call>{"name": "time"}</tool_call>', "", "", [("time", "{}")]),
    (
        "hermes",
        f'<tool_call>{{"name": "time", "arguments": {json.dumps(PARIS)}}}</tool_call>',
        "",
        "",
        [("time", PARIS)],
    ),
    (
        "hermes",
        f'<tool_call>{{"id": "1", "name": "time", "arguments": {PARIS}, "x": "}}"}}</tool_call>',
        "",
        "",
        [("time", PARIS)],
    ),
    ("hermes", f'<tool_call>{{"name": "time", "arguments": {PARIS}</tool_call> so', "so", "", [("time", PARIS)]),
    ("hermes", '<tool_call>{"name": "time", "arguments": {"a": 1', "", "", [("time", '{"a": 1')]),
    ("hermes", "a\n<tool_call>nothing</tool_call>", "a\n<tool_call>nothing</tool_call>", "", []),
    ("hermes", '<tool_call>{"name": 5, "arguments": {}}', '<tool_call>{"name": 5, "arguments": {}}', "", []),
    ("hermes", '<tool_call>{"name": "ti', '<tool_call>{"name": "ti', "", []),
    ("hermes", "1 <tool 2 <tool_call", "1 <tool 2 <tool_call", "", []),
    ("hermes", "<think>\nHm.\n</think>\n\nYes", "Yes", "Hm.", []),
    (
        "hermes",
        '<think>Hm <tool_call></think><tool_call>{"name": "time"}</tool_call>',
        "",
        "Hm <tool_call>",
        [("time", "{}")],
    ),
    ("hermes", "<think>Hm", "", "Hm", []),
    ("hermes", "a <think>b</think>", "a <think>b</think>", "", []),
    ("json", f'{{"name": "weather", "parameters": {PARIS}}}', "", "", [("weather", PARIS)]),
    ("json", f' {{"type": "function", "name": "weather", "parameters": {PARIS}}}', "", "", [("weather", PARIS)]),
    (
        "json",
        f'{{"type": "function", "function": {{"name": "weather", "arguments": {PARIS}}}}}',
        "",
        "",
        [("weather", PARIS)],
    ),
    (
        "json",
        f'{{"name": "weather", "parameters": {PARIS}}}; {{"name": "time", "parameters": {{}}}}',
        "",
        "",
        [("weather", PARIS), ("time", "{}")],
    ),
    ("json", f'<|python_tag|>{{"name": "other", "parameters": {PARIS}}}', "", "", [("other", PARIS)]),
    ("json", f'I look.\n<|python_tag|>{{"name": "time", "parameters": {PARIS}}}', "I look.", "", [("time", PARIS)]),
    (
        "json",
        f'[{{"name": "time", "arguments": {PARIS}}}, {{"name": "time", "arguments": {{}}}}]',
        "",
        "",
        [("time", PARIS), ("time", "{}")],
    ),
    ("json", f'```json\n{{"name": "time", "arguments": {PARIS}}}\n```\nSo.', "So.", "", [("time", PARIS)]),
    ("json", '{"name": "Ann", "arguments": {}}', '{"name": "Ann", "arguments": {}}', "", []),
    ("json", '{"answer": 1}', '{"answer": 1}', "", []),
    ("json", " [1, 2]", " [1, 2]", "", []),
    ("json", "```python\nprint()\n```", "```python\nprint()\n```", "", []),
    ("json", "x <|python_tag|>print(1)", "x <|python_tag|>print(1)", "", []),
    (
        "mistral",
        f'[TOOL_CALLS][{{"name": "weather", "arguments": {PARIS}}}, {{"name": "time", "arguments": {{}}}}]',
        "",
        "",
        [("weather", PARIS), ("time", "{}")],
    ),
    ("mistral", f'[TOOL_CALLS] [{{"arguments": {PARIS}, "name": "weather"}}]', "", "", [("weather", PARIS)]),
    (
        "mistral",
        f"Sure [TOOL_CALLS]weather[ARGS]{NESTED}[TOOL_CALLS]time[ARGS]{{}}",
        "Sure",
        "",
        [("weather", NESTED), ("time", "{}")],
    ),
    ("mistral", f"[TOOL_CALLS]weather{PARIS}", "", "", [("weather", PARIS)]),
    ("mistral", "[TOOL_CALLS] none", "[TOOL_CALLS] none", "", []),
    ("mistral", "[TOOL_CALLS][]", "[TOOL_CALLS][]", "", []),
    (
        "harmony",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
        f"<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{PARIS}<|call|>",
        "",
        "Hm.",
        [("weather", PARIS)],
    ),
    (
        "harmony",
        f"<|start|>assistant to=functions.time<|channel|>commentary json<|message|>{PARIS}",
        "",
        "",
        [("time", PARIS)],
    ),
    (
        "harmony",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Yes <b>!<|return|>",
        "Yes <b>!",
        "Hm.",
        [],
    ),
    (
        "harmony",
        "<|channel|>commentary<|message|>First.<|end|><|start|>assistant<|channel|>final<|message|>Then",
        "First.Then",
        "",
        [],
    ),
    ("harmony", f" to=functions.time<|channel|>commentary<|message|>{PARIS}", "", "", [("time", PARIS)]),
    ("harmony", "plain", "plain", "", []),
]


def parsed(kind: str, parts: Iterable[str], **options: Any) -> list[Piece]:
    parser = MessageParser(
        MessageFormat(call_format(TEMPLATES[kind]), NAMES, has_reasoning=kind != "harmony", **options)
    )
    pieces = [piece for part in parts for piece in parser.feed(part)]
    return [*pieces, *parser.feed("", end=True)]


def joined(pieces: list[Piece]) -> tuple[str, str, list[tuple[str, str]]]:
    content = "".join(piece.text for piece in pieces if isinstance(piece, Content))
    reasoning = "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
    starts = [piece for piece in pieces if isinstance(piece, CallStart)]
    assert [start.index for start in starts] == list(range(len(starts)))
    arguments = [
        "".join(piece.text for piece in pieces if isinstance(piece, Arguments) and piece.index == start.index)
        for start in starts
    ]
    return content, reasoning, [(start.name, text) for start, text in zip(starts, arguments, strict=True)]


@pytest.mark.parametrize(("kind", "output", "content", "reasoning", "calls"), CASES)
def test_an_output_is_divided_into_its_parts(
    kind: str, output: str, content: str, reasoning: str, calls: list[tuple[str, str]]
) -> None:
    assert joined(parsed(kind, [output])) == (content, reasoning, calls)
    assert joined(parsed(kind, output)) == (content, reasoning, calls)


FRAGMENTS = sorted(
    {"{", "}", "[", "]", '"', ",", ":", ";", "\\", " ", "\n", "x", "a", '{"name": "time", "arguments": ', "{}", "}}"}
    | {'"name"', '"arguments"', "<", "<tool_call>", "</tool_call>", "<think>", "</think>", "<|python_tag|>", "```json"}
    | {"[TOOL_CALLS]", "[ARGS]", "time", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|start|>assistant"}
    | {"analysis", "commentary to=functions.time", "final"}
)
OUTPUTS = st.one_of(
    st.sampled_from([case[1] for case in CASES]), st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)
)


@settings(max_examples=600, deadline=None)
@given(st.sampled_from(sorted(TEMPLATES)), OUTPUTS, st.data())
def test_parts_do_not_depend_on_how_the_text_arrives(kind: str, output: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(output)), max_size=8)))
    parts = [output[start:end] for start, end in zip([0, *cuts], [*cuts, len(output)], strict=True)]
    whole = joined(parsed(kind, [output]))
    assert joined(parsed(kind, parts)) == whole
    assert joined(parsed(kind, output)) == whole


def test_a_call_is_announced_before_its_arguments_are_complete() -> None:
    parser = MessageParser(MessageFormat(call_format(TEMPLATES["hermes"]), NAMES))
    (start,) = parser.feed('<tool_call>{"name": "time", "arguments": ')[:1] or parser.feed("{")[:1]
    assert isinstance(start, CallStart) and start.name == "time" and start.id.startswith("call_")
    assert parser.feed('"a": "b') == [Arguments(0, '"a": "b')]


def test_ids_have_the_length_that_the_template_checks() -> None:
    start, *_ = parsed("mistral", [f"[TOOL_CALLS]time[ARGS]{PARIS}"])
    assert isinstance(start, CallStart) and len(start.id) == 9 and start.id.isalnum()


def test_one_call_or_no_reasoning_if_no_more_is_wanted() -> None:
    calls = '<think>x</think><tool_call>{"name": "time"}</tool_call><tool_call>{"name": "time"}</tool_call>y'
    pieces = parsed("hermes", [calls], several_calls=False, shows_reasoning=False)
    assert joined(pieces) == ("y", "", [("time", "{}")])


def test_a_prompt_may_begin_the_reasoning() -> None:
    assert joined(parsed("hermes", ["Hm.\n</think>\nYes"], begins_in_reasoning=True)) == ("Yes", "Hm.", [])


def test_long_text_is_read_in_linear_time() -> None:
    """Each part is looked at a bounded number of times: ten times the arguments take no more than some ten times."""
    arguments = json.dumps({"text": "x" * 200_000})
    pieces = parsed("hermes", ['<tool_call>{"name": "time", "arguments": ', *arguments, "}</tool_call>"])
    assert joined(pieces)[2] == [("time", arguments)]
