"""Bodies of OpenAI's Responses API, and the chats that they mean."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from server.api.errors import bad_request
from server.api.fields import HARMLESS_IN_RESPONSES, REFUSED, REFUSED_IN_RESPONSES, Refusal
from server.api.inference.plan import GenerationPlan
from server.api.protocols.translation import TranslatedRequest
from server.api.requests.wire import ModelName, NumTop, OpenWire, Text, TokenCount


class Item(OpenWire):
    harmless = {"id": "", "status": "", "phase": "", "annotations": "", "logprobs": ""}  # noqa: RUF012


class ItemText(Item):
    type: Literal["input_text", "output_text", "text", "reasoning_text"]
    text: Text


ItemContent = Text | Annotated[list[ItemText], Field(max_length=1024, fail_fast=True)]


def text_of(content: ItemContent | None) -> str:
    return "".join(part.text for part in content) if isinstance(content, list) else content or ""


class MessageItem(Item):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: ItemContent


class CallItem(Item):
    type: Literal["function_call"]
    call_id: str = Field(max_length=256)
    name: str = Field(min_length=1, max_length=256)
    arguments: Text


class CallOutputItem(Item):
    type: Literal["function_call_output"]
    call_id: str = Field(max_length=256)
    output: ItemContent


class ReasoningItem(Item):
    """Reasoning of an earlier response. Its summary is not read: this server writes none."""

    harmless = {**Item.harmless, "summary": "", "encrypted_content": ""}  # noqa: RUF012

    type: Literal["reasoning"]
    content: ItemContent | None = None


def _item_type(value: Any) -> str:
    found = value.get("type") if isinstance(value, dict) else getattr(value, "type", None)
    return found if isinstance(found, str) else "message"


InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_item_type),
]


class FunctionTool(OpenWire):
    """A function. OpenAI's own tools, which have other types, are refused."""

    type: Literal["function"]
    name: str = Field(min_length=1, max_length=256)
    description: Text | None = None
    parameters: dict[str, Any] | None = None

    def as_chat(self) -> dict[str, Any]:
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


class Choice(OpenWire):
    type: Literal["function"]
    name: str = Field(min_length=1, max_length=256)


class TextFormat(OpenWire):
    harmless = {"strict": "the schema is followed either way"}  # noqa: RUF012

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(None, max_length=256)
    description: str | None = Field(None, max_length=65536)
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class TextOptions(OpenWire):
    refused = {"verbosity": Refusal("how long the output is", ("medium",))}  # noqa: RUF012

    format: TextFormat | None = None

    def as_chat(self) -> dict[str, Any] | None:
        if self.format is None or self.format.type == "text":
            return None
        if self.format.type == "json_object":
            return {"type": "json_object"}
        return {"type": "json_schema", "json_schema": {"name": self.format.name, "schema": self.format.schema_}}


class ReasoningOptions(OpenWire):
    effort: str | None = Field(None, max_length=64)
    harmless = {"summary": "this server writes none", "generate_summary": ""}  # noqa: RUF012


LOGPROBS = "message.output_text.logprobs"
Include = Literal["message.output_text.logprobs", "reasoning.encrypted_content"]  # the second is never there


class ResponsesRequest(TranslatedRequest):
    refused = REFUSED_IN_RESPONSES | REFUSED
    harmless = TranslatedRequest.harmless | HARMLESS_IN_RESPONSES

    model: ModelName
    input: Text | Annotated[list[InputItem], Field(min_length=1, max_length=4096, fail_fast=True)]
    instructions: Text | None = None
    max_output_tokens: TokenCount | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=1024, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Choice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: Annotated[list[Include], Field(max_length=16, fail_fast=True)] | None = None
    top_logprobs: NumTop | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "ResponsesRequest":
        if self.top_logprobs and not self.wants_logprobs:
            raise PydanticCustomError("value_error", f"top_logprobs needs '{LOGPROBS}' in include")
        return self

    def as_chat(self) -> dict[str, Any]:
        choice = self.tool_choice
        return {
            "model": self.model,
            "messages": self._messages(),
            "max_tokens": self.max_output_tokens,
            "stream": self.stream,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "tools": [tool.as_chat() for tool in self.tools or ()],
            "tool_choice": {"type": "function", "function": {"name": choice.name}}
            if isinstance(choice, Choice)
            else choice,
            "response_format": self.text and self.text.as_chat(),
            "parallel_tool_calls": self.parallel_tool_calls,
            "reasoning_effort": self.reasoning and self.reasoning.effort,
            "logprobs": self.wants_logprobs,
            "top_logprobs": self.top_logprobs if self.wants_logprobs else None,
        }

    @property
    def wants_logprobs(self) -> bool:
        return LOGPROBS in (self.include or ())

    def check_plan(self, plan: GenerationPlan) -> None:
        """Raise 400 for log-probabilities of an output that may be more than text, whose tokens have no item."""
        if self.wants_logprobs and plan.output.message_format is not None:
            raise bad_request(
                f"'{LOGPROBS}' is not supported beside functions and reasoning; use /v1/chat/completions.",
                "include",
                "unsupported",
            )

    def _messages(self) -> list[dict[str, Any]]:
        """Return the conversation. Reasoning, text and calls that follow each other are one assistant's message."""
        messages = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        for item in self.input:
            _add(messages, item)
        return messages


def _add(messages: list[dict[str, Any]], item: Any) -> None:
    match item:
        case CallOutputItem():
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": text_of(item.output)})
        case CallItem():
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            _assistant(messages).setdefault("tool_calls", []).append(call)
        case ReasoningItem():
            messages.append({"role": "assistant", "reasoning_content": text_of(item.content) or None})
        case MessageItem(role="assistant") if messages and _is_only_reasoning(messages[-1]):
            messages[-1]["content"] = text_of(item.content)
        case MessageItem():
            messages.append({"role": item.role, "content": text_of(item.content)})


def _assistant(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the assistant's message at the end, which is added if there is none."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant"})
    return messages[-1]


def _is_only_reasoning(message: dict[str, Any]) -> bool:
    return message["role"] == "assistant" and "content" not in message and "tool_calls" not in message
