"""The plan of a generation: everything that follows from a request once its prompts are tokenized."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from server.api.context import AppContext
from server.api.errors import bad_request
from server.api.inference.receipts import begun_receipt, with_seed
from server.api.inference.targets import Target
from server.api.message_formats.parser import MessageFormat
from server.api.middleware.auth import Key
from server.api.requests.inference import GenerationRequest, InferenceRequest
from server.api.requests.pooled import PooledRequest
from server.api.requests.sampling import Sampling
from server.api.requests.wire import REST_OF_CONTEXT
from server.api.text.tokenizer import Tokenizer, context_exceeded
from server.request import Constraint, SamplingParams


@dataclass(frozen=True, slots=True)
class AdmittedRequest:
    """A request whose adapter versions and tokenizer are fixed; its prompts are not tokenized yet."""

    target: Target
    tokenizer: Tokenizer
    key: Key
    received: float  # of time.monotonic()
    deadline: float | None = None  # of time.monotonic()
    constraint: Constraint | None = None  # on the outputs


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """The parts of a response beside its text."""

    include_stop: bool = False  # the stop string, or the token, that ended the output
    skip_special_tokens: bool = True
    token_ids: bool = False
    tokens_as_ids: bool = False  # in log-probabilities
    prompt_logprobs: int | None = None
    continuous_usage: bool = False  # in every event of a stream
    echo: tuple[str | None, ...] | None = None  # the prompts as they were sent, None for token ids
    message_format: MessageFormat | None = None  # of a chat's text, if it may be more than content
    receipt: dict[str, Any] | None = None  # without the outputs


@dataclass(frozen=True, slots=True)
class GenerationPlan:
    """All that one generation depends on: prompts, adapters, sampling, choices, and whether to stream them."""

    target: Target
    tokenizer: Tokenizer
    key: Key
    received: float  # of time.monotonic()
    id_prefix: str
    prompts: tuple[list[int], ...]  # token ids
    sampling: SamplingParams
    stop: tuple[str, ...] = ()
    n: int = 1  # choices per prompt
    priority: int = 0
    deadline: float | None = None  # of time.monotonic()
    stream: bool = False
    include_usage: bool = False  # in the last event of a stream
    request_salt: str = ""  # of the prefix cache, within the tenant's
    output: OutputOptions = OutputOptions()

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))


def plan_generation(
    context: AppContext,
    admitted: AdmittedRequest,
    body: GenerationRequest,
    prompts: Sequence[list[int]],
    texts: Sequence[str | None] = (),
    message_format: MessageFormat | None = None,
) -> GenerationPlan:
    """Plan the generation for `prompts`, which were sent as `texts`. Raises 400 for what the model or this server
    cannot do."""
    vocab_size = admitted.target.traits.vocab_size or context.info.vocab_size
    _check_prompts(prompts, vocab_size, body.prompt_field)
    max_tokens = _token_budget(context, prompts, body, admitted.target)
    sampling, output = (
        _sampling_params(vocab_size, body, max_tokens, admitted),
        _output_options(body, texts, message_format),
    )
    if body.receipt:
        sampling = with_seed(sampling)
        begun = begun_receipt(context, admitted.target, prompts, sampling, body.stop_strings, body.n or 1)
        output = replace(output, receipt=begun)
    return replace(
        _plan(context, admitted, body, prompts, sampling),
        stop=tuple(body.stop_strings),
        n=body.n or 1,
        stream=bool(body.stream),
        include_usage=body.include_usage,
        output=output,
    )


def plan_embedding(
    context: AppContext, admitted: AdmittedRequest, body: PooledRequest, prompts: Sequence[list[int]]
) -> GenerationPlan:
    """Plan the embeddings of `prompts`: generations without tokens. Raises 400 for what the model cannot do."""
    traits = admitted.target.traits
    _check_prompts(prompts, traits.vocab_size or context.info.vocab_size, body.prompt_field)
    longest, context_length = max(map(len, prompts)), context.info.max_model_len
    if longest + traits.virtual_tokens > context_length:
        parts = f"{longest} tokens" + (f" beside {traits.virtual_tokens} virtual ones" if traits.virtual_tokens else "")
        raise context_exceeded(context_length, f"an input has {parts}", body.prompt_field)
    sampling = SamplingParams(max_tokens=0, temperature=0.0, pooling=body.pooling or "last")
    return _plan(context, admitted, body, prompts, sampling)


def _plan(
    context: AppContext,
    admitted: AdmittedRequest,
    body: InferenceRequest,
    prompts: Sequence[list[int]],
    sampling: SamplingParams,
) -> GenerationPlan:
    """Return a plan with what all inference requests have."""
    return GenerationPlan(
        target=admitted.target,
        tokenizer=admitted.tokenizer,
        key=admitted.key,
        received=admitted.received,
        id_prefix=body.id_prefix,
        prompts=tuple(prompts),
        sampling=sampling,
        priority=_priority(context, body),
        deadline=admitted.deadline,
        request_salt=body.cache_salt or "",
    )


def _output_options(
    body: GenerationRequest, texts: Sequence[str | None], message_format: MessageFormat | None
) -> OutputOptions:
    return OutputOptions(
        include_stop=bool(body.include_stop_str_in_output or body.no_stop_trim),
        skip_special_tokens=body.skip_special_tokens is not False,
        token_ids=bool(body.return_token_ids),
        tokens_as_ids=bool(body.return_tokens_as_token_ids),
        prompt_logprobs=body.prompt_logprobs,
        continuous_usage=body.continuous_usage,
        echo=tuple(texts) if body.echoes_prompt else None,
        message_format=message_format,
    )


def _check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int, param: str) -> None:
    """Raise 400 for a prompt without tokens, or with a token outside the vocabulary: token ids come from clients or
    from an adapter's own tokenizer and template."""
    if not all(prompts):
        raise bad_request("The prompt is empty.", param)
    largest = max(map(max, prompts))
    if largest >= vocab_size:
        raise bad_request(f"Token {largest} is not in the vocabulary of {vocab_size}.", param)


