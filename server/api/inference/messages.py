"""Messages of a chat: as chat templates read them, and as responses return them."""

from collections.abc import Sequence
from typing import Any, Literal

from server.api.inference.choices import Delta
from server.api.inference.generation import Generation
from server.api.message_formats.parser import (
    MessageFormat,
    MessageParser,
    call_format,
    ends_in_reasoning,
    marks_reasoning,
    writes_channels,
)
from server.api.message_formats.pieces import Arguments, CallStart, Content, Piece, Reasoning
from server.api.requests.chat import ChatCompletionRequest, ChatMessage
from server.api.requests.functions import ToolCall
from server.api.text.tokenizer import Tokenizer
from server.api.text.tool_prompt import TOOL_FORMAT

_PROMPT_END_TOKENS = 16  # in which the mark of reasoning is looked for


def chat_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Return messages as templates read them, without fields that are null. A tool's message names its function."""
    called = {call.id: call.function.name for message in messages for call in message.tool_calls or ()}
    return [_message(message, called.get(message.tool_call_id or "")) for message in messages]


def _message(message: ChatMessage, function: str | None) -> dict[str, Any]:
    optional = {
        "name": message.name or function,
        "reasoning_content": message.reasoning_content,
        "tool_calls": [_call(call) for call in message.tool_calls or ()] or None,
        "tool_call_id": message.tool_call_id,
    }
    given = {name: value for name, value in optional.items() if value is not None}
    return {"role": _role_of(message.role), "content": message.text, **given}


def _role_of(role: str) -> str:
    """Map `developer`, OpenAI's newer name for `system`, to `system`, which chat templates support."""
    return "system" if role == "developer" else role


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": call.function.arguments}
    return {"id": call.id, "type": "function", "function": function}


def message_format(
    tokenizer: Tokenizer,
    body: ChatCompletionRequest,
    prompt: list[int],
    tool_format: str | None = None,
    *,
    is_constrained: bool,
) -> MessageFormat | None:
    """Return how the output is written; None if it is content alone. The template decides how calls are, unless
    `tool_format` does. A constraint leaves no room for reasoning, and that of a forced call is JSON, whatever the
    template is."""
    template = "" if tokenizer.template is None or is_constrained else tokenizer.template.source
    names = frozenset(function.name for function in body.offered_functions)
    splits = body.separate_reasoning is not False
    has_channels, has_reasoning = writes_channels(template) and splits, marks_reasoning(template) and splits
    if not names and not has_channels and not has_reasoning:
        return None
    if tokenizer.template is not None and not tokenizer.template.renders_tools and not has_channels:
        tool_format = tool_format or TOOL_FORMAT
    end = tokenizer.decode(prompt[-_PROMPT_END_TOKENS:], skip_special_tokens=False)
    return MessageFormat(
        call_format(template, tool_format) if names or has_channels else None,
        names,
        several_calls=body.parallel_tool_calls is not False,
        has_reasoning=has_reasoning,
        begins_in_reasoning=has_reasoning and ends_in_reasoning(end),
        shows_reasoning=body.include_reasoning is not False,
    )


def parsers(generation: Generation) -> dict[int, MessageParser]:
    """Return a parser for each choice; none if their texts are content alone."""
    found = generation.plan.output.message_format
    return {} if found is None else {index: MessageParser(found) for index in range(len(generation))}


def finish_reason(
    parser: MessageParser | None, delta: Delta
) -> Literal["stop", "length", "tool_calls", "abort"] | None:
    if parser is not None and parser.has_calls and delta.finish_reason == "stop":
        return "tool_calls"
    return delta.finish_reason


def message_delta(pieces: Sequence[Piece]) -> dict[str, Any]:
    """Return the delta of a message in OpenAI's format. A call appears once, with all that is new of it."""
    delta: dict[str, Any] = {}
    calls: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        match piece:
            case Content(text):
                delta["content"] = delta.get("content", "") + text
            case Reasoning(text):
                delta["reasoning_content"] = delta.get("reasoning_content", "") + text
            case CallStart(index, id, name):
                function = {"name": name, "arguments": ""}
                calls[index] = {"index": index, "id": id, "type": "function", "function": function}
            case Arguments(index, text):
                call = calls.setdefault(index, {"index": index, "function": {"arguments": ""}})
                call["function"]["arguments"] += text
    return {**delta, "tool_calls": list(calls.values())} if calls else delta


def whole_message(pieces: Sequence[Piece]) -> dict[str, Any]:
    """Return a message in OpenAI's format. Its content is null if there is nothing but calls."""
    message = message_delta(pieces)
    for call in message.get("tool_calls", ()):
        del call["index"]
    return {"content": None if "tool_calls" in message else "", **message}
