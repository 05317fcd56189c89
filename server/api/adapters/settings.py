"""Settings of adapters' names: a description, labels, and defaults of requests. All versions of a name share them."""

import json
from collections.abc import Mapping
from typing import Any

from adapters.traits import Traits
from server.api.adapters.schemas import MAX_LABELS, Settings
from server.api.context import AppContext
from server.api.errors import bad_request
from server.api.inference.plan import check_named_tokens
from server.api.text.template_sandbox import TemplateFailed


async def check(context: AppContext, settings: Settings) -> None:
    """Raise 400 for a chat template that does not compile. It is compiled in the sandbox, because compiling can be as
    expensive as rendering."""
    template = None if settings.defaults is None else settings.defaults.chat_template
    if template is None:
        return
    try:
        await context.sandbox.check(template)
    except TemplateFailed as failed:
        raise bad_request(f"The chat template does not compile: {failed}.", "defaults.chat_template") from None


def check_tokens(context: AppContext, settings: Settings, traits: Traits) -> None:
    """Raise 400 for defaults that name a token outside the vocabulary of an adapter with `traits`."""
    if settings.defaults is not None:
        check_named_tokens(settings.defaults, traits.vocab_size or context.info.vocab_size, "defaults.")


def changed(stored: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with `changes`. Raises 400 for too many labels."""
    settings = _merged(stored, changes)
    for group in ("labels", "defaults"):
        if isinstance(changes.get(group), dict):
            settings[group] = _merged(stored.get(group, {}), changes[group])
    if len(settings.get("labels", ())) > MAX_LABELS:
        raise bad_request(f"An adapter has at most {MAX_LABELS} labels.", "labels")
    return {name: value for name, value in settings.items() if value not in ("", {})}


def as_json(settings: Mapping[str, Any]) -> str:
    """Return settings as the registry stores them."""
    return json.dumps(settings) if settings else ""


def _merged(stored: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**stored, **changes}.items() if value is not None}


def settings_of(context: AppContext, name: str) -> dict[str, Any]:
    """Return the settings of a name, damaged or not; none for a new one."""
    return context.registry.record(name).settings if name in context.registry else {}
