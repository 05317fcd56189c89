"""Whatever field a client sends is applied, refused by name, or known to change nothing."""

import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from tokenizers.processors import TemplateProcessing

from server.api.fields import APPLIED, HARMLESS, REFUSED, REFUSED_IN_MESSAGES, SELECTORS
from server.api.requests.chat import ChatCompletionRequest
from server.api.requests.completions import CompletionRequest
from server.api.requests.inference import GenerationRequest
from tests.fixtures.api_server import BASE, Api, assert_error, byte_tokenizer, serving

SCHEMAS: dict[str, type[GenerationRequest]] = {"chat": ChatCompletionRequest, "completions": CompletionRequest}
TEMPLATE = (
    "{% if tools %}{{ tools | length }}{% endif %}{# </think> #}"
    "{% for m in messages %}<|start|>{{ m.role }} {{ m.name }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{{ think }}{{ reasoning_effort }}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
ASSISTANT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "So"}]
TOOLS = [{"type": "function", "function": {"name": "f"}}]
USERS = {"model": "both", "user": "u0"}, {"model": "both", "user": "u5"}  # on the two sides of a split

# For each applied field, a request and another one that differs in this field alone.
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "model": ({}, {"model": "own"}),
    "adapters": ({}, {"adapters": [{"name": "own", "scale": 0.5}]}),
    "adapter_scale": ({"model": "own"}, {"model": "own", "adapter_scale": 0.5}),
    **{selector: ({}, {selector: "own"}) for selector in SELECTORS},
    "messages": ({}, {"messages": [{"role": "user", "name": "ann", "content": "hi"}]}),
    "prompt": ({}, {"prompt": [1, 2]}),
    "max_tokens": ({}, {"max_tokens": 0}),
    "max_completion_tokens": ({"max_tokens": 9}, {"max_tokens": 9, "max_completion_tokens": 1}),
    "temperature": ({}, {"temperature": 0}),
    "top_p": ({}, {"top_p": 0}),
    "n": ({}, {"n": 2}),
    "stop": ({}, {"stop": ["l"]}),
    "presence_penalty": ({}, {"presence_penalty": 1}),
    "frequency_penalty": ({}, {"frequency_penalty": 1}),
    "logit_bias": ({}, {"logit_bias": {"5": 1}}),
    "seed": ({}, {"seed": 1}),
    "stream": ({}, {"stream": True}),
    "stream_options": ({"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}),
    "top_k": ({}, {"top_k": 5}),
    "min_p": ({}, {"min_p": 0.5}),
    "repetition_penalty": ({}, {"repetition_penalty": 1.5}),
    "min_tokens": ({}, {"min_tokens": 2}),
    "ignore_eos": ({}, {"ignore_eos": True}),
    "stop_token_ids": ({}, {"stop_token_ids": [40]}),
    "include_stop_str_in_output": ({"stop": "l"}, {"stop": "l", "include_stop_str_in_output": True}),
    "no_stop_trim": ({"stop": "l"}, {"stop": "l", "no_stop_trim": True}),
    "skip_special_tokens": ({}, {"skip_special_tokens": False}),
    "add_special_tokens": ({"add_special_tokens": False}, {"add_special_tokens": True}),
    "add_generation_prompt": ({}, {"add_generation_prompt": False}),
    "continue_final_message": ({"messages": ASSISTANT}, {"messages": ASSISTANT, "continue_final_message": True}),
    "tools": ({}, {"tools": TOOLS}),
    "tool_choice": ({"tools": TOOLS}, {"tools": TOOLS, "tool_choice": "none"}),
    "parallel_tool_calls": ({"tools": TOOLS}, {"tools": TOOLS, "parallel_tool_calls": False}),
    "separate_reasoning": ({}, {"separate_reasoning": False}),
    "include_reasoning": ({}, {"include_reasoning": False}),
    "chat_template_kwargs": ({}, {"chat_template_kwargs": {"think": "no"}}),
    "reasoning_effort": ({}, {"reasoning_effort": "low"}),
    "logprobs": ({}, {"logprobs": True}),
    "top_logprobs": ({"logprobs": True}, {"logprobs": True, "top_logprobs": 2}),
    "prompt_logprobs": ({}, {"prompt_logprobs": 1}),
    "echo": ({}, {"echo": True}),
    "logprobs_mode": ({"logprobs": True}, {"logprobs": True, "logprobs_mode": "processed_logprobs"}),
    "receipt": ({}, {"receipt": True}),
    "return_token_ids": ({}, {"return_token_ids": True}),
    "return_tokens_as_token_ids": ({"logprobs": True}, {"logprobs": True, "return_tokens_as_token_ids": True}),
    "cache_salt": ({}, {"cache_salt": "x"}),
    "priority": ({}, {"priority": 3}),
    "timeout": ({}, {"timeout": 60}),
    "user": USERS,
    "response_format": ({}, {"response_format": {"type": "json_object"}}),
    "structured_outputs": ({}, {"structured_outputs": {"choice": ["a", "b"]}}),
    "guided_json": ({}, {"guided_json": {"type": "integer"}}),
    "guided_regex": ({}, {"guided_regex": "a+"}),
    "guided_choice": ({}, {"guided_choice": ["a", "b"]}),
    "guided_grammar": ({}, {"guided_grammar": 'root ::= "a"'}),
    "json_schema": ({}, {"json_schema": '{"type": "integer"}'}),
    "regex": ({}, {"regex": "a+"}),
    "ebnf": ({}, {"ebnf": 'root ::= "a"'}),
}
OUTPUT = "H<|start|>ello"
CALLS = '{"name":"f","arguments":{}};{"name":"f","arguments":{}}'
OUTPUTS = {
    "parallel_tool_calls": CALLS,
    "separate_reasoning": "<think>a</think>b",
    "include_reasoning": "<think>a</think>b",
}
PAIRS = [(name, route) for name in APPLIED for route, schema in SCHEMAS.items() if name in schema.model_fields]
NOT_DECLARED = [
    (name, route) for name in REFUSED for route, schema in SCHEMAS.items() if name not in schema.model_fields
]


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    tokenizer = byte_tokenizer(TEMPLATE)
    start = tokenizer.backend.token_to_id("<|start|>")
    tokenizer.backend.post_processor = TemplateProcessing("<|start|> $A", special_tokens=[("<|start|>", start)])
    async with serving(tmp_path, tokenizer=tokenizer) as found:
        await found.upload("own")
        await found.upload("other", seed=1)
        await found.http.put("/v1/adapters/both/split", json={"weights": {"own": 50, "other": 50}})
        yield found


async def send(api: Api, route: str, fields: dict[str, Any]) -> httpx.Response:
    answer = await (api.chat(**fields) if route == "chat" else api.complete(**fields))
    assert isinstance(answer, httpx.Response)
    return answer


async def observed(api: Api, route: str, fields: dict[str, Any], output: str = OUTPUT) -> tuple[Any, ...]:
    """What a request does: all that is submitted to the engine for it, and the response without what is unique."""
    api.engine.submitted.clear()
    eos = api.engine.info.eos_token_ids
    ids = api.context.tokenizer.backend.encode(output, add_special_tokens=False).ids
    api.engine.script = lambda submit: [*ids, *eos] * 20
    answer = await send(api, route, {"max_tokens": 9 if output == OUTPUT else len(output) + 1, **fields})
    assert answer.status_code == 200, answer.text
    submits = [
        msgspec.structs.replace(submit, seq_id="", deadline=submit.deadline and 1.0) for submit in api.engine.submitted
    ]
    text = answer.text
    for unique in ("id", "created"):
        text = "\n".join(_without(line, unique) for line in text.splitlines())
    text = re.sub(r'"call_[0-9a-f]{24}"', '"call"', text)
    return submits, text, answer.headers.get("x-loraplex-ignored")


def _without(line: str, key: str) -> str:
    head, separator, rest = line.partition(f'"{key}":')
    return head + rest.partition(",")[2] if separator and "permission" not in line else line


def test_every_applied_field_is_declared_and_has_a_case() -> None:
    declared = {name for schema in SCHEMAS.values() for name in schema.model_fields}
    assert declared == set(APPLIED) == set(CHANGES)
    assert not set(HARMLESS) & (declared | set(REFUSED))


@pytest.mark.parametrize(("name", "route"), PAIRS)
async def test_an_applied_field_changes_what_happens(api: Api, name: str, route: str) -> None:
    without, having = CHANGES[name]
    if route == "completions" and without.get("logprobs"):
        without, having = ({**fields, "logprobs": 1} for fields in (without, having))
    output = OUTPUTS.get(name, OUTPUT)
    first = await observed(api, route, without, output)
    assert await observed(api, route, having, output) != first
    assert await observed(api, route, without, output) == first


@pytest.mark.parametrize("route", SCHEMAS)
async def test_null_is_the_same_as_leaving_a_field_out(api: Api, route: str) -> None:
    schema = SCHEMAS[route]
    plain = await observed(api, route, {})
    for name, field in schema.model_fields.items():
        if not field.is_required():
            assert await observed(api, route, {name: None, "max_tokens": 9}) == plain, name
    for options in ({"include_usage": None}, {"continuous_usage_stats": None}):
        assert (await send(api, route, {"stream": True, "stream_options": options})).status_code == 200
    scaled = {"adapters": [{"name": "own", "scale": None}]}
    assert (await observed(api, route, scaled))[0][0].adapters[0].scale == 1


@pytest.mark.parametrize(("name", "route"), NOT_DECLARED)
async def test_a_refused_field_is_named(api: Api, name: str, route: str) -> None:
    for value in ("x", 7, [{"a": 1}], {"a": 1}):
        error = assert_error(await send(api, route, {name: value}), 400, "unsupported")
        assert error["param"] == name and name in error["message"]
    assert not api.engine.submitted
    plain = await observed(api, route, {})
    for value in (None, *REFUSED[name].neutral):
        assert await observed(api, route, {name: value}) == plain


@pytest.mark.parametrize("name", REFUSED_IN_MESSAGES)
async def test_a_refused_field_of_a_message_is_named(api: Api, name: str) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x", name: [{"id": "1"}]}]
    error = assert_error(await api.chat(messages=messages), 400, "unsupported")
    assert error["param"] == f"messages.1.{name}"


async def test_every_refused_field_is_named_in_the_order_of_the_table(api: Api) -> None:
    names = [name for name in REFUSED if name not in ChatCompletionRequest.model_fields and name != "echo"]
    for given in (names, names[::-1]):
        fields = dict.fromkeys(given, "x")
        error = assert_error(await api.chat(**fields), 400, "unsupported")
        assert error["param"] == names[0]
        places = [error["message"].index(f"{name}: ") for name in names]
        assert len(places) == len(names)


@pytest.mark.parametrize("route", SCHEMAS)
async def test_a_harmless_field_changes_nothing(api: Api, route: str) -> None:
    plain = await observed(api, route, {})
    for name in HARMLESS:
        for value in (True, "x", {"a": 1}, -5):
            assert await observed(api, route, {name: value}) == plain, name


async def test_unknown_fields_are_named_in_a_header(api: Api) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi", "cache_control": {}}], "mood": 1}]
    answer = await api.chat(messages=messages, brand_new=1, naïve="é", stream=True, stream_options={"every": 5})
    assert answer.status_code == 200
    names = answer.headers["x-loraplex-ignored"].split(", ")
    nested = {"messages.0.mood", "messages.0.content.0.cache_control", "stream_options.every"}
    assert set(names) == {"brand_new", "na%C3%AFve"} | nested
    many = await api.complete(**{f"field{i}": 1 for i in range(500)}, **{"x" * 10_000: 1, "a\r\nb": 1})
    assert many.status_code == 200 and len(many.headers["x-loraplex-ignored"]) < 2048
    assert "x-loraplex-ignored" not in (await api.chat()).headers


async def test_strict_servers_refuse_unknown_fields(tmp_path: Path) -> None:
    async with serving(tmp_path, strict_requests=True) as api:
        error = assert_error(await api.chat(brand_new=1, another=2), 400, "unknown_field")
        assert error["param"] == "brand_new" and "another" in error["message"]
        assert (await api.chat(store=True, tools=[], functions=[])).status_code == 200
        assert_error(await api.http.post("/tokenize", json={"prompt": "x", "brand_new": 1}), 400, "unknown_field")


@pytest.mark.parametrize("selector", SELECTORS)
async def test_selectors_of_other_servers_name_adapters(api: Api, selector: str) -> None:
    for model in (BASE, "own"):
        body = (await api.chat(model=model, **{selector: "own"})).json()
        assert body["model"] == "own" and api.engine.submitted[-1].adapters
    scaled = await api.chat(**{selector: "own"}, adapter_scale=0.25)
    assert scaled.status_code == 200 and api.engine.submitted[-1].adapters[0].scale == 0.25
    count = len(api.engine.submitted)
    assert assert_error(await api.chat(model="other", **{selector: "own"}), 400)["param"] == selector
    assert assert_error(await api.chat(adapters=[{"name": "other"}], **{selector: "own"}), 400)["param"] == selector
    assert_error(await api.chat(**{selector: "/adapters/own"}), 404, "model_not_found")
    assert assert_error(await api.chat(**{selector: ["own"]}), 400)["param"] == selector
    assert len(api.engine.submitted) == count


async def test_two_selectors_must_agree(api: Api) -> None:
    assert (await api.chat(lora_path="own", adapter_id="own")).json()["model"] == "own"
    assert_error(await api.chat(lora_path="own", adapter_id="other"), 400)


async def test_template_variables_that_are_the_server_s_are_refused(api: Api) -> None:
    for name in ("messages", "tools", "add_generation_prompt"):
        error = assert_error(await api.chat(chat_template_kwargs={name: []}), 400)
        assert error["param"] == "chat_template_kwargs" and name in error["message"]
    assert_error(await api.chat(messages=ASSISTANT, continue_final_message=True, add_generation_prompt=True), 400)


async def test_what_other_servers_take_is_taken(api: Api) -> None:
    """`top_p` 0 keeps the most probable token, `max_tokens` -1 takes the rest of the context."""
    await api.complete(top_p=0)
    assert (api.engine.submitted[-1].sampling.top_k, api.engine.submitted[-1].sampling.top_p) == (1, 1)
    await api.complete([1, 2], max_tokens=-1)
    assert api.engine.submitted[-1].sampling.max_tokens == api.engine.info.max_model_len - 2
    assert len((await api.chat(n=128, max_tokens=1)).json()["choices"]) == 128
    nothing = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "b"},
    ]
    assert (await api.chat(messages=nothing)).status_code == 200
    assert_error(await api.chat(messages=[{"role": "user", "content": None}]), 400)
    assert (await api.chat(top_logprobs=0)).status_code == 200
