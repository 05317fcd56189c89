"""Targets of requests: the base model or the adapter versions that `model` and `adapters` name, and their room."""

from dataclasses import dataclass, field

from pydantic import ValidationError

from adapters.errors import AdapterNotFound
from adapters.registry.aliases import BASE_MEMBER
from adapters.registry.registry import AdapterRecord
from adapters.residency.room import shortage_of
from adapters.residency.slots import PAGE_COLUMNS, pages_of
from adapters.traits import Traits
from server.api.context import BASE_NAME, AppContext
from server.api.errors import ApiError, bad_request, model_not_found, unavailable
from server.api.middleware.auth import Key
from server.api.requests.defaults import NO_DEFAULTS, Defaults
from server.api.requests.inference import AdapterPart, InferenceRequest
from server.metrics import COMPOSED_LABEL
from server.request import ScaledAdapter
from server.version_labels import version_label


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
    fixed: frozenset[str] = frozenset()  # digests that the request named itself, as `name@version`
    defaults: Defaults = NO_DEFAULTS  # of the adapter, if there is exactly one

    @property
    def names(self) -> frozenset[str]:
        """Names for usage accounting."""
        return frozenset(name for name, _ in self.versions) or frozenset([BASE_NAME])

    @property
    def adapter_names(self) -> list[str]:
        return [name for name, _ in self.versions]

    def adapters_for(self, prompt: list[int]) -> tuple[tuple[ScaledAdapter, ...], int]:
        """Return the adapters that apply to this prompt and the first token they apply to. An activated LoRA applies
        from its last invocation on, and not at all to a prompt without one."""
        if not self.traits.invocation_tokens:
            return self.adapters, 0
        start = _last_occurrence(list(self.traits.invocation_tokens), prompt)
        return ((), 0) if start is None else (self.adapters, start)


def _last_occurrence(needle: list[int], tokens: list[int]) -> int | None:
    starts = (at for at in range(len(tokens) - len(needle), -1, -1) if tokens[at] == needle[0])
    return next((at for at in starts if tokens[at : at + len(needle)] == needle), None)


def resolve_target(context: AppContext, key: Key, body: InferenceRequest) -> Target:
    """Resolve the model of a request. The request keeps these versions, even if others are published meanwhile."""
    base = context.info.base_fingerprint
    model = requested_model(context, body)
    found = [
        (record, part)
        for part in _parts(context, body, model)
        if (record := serving_record(context, key, part.name, body.user)) is not None
    ]
    records, parts = [record for record, _ in found], [part for _, part in found]
    adapters = tuple(sorted(ScaledAdapter(record.version.digest, part.factor) for record, part in found))
    refuse_if_merged(context, adapters)
    if not records:
        return Target(model, BASE_NAME, (), (), f"{base}-{version_label(())}")
    _check_scales(parts, records)
    _check_owners(records)
    pages = _pages(records)
    no_room = room_error(context, pages)
    if no_room is not None:
        raise no_room
    versions = tuple((record.name, record.version.digest) for record in records)
    for name, _ in versions:
        context.metrics.add_adapter(name)
    label, traits = _label_and_traits(records)
    fixed = frozenset(record.version.digest for record, part in found if "@" in part.name)
    defaults = defaults_of(records[0]) if len(records) == 1 else NO_DEFAULTS
    fingerprint = f"{base}-{version_label(adapters)}"
    return Target(model, label, versions, adapters, fingerprint, traits, pages, fixed, defaults)


def requested_model(context: AppContext, body: InferenceRequest) -> str:
    """Return the name in `model`, or the adapter that a field of another server selects. Raises 400 if two fields name
    different adapters."""
    model = body.model
    for selector, name in body.selectors.items():
        if body.adapters:
            raise bad_request(f"'{selector}' cannot be used beside 'adapters'.", selector)
        if model not in (context.base_model, name):
            raise bad_request(f"'{selector}' and another field select different models; use 'model' alone.", selector)
        model = name
    return model


def _parts(context: AppContext, body: InferenceRequest, model: str) -> list[AdapterPart]:
    """Return the adapters of the request, whether given in `model` or in `adapters`."""
    is_base = model == context.base_model
    if body.adapters and not is_base:
        raise bad_request("With 'adapters', 'model' must be the base model.", "model")
    if is_base and body.adapter_scale not in (None, 1):
        raise bad_request(
            "'adapter_scale' needs an adapter as 'model'; use 'adapters' to scale adapters of the base model.",
            "adapter_scale",
        )
    if is_base:
        return body.adapters or []
    return [AdapterPart(name=model, scale=body.adapter_scale)]


def _check_scales(parts: list[AdapterPart], records: list[AdapterRecord]) -> None:
    """Raise a 400 for an adapter with a scale that PEFT would not apply to all of it: the scale of an adapter that
    saves modules is that of its factors, and with 0 the engine would leave out all of it."""
    for part, record in zip(parts, records, strict=True):
        traits = record.version.traits
        if part.factor == 1 or traits.additive:
            continue
        if traits.invocation_tokens or not (traits.scalable and traits.owned) or part.factor == 0:
            raise bad_request(
                f"The adapter '{part.name}' cannot be scaled by {part.factor:g} because it {_why(traits)}."
            )


