"""`POST /generate` and `/generate_stream` in the format of LoRAX and TGI: a prompt, an adapter and parameters."""

from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from pydantic import Field, ValidationError

from server.api.context import AppContext, Context
from server.api.errors import ApiError, error_body, lorax_error, validation_error
from server.api.fields import SELECTORS, Refusal
from server.api.inference.choices import Delta
from server.api.inference.completions import plan_completion
from server.api.inference.generation import Generation
from server.api.inference.responses import documented_responses, respond
from server.api.middleware.auth import Key, key_of
from server.api.requests.completions import CompletionRequest
from server.api.requests.wire import AdapterScale, ModelName, OpenWire, Text, TokenCount
from server.api.schemas import LoraxErrorBody, Wire
from server.api.text.tokenizer import finite

router = APIRouter(tags=["inference"])
Caller = Annotated[Key, Depends(key_of)]


_OTHER_SELECTORS = {
    name: Refusal("adapters, by another name", (), "; use 'adapter_id' in 'parameters'")
    for name in (*SELECTORS, "model", "adapters", "lora", "lora_request")
}


class Parameters(OpenWire):
    """Names that completions have as well mean the same."""

    refused = {  # noqa: RUF012
        **_OTHER_SELECTORS,
        "adapter_source": Refusal("where an adapter comes from", (), "; register it with POST /v1/adapters"),
        "merged_adapters": Refusal("a combination of adapters"),
        "best_of": Refusal("the best of several outputs", (1,)),
        "truncate": Refusal("cuts the prompt"),
        "typical_p": Refusal("typical sampling", (1,)),
        "watermark": Refusal("a watermark", (False,)),
        "decoder_input_details": Refusal("tokens of the prompt", (False,)),
        "top_n_tokens": Refusal("more log-probabilities", (0,)),
        "response_format": Refusal("a constraint", (), "; use /v1/completions"),
        "grammar": Refusal("a constraint", (), "; use /v1/completions"),
    }
    harmless = {"api_token": "for fetching an adapter"}  # noqa: RUF012

    adapter_id: ModelName | None = None
    adapter_scale: AdapterScale | None = None
    max_new_tokens: TokenCount | None = None
    do_sample: bool | None = None  # default: true if a parameter of sampling is given
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    stop: list[str] | None = None
    ignore_eos_token: bool | None = None
    return_full_text: bool | None = None
    details: bool | None = None

    @property
    def samples(self) -> bool:
        """True unless the most probable tokens are wanted, which is the default."""
        chosen = (self.temperature, self.top_k, self.top_p)
        return bool(self.do_sample) or (self.do_sample is None and any(value is not None for value in chosen))

    def as_completion(self) -> dict[str, Any]:
        return {
            "adapter_id": self.adapter_id,
            "adapter_scale": self.adapter_scale,
            "max_tokens": self.max_new_tokens,
            "temperature": 0.0 if self.do_sample is False else self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "seed": self.seed,
            "repetition_penalty": self.repetition_penalty,
            "frequency_penalty": self.frequency_penalty,
            "stop": self.stop,
            "ignore_eos": self.ignore_eos_token,
        }


class GreedyRequest(CompletionRequest):
    """A completion that takes the most probable tokens, unless the adapter's defaults have a temperature."""

    default_temperature = 0.0


class GenerateRequest(OpenWire):
    refused = _OTHER_SELECTORS

    inputs: Text
    parameters: Parameters = Field(default_factory=lambda: Parameters())


class GeneratedToken(Wire):
    id: int
    text: str
    logprob: float
    special: bool


class Details(Wire):
    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    prompt_tokens: int
    generated_tokens: int
    seed: int | None
    prefill: list[GeneratedToken] = Field(default_factory=list)
    tokens: list[GeneratedToken]


class GeneratedBody(Wire):
    generated_text: str
    details: Details | None = None


class GeneratedEvent(Wire):
    token: GeneratedToken
    generated_text: str | None = None  # of the last event alone, as are the details
    details: Details | None = None


