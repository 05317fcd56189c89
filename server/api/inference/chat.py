"""`POST /v1/chat/completions`."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from server.api.context import AppContext, Context
from server.api.errors import error_responses
from server.api.inference.admission import check_capacity, choose_target
from server.api.inference.generation import Delta, Generation, TokenScore, collect, start_generation
from server.api.inference.streaming import EventStream
from server.api.middleware.auth import Key, key_of
from server.api.schemas import (
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
)
from server.api.text.tokenizer import Tokenizer, finite

router = APIRouter()

_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"model": ChatCompletion, "content": {"text/event-stream": {"x-chunk": ChatCompletionChunk.__name__}}},
    **error_responses(400, 401, 403, 404, 409, 413, 415, 429, 500, 503),
}


@router.post("/v1/chat/completions", responses=_RESPONSES, response_model=None, tags=["inference"])
async def create_chat_completion(
    request: Request, body: ChatCompletionRequest, context: Context, key: Annotated[Key, Depends(key_of)]
) -> Response:
    """Generate a reply to a conversation with the base model or an adapter."""
    check_capacity(context)
    target, tokenizer = await choose_target(request, context, key, body)
    prompt = await _render(context, tokenizer, body)
    generation = start_generation(
        request,
        context,
        key,
        body,
        target,
        tokenizer,
        [prompt],
        prefix="chatcmpl",
        requested=body.max_completion_tokens or body.max_tokens,
        default=None,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    encode = _Encoder(tokenizer, with_logprobs=bool(body.logprobs))
    if body.stream:
        return EventStream(
            generation,
            encode.chunk_choice,
            kind="chat.completion.chunk",
            include_usage=body.include_usage,
            opening=_role,
        )
    deltas = await collect(request, generation)
    return JSONResponse(_completion(generation, [encode.choice(delta) for delta in deltas]).model_dump())


async def _render(context: AppContext, tokenizer: Tokenizer, body: ChatCompletionRequest) -> list[int]:
    messages = [{"role": _role_of(message.role), "content": message.text} for message in body.messages]
    return await tokenizer.render(messages, context.info.max_model_len, continue_final=body.continue_final_message)


def _role_of(role: str) -> str:
    """Map `developer`, OpenAI's newer name for `system`, to `system`, which chat templates support."""
    return "system" if role == "developer" else role


def _role(delta: Delta) -> dict[str, Any]:
    return {
        "index": delta.index,
        "delta": {"role": "assistant", "content": ""},
        "logprobs": None,
        "finish_reason": None,
    }


def _completion(generation: Generation, choices: list[ChatChoice]) -> ChatCompletion:
    return ChatCompletion(
        id=generation.id,
        created=generation.created,
        model=generation.target.requested_model,
        system_fingerprint=generation.target.fingerprint,
        choices=choices,
        usage=generation.usage(),
    )


class _Encoder:
    """Encodes deltas as the choices of a response or of a chunk."""

    def __init__(self, tokenizer: Tokenizer, with_logprobs: bool):
        self._tokenizer = tokenizer
        self._with_logprobs = with_logprobs

    def choice(self, delta: Delta) -> ChatChoice:
        return ChatChoice.model_validate(
            {
                "index": delta.index,
                "message": AssistantMessage(content=delta.text),
                "logprobs": self._logprobs(delta),
                "finish_reason": delta.finish_reason,
            }
        )

    def chunk_choice(self, delta: Delta) -> dict[str, Any]:
        return {
            "index": delta.index,
            "delta": {"content": delta.text} if delta.text else {},
            "logprobs": self._logprobs(delta),
            "finish_reason": delta.finish_reason,
        }

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        return {"content": [self._score(score) for score in delta.scores]} if self._with_logprobs else None

    def _score(self, score: TokenScore) -> dict[str, Any]:
        top = [self._token(token_id, logprob) for token_id, logprob in score.logprobs.top]
        return self._token(score.token_id, score.logprobs.logprob) | {"top_logprobs": top}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token_id)
        return {"token": raw.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(raw)}
