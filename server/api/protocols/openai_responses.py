"""`POST /v1/responses` in the format of OpenAI's Responses API, without stored state."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from server.api.context import Context
from server.api.errors import ApiError
from server.api.inference.choices import TokenScore
from server.api.inference.formatting import score_body, token_body
from server.api.inference.generation import Generation
from server.api.inference.responses import documented_responses
from server.api.middleware.auth import Key, key_of
from server.api.protocols.blocks import Block, BlockFormatter, Event
from server.api.protocols.responses_requests import ResponsesRequest
from server.api.protocols.translation import respond_as
from server.api.schemas import Wire

router = APIRouter()
_PREFIXES = {"text": "msg", "reasoning": "rs", "call": "fc"}  # of the items' ids


class ResponseBody(Wire):
    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    model: str
    output: list[dict[str, Any]]  # items: message, reasoning, function_call
    error: dict[str, Any] | None = None
    incomplete_details: dict[str, Any] | None = None
    usage: dict[str, Any] | None = None
    instructions: str | None
    max_output_tokens: int | None
    temperature: float | None
    top_p: float | None
    tools: list[dict[str, Any]]
    tool_choice: Any
    parallel_tool_calls: bool
    reasoning: dict[str, Any]
    text: dict[str, Any]
    metadata: Any
    previous_response_id: None = None
    store: bool = False  # no response is stored
    truncation: Literal["disabled"] = "disabled"


class ResponseEvent(Wire):
    """An event of a stream. Its other fields follow from its type, as in OpenAI's API."""

    type: str
    sequence_number: int


@router.post(
    "/v1/responses",
    responses=documented_responses(ResponseBody, ResponseEvent),
    response_model=None,
    tags=["inference"],
)
async def create_response(
    request: Request, body: ResponsesRequest, context: Context, key: Annotated[Key, Depends(key_of)]
) -> Response:
    """Generate a reply to a conversation in the format of OpenAI's Responses API. No response is stored."""
    return await respond_as(lambda each: ResponseFormatter(each, body), request, body, context, key)


