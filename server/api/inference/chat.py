"""`POST /v1/chat/completions`."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from server.api.context import AppContext, Context
from server.api.inference.admission import admit_prompts, admit_request
from server.api.inference.choices import Delta, TokenScore
from server.api.inference.formatting import ChoicesFormatter
from server.api.inference.responses import documented_responses, respond
from server.api.middleware.auth import Key, key_of
from server.api.schemas import ChatCompletion, ChatCompletionChunk, ChatCompletionRequest
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
    prompt = await _render(context, admitted.tokenizer, body)
    plan = admit_prompts(context, admitted, body, [prompt])
    return await respond(context, request, plan, ChatFormatter)


async def _render(context: AppContext, tokenizer: Tokenizer, body: ChatCompletionRequest) -> list[int]:
    messages = [{"role": _role_of(message.role), "content": message.text} for message in body.messages]
    return await tokenizer.render(messages, context.info.max_model_len, continue_final=body.continue_final_message)


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
        }

    def chunk_choice(self, delta: Delta) -> dict[str, Any]:
        return {
            "index": delta.index,
            "delta": {"content": delta.text} if delta.text else {},
            "logprobs": self._logprobs(delta),
            "finish_reason": delta.finish_reason,
        }

    def opening_choice(self, index: int) -> dict[str, Any]:
        return {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        return {"content": [self._score(score) for score in delta.scores]} if self._with_logprobs else None

    def _score(self, score: TokenScore) -> dict[str, Any]:
        top = [self._token(token_id, logprob) for token_id, logprob in score.logprobs.top]
        return self._token(score.token_id, score.logprobs.logprob) | {"top_logprobs": top}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token_id)
        return {"token": raw.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(raw)}
