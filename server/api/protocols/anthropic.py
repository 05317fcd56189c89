"""`POST /v1/messages` in the format of Anthropic's Messages API."""

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from server.api.context import Context
from server.api.errors import ApiError, anthropic_error, error_body
from server.api.inference.choices import TokenScore
from server.api.inference.responses import documented_responses
from server.api.middleware.auth import Key, key_of
from server.api.protocols.anthropic_requests import MessagesRequest
from server.api.protocols.blocks import Block, BlockFormatter, Event
from server.api.protocols.translation import respond_as
from server.api.schemas import AnthropicErrorBody, Wire

router = APIRouter()
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "abort": "max_tokens"}


class MessageUsage(Wire):
    input_tokens: int  # without those of the prefix cache
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int = 0


class Message(Wire):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[dict[str, Any]]  # blocks: text, thinking, tool_use
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: MessageUsage


class MessageEvent(Wire):
    """An event of a stream. Its other fields follow from its type, as in Anthropic's API."""

    type: Literal[
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
        "error",
    ]


@router.post(
    "/v1/messages",
    responses=documented_responses(Message, MessageEvent, AnthropicErrorBody),
    response_model=None,
    tags=["inference"],
)
async def create_message(
    request: Request, body: MessagesRequest, context: Context, key: Annotated[Key, Depends(key_of)]
) -> Response:
    """Generate a reply to a conversation in the format of Anthropic's API."""
    return await respond_as(MessageFormatter, request, body, context, key)


class MessageFormatter(BlockFormatter):
    def whole(self) -> Message:
        return self._message([_content(block) for block in self._blocks])

    def first_events(self) -> Iterator[Event]:
        yield {"type": "message_start", "message": self._message([]).model_dump()}

    def started(self, block: Block) -> Iterator[Event]:
        empty = _content(Block(block.index, block.kind, id=block.id, name=block.name))
        yield {"type": "content_block_start", "index": block.index, "content_block": empty}

    def grown(self, block: Block, text: str, scores: list[TokenScore]) -> Iterator[Event]:
        delta = {
            "text": {"type": "text_delta", "text": text},
            "reasoning": {"type": "thinking_delta", "thinking": text},
            "call": {"type": "input_json_delta", "partial_json": text},
        }[block.kind]
        yield {"type": "content_block_delta", "index": block.index, "delta": delta}

    def ended(self, block: Block) -> Iterator[Event]:
        yield {"type": "content_block_stop", "index": block.index}

    def last_events(self) -> Iterator[Event]:
        delta = {"stop_reason": self._stop_reason(), "stop_sequence": self._end.stop_string}
        yield {"type": "message_delta", "delta": delta, "usage": self._usage().model_dump()}
        yield {"type": "message_stop"}

    def failure(self, error: ApiError) -> bytes:
        body = error_body(error.status_code, str(error.detail), code=error.code, param=error.param)
        return b"event: error\ndata: %b\n\n" % msgspec.json.encode(anthropic_error(error.status_code, body["error"]))

    def _message(self, content: list[dict[str, Any]]) -> Message:
        return Message(
            id=f"msg_{self._generation.id.rpartition('-')[2]}",
            model=self._generation.plan.target.requested_model,
            content=content,
            stop_reason=self._stop_reason(),
            stop_sequence=self._end.stop_string,
            usage=self._usage(),
        )

    def _stop_reason(self) -> Any:
        if self._end.finish_reason == "stop" and self._parser.has_calls:
            return "tool_use"
        return "stop_sequence" if self._end.stop_string else _STOP_REASONS.get(self._end.finish_reason or "")

    def _usage(self) -> MessageUsage:
        usage = self._generation.usage()
        cached = usage.prompt_tokens_details.cached_tokens
        return MessageUsage(
            input_tokens=usage.prompt_tokens - cached,
            output_tokens=usage.completion_tokens,
            cache_read_input_tokens=cached,
        )


def _content(block: Block) -> dict[str, Any]:
    if block.kind == "text":
        return {"type": "text", "text": block.text}
    if block.kind == "reasoning":
        return {"type": "thinking", "thinking": block.text, "signature": ""}
    return {"type": "tool_use", "id": block.id, "name": block.name, "input": _input(block.text)}


def _input(arguments: str) -> Any:
    """Return arguments as an object; what the model did not complete stays text."""
    try:
        return json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return {"arguments": arguments}