_RESPONSES = documented_responses(GeneratedBody, GeneratedEvent, LoraxErrorBody)


@router.post("/generate", responses=_RESPONSES, response_model=None)
async def generate(request: Request, body: GenerateRequest, context: Context, key: Caller) -> Response:
    """Complete a prompt with the base model or an adapter, in the format of LoRAX."""
    return await _respond(request, body, context, key, stream=False)


@router.post("/generate_stream", responses=_RESPONSES, response_model=None)
async def generate_stream(request: Request, body: GenerateRequest, context: Context, key: Caller) -> Response:
    """Complete a prompt as a stream of tokens, in the format of LoRAX."""
    return await _respond(request, body, context, key, stream=True)


async def _respond(request: Request, body: GenerateRequest, context: AppContext, key: Key, *, stream: bool) -> Response:
    given = {"model": context.base_model, "prompt": body.inputs, "logprobs": 0, "stream": stream}
    kind = CompletionRequest if body.parameters.samples else GreedyRequest
    try:
        completion = kind.model_validate({**given, **body.parameters.as_completion()})
    except ValidationError as error:
        raise validation_error(error.errors()) from None
    plan = await plan_completion(request, context, key, completion, sent=body)
    return await respond(context, request, plan, lambda generation: GeneratedFormatter(generation, body))


class GeneratedFormatter:
    """The text with the prompt before it if that was asked for, and one event for each token."""

    def __init__(self, generation: Generation, sent: GenerateRequest):
        self._generation = generation
        self._sent = sent
        self._text = sent.inputs if sent.parameters.return_full_text else ""
        self._tokens: list[GeneratedToken] = []

    def body(self, deltas: list[Delta]) -> Wire:
        (delta,) = deltas
        self._add(delta)
        details = self._details(delta) if self._sent.parameters.details else None
        return GeneratedBody(generated_text=self._text, details=details)

    def opening(self) -> bytes:
        return b""

    def has_event(self, delta: Delta) -> bool:
        return bool(delta.scores or delta.text or delta.finish_reason)

    def event(self, delta: Delta) -> bytes:
        events = [GeneratedEvent(token=token) for token in self._add(delta)]
        if delta.finish_reason is not None:
            if not events:  # the token that ended the output, which has no text
                events = [GeneratedEvent(token=self._token(delta.token_ids[-1] if delta.token_ids else 0, 0.0, ""))]
            events[-1].generated_text, events[-1].details = self._text, self._details(delta)
        return b"".join(b"data: %b\n\n" % msgspec.json.encode(event.model_dump()) for event in events)

    def ending(self) -> bytes:
        return b""

    def failure(self, error: ApiError) -> bytes:
        body = error_body(error.status_code, str(error.detail), code=error.code, param=error.param)
        return b"data: %b\n\n" % msgspec.json.encode(lorax_error(error.status_code, body["error"]))

    def _add(self, delta: Delta) -> list[GeneratedToken]:
        """Add the tokens of a delta, the last of which has its text: together they have the text of the output."""
        self._text += delta.text
        scored = [(score.token_id, score.logprobs) for score in delta.scores]
        added = [self._token(token_id, 0.0 if known is None else known.logprob, "") for token_id, known in scored]
        if added:
            added[-1].text = delta.text
        self._tokens += added
        return added

    def _token(self, token_id: int, logprob: float, text: str) -> GeneratedToken:
        special = token_id in self._generation.plan.tokenizer.special_ids
        return GeneratedToken(id=token_id, text=text, logprob=finite(logprob), special=special)

    def _details(self, delta: Delta) -> Details:
        usage = self._generation.usage()
        ended: Literal["stop_sequence", "eos_token"] = "stop_sequence" if delta.stop_string else "eos_token"
        return Details(
            finish_reason="length" if delta.is_cut else ended,
            prompt_tokens=usage.prompt_tokens,
            generated_tokens=usage.completion_tokens,
            seed=self._generation.plan.sampling.seed,
            tokens=self._tokens,
        )
