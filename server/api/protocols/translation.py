"""The translation of other APIs' requests to chats."""

from collections.abc import Callable
from typing import Any, ClassVar

from fastapi import Request
from fastapi.responses import Response
from pydantic import ValidationError

from server.api.context import AppContext
from server.api.errors import validation_error
from server.api.fields import HARMLESS, REFUSED, SELECTORS
from server.api.inference.chat import plan_chat
from server.api.inference.formatting import Formatter
from server.api.inference.generation import Generation
from server.api.inference.plan import GenerationPlan
from server.api.inference.responses import respond
from server.api.middleware.auth import Key
from server.api.requests.chat import ChatCompletionRequest
from server.api.requests.wire import OpenWire

# Fields of a chat that another API's request may have as well. Those that add to the response are not among them.
EXTENSIONS = (
    *("adapters", "adapter_scale", *SELECTORS, "user", "priority", "timeout", "cache_salt"),
    *("top_k", "min_p", "seed", "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias"),
    *("min_tokens", "ignore_eos", "stop_token_ids", "skip_special_tokens"),
    *("response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar"),
    *("json_schema", "regex", "ebnf"),
    *("chat_template_kwargs", "reasoning_effort", "separate_reasoning", "include_reasoning"),
)


class TranslatedRequest(OpenWire):
    """Base of requests of other APIs. The fields of chats in `EXTENSIONS` are applied; `fields.py` has the refused."""

    refused = REFUSED
    harmless: ClassVar[dict[str, str]] = HARMLESS | dict.fromkeys(EXTENSIONS, "")

    @property
    def extensions(self) -> dict[str, Any]:
        return {name: value for name, value in (self.model_extra or {}).items() if name in EXTENSIONS}

    def as_chat(self) -> dict[str, Any]:
        """Return the fields of the chat that this request means, without `extensions`."""
        raise NotImplementedError

    def check_plan(self, plan: GenerationPlan) -> None:
        """Raise 400 if the format of the response has no place for what this request asks for."""


async def respond_as(
    formatter: Callable[[Generation], Formatter],
    request: Request,
    body: TranslatedRequest,
    context: AppContext,
    key: Key,
) -> Response:
    """Generate the chat that `body` means and return it in the format of `formatter`."""
    fields = {name: value for name, value in body.as_chat().items() if value is not None}
    try:
        chat = ChatCompletionRequest.model_validate({**body.extensions, **fields})
    except ValidationError as error:
        raise validation_error(error.errors()) from None
    plan = await plan_chat(request, context, key, chat, sent=body)
    body.check_plan(plan)
    return await respond(context, request, plan, formatter)
