"""`POST /v1/chat/completions`."""

from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from server.api.context import AppContext, Context
from server.api.errors import bad_request
from server.api.inference.admission import admit_prompts, admit_request
from server.api.inference.choices import Delta, TokenScore
from server.api.inference.formatting import ChoicesFormatter
from server.api.inference.responses import documented_responses, respond
from server.api.middleware.auth import Key, key_of
from server.api.requests import ChatCompletionRequest, ChatMessage, ChatPrompt
from server.api.schemas import ChatCompletion, ChatCompletionChunk
from server.api.text.chat_template import RESERVED_VARIABLES, Conversation
from server.api.text.tokenizer import Tokenizer, finite

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
    admitted = await admit_request(request, context, key, body)
    prompt = await render_chat(context, admitted.tokenizer, body)
    plan = admit_prompts(context, admitted, body, [prompt])
    return await respond(context, request, plan, ChatFormatter)


async def render_chat(context: AppContext, tokenizer: Tokenizer, body: ChatPrompt) -> list[int]:
    """Return the token ids of a conversation."""
    conversation = Conversation(
        [_message(message) for message in body.messages],
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


def _message(message: ChatMessage) -> dict[str, str]:
    """Return a message as templates read it, without what it leaves out."""
    optional = {"name": message.name, "reasoning_content": message.reasoning_content}
    given = {name: value for name, value in optional.items() if value is not None}
    return {"role": _role_of(message.role), "content": message.text, **given}


def _role_of(role: str) -> str:
    """Map `developer`, OpenAI's newer name for `system`, to `system`, which chat templates support."""
    return "system" if role == "developer" else role


class ChatFormatter(ChoicesFormatter):
    """Choices as messages, or as deltas of messages. A stream opens with the role of each."""

    body_model = ChatCompletion
    chunk_model = ChatCompletionChunk

    def choice(self, delta: Delta) -> dict[str, Any]:
        return {
            "index": delta.index,
            "message": {"content": delta.text},
            "logprobs": self._logprobs(delta),
            "finish_reason": delta.finish_reason,
            **self._token_ids(delta),
        }

    def body_fields(self, deltas: list[Delta]) -> dict[str, Any]:
        (prompt,) = self._generation.plan.prompts
        shown = {"prompt_token_ids": prompt} if self._show_token_ids else {}
        return {**shown, **self._prompt_logprobs(prompt, deltas[0])}

    def chunk_choice(self, delta: Delta) -> dict[str, Any]:
        return {
            "index": delta.index,
            "delta": {"content": delta.text} if delta.text else {},
            "logprobs": self._logprobs(delta),
            "finish_reason": delta.finish_reason,
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
        return {"content": [self._score(score) for score in delta.scores]} if self._with_logprobs else None

    def _score(self, score: TokenScore) -> dict[str, Any]:
        assert score.logprobs is not None  # a chat does not echo its prompt
        top = [self._token(token_id, logprob) for token_id, logprob in score.logprobs.top]
        return self._token(score.token_id, score.logprobs.logprob) | {"top_logprobs": top}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token_id)
        return {"token": self._name(token_id), "logprob": finite(logprob), "bytes": list(raw)}
