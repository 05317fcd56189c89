"""Chat templates: a conversation becomes the text of a prompt."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from server.api.errors import bad_request
from server.api.text import template_worker
from server.api.text.template_sandbox import TemplateFailed, TemplateSandbox

# Variables that a request may not set: the server's own, and those of transformers' method.
RESERVED_VARIABLES = {
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template",
}
_MARK = "CONTINUE_FINAL_MESSAGE_TAG "  # the mark that transformers uses; templates may trim it

Render = Callable[[str, dict[str, Any]], Awaitable[str]]  # template and variables to text; raises TemplateFailed


@dataclass(frozen=True, slots=True)
class Conversation:
    """The variables of one rendering. With `continue_final`, the text ends within the last message."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None  # JSON schemas of functions
    generation_prompt: bool = True
    continue_final: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict)  # the request's own


class ChatTemplate:
    """A chat template with the variables that transformers defines. `owner` is named in errors."""

    def __init__(self, source: str, render: Render, owner: str):
        self.source = source
        self._render = render
        self._owner = owner

    @property
    def renders_tools(self) -> bool:
        return "tools" in self.source

    async def render(self, conversation: Conversation, special_tokens: Mapping[str, str]) -> str:
        """Return the text of the prompt. Raises `ApiError` if the template fails."""
        messages, continue_final = conversation.messages, conversation.continue_final
        variables: dict[str, Any] = {
            **conversation.variables,
            **special_tokens,
            "messages": _marked(messages) if continue_final else messages,
            "tools": conversation.tools,
            "documents": None,
            "add_generation_prompt": conversation.generation_prompt and not continue_final,
        }
        try:
            text = await self._render(self.source, variables)
        except TemplateFailed as failed:
            raise bad_request(
                f"The {self._owner}'s chat template failed: {str(failed).removesuffix('.')}.", "messages"
            ) from None
        return self._up_to_mark(text) if continue_final else text

    def _up_to_mark(self, text: str) -> str:
        """Return the text up to the end of the last message. Templates that trim messages have trimmed the mark as
        well."""
        before, mark, after = text.rpartition(_MARK.strip())
        if not mark:
            raise bad_request(
                f"The {self._owner}'s chat template does not render the last message, so it cannot be continued.",
                "messages",
            )
        return before if after.startswith(" ") else before.rstrip()


def base_template(source: str) -> ChatTemplate:
    """Return the base model's template, which is trusted and rendered in this process."""
    return ChatTemplate(source, _render_here, "model")


def adapter_template(source: str, sandbox: TemplateSandbox) -> ChatTemplate:
    """Return an adapter's template. It renders one conversation at a time, so that an adapter occupies one worker."""
    turn = asyncio.Lock()

    async def render(template: str, variables: dict[str, Any]) -> str:
        async with turn:
            return await sandbox.render(template, variables)

    return ChatTemplate(source, render, "adapter")


async def _render_here(template: str, variables: dict[str, Any]) -> str:
    request = {"template": template, "context": variables}
    response = await asyncio.to_thread(template_worker.respond, request)
    if "error" in response:
        raise TemplateFailed(response["error"])
    return response["text"]


def _marked(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    *others, last = messages
    return [*others, {**last, "content": last["content"] + _MARK}]
