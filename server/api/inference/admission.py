"""Admission of requests: resolves the model to adapter versions, checks limits, and builds the sampling parameters."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
from fastapi import Request

from adapters.errors import AdapterNotFound
from adapters.registry.registry import AdapterRecord
from adapters.residency.slots import PAGE_COLUMNS, pages_of
from adapters.traits import Traits
from server.api.context import BASE_NAME, AppContext
from server.api.errors import ApiError, bad_request, model_not_found, unavailable
from server.api.middleware.auth import Key
from server.api.schemas import AdapterPart, GenerationRequest
from server.api.text.tokenizer import Tokenizer
from server.metrics import COMPOSED_LABEL
from server.sequence import SamplingParams, ScaledAdapter

MAX_SEQUENCES = 64  # prompts times n of one request


@dataclass(frozen=True, slots=True)
class Target:
    """The base model, or one or several adapter versions, fixed for the whole request.

    `label` is the metrics label; `versions` are names and digests in the order of the request.
    """

    requested_model: str
    label: str
    versions: tuple[tuple[str, str], ...]
    adapters: tuple[ScaledAdapter, ...]  # sorted
    fingerprint: str
    traits: Traits = field(default_factory=Traits)  # of the adapter, if there is exactly one
    pages: dict[str, int] = field(default_factory=dict)  # pages of device memory, by digest

    @property
    def names(self) -> frozenset[str]:
        """Names for usage accounting."""
        return frozenset(name for name, _ in self.versions) or frozenset([BASE_NAME])

    @property
    def adapter_names(self) -> list[str]:
        return [name for name, _ in self.versions]

    def on(self, prompt: list[int]) -> tuple[tuple[ScaledAdapter, ...], int]:
        """Return the adapters that apply to this prompt and the first token they apply to. An activated LoRA applies
        from its last invocation on, and not at all to a prompt without one."""
        if not self.traits.invocation_tokens:
            return self.adapters, 0
        start = _last_occurrence(list(self.traits.invocation_tokens), prompt)
        return ((), 0) if start is None else (self.adapters, start)


def _last_occurrence(needle: list[int], tokens: list[int]) -> int | None:
    starts = (at for at in range(len(tokens) - len(needle), -1, -1) if tokens[at] == needle[0])
    return next((at for at in starts if tokens[at : at + len(needle)] == needle), None)


def resolve(context: AppContext, key: Key, body: GenerationRequest) -> Target:
    """Resolve the model of a request. The request keeps these versions, even if others are published meanwhile."""
    base = context.info.base_fingerprint
    parts = _parts(context, body)
    found = [(_serving_record(context, key, part.name, body.user), part.scale) for part in parts]
    adapters = tuple(sorted(ScaledAdapter(record.version.digest, scale) for record, scale in found))
    _refuse_if_merged(context, adapters)
    if not found:
        return Target(body.model, BASE_NAME, (), (), f"{base}-base")
    _check_additive(parts, [record for record, _ in found])
    pages = _pages(found)
    check_room(context, pages)
    versions = tuple((record.name, record.version.digest) for record, _ in found)
    for name, _ in versions:
        context.metrics.add_adapter(name)
    label, traits = (COMPOSED_LABEL, Traits()) if len(found) > 1 else (found[0][0].name, found[0][0].version.traits)
    return Target(body.model, label, versions, adapters, f"{base}-{_identity(adapters)}", traits, pages)


async def choose_target(
    request: Request, context: AppContext, key: Key, body: GenerationRequest
) -> tuple[Target, Tokenizer]:
    """Resolve the target of a request and its tokenizer, which may be the adapter's own. Raises 429 before tokenizing
    if the request cannot begin now."""
    target = resolve(context, key, body)
    request.state.adapter = target.label
    context.rate_limits.check_request(key.sha256, key.limits, target.adapter_names)
    digest = target.adapters[0].digest if len(target.adapters) == 1 else None
    try:
        return target, await context.tokenizers.of(digest, target.traits)
    except FileNotFoundError:  # the adapter was deleted just now
        raise model_not_found(body.model) from None


def check_still_there(context: AppContext, target: Target) -> None:
    """Raise 404 if an adapter was deleted since `resolve`. A version that was replaced meanwhile may still run."""
    for name, digest in target.versions:
        try:
            context.registry.resolve(f"{name}@{digest}")
        except AdapterNotFound:
            raise model_not_found(target.requested_model) from None


def vocab_size_of(context: AppContext, target: Target) -> int:
    return target.traits.vocab_size or context.info.vocab_size


def check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raise 400 for a prompt without tokens, or with a token outside the vocabulary: token ids come from clients or
    from an adapter's own tokenizer and template."""
    if not all(prompts):
        raise bad_request("The prompt is empty.", "prompt")
    largest = max(map(max, prompts))
    if largest >= vocab_size:
        raise bad_request(f"Token {largest} is not in the vocabulary of {vocab_size}.", "prompt")


def _parts(context: AppContext, body: GenerationRequest) -> list[AdapterPart]:
    """Return the adapters of the request, whether given in `model` or in `adapters`."""
    is_base = body.model == context.base_model
    if body.adapters and not is_base:
        raise bad_request("With 'adapters', 'model' must be the base model.", "model")
    if is_base and body.adapter_scale not in (None, 1):
        raise bad_request(
            "'adapter_scale' needs an adapter as 'model'; use 'adapters' to scale adapters of the base model.",
            "adapter_scale",
        )
    if is_base:
        return body.adapters or []
    return [AdapterPart(name=body.model, scale=1.0 if body.adapter_scale is None else body.adapter_scale)]