def _token_budget(
    context: AppContext, prompts: Sequence[Sequence[int]], body: GenerationRequest, target: Target
) -> int:
    """Return the maximum number of output tokens: the requested number, or the adapter's or endpoint's default within
    the context, of which the adapter's virtual tokens take a part."""
    context_length, virtual_tokens = context.info.max_model_len, target.traits.virtual_tokens
    requested = body.requested_tokens
    longest = max(map(len, prompts))
    left = context_length - virtual_tokens - longest
    default = body.default_max_tokens if target.defaults.max_tokens is None else target.defaults.max_tokens
    wanted = default if requested is None else requested
    least = 1 if requested is None or requested == REST_OF_CONTEXT else requested
    if left < least:
        parts = f"{longest} in the {body.prompt_field}, {least} in the completion"
        parts += f", {virtual_tokens} virtual tokens of the adapter" if virtual_tokens else ""
        but = f"you requested {longest + least + virtual_tokens} tokens ({parts})"
        raise context_exceeded(context_length, but, body.prompt_field)
    return left if wanted == REST_OF_CONTEXT else min(wanted, left)


def _priority(context: AppContext, body: InferenceRequest) -> int:
    """Return the priority of the request. Raises 400 if it would have no effect."""
    if body.priority and context.config.scheduling_policy == "fcfs":
        raise bad_request(
            "'priority' has no effect because this server runs requests in order of arrival.", "priority", "unsupported"
        )
    return body.priority or 0


def _sampling_params(
    vocab_size: int, body: GenerationRequest, max_tokens: int, admitted: AdmittedRequest
) -> SamplingParams:
    """Build the sampling parameters. The tokenizer's end tokens end an output unless the request sets `ignore_eos`."""
    check_named_tokens(body, vocab_size)
    if (body.min_tokens or 0) > max_tokens:
        raise bad_request(f"min_tokens is larger than the {max_tokens} tokens that may be generated.", "min_tokens")
    ends = () if body.ignore_eos else tuple(token for token in admitted.tokenizer.end_ids if token < vocab_size)
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=body.min_tokens or 0,
        temperature=body.default_temperature if body.temperature is None else body.temperature,
        top_p=body.top_p or 1.0,
        top_k=1 if body.top_p == 0 else min(max(body.top_k or 0, 0), vocab_size),
        min_p=body.min_p or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        logit_bias={int(token): value for token, value in (body.logit_bias or {}).items()},
        seed=body.seed,
        stop_token_ids=tuple(body.stop_token_ids or ()) + ends,
        ignore_eos=bool(body.ignore_eos),
        logprobs=body.num_logprobs,
        processed_logprobs=body.logprobs_mode == "processed_logprobs",
        prompt_logprobs=_prompt_logprobs(body),
        constraint=admitted.constraint,
    )


def check_named_tokens(body: Sampling, vocab_size: int, prefix: str = "") -> None:
    """Raise 400 for a token outside the vocabulary in a field of `body`, which `prefix` leads to."""
    for name, token in body.named_tokens():
        if token >= vocab_size:
            raise bad_request(f"Token {token} is not in the vocabulary of {vocab_size}.", prefix + name)


def _prompt_logprobs(body: GenerationRequest) -> int | None:
    """Return the number of most probable tokens at each position of the prompt; None if none are wanted, asked for by
    themselves or with an echoed prompt."""
    wanted = (body.prompt_logprobs, body.num_logprobs if body.echoes_prompt else None)
    return max((number for number in wanted if number is not None), default=None)
