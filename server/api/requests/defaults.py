"""Defaults of an adapter's requests: fields that a request leaves out, and what its chat template and messages are."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import ConfigDict, Field

from server.api.requests.chat import ChatMessage, ChatPrompt
from server.api.requests.sampling import Sampling
from server.api.requests.wire import OpenWire, TokenCount

_MAX_PROMPT = 1 << 16
_MAX_TEMPLATE = 1 << 18

ToolFormat = Literal["harmony", "hermes", "json", "mistral"]
Body = TypeVar("Body", bound=OpenWire)


class Defaults(Sampling):
    """Fields that have the name of a request's field have its bounds, and apply where the request leaves it out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    system_prompt: Annotated[str, Field(min_length=1, max_length=_MAX_PROMPT)] | None = None
    max_tokens: TokenCount | None = None
    chat_template: Annotated[str, Field(min_length=1, max_length=_MAX_TEMPLATE)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # the request's variables are added, and win
    tool_format: ToolFormat | None = None  # how calls in the output are read

    def applied_to(self, body: Body) -> Body:
        """Return the request with the fields that it leaves out. `max_tokens` is not among them: it may exceed what the
        context leaves, which a request's own number may not."""
        left_out = [name for name in Sampling.model_fields if getattr(body, name, self) is None]
        given = {name: value for name in left_out if (value := getattr(self, name)) is not None}
        if isinstance(body, ChatPrompt):
            given |= self._of_a_chat(body)
        return body.model_copy(update=given) if given else body

    def _of_a_chat(self, body: ChatPrompt) -> dict[str, Any]:
        given: dict[str, Any] = {}
        if self.system_prompt is not None and not any(each.role in ("system", "developer") for each in body.messages):
            system = ChatMessage.model_validate({"role": "system", "content": self.system_prompt})
            given["messages"] = [system, *body.messages]
        if self.chat_template_kwargs is not None:
            given["chat_template_kwargs"] = {**self.chat_template_kwargs, **(body.chat_template_kwargs or {})}
        return given


NO_DEFAULTS = Defaults.model_validate({})