def _check_owners(records: list[AdapterRecord]) -> None:
    """Raise unless the sum of the adapters is defined: every module has at most one adapter that does more in it than
    add to its output."""
    owners: dict[str, str] = {}
    for record in records if len(records) > 1 else ():
        traits = record.version.traits
        if traits.invocation_tokens or traits.vocab_size is not None or not (traits.additive or traits.owned):
            raise bad_request(f"The adapter '{record.name}' cannot be combined with others because it {_why(traits)}.")
        for module in traits.owned:
            if (owner := owners.setdefault(module, record.name)) != record.name:
                raise ApiError(
                    422,
                    f"The adapters '{owner}' and '{record.name}' cannot be combined: both replace or change "
                    f"'{module}', and their sum is not defined.",
                    code="adapters_conflict",
                    param="adapters",
                )


def _why(traits: Traits) -> str:
    if traits.virtual_tokens:
        return "puts virtual tokens in front of the prompt"
    if traits.invocation_tokens:
        return "applies to a part of the prompt only"
    if traits.vocab_size is not None:
        return "has a vocabulary of its own"
    return "does more than add B A x to outputs"


def _pages(records: list[AdapterRecord]) -> dict[str, int]:
    pages = {record.version.digest: pages_of(record.version.rank) for record in records}
    if len(pages) < len(records):
        raise bad_request("'adapters' contains the same adapter version twice.", "adapters")
    return pages


def _label_and_traits(records: list[AdapterRecord]) -> tuple[str, Traits]:
    if len(records) > 1:
        return COMPOSED_LABEL, Traits()
    return records[0].name, records[0].version.traits


def defaults_of(record: AdapterRecord) -> Defaults:
    """Return the defaults of a name. Raises 503 for defaults that this version cannot read."""
    stored = record.settings.get("defaults")
    if stored is None:
        return NO_DEFAULTS
    try:
        return Defaults.model_validate(stored)
    except ValidationError:  # a later version wrote them
        raise adapter_failed(record.name, "its defaults have fields that this version does not know") from None


def room_error(context: AppContext, pages: dict[str, int]) -> ApiError | None:
    """Return a 400 or 503 unless these versions fit on the device together."""
    num_slots, num_pages = context.config.adapter_slots, context.info.adapter_pages
    match shortage_of(pages, context.engine.residency.pinned, num_slots, num_pages):
        case "slots":
            message = f"The device has slots for {num_slots} adapters; the request has {len(pages)}."
            return bad_request(message, "adapters")
        case "pages":
            rank = num_pages * PAGE_COLUMNS
            message = f"The device has room for a total rank of {rank}; the request's adapters need more."
            return bad_request(message, "adapters")
        case "beside_pinned":
            message = "The adapters do not fit on the device beside the pinned ones; try again later."
            return unavailable(message, "no_room")
        case None:
            return None


def refuse_if_merged(context: AppContext, adapters: tuple[ScaledAdapter, ...]) -> None:
    merged = context.engine.requested_merge
    if context.config.merge_others == "refuse" and merged is not None and adapters != (ScaledAdapter(merged),):
        raise merged_error()


def merged_error() -> ApiError:
    return ApiError(
        409,
        "Another adapter is merged into the base model, and the server refuses requests for other models.",
        code="merged",
        param="model",
    )


def serving_record(context: AppContext, key: Key, name: str, user: str | None) -> AdapterRecord | None:
    """Return the adapter for `name`; for an alias, the member that its weights assign to `user`, and None where that is
    the base model. A key that may use an alias need not see its members, and errors do not reveal them."""
    alias = context.registry.aliases.get(name)
    if alias is None:
        record = resolve_record(context, key, name)
        if (reason := context.quarantine.reasons.get(record.version.digest)) is not None:
            raise adapter_failed(name, reason)
        return record
    if not key.sees(name):
        raise model_not_found(name)
    member = alias.pick(user)
    if member == BASE_MEMBER:
        return None
    try:
        record = context.registry.resolve(member)
    except AdapterNotFound:  # the member is damaged
        raise adapter_failed(name, "an adapter that the alias chose is damaged") from None
    if record.version.digest in context.quarantine.reasons:
        raise adapter_failed(name, "an adapter that the alias chose computes numbers that are not finite")
    return record


def adapter_failed(name: str, reason: str) -> ApiError:
    """Return the 503 for an adapter that exists and cannot be served."""
    return unavailable(
        f"The adapter '{name}' cannot be served; its state is 'failed': {reason.removesuffix('.')}.", "adapter_failed"
    )


def resolve_record(context: AppContext, key: Key, model: str) -> AdapterRecord:
    """Return the adapter for `name` or `name@version`. Unknown adapters and adapters that the key may not see raise the
    same 404."""
    try:
        record = context.registry.resolve(model)
    except AdapterNotFound:
        pending = context.registry.pending.get(model)
        if pending is not None and pending.error is None and key.sees(model):
            raise unavailable("The adapter is being fetched; try again later.", "adapter_loading") from None
        if model in context.startup.adapters and key.sees(model):
            message = "The server is starting and has not registered the adapter yet; try again later."
            raise unavailable(message, "adapter_loading") from None
        damage = context.registry.damaged.get(model)
        if damage is not None and key.sees(model):
            raise adapter_failed(model, damage) from None
        raise model_not_found(model) from None
    if not key.sees(record.name):
        raise model_not_found(model)
    return record
