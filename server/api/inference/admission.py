"""Admission of requests. A request enters once before tokenizing, so that a refusal costs no tokenizing, and once
after."""

import math
from collections.abc import Sequence

from fastapi import Request

from adapters.errors import AdapterInvalid, AdapterNotFound
from server.api.context import AppContext
from server.api.errors import ApiError, bad_request, model_not_found, unavailable
from server.api.inference.constraints import constraint_of
from server.api.inference.plan import AdmittedRequest, GenerationPlan, plan_generation
from server.api.inference.targets import Target, adapter_failed, refuse_if_merged, resolve_target
from server.api.message_formats.parser import MessageFormat
from server.api.middleware.auth import Key
from server.api.middleware.request_scope import ignored_names
from server.api.requests.inference import GenerationRequest, InferenceRequest
from server.api.requests.wire import MAX_CHOICES, MAX_TIMEOUT_SECONDS, OpenWire

TIMEOUT_HEADER = "x-request-timeout"  # in seconds


async def admit_request(
    request: Request, context: AppContext, key: Key, body: InferenceRequest, sent: OpenWire | None = None
) -> AdmittedRequest:
    """Fix the adapter versions of a request, the tokenizer, which may be the adapter's own, and the constraint on its
    outputs. `sent` is the client's request if it was translated to `body`. Raises `ApiError` if the request cannot
    begin now."""
    note_unknown_fields(request, context, sent or body)
    _check_capacity(context)
    target = resolve_target(context, key, body)
    request.state.adapter = target.label
    context.rate_limits.check_request(key.sha256, key.limits, target.adapter_names)
    digest = target.adapters[0].digest if len(target.adapters) == 1 else None
    try:
        tokenizer = await context.tokenizers.of(digest, target.traits, target.defaults.chat_template)
    except FileNotFoundError:  # the adapter was deleted just now
        raise model_not_found(target.requested_model) from None
    except AdapterInvalid as error:  # it was stored by an earlier version, which admitted it
        raise adapter_failed(target.requested_model, str(error)) from None
    constraint = await constraint_of(context, target, body) if isinstance(body, GenerationRequest) else None
    received = request.state.started
    return AdmittedRequest(target, tokenizer, key, received, _deadline(context, request, body, received), constraint)


def note_unknown_fields(request: Request, context: AppContext, body: OpenWire) -> None:
    """Have the response's header name the fields that have no effect. Raises 400 for them with `--strict-requests`."""
    request.state.ignored = names = ignored_names(body.unknown_fields())
    if names and context.config.strict_requests:
        message = f"The request has fields that this server does not know: {', '.join(names)}."
        raise bad_request(message, names[0], "unknown_field")


def _deadline(context: AppContext, request: Request, body: InferenceRequest, received: float) -> float | None:
    """Return the earliest time at which the request must end: by its field, its header, or the server's limit."""
    given = (body.timeout, _header_timeout(request), context.config.request_timeout or None)
    limits = [seconds for seconds in given if seconds is not None]
    return received + min(limits) if limits else None


def _header_timeout(request: Request) -> float | None:
    value = request.headers.get(TIMEOUT_HEADER)
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_TIMEOUT_SECONDS:
        raise bad_request(f"The header {TIMEOUT_HEADER} must be a number of seconds above 0 and at most 86400.")
    return seconds


def admit_prompts(
    context: AppContext,
    admitted: AdmittedRequest,
    body: GenerationRequest,
    prompts: Sequence[list[int]],
    texts: Sequence[str | None] = (),
    message_format: MessageFormat | None = None,
) -> GenerationPlan:
    """Check the request and its prompts, encoded by the request's tokenizer, and return the plan. `texts` are the
    prompts as they were sent, None for token ids; `message_format` is that of a chat's text. Raises `ApiError` if they
    do not fit the model or if an adapter was deleted meanwhile."""
    return admit_plan(context, plan_generation(context, admitted, body, prompts, texts, message_format))


def admit_plan(context: AppContext, plan: GenerationPlan) -> GenerationPlan:
    """Return the plan if it may still begin. Raises `ApiError` if an adapter was deleted since `admit_request`, or if
    the queue is full."""
    _check_still_there(context, plan.target)
    _check_queue(context, plan)
    return plan


def _check_capacity(context: AppContext) -> None:
    """Raise 503 if the server is shutting down or its queue is full."""
    if not context.accepting:
        raise unavailable("The server is shutting down.", "draining")
    if context.saturated:
        seconds = context.queue_limits.full_for()
        raise unavailable("Too many requests are waiting; try again later.", "queue_full", seconds)


def _check_still_there(context: AppContext, target: Target) -> None:
    """Raise 404 if an adapter was deleted since `resolve_target`, and 409 if another was merged. A version that was
    replaced meanwhile may still run."""
    refuse_if_merged(context, target.adapters)
    for name, digest in target.versions:
        try:
            context.registry.resolve(f"{name}@{digest}")
        except AdapterNotFound:
            raise model_not_found(target.requested_model) from None


def _check_queue(context: AppContext, plan: GenerationPlan) -> None:
    """Raise 429 if the key's tenant holds its share of the queue, 503 if the queue has no room for the request."""
    key, sequences = plan.key, min(len(plan.prompts) * plan.n, MAX_CHOICES)  # at once
    tokens = plan.prompt_tokens * plan.n
    refusal = context.queue_limits.refusal(key.tenant, key.weight, sequences, tokens)
    if refusal is None:
        return
    if refusal.of_tenant:
        headers = {"retry-after": str(refusal.seconds)}
        raise ApiError(429, refusal.message, code="queue_share", headers=headers)
    raise unavailable(refusal.message, "queue_full", refusal.seconds)
