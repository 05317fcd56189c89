"""Whether and how a request may run: which version answers it, whether there is room, how its sampler is set."""

from collections.abc import Sequence
from dataclasses import dataclass

from adapters.errors import AdapterNotFound
from adapters.registry import AdapterRecord
from server.api.auth import Key
from server.api.context import BASE_NAME, AppContext
from server.api.errors import ApiError, bad_request, model_not_found, unavailable
from server.api.schemas import GenerationRequest
from server.sequence import SamplingParams

MAX_SEQUENCES = 64  # prompts times n of one request


@dataclass(frozen=True, slots=True)
class Target:
    """What answers: the base model (no digest) or one version of an adapter, fixed for the whole request."""

    asked: str
    name: str
    digest: str | None
    fingerprint: str


def resolve(context: AppContext, key: Key, model: str) -> Target:
    """Find what `model` names. The version found here is the one that answers, whatever is published meanwhile."""
    base = context.info.base_fingerprint
    if model == context.base_model:
        _refuse_if_merged(context, None)
        return Target(model, BASE_NAME, None, f"{base}-base")
    record = resolve_record(context, key, model)
    _refuse_if_merged(context, record.version.digest)
    context.metrics.know(record.name)
    return Target(model, record.name, record.version.digest, f"{base}-{record.version.digest[:12]}")


def _refuse_if_merged(context: AppContext, digest: str | None) -> None:
    merged = context.engine.asked_to_merge
    if context.config.merge_others == "refuse" and merged not in (None, digest):
        raise ApiError(409, "The server answers for one merged adapter alone.", code="merged", param="model")


def resolve_record(context: AppContext, key: Key, model: str) -> AdapterRecord:
    """The adapter that `name` or `name@version` means. An unknown one and one that the key may not see look alike."""
    try:
        record = context.registry.resolve(model)
    except AdapterNotFound:
        lazy = context.lazy.get(model)
        if lazy is not None and lazy.error is None and key.sees(model):
            raise unavailable("The adapter is being fetched.", "adapter_loading") from None
        raise model_not_found(model) from None
    if not key.sees(record.name):
        raise model_not_found(model)
    return record


def admit(context: AppContext) -> None:
    """Refuse early what could only wait."""
    if not context.accepting:
        raise unavailable("The server is shutting down.", "draining")
    if context.saturated:
        raise unavailable("Too many requests are waiting.", "queue_full")


def token_budget(context: AppContext, prompts: Sequence[Sequence[int]], asked: int | None, default: int | None) -> int:
    """How many tokens may be generated: as asked, or `default` (None: no other limit) cut to what is left."""
    context_length = context.info.max_model_len
    longest = max(map(len, prompts))
    if longest >= context_length or longest + (asked or 0) > context_length:
        wanted = f" and {asked} for the answer" if asked else ""
        raise bad_request(
            f"The context has {context_length} tokens; the request needs {longest} for the prompt{wanted}.",
            code="context_length_exceeded",
        )
    left = context_length - longest
    return asked or min(default or left, left)


def sampling_params(
    context: AppContext, body: GenerationRequest, max_tokens: int, logprobs: int | None
) -> SamplingParams:
    vocab_size = context.info.vocab_size
    bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    for token in (*bias, *(body.stop_token_ids or ())):
        if token >= vocab_size:
            raise bad_request(f"Token {token} is not in the vocabulary of {vocab_size}.")
    if (body.min_tokens or 0) > max_tokens:
        raise bad_request(f"min_tokens is larger than the {max_tokens} tokens that may be generated.", "min_tokens")
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens or 0,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=min(max(body.top_k or 0, 0), vocab_size),
        min_p=body.min_p or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        logit_bias=bias,
        seed=body.seed,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
    )
