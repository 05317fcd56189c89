"""Functions for chat templates that know none: functions, calls and results become text in the manner of Hermes."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from typing import Any

from server.api.errors import ApiError, bad_request
from server.api.text.chat_template import ChatTemplate, Conversation

TOOL_FORMAT = "hermes"  # of the calls that the model is asked for

_INSTRUCTIONS = """You may call functions. These are their JSON schemas:
<tools>
{functions}
</tools>
To call a function, answer with its name and arguments as a JSON object between tags, as in:
<tool_call>
{{"name": "the function's name", "arguments": {{"argument": "value"}}}}
</tool_call>"""

Message = dict[str, Any]


async def render(template: ChatTemplate, conversation: Conversation, special_tokens: Mapping[str, str]) -> str:
    """Render a conversation with a template that knows no functions. They are described in the system message, or in
    the first of the others where the template has no system message. Raises 400 if the template drops both."""
    if "tool_calls" not in template.source:
        conversation = replace(conversation, messages=list(_flattened(conversation.messages)))
    if not conversation.tools:
        return await template.render(conversation, special_tokens)
    functions = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in conversation.tools)
    instructions = _INSTRUCTIONS.format(functions=functions)
    reason: ApiError | None = None
    for messages in _places(conversation.messages, instructions):
        try:
            text = await template.render(replace(conversation, messages=messages, tools=None), special_tokens)
        except ApiError as failed:
            reason = failed
            continue
        if instructions in text:
            return text
    raise reason or bad_request(
        "The chat template of this model has no place for tools; use a model or an adapter whose template has.",
        "tools",
        "unsupported",
    )


def _places(messages: list[Message], instructions: str) -> Iterator[list[Message]]:
    """Yield the messages with the instructions in each place that they may have."""
    first, *rest = messages
    if first["role"] == "system":
        yield [{**first, "content": f"{first['content']}\n\n{instructions}"}, *rest]
        return
    yield [{"role": "system", "content": instructions}, *messages]
    yield [{**first, "content": f"{instructions}\n\n{first['content']}"}, *rest]


def _flattened(messages: list[Message]) -> Iterator[Message]:
    """Yield the messages with calls as text. Results that follow each other are one message of the user, because
    templates often want the roles to alternate."""
    for role, group in groupby(messages, key=lambda message: message["role"]):
        if role == "tool":
            results = "\n".join(f"<tool_response>\n{each['content']}\n</tool_response>" for each in group)
            yield {"role": "user", "content": results}
        else:
            yield from map(_with_calls_as_text, group)


def _with_calls_as_text(message: Message) -> Message:
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls", ())]
    parts = [message["content"], *(f"<tool_call>\n{call}\n</tool_call>" for call in calls)]
    others = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**others, "content": "\n".join(filter(None, parts))}