def _check_additive(parts: list[AdapterPart], records: list[AdapterRecord]) -> None:
    for part, record in zip(parts, records, strict=True):
        traits = record.version.traits
        if not traits.additive and (len(parts) > 1 or part.scale != 1):
            why = (
                "applies to a part of the prompt only"
                if traits.invocation_tokens
                else "does more than add B A x to outputs"
            )
            raise bad_request(f"The adapter '{part.name}' cannot be scaled or combined with others because it {why}.")


def _pages(found: list[tuple[AdapterRecord, float]]) -> dict[str, int]:
    pages = {record.version.digest: pages_of(record.version.rank) for record, _ in found}
    if len(pages) < len(found):
        raise bad_request("'adapters' contains the same adapter version twice.", "adapters")
    return pages


def check_room(context: AppContext, pages: dict[str, int]) -> None:
    """Raise 400 or 503 unless these versions fit on the device together."""
    slots, all_pages = context.config.adapter_slots, context.info.adapter_pages
    if len(pages) > slots:
        raise bad_request(f"The device has slots for {slots} adapters; the request has {len(pages)}.", "adapters")
    if sum(pages.values()) > all_pages:
        room = all_pages * PAGE_COLUMNS
        raise bad_request(
            f"The device has room for a total rank of {room}; the request's adapters need more.", "adapters"
        )
    beside = {**context.engine.residency.pinned, **pages}
    if len(pages) > 1 and (len(beside) > slots or sum(beside.values()) > all_pages):
        raise unavailable("The adapters do not fit on the device beside the pinned ones; try again later.", "no_room")


def _identity(adapters: tuple[ScaledAdapter, ...]) -> str:
    """Return 12 hex digits that identify the version, or all versions and scales together."""
    if len(adapters) == 1 and adapters[0].scale == 1:
        return adapters[0].digest[:12]
    return hashlib.sha256(msgspec.json.encode(adapters)).hexdigest()[:12]


def _refuse_if_merged(context: AppContext, adapters: tuple[ScaledAdapter, ...]) -> None:
    merged = context.engine.requested_merge
    if context.config.merge_others == "refuse" and merged is not None and adapters != (ScaledAdapter(merged),):
        raise ApiError(
            409,
            "Another adapter is merged into the base model, and the server refuses requests for other models.",
            code="merged",
            param="model",
        )


def _serving_record(context: AppContext, key: Key, name: str, user: str | None) -> AdapterRecord:
    """Return the adapter for `name`; for an alias, the member that its weights assign to `user`. A key that may use an
    alias need not see its members, and errors do not reveal them."""
    alias = context.registry.aliases.get(name)
    if alias is None:
        return resolve_record(context, key, name)
    try:
        record = context.registry.resolve(alias.pick(user))
    except AdapterNotFound:  # the member is damaged
        raise model_not_found(name) from None
    if not key.sees(name):
        raise model_not_found(name)
    return record


def resolve_record(context: AppContext, key: Key, model: str) -> AdapterRecord:
    """Return the adapter for `name` or `name@version`. Unknown adapters and adapters that the key may not see raise the
    same 404."""
    try:
        record = context.registry.resolve(model)
    except AdapterNotFound:
        pending = context.registry.pending.get(model)
        if pending is not None and pending.error is None and key.sees(model):
            raise unavailable("The adapter is being fetched; try again later.", "adapter_loading") from None
        raise model_not_found(model) from None
    if not key.sees(record.name):
        raise model_not_found(model)
    return record


def check_capacity(context: AppContext) -> None:
    """Raise 503 if the server is shutting down or its queue is full."""
    if not context.accepting:
        raise unavailable("The server is shutting down.", "draining")
    if context.saturated:
        raise unavailable("Too many requests are waiting; try again later.", "queue_full")


def check_queue(context: AppContext, key: Key, sequences: int, tokens: int) -> None:
    """Raise 429 if the key's tenant holds its share of the queue, 503 if the queue has no room for the request."""
    refusal = context.queue_limits.refusal(key.tenant, key.weight, sequences, tokens)
    if refusal is None:
        return
    if refusal.of_tenant:
        raise ApiError(429, refusal.message, code="queue_share", headers={"retry-after": "1"})
    raise unavailable(refusal.message, "queue_full")


def priority_of(context: AppContext, body: GenerationRequest) -> int:
    """Return the priority of the request. Raises 400 if it would have no effect."""
    if body.priority and context.config.scheduling_policy == "fcfs":
        raise bad_request(
            "'priority' has no effect because this server runs requests in order of arrival.", "priority", "unsupported"
        )
    return body.priority or 0


def token_budget(
    context: AppContext, prompts: Sequence[Sequence[int]], requested: int | None, default: int | None
) -> int:
    """Return the maximum number of output tokens: `requested`, or `default` (None: no limit) within the context."""
    context_length = context.info.max_model_len
    longest = max(map(len, prompts))
    if longest >= context_length or longest + (requested or 0) > context_length:
        wanted = f" and {requested} for the output" if requested else ""
        raise bad_request(
            f"The context has {context_length} tokens; the request needs {longest} for the prompt{wanted}.",
            code="context_length_exceeded",
        )
    left = context_length - longest
    return requested or min(default or left, left)


def sampling_params(
    vocab_size: int, body: GenerationRequest, max_tokens: int, logprobs: int | None, end_ids: tuple[int, ...]
) -> SamplingParams:
    """Build the sampling parameters. `end_ids` end an output unless the request sets `ignore_eos`."""
    ends = () if body.ignore_eos else tuple(token for token in end_ids if token < vocab_size)
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
        stop_token_ids=(*(body.stop_token_ids or ()), *ends),
        ignore_eos=bool(body.ignore_eos),
        logprobs=logprobs,
    )
