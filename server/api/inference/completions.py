"""`POST /v1/completions`."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from server.api.context import AppContext, Context
from server.api.errors import bad_request
from server.api.inference.admission import admit_prompts, admit_request
from server.api.inference.choices import Delta, TokenScore
from server.api.inference.formatting import ChoicesFormatter
from server.api.inference.generation import Generation
from server.api.inference.plan import GenerationPlan
from server.api.inference.responses import documented_responses, respond
from server.api.middleware.auth import Key, key_of
from server.api.requests.completions import CompletionRequest
from server.api.requests.wire import MAX_CHOICES, OpenWire
from server.api.schemas import Completion, CompletionChunk
from server.api.text.tokenizer import Tokenizer, finite
from server.request import TokenLogprobs

router = APIRouter()


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
    return await respond(context, request, await plan_completion(request, context, key, body), CompletionFormatter)


async def plan_completion(
    request: Request, context: AppContext, key: Key, body: CompletionRequest, sent: OpenWire | None = None
) -> GenerationPlan:
    """Admit a completion and return its plan. `sent` is the request of another API that was translated to `body`."""
    admitted = await admit_request(request, context, key, body, sent)
    body = admitted.target.defaults.applied_to(body)
    given = _prompts(body)
    prompts = [await _encode_prompt(context, admitted.tokenizer, body, prompt) for prompt in given]
    texts = [prompt if isinstance(prompt, str) else None for prompt in given]
    return admit_prompts(context, admitted, body, prompts, texts)


def _prompts(body: CompletionRequest) -> list[Any]:
    """Return the prompts. OpenAI allows a text, a list of texts, token ids, or a list of token ids."""
    given = body.prompt
    several = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    if len(several) * (body.n or 1) > MAX_CHOICES:
        raise bad_request(f"A request may have at most {MAX_CHOICES} choices (prompts times n).", "prompt")
    return list(several)


async def _encode_prompt(
    context: AppContext, tokenizer: Tokenizer, body: CompletionRequest, prompt: str | list[int]
) -> list[int]:
    if not isinstance(prompt, str):
        return prompt
    special = body.add_special_tokens is not False
    return await tokenizer.encode(prompt, context.info.max_model_len, add_special_tokens=special)


class CompletionFormatter(ChoicesFormatter):
    """Choices as text. Those of a body and of a chunk have the same format."""

    body_model = Completion
    chunk_model = CompletionChunk

    def __init__(self, generation: Generation):
        super().__init__(generation)
        self._opened: set[int] = set()

    def choice(self, delta: Delta) -> dict[str, Any]:
        return {
            "index": delta.index,
            "text": delta.text,
            "logprobs": self._logprobs(delta.scores) if self._with_logprobs else None,
            "finish_reason": delta.finish_reason,
            **self._prompt_logprobs(self._prompt(delta), delta),
            **self._prompt_ids(delta),
            **self._token_ids(delta),
        }

    chunk_choice = choice

    def _prompt(self, delta: Delta) -> list[int]:
        plan = self._generation.plan
        return plan.prompts[delta.index // plan.n]

    def _prompt_ids(self, delta: Delta) -> dict[str, list[int]]:
        """Return the prompt's tokens, if they were asked for, with a choice's first delta."""
        if not self._show_token_ids or delta.index in self._opened:
            return {}
        self._opened.add(delta.index)
        return {"prompt_token_ids": self._prompt(delta)}

    def _logprobs(self, scores: list[TokenScore]) -> dict[str, Any]:
        return {
            "tokens": [self._name(score.token_id) for score in scores],
            "token_logprobs": [score.logprobs and finite(score.logprobs.logprob) for score in scores],
            "top_logprobs": [score.logprobs and self._top(score.token_id, score.logprobs) for score in scores],
            "text_offset": [score.offset for score in scores],
        }

    def _top(self, token_id: int, logprobs: TokenLogprobs) -> dict[str, float]:
        """Return the n most probable tokens and the token itself. Of those with equal text, keep the most probable."""
        top: dict[str, float] = {}
        for each, logprob in [*logprobs.top, (token_id, logprobs.logprob)]:
            top.setdefault(self._name(each), finite(logprob))
        return top
