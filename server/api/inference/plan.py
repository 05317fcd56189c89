"""The plan of a generation: everything that follows from a request once its prompts are tokenized."""

from collections.abc import Sequence
from dataclasses import dataclass

from server.api.context import AppContext
from server.api.errors import bad_request
from server.api.inference.targets import Target
from server.api.middleware.auth import Key
from server.api.schemas import GenerationRequest
from server.api.text.tokenizer import Tokenizer
from server.sequence import SamplingParams


@dataclass(frozen=True, slots=True)
class AdmittedRequest:
    """A request whose adapter versions and tokenizer are fixed; its prompts are not tokenized yet."""

    target: Target
    tokenizer: Tokenizer
    key: Key
    received: float  # of time.monotonic()
    deadline: float | None = None  # of time.monotonic()


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

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))


def plan_generation(
    context: AppContext, admitted: AdmittedRequest, body: GenerationRequest, prompts: Sequence[list[int]]
) -> GenerationPlan:
    """Plan the generation for `prompts`. Raises 400 for what the model or this server cannot do."""
    vocab_size = admitted.target.traits.vocab_size or context.info.vocab_size
    _check_prompts(prompts, vocab_size)
    max_tokens = _token_budget(context, prompts, body, admitted.target.traits.virtual_tokens)
    return GenerationPlan(
        target=admitted.target,
        tokenizer=admitted.tokenizer,
        key=admitted.key,
        received=admitted.received,
        id_prefix=body.id_prefix,
        prompts=tuple(prompts),
        sampling=_sampling_params(vocab_size, body, max_tokens, admitted.tokenizer.end_ids),
        stop=tuple(body.stop_strings),
        n=body.n or 1,
        priority=_priority(context, body),
        deadline=admitted.deadline,
        stream=bool(body.stream),
        include_usage=body.include_usage,
    )


def _check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raise 400 for a prompt without tokens, or with a token outside the vocabulary: token ids come from clients or
    from an adapter's own tokenizer and template."""
    if not all(prompts):
        raise bad_request("The prompt is empty.", "prompt")
    largest = max(map(max, prompts))
    if largest >= vocab_size:
        raise bad_request(f"Token {largest} is not in the vocabulary of {vocab_size}.", "prompt")


def _token_budget(
    context: AppContext, prompts: Sequence[Sequence[int]], body: GenerationRequest, virtual_tokens: int
) -> int:
    """Return the maximum number of output tokens: the requested number, or the endpoint's default within the
    context, of which the adapter's virtual tokens take a part."""
    requested, context_length = body.requested_tokens, context.info.max_model_len - virtual_tokens
    longest = max(map(len, prompts))
    if longest >= context_length or longest + (requested or 0) > context_length:
        wanted = f" and {requested} for the output" if requested else ""
        virtual = f" beside the {virtual_tokens} virtual ones of the adapter" if virtual_tokens else ""
        room = f"{max(context_length, 0)} tokens{virtual}"
        raise bad_request(
            f"The context has {room}; the request needs {longest} for the prompt{wanted}.",
            code="context_length_exceeded",
        )
    left = context_length - longest
    return requested or min(body.default_max_tokens or left, left)


def _priority(context: AppContext, body: GenerationRequest) -> int:
    """Return the priority of the request. Raises 400 if it would have no effect."""
    if body.priority and context.config.scheduling_policy == "fcfs":
        raise bad_request(
            "'priority' has no effect because this server runs requests in order of arrival.", "priority", "unsupported"
        )
    return body.priority or 0


def _sampling_params(
    vocab_size: int, body: GenerationRequest, max_tokens: int, end_ids: tuple[int, ...]
) -> SamplingParams:
    """Build the sampling parameters. `end_ids` end an output unless the request sets `ignore_eos`."""
    bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    stop_token_ids = tuple(body.stop_token_ids or ())
    for token in (*bias, *stop_token_ids):
        if token >= vocab_size:
            raise bad_request(f"Token {token} is not in the vocabulary of {vocab_size}.")
    if (body.min_tokens or 0) > max_tokens:
        raise bad_request(f"min_tokens is larger than the {max_tokens} tokens that may be generated.", "min_tokens")
    ends = () if body.ignore_eos else tuple(token for token in end_ids if token < vocab_size)
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
        stop_token_ids=stop_token_ids + ends,
        ignore_eos=bool(body.ignore_eos),
        logprobs=body.num_logprobs,
    )
