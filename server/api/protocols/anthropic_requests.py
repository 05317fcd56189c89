"""Bodies of Anthropic's Messages API, and the chats that they mean."""

import json
from typing import Annotated, Any, Literal

from pydantic import Field

from server.api.protocols.translation import TranslatedRequest
from server.api.requests.wire import ModelName, OpenWire, StopString, Text, TokenCount


class BlockPart(OpenWire):
    harmless = {"cache_control": "the prefix cache needs no hints", "citations": "", "caller": "", "signature": ""}  # noqa: RUF012


class TextBlock(BlockPart):
    type: Literal["text"]
    text: Text


class ThinkingBlock(BlockPart):
    type: Literal["thinking"]
    thinking: Text


class ToolUseBlock(BlockPart):
    type: Literal["tool_use"]
    id: str = Field(max_length=256)
    name: str = Field(min_length=1, max_length=256)
    input: dict[str, Any]


class ToolResultBlock(BlockPart):
    type: Literal["tool_result"]
    tool_use_id: str = Field(max_length=256)
    content: Text | Annotated[list[TextBlock], Field(max_length=1024, fail_fast=True)] | None = None
    is_error: bool | None = None


InputBlock = Annotated[TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]
InputText = Text | Annotated[list[TextBlock], Field(max_length=1024, fail_fast=True)]


class InputMessage(OpenWire):
    role: Literal["user", "assistant", "system"]
    content: Text | Annotated[list[InputBlock], Field(min_length=1, max_length=4096, fail_fast=True)]

    @property
    def blocks(self) -> list[InputBlock]:
        return [TextBlock(type="text", text=self.content)] if isinstance(self.content, str) else self.content

    def as_chat(self) -> list[dict[str, Any]]:
        """Return the results of functions as messages of their own, and then the rest."""
        results = [block for block in self.blocks if isinstance(block, ToolResultBlock)]
        messages = [
            {"role": "tool", "tool_call_id": block.tool_use_id, "content": text_of(block.content)} for block in results
        ]
        if len(results) < len(self.blocks):
            messages.append({"role": self.role, **self._own_fields()})
        return messages

    def _own_fields(self) -> dict[str, Any]:
        calls = [_call(block) for block in self.blocks if isinstance(block, ToolUseBlock)]
        thoughts = [block.thinking for block in self.blocks if isinstance(block, ThinkingBlock)]
        return {
            "content": "".join(block.text for block in self.blocks if isinstance(block, TextBlock)),
            "tool_calls": calls or None,
            "reasoning_content": "".join(thoughts) or None,
        }


def text_of(content: InputText | None) -> str:
    return "".join(part.text for part in content) if isinstance(content, list) else content or ""


def _call(block: ToolUseBlock) -> dict[str, Any]:
    function = {"name": block.name, "arguments": json.dumps(block.input)}
    return {"id": block.id, "type": "function", "function": function}


class AnthropicTool(BlockPart):
    """A function. Anthropic's own tools, which have other types, are refused."""

    type: Literal["custom"] | None = None
    name: str = Field(min_length=1, max_length=256)
    description: Text | None = None
    input_schema: dict[str, Any]

    def as_chat(self) -> dict[str, Any]:
        function = {"name": self.name, "description": self.description, "parameters": self.input_schema}
        return {"type": "function", "function": function}


class AnthropicToolChoice(OpenWire):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = Field(None, max_length=256)
    disable_parallel_tool_use: bool | None = None

    def as_chat(self) -> Any:
        if self.type == "tool":
            return {"type": "function", "function": {"name": self.name}}
        return "required" if self.type == "any" else self.type


class Thinking(OpenWire):
    type: Literal["enabled", "adaptive", "disabled"]


class OutputFormat(OpenWire):
    """A schema that the text follows."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")

    def as_chat(self) -> dict[str, Any]:
        return {"type": "json_schema", "json_schema": {"schema": self.schema_}}


class OutputConfig(OpenWire):
    effort: str | None = Field(None, max_length=64)
    format: OutputFormat | None = None


class Metadata(OpenWire):
    user_id: str | None = Field(None, max_length=1024)


class MessagesRequest(TranslatedRequest):
    model: ModelName
    messages: Annotated[list[InputMessage], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_tokens: TokenCount
    system: InputText | None = None
    stop_sequences: Annotated[list[StopString], Field(max_length=64)] | None = None
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: Annotated[list[AnthropicTool], Field(max_length=1024, fail_fast=True)] | None = None
    tool_choice: AnthropicToolChoice | None = None
    metadata: Metadata | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None  # the former name of `format` in `output_config`

    def as_chat(self) -> dict[str, Any]:
        system = [] if self.system is None else [{"role": "system", "content": text_of(self.system)}]
        messages = [*system, *(each for message in self.messages for each in message.as_chat())]
        choice, config = self.tool_choice, self.output_config
        output_format = (config and config.format) or self.output_format
        return {
            "model": self.model,
            "messages": messages,
            "max_tokens": self.max_tokens,
            "stop": self.stop_sequences,
            "stream": self.stream,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "tools": [tool.as_chat() for tool in self.tools or ()],
            "tool_choice": choice and choice.as_chat(),
            "parallel_tool_calls": choice and not choice.disable_parallel_tool_use,
            "user": self.extensions.get("user") or (self.metadata and self.metadata.user_id),
            "response_format": output_format and output_format.as_chat(),
            "reasoning_effort": config and config.effort,
            "chat_template_kwargs": self._template_variables(),
            "continue_final_message": messages[-1]["role"] == "assistant" and not messages[-1]["tool_calls"],
        }

    def _template_variables(self) -> Any:
        """Return the template's variables: `enable_thinking` is what templates of reasoning models call it."""
        given = self.extensions.get("chat_template_kwargs") or {}
        if self.thinking is None or not isinstance(given, dict):
            return given
        return {"enable_thinking": self.thinking.type != "disabled", **given}