class ResponseFormatter(BlockFormatter):
    def __init__(self, generation: Generation, sent: ResponsesRequest):
        super().__init__(generation)
        self._sent = sent
        self._unique = generation.id.rpartition("-")[2]
        self._sequence_number = 0

    def whole(self) -> ResponseBody:
        status: Literal["incomplete", "completed"]
        status = "incomplete" if self._end.is_cut else "completed"
        items = [self._item(block, self._status(block)) for block in self._blocks]
        details = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return self._response(status, output=items, incomplete_details=details, usage=self._usage())

    def first_events(self) -> Iterator[Event]:
        response = self._response("in_progress").model_dump()
        yield {"type": "response.created", "response": response}
        yield {"type": "response.in_progress", "response": response}

    def started(self, block: Block) -> Iterator[Event]:
        empty = Block(block.index, block.kind, id=block.id, name=block.name)
        item = self._item(empty, "in_progress")
        if block.kind != "call":
            item["content"] = []
        yield {"type": "response.output_item.added", "output_index": block.index, "item": item}
        if block.kind != "call":
            yield {"type": "response.content_part.added", **self._place(block), "part": self._part(empty)}

    def grown(self, block: Block, text: str, scores: list[TokenScore]) -> Iterator[Event]:
        yield {"type": f"response.{_event_name(block)}.delta", **self._place(block, scores), "delta": text}

    def ended(self, block: Block) -> Iterator[Event]:
        key = "arguments" if block.kind == "call" else "text"
        named = {"name": block.name} if block.kind == "call" else {}
        place = self._place(block, block.scores)
        yield {"type": f"response.{_event_name(block)}.done", **place, key: block.text, **named}
        if block.kind != "call":
            yield {"type": "response.content_part.done", **self._place(block), "part": self._part(block)}
        item = self._item(block, self._status(block))
        yield {"type": "response.output_item.done", "output_index": block.index, "item": item}

    def last_events(self) -> Iterator[Event]:
        response = self.whole()
        yield {"type": f"response.{response.status}", "response": response.model_dump()}

    def failure(self, error: ApiError) -> bytes:
        reason = {"code": error.code or "server_error", "message": str(error.detail)}
        failed = self._response("failed", error=reason)
        return self._encoded(iter([{"type": "response.failed", "response": failed.model_dump()}]))

    def _encoded(self, events: Iterator[Event]) -> bytes:
        return super()._encoded(self._numbered(events))

    def _numbered(self, events: Iterator[Event]) -> Iterator[Event]:
        for event in events:
            yield {**event, "sequence_number": self._sequence_number}
            self._sequence_number += 1

    def _place(self, block: Block, scores: Sequence[TokenScore] = ()) -> dict[str, Any]:
        """Return where an event of a block belongs, and the log-probabilities of its tokens."""
        place = {"item_id": self._item_id(block), "output_index": block.index}
        if block.kind == "call":
            return place
        logprobs = {"logprobs": self._logprobs(scores)} if block.kind == "text" else {}
        return place | {"content_index": 0} | logprobs

    def _logprobs(self, scores: Sequence[TokenScore]) -> list[dict[str, Any]]:
        return [score_body(score, partial(token_body, self._generation.plan.tokenizer)) for score in scores]

    def _part(self, block: Block) -> dict[str, Any]:
        if block.kind == "reasoning":
            return {"type": "reasoning_text", "text": block.text}
        return {"type": "output_text", "text": block.text, "annotations": [], "logprobs": self._logprobs(block.scores)}

    def _item_id(self, block: Block) -> str:
        return f"{_PREFIXES[block.kind]}_{self._unique}{block.index}"

    def _status(self, block: Block) -> str:
        is_cut = self._end.is_cut and block is self._blocks[-1]
        return "incomplete" if is_cut else "completed"

    def _item(self, block: Block, status: str) -> dict[str, Any]:
        head = {"id": self._item_id(block), "status": status}
        if block.kind == "call":
            called = {"call_id": block.id, "name": block.name, "arguments": block.text}
            return {"type": "function_call", **head, **called}
        if block.kind == "reasoning":
            return {"type": "reasoning", **head, "summary": [], "content": [self._part(block)]}
        return {"type": "message", **head, "role": "assistant", "content": [self._part(block)]}

    def _response(self, status: Any, **fields: Any) -> ResponseBody:
        sent, generation = self._sent, self._generation
        return ResponseBody(
            id=f"resp_{self._unique}",
            created_at=generation.created,
            status=status,
            model=generation.plan.target.requested_model,
            instructions=sent.instructions,
            max_output_tokens=sent.max_output_tokens,
            temperature=generation.plan.sampling.temperature,
            top_p=generation.plan.sampling.top_p,
            tools=[{"strict": None, **tool.model_dump()} for tool in sent.tools or ()],
            tool_choice=_shown(sent.tool_choice) or "auto",
            parallel_tool_calls=sent.parallel_tool_calls is not False,
            reasoning={"effort": sent.reasoning and sent.reasoning.effort, "summary": None},
            text={"format": _shown(sent.text and sent.text.format) or {"type": "text"}},
            metadata=(sent.model_extra or {}).get("metadata") or {},
            **{"output": [], **fields},
        )

    def _usage(self) -> dict[str, Any]:
        usage = self._generation.usage()
        cached = usage.prompt_tokens_details.cached_tokens
        return {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.total_tokens,
        }


def _shown(value: Any) -> Any:
    """Return a part of the request as the client wrote it."""
    return value.model_dump(by_alias=True, exclude_none=True) if isinstance(value, Wire) else value


def _event_name(block: Block) -> str:
    return {"text": "output_text", "reasoning": "reasoning_text", "call": "function_call_arguments"}[block.kind]
