"""`POST /v1/completions`."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from server.api.context import AppContext, Context
from server.api.errors import bad_request, error_responses
from server.api.inference.admission import MAX_SEQUENCES, check_capacity, choose_target
from server.api.inference.generation import Delta, TokenScore, collect, start_generation
from server.api.inference.streaming import EventStream
from server.api.middleware.auth import Key, key_of
from server.api.schemas import Completion, CompletionChoice, CompletionChunk, CompletionRequest
from server.api.text.tokenizer import Tokenizer, finite

router = APIRouter()

_DEFAULT_MAX_TOKENS = 16  # OpenAI's
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"model": Completion, "content": {"text/event-stream": {"x-chunk": CompletionChunk.__name__}}},
    **error_responses(400, 401, 403, 404, 409, 413, 415, 429, 500, 503),
}


@router.post("/v1/completions", responses=_RESPONSES, response_model=None, tags=["inference"])
async def create_completion(
    request: Request, body: CompletionRequest, context: Context, key: Annotated[Key, Depends(key_of)]
) -> Response:
    """Complete one or several prompts with the base model or an adapter."""
    check_capacity(context)
    target, tokenizer = await choose_target(request, context, key, body)
    prompts = await _prompts(context, tokenizer, body)
    generation = start_generation(
        request,
        context,
        key,
        body,
        target,
        tokenizer,
        prompts,
        prefix="cmpl",
        requested=body.max_tokens,
        default=_DEFAULT_MAX_TOKENS,
        logprobs=body.logprobs,
    )
    encode = _Encoder(tokenizer, with_logprobs=body.logprobs is not None)
    if body.stream:
        return EventStream(generation, encode, kind="text_completion", include_usage=body.include_usage)
    deltas = await collect(request, generation)
    completion = Completion(
        id=generation.id,
        created=generation.created,
        model=generation.target.requested_model,
        system_fingerprint=generation.target.fingerprint,
        choices=[CompletionChoice.model_validate(encode(delta)) for delta in deltas],
        usage=generation.usage(),
    )
    return JSONResponse(completion.model_dump())


async def _prompts(context: AppContext, tokenizer: Tokenizer, body: CompletionRequest) -> list[list[int]]:
    """Return the prompts as token ids. OpenAI allows a text, a list of texts, token ids, or a list of token ids."""
    given = body.prompt
    several = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    if len(several) * (body.n or 1) > MAX_SEQUENCES:
        raise bad_request(f"A request may have at most {MAX_SEQUENCES} choices (prompts times n).", "prompt")
    return [await _prompt_ids(context, tokenizer, prompt) for prompt in several]


async def _prompt_ids(context: AppContext, tokenizer: Tokenizer, prompt: Any) -> list[int]:
    if isinstance(prompt, str):
        return await tokenizer.encode(prompt, context.info.max_model_len)
    return list(prompt)


class _Encoder:
    """Encodes deltas as the choices of a response or of a chunk, which have the same format."""

    def __init__(self, tokenizer: Tokenizer, with_logprobs: bool):
        self._tokenizer = tokenizer
        self._with_logprobs = with_logprobs

    def __call__(self, delta: Delta) -> dict[str, Any]:
        return {
            "index": delta.index,
            "text": delta.text,
            "logprobs": self._logprobs(delta.scores) if self._with_logprobs else None,
            "finish_reason": delta.finish_reason,
        }

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
