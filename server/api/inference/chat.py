"""`POST /v1/chat/completions`."""

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from server.api.context import AppContext, Context
from server.api.errors import bad_request
from server.api.inference.admission import admit_prompts, admit_request
from server.api.inference.choices import Delta
from server.api.inference.formatting import ChoicesFormatter, score_body, token_body
from server.api.inference.generation import Generation
from server.api.inference.messages import (
    chat_messages,
    finish_reason,
    message_delta,
    message_format,
    parsers,
    whole_message,
)
from server.api.inference.plan import GenerationPlan
from server.api.inference.responses import documented_responses, respond
from server.api.middleware.auth import Key, key_of
from server.api.requests.chat import ChatCompletionRequest, ChatPrompt
from server.api.requests.wire import OpenWire
from server.api.schemas import ChatCompletion, ChatCompletionChunk
from server.api.text.chat_template import RESERVED_VARIABLES, Conversation
from server.api.text.tokenizer import Tokenizer

router = APIRouter()


@router.post(
    "/v1/chat/completions",
    responses=documented_responses(ChatCompletion, ChatCompletionChunk),
    response_model=None,
    tags=["inference"],
)
async def create_chat_completion(
    request: Request, body: ChatCompletionRequest, context: Context, key: Annotated[Key, Depends(key_of)]
) -> Response:
    """Generate a reply to a conversation with the base model or an adapter."""
    return await respond(context, request, await plan_chat(request, context, key, body), ChatFormatter)


async def plan_chat(
    request: Request, context: AppContext, key: Key, body: ChatCompletionRequest, sent: OpenWire | None = None
) -> GenerationPlan:
    """Admit a chat and return its plan. `sent` is the request of another API that was translated to `body`."""
    admitted = await admit_request(request, context, key, body, sent)
    defaults = admitted.target.defaults
    body = defaults.applied_to(body)
    prompt = await render_chat(context, admitted.tokenizer, body)
    is_constrained = admitted.constraint is not None
    found = message_format(admitted.tokenizer, body, prompt, defaults.tool_format, is_constrained=is_constrained)
    return admit_prompts(context, admitted, body, [prompt], message_format=found)


async def render_chat(context: AppContext, tokenizer: Tokenizer, body: ChatPrompt) -> list[int]:
    """Return the token ids of a conversation."""
    conversation = Conversation(
        chat_messages(body.messages),
        tools=[function.as_schema() for function in body.offered_functions] or None,
        generation_prompt=body.add_generation_prompt is not False,
        continue_final=bool(body.continue_final_message),
        variables=_variables(body),
    )
    special = bool(body.add_special_tokens)
    return await tokenizer.render(conversation, context.info.max_model_len, add_special_tokens=special)


def _variables(body: ChatPrompt) -> dict[str, Any]:
    """Return the request's variables of the chat template. Raises 400 for one that is not the request's to set."""
    given = body.chat_template_kwargs or {}
    for name in sorted(given.keys() & RESERVED_VARIABLES):
        raise bad_request(f"'chat_template_kwargs' may not have '{name}'.", "chat_template_kwargs")
    return given if body.reasoning_effort is None else {"reasoning_effort": body.reasoning_effort, **given}


class ChatFormatter(ChoicesFormatter):
    """Choices as messages, or as deltas of messages. A stream opens with the role of each."""

    body_model = ChatCompletion
    chunk_model = ChatCompletionChunk

    def __init__(self, generation: Generation):
        super().__init__(generation)
        self._parsers = parsers(generation)

    def choice(self, delta: Delta) -> dict[str, Any]:
        parser = self._parsers.get(delta.index)
        return {
            "index": delta.index,
            "message": whole_message(parser.feed(delta.text, end=True)) if parser else {"content": delta.text},
            "logprobs": self._logprobs(delta),
            "finish_reason": finish_reason(parser, delta),
            **self._token_ids(delta),
        }

    def body_fields(self, deltas: list[Delta]) -> dict[str, Any]:
        (prompt,) = self._generation.plan.prompts
        shown = {"prompt_token_ids": prompt} if self._show_token_ids else {}
        return {**shown, **self._prompt_logprobs(prompt, deltas[0])}

    def event(self, delta: Delta) -> bytes:
        choice = self.chunk_choice(delta)
        says = choice["delta"] or delta.scores or delta.finish_reason or choice.get("token_ids")
        return self._event_head + msgspec.json.encode(choice) + self._tail() if says else b""

    def chunk_choice(self, delta: Delta) -> dict[str, Any]:
        parser = self._parsers.get(delta.index)
        text = {"content": delta.text} if delta.text else {}
        return {
            "index": delta.index,
            "delta": message_delta(parser.feed(delta.text, end=bool(delta.finish_reason))) if parser else text,
            "logprobs": self._logprobs(delta),
            "finish_reason": finish_reason(parser, delta),
            **self._token_ids(delta),
        }

    def opening_choice(self, index: int) -> dict[str, Any]:
        return {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }

    def _opening_tail(self) -> bytes:
        """Return the end of an event before the first output, which has the prompt's tokens if they were asked for."""
        if not self._show_token_ids:
            return self._tail()
        (prompt,) = self._generation.plan.prompts
        return self._tail().replace(b"]", b'],"prompt_token_ids":' + msgspec.json.encode(prompt), 1)

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        return {"content": [score_body(score, self._token) for score in delta.scores]} if self._with_logprobs else None

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {**token_body(self._tokenizer, token_id, logprob), "token": self._name(token_id)}
