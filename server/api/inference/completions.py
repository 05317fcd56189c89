"""`POST /v1/completions`."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from server.api.context import AppContext, Context
from server.api.errors import bad_request
from server.api.inference.admission import admit_prompts, admit_request
from server.api.inference.choices import Delta, TokenScore
from server.api.inference.formatting import ChoicesFormatter
from server.api.inference.responses import documented_responses, respond
from server.api.middleware.auth import Key, key_of
from server.api.schemas import Completion, CompletionChunk, CompletionRequest
from server.api.text.tokenizer import Tokenizer, finite

router = APIRouter()

_MAX_CHOICES = 64  # prompts times n of one request


@router.post(
    "/v1/completions",
    responses=documented_responses(Completion, CompletionChunk),
    response_model=None,
    tags=["inference"],
)
async def create_completion(
    request: Request, body: CompletionRequest, context: Context, key: Annotated[Key, Depends(key_of)]
) -> Response:
    """Complete one or several prompts with the base model or an adapter."""
    admitted = await admit_request(request, context, key, body)
    prompts = await _encode_prompts(context, admitted.tokenizer, body)
    plan = admit_prompts(context, admitted, body, prompts)
    return await respond(context, request, plan, CompletionFormatter)


async def _encode_prompts(context: AppContext, tokenizer: Tokenizer, body: CompletionRequest) -> list[list[int]]:
    """Return the prompts as token ids. OpenAI allows a text, a list of texts, token ids, or a list of token ids."""
    given = body.prompt
    several = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    if len(several) * (body.n or 1) > _MAX_CHOICES:
        raise bad_request(f"A request may have at most {_MAX_CHOICES} choices (prompts times n).", "prompt")
    return [await _encode_prompt(context, tokenizer, prompt) for prompt in several]


async def _encode_prompt(context: AppContext, tokenizer: Tokenizer, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        return await tokenizer.encode(prompt, context.info.max_model_len)
    return list(prompt)


class CompletionFormatter(ChoicesFormatter):
    """Choices as text. Those of a body and of a chunk have the same format."""

    body_model = Completion
    chunk_model = CompletionChunk

    def choice(self, delta: Delta) -> dict[str, Any]:
        return {
            "index": delta.index,
            "text": delta.text,
            "logprobs": self._logprobs(delta.scores) if self._with_logprobs else None,
            "finish_reason": delta.finish_reason,
        }

    chunk_choice = choice

    def _logprobs(self, scores: list[TokenScore]) -> dict[str, Any]:
        return {
            "tokens": [self._text(score.token_id) for score in scores],
            "token_logprobs": [finite(score.logprobs.logprob) for score in scores],
            "top_logprobs": [self._top(score) for score in scores],
            "text_offset": [score.offset for score in scores],
        }

    def _top(self, score: TokenScore) -> dict[str, float]:
        """Return the n most probable tokens and the sampled one. Of tokens with equal text, keep the most probable."""
        scored = [*score.logprobs.top, (score.token_id, score.logprobs.logprob)]
        top: dict[str, float] = {}
        for token_id, logprob in scored:
            top.setdefault(self._text(token_id), finite(logprob))
        return top

    def _text(self, token_id: int) -> str:
        return self._tokenizer.token_bytes(token_id).decode("utf-8", "replace")
