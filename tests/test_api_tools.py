"""Functions in chats: what the template gets, and what clients get of the model's calls."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.fixtures import api_server
from tests.fixtures.api_server import Api, assert_error, byte_tokenizer, events, ids, last_prompt, serving

HERMES = (
    "{% if tools %}<tools>{% for tool in tools %}{{ tool.function.name }} {{ tool.function.parameters.type }}"
    "{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'tool' %} {{ m.name }} {{ m.tool_call_id }}{% endif %}"
    "{{ '\n' }}{{ m.content }}{% for call in m.tool_calls %}<tool_call>{{ call.function.name }}"
    "{% for key, value in call.function.arguments.items() %} {{ key }}={{ value }}{% endfor %}</tool_call>{% endfor %}"
    "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
PARIS = '{"city": "Paris"}'
CALL = f'<tool_call>\n{{"name": "weather", "arguments": {PARIS}}}\n</tool_call>'
HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "hi"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": PARIS}}],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
]


@pytest.fixture
def long_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """The description of functions has more bytes, and so tokens, than the context of the fixtures."""
    monkeypatch.setattr(api_server, "MAX_MODEL_LEN", 4096)


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    async with serving(tmp_path, tokenizer=byte_tokenizer(HERMES)) as found:
        yield found


def joined(answer: httpx.Response) -> tuple[dict[str, Any], str | None]:
    """The message of a stream, put together as OpenAI's clients do, and its finish reason."""
    message: dict[str, Any] = {"content": "", "tool_calls": []}
    reason = None
    for event in events(answer):
        (choice,) = event["choices"]
        reason = choice["finish_reason"] or reason
        message["content"] += choice["delta"].get("content") or ""
        for call in choice["delta"].get("tool_calls", ()):
            if "id" in call:
                assert call["index"] == len(message["tool_calls"]) and call["type"] == "function"
                message["tool_calls"].append(call)
            else:
                message["tool_calls"][call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    return message, reason


async def test_functions_and_calls_reach_the_template(api: Api) -> None:
    answer = await api.chat(tools=[WEATHER], messages=HISTORY)
    assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"] == "Hello world"
    assert last_prompt(api) == (
        "<tools>weather object</tools><|start|>user\nhi<|end|>\n<|start|>assistant\n"
        "<tool_call>weather city=Paris</tool_call><|end|>\n<|start|>tool weather c1\nsunny<|end|>\n<|start|>assistant\n"
    )
    tokens = await api.http.post("/tokenize", json={"messages": HISTORY, "tools": [WEATHER]})
    assert tokens.json()["tokens"] == api.engine.submitted[-1].token_ids


@pytest.mark.parametrize("output", [CALL, f"Hm.\n{CALL}{CALL}"])
async def test_calls_are_returned_whole_and_as_deltas(api: Api, output: str) -> None:
    api.says(output)
    answer = await api.chat(tools=[WEATHER], max_tokens=-1)
    (choice,) = answer.json()["choices"]
    message, calls = choice["message"], choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert message["content"] == ("Hm." if output != CALL else None) and message["role"] == "assistant"
    assert len(calls) == output.count(CALL) == len({call["id"] for call in calls})
    for call in calls:
        assert call["id"].startswith("call_") and call["type"] == "function"
        assert call["function"] == {"name": "weather", "arguments": PARIS}
    streamed, reason = joined(await api.chat(tools=[WEATHER], max_tokens=-1, stream=True))
    assert reason == "tool_calls" and streamed["content"] == (message["content"] or "")
    assert [call["function"] for call in streamed["tool_calls"]] == [call["function"] for call in calls]


async def test_a_delta_names_the_function_before_its_arguments(api: Api) -> None:
    api.says(CALL)
    deltas = [event["choices"][0] for event in events(await api.chat(tools=[WEATHER], max_tokens=-1, stream=True))]
    found = [delta["delta"]["tool_calls"][0] for delta in deltas if "tool_calls" in delta["delta"]]
    assert found[0]["function"]["name"] == "weather" and all("name" not in more["function"] for more in found[1:])
    assert not any("content" in delta["delta"] for delta in deltas[1:]) and deltas[-1]["delta"] == {}


async def test_a_malformed_call_is_text(api: Api) -> None:
    output = '<tool_call>{"name": weather}</tool_call>'
    api.says(output)
    (choice,) = (await api.chat(tools=[WEATHER], max_tokens=-1)).json()["choices"]
    assert choice["finish_reason"] == "stop" and choice["message"]["content"] == output
    assert "tool_calls" not in choice["message"]


async def test_a_call_that_is_cut_off_says_so(api: Api) -> None:
    api.says(CALL)
    (choice,) = (await api.chat(tools=[WEATHER], max_tokens=50)).json()["choices"]
    assert choice["finish_reason"] == "length" and choice["message"]["tool_calls"][0]["function"]["name"] == "weather"


async def test_no_functions_no_calls(api: Api) -> None:
    api.says(CALL)
    for fields in ({}, {"tools": [WEATHER], "tool_choice": "none"}, {"tools": []}):
        (choice,) = (await api.chat(max_tokens=-1, **fields)).json()["choices"]
        assert choice["message"]["content"] == CALL and choice["finish_reason"] == "stop"
        assert "<tools>" not in last_prompt(api)


async def test_marks_that_are_special_tokens_are_read(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer("{{ tools }}{# [TOOL_CALLS] #}{{ messages[-1].content }}")
    tokenizer.backend.add_special_tokens(["[TOOL_CALLS]", "<other>"])
    added = {id for id, token in tokenizer.backend.get_added_tokens_decoder().items() if token.special}
    tokenizer.special_ids = frozenset(added)
    async with serving(tmp_path, tokenizer=tokenizer) as api:
        output = f'So <other>it is.[TOOL_CALLS][{{"name": "weather", "arguments": {PARIS}}}]'
        assert len(ids(tokenizer, output)) < len(output) - 15
        api.says(output)
        message = (await api.chat(tools=[WEATHER], max_tokens=-1)).json()["choices"][0]["message"]
        assert message["content"] == "So it is." and message["tool_calls"][0]["function"]["arguments"] == PARIS
        assert len(message["tool_calls"][0]["id"]) == 9
        assert (await api.chat(max_tokens=-1)).json()["choices"][0]["message"]["content"].startswith("So it is.[{")


async def test_reasoning_is_split_off_where_the_template_marks_it(tmp_path: Path) -> None:
    template = "{{ messages[-1].content }}{% if open %}<think>\n{% endif %}{# <think></think> #}"
    async with serving(tmp_path, tokenizer=byte_tokenizer(template)) as api:
        api.says("<think>\nHm.\n</think>\n\nYes")
        message = (await api.chat()).json()["choices"][0]["message"]
        assert (message["content"], message["reasoning_content"]) == ("Yes", "Hm.")
        deltas = [event["choices"][0]["delta"] for event in events(await api.chat(stream=True))]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Hm."
        assert "".join(delta.get("content", "") for delta in deltas) == "Yes"
        assert "<think>" in (await api.chat(separate_reasoning=False)).json()["choices"][0]["message"]["content"]
        assert "reasoning_content" not in (await api.chat(include_reasoning=False)).json()["choices"][0]["message"]
        api.says("Hm.</think>Yes")
        opened = (await api.chat(chat_template_kwargs={"open": True})).json()["choices"][0]["message"]
        assert (opened["content"], opened["reasoning_content"]) == ("Yes", "Hm.")


async def test_what_cannot_be_applied_is_named(api: Api) -> None:
    other = {"type": "function", "function": {"name": "other"}}
    for fields in ({"tools": [WEATHER], "tool_choice": other}, {"tool_choice": "required"}):
        assert "tool_choice" in assert_error(await api.chat(**fields), 400)["message"]
    strict = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]
    answer = await api.chat(tools=[strict])
    assert answer.status_code == 200 and answer.headers["x-loraplex-ignored"] == "tools.0.function.strict"
    assert "strict" not in last_prompt(api)
    for messages, param in (
        ([*HISTORY[:1], {**HISTORY[1], "role": "user", "content": "x"}], "messages.1"),
        ([*HISTORY[:2], {"role": "tool", "content": "sunny"}], "messages.2"),
        ([{"role": "user", "content": "x", "tool_call_id": "c1"}], "messages.0"),
    ):
        assert assert_error(await api.chat(messages=messages), 400)["param"] == param
    broken = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"city": '}}
    error = assert_error(await api.chat(messages=[HISTORY[0], {"role": "assistant", "tool_calls": [broken]}]), 400)
    assert error["param"] == "messages.1.tool_calls.0.function.arguments"


@pytest.mark.usefixtures("long_context")
async def test_a_template_that_knows_no_functions_gets_them_as_text(tmp_path: Path) -> None:
    async with serving(tmp_path) as plain:
        plain.says(f"Hm.\n{CALL}")
        for own in ([], [{"role": "system", "content": "Be kind."}]):
            messages = [*own, *HISTORY, {"role": "tool", "tool_call_id": "c1", "content": "and warm"}]
            (choice,) = (await plain.chat(tools=[WEATHER], messages=messages, max_tokens=-1)).json()["choices"]
            assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "Hm."
            assert choice["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": PARIS}
            system, user, assistant, results, _ = last_prompt(plain).split("<|start|>")[1:]
            assert system.startswith("system\nBe kind.\n\nYou may" if own else "system\nYou may")
            assert json.dumps(WEATHER) in system and user == "user\nhi<|end|>\n"
            assert assistant == f"assistant\n{CALL}<|end|>\n"
            for text in ("user\n", "<tool_response>\nsunny\n</tool_response>\n<tool_response>\nand warm\n</tool_resp"):
                assert text in results
        await plain.chat(tools=[WEATHER], tool_choice="none", messages=HISTORY)
        assert CALL in last_prompt(plain) and "You may" not in last_prompt(plain)
        call = f'{{"name": "weather", "arguments": {PARIS}}}'
        plain.says(call)
        forced = await plain.chat(tools=[WEATHER], tool_choice="required", parallel_tool_calls=False, max_tokens=-1)
        (choice,) = forced.json()["choices"]
        assert choice["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": PARIS}
        assert plain.engine.submitted[-1].sampling.constraint is not None


NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
LOOP = "{% for m in messages %}{% if m.role != 'system' %}{{ m.role }}: {{ m.content | trim }}\n{% endif %}{% endfor %}"


@pytest.mark.parametrize("template", [NO_SYSTEM + LOOP, LOOP])
@pytest.mark.usefixtures("long_context")
async def test_without_a_system_message_functions_are_in_the_first_one(tmp_path: Path, template: str) -> None:
    async with serving(tmp_path, tokenizer=byte_tokenizer(template)) as api:
        assert (await api.chat(tools=[WEATHER])).status_code == 200
        assert last_prompt(api).startswith("user: You may call functions.") and last_prompt(api).endswith("\n\nhi\n")
        assert json.dumps(WEATHER) in last_prompt(api)


@pytest.mark.parametrize(
    ("template", "says"),
    [("{{ messages | length }}", "no place for tools"), ("{{ raise_exception('never') }}", "never")],
)
@pytest.mark.usefixtures("long_context")
async def test_a_template_that_drops_functions_is_refused(tmp_path: Path, template: str, says: str) -> None:
    async with serving(tmp_path, tokenizer=byte_tokenizer(template)) as api:
        assert says in assert_error(await api.chat(tools=[WEATHER]), 400)["message"]


PLACE = {"type": "object", "properties": {"at": {"$ref": "#/$defs/at"}}, "$defs": {"at": {"type": "string"}}}
LOCATE = {"type": "function", "function": {"name": "locate", "parameters": PLACE}}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
async def test_a_forced_call_is_a_constraint_of_json(api: Api, choice: Any) -> None:
    call = f'{{"name": "weather", "arguments": {PARIS}}}'
    api.says(call if choice != "required" else f"[{call}, {call}]")
    for stream in (False, True):
        answer = await api.chat(tools=[WEATHER, LOCATE], tool_choice=choice, max_tokens=-1, stream=stream)
        if stream:
            message, reason = joined(answer)
        else:
            message, reason = (answer.json()["choices"][0][key] for key in ("message", "finish_reason"))
        assert reason == "tool_calls" and not message["content"]
        assert {call["function"]["arguments"] for call in message["tool_calls"]} == {PARIS}
        constraint = api.engine.submitted[-1].sampling.constraint
        assert constraint is not None and "weather" in constraint.grammar
        assert ("locate" in constraint.grammar) is (choice == "required")


async def test_forced_calls_of_functions_that_disagree_are_refused(api: Api) -> None:
    changed = {**PLACE, "$defs": {"at": {"type": "integer"}}}
    second = {"type": "function", "function": {"name": "second", "parameters": changed}}
    error = assert_error(await api.chat(tools=[LOCATE, second], tool_choice="required"), 400)
    assert error["param"] == "tools" and "'at'" in error["message"]
    for fields in ({"tool_choice": "required"}, {"tool_choice": {"type": "function", "function": {"name": "locate"}}}):
        both = await api.chat(tools=[LOCATE], response_format={"type": "json_object"}, **fields)
        assert_error(both, 400)


async def test_what_is_constrained_has_no_reasoning(tmp_path: Path) -> None:
    template = "{{ messages[-1].content }}<think>\n{# </think> #}"
    async with serving(tmp_path, tokenizer=byte_tokenizer(template)) as api:
        api.says('{"a": 1}')
        (choice,) = (await api.chat(response_format={"type": "json_object"})).json()["choices"]
        assert choice["message"]["content"] == '{"a": 1}'
