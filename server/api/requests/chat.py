"""Bodies of chats: messages, functions, and what a chat template takes."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from server.api.fields import HARMLESS_IN_MESSAGES, REFUSED_IN_MESSAGES
from server.api.requests.functions import Function, NamedChoice, Tool, ToolCall, ToolChoice
from server.api.requests.inference import GenerationRequest
from server.api.requests.wire import MAX_CHOICES, NumTop, OpenWire, Text, TokenCount


class TextPart(OpenWire):
    type: Literal["text"]
    text: Text


class ChatMessage(OpenWire):
    refused = REFUSED_IN_MESSAGES
    harmless = HARMLESS_IN_MESSAGES

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=1024, fail_fast=True)] | None = None
    name: str | None = Field(None, max_length=256)  # this and the next one: for the chat template
    reasoning_content: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CHOICES, fail_fast=True)] | None = None
    tool_call_id: str | None = Field(None, max_length=256)  # the call that a tool's message is the result of

    @model_validator(mode="after")
    def _fits_role(self) -> "ChatMessage":
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("value_error", "content is required")
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("value_error", "only an assistant's message has tool_calls")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise PydanticCustomError("value_error", "a tool's message, and no other, needs a tool_call_id")
        return self

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ChatPrompt(OpenWire):
    """A conversation, and how the chat template renders it."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096, fail_fast=True)]
    tools: Annotated[list[Tool], Field(max_length=1024, fail_fast=True)] | None = None
    add_generation_prompt: bool | None = None  # default: true, unless `continue_final_message`
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # variables of the template
    reasoning_effort: str | None = Field(None, max_length=64)  # another one

    @property
    def offered_functions(self) -> list[Function]:
        """The functions that the model may call."""
        return [tool.function for tool in self.tools or ()]

    @model_validator(mode="after")
    def _consistent_end(self) -> "ChatPrompt":
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise PydanticCustomError("value_error", "continue_final_message needs an assistant message at the end")
        if self.continue_final_message and self.add_generation_prompt:
            raise PydanticCustomError("value_error", "continue_final_message needs add_generation_prompt to be false")
        return self


class ChatCompletionRequest(GenerationRequest, ChatPrompt):
    id_prefix = "chatcmpl"
    prompt_field = "messages"

    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: NumTop | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None  # default: true
    separate_reasoning: bool | None = None  # default: true
    include_reasoning: bool | None = None  # default: true

    @model_validator(mode="after")
    def _consistent(self) -> "ChatCompletionRequest":
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("value_error", "top_logprobs needs logprobs to be true")
        if self.tool_choice not in (None, "none", "auto") and not self.forced_functions:
            raise PydanticCustomError("value_error", "tool_choice forces a function that tools does not have")
        return self

    @property
    def requested_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def offered_functions(self) -> list[Function]:
        return [] if self.tool_choice == "none" else super().offered_functions

    @property
    def forced_functions(self) -> list[Function]:
        if self.tool_choice == "required":
            return self.offered_functions
        name = self._named_function
        return [function for function in self.offered_functions if function.name == name]

    @property
    def calls_one_function(self) -> bool:
        return self._named_function is not None or self.parallel_tool_calls is False

    @property
    def _named_function(self) -> str | None:
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedChoice) else None
