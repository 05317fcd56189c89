"""Admission of requests. A request enters once before tokenizing, so that a refusal costs no tokenizing, and once
after."""

from collections.abc import Sequence

from fastapi import Request

from adapters.errors import AdapterNotFound
from server.api.context import AppContext
from server.api.errors import ApiError, model_not_found, unavailable
from server.api.inference.plan import AdmittedRequest, GenerationPlan, plan_generation
from server.api.inference.targets import Target, refuse_if_merged, resolve_target
from server.api.middleware.auth import Key
from server.api.schemas import GenerationRequest


async def admit_request(request: Request, context: AppContext, key: Key, body: GenerationRequest) -> AdmittedRequest:
    """Fix the adapter versions of a request and the tokenizer, which may be the adapter's own. Raises `ApiError` if the
    request cannot begin now."""
    _check_capacity(context)
    target = resolve_target(context, key, body)
    request.state.adapter = target.label
    context.rate_limits.check_request(key.sha256, key.limits, target.adapter_names)
    digest = target.adapters[0].digest if len(target.adapters) == 1 else None
    try:
        tokenizer = await context.tokenizers.of(digest, target.traits)
    except FileNotFoundError:  # the adapter was deleted just now
        raise model_not_found(body.model) from None
    return AdmittedRequest(target, tokenizer, key, request.state.started)


def admit_prompts(
    context: AppContext, admitted: AdmittedRequest, body: GenerationRequest, prompts: Sequence[list[int]]
) -> GenerationPlan:
    """Check the request and its prompts, encoded by the request's tokenizer, and return the plan. Raises `ApiError` if
    they do not fit the model or if an adapter was deleted meanwhile."""
    _check_still_there(context, admitted.target)
    plan = plan_generation(context, admitted, body, prompts)
    _check_queue(context, plan)
    return plan


def _check_capacity(context: AppContext) -> None:
    """Raise 503 if the server is shutting down or its queue is full."""
    if not context.accepting:
        raise unavailable("The server is shutting down.", "draining")
    if context.saturated:
        raise unavailable("Too many requests are waiting; try again later.", "queue_full")


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
    key, sequences, tokens = plan.key, len(plan.prompts) * plan.n, plan.prompt_tokens * plan.n
    refusal = context.queue_limits.refusal(key.tenant, key.weight, sequences, tokens)
    if refusal is None:
        return
    if refusal.of_tenant:
        raise ApiError(429, refusal.message, code="queue_share", headers={"retry-after": "1"})
    raise unavailable(refusal.message, "queue_full")
