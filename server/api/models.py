"""`/v1/models`: the base model, adapters and aliases in OpenAI's format."""

import asyncio
from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi.responses import Response

from adapters.registry.aliases import Alias
from adapters.registry.registry import AdapterRecord
from server.api.context import AppContext, Context
from server.api.errors import error_responses
from server.api.inference.targets import resolve_record
from server.api.middleware.auth import Key, key_of
from server.api.schemas import ModelBody, ModelList

router = APIRouter(tags=["inference"])
Caller = Annotated[Key, Depends(key_of)]


@router.get("/v1/models", responses={200: {"model": ModelList}, **error_responses(401, 403)})
async def list_models(context: Context, key: Caller) -> Response:
    """List the models visible to this API key."""
    # OpenAI's route has no pages. A thread keeps thousands of names from delaying the streams.
    return Response(await asyncio.to_thread(_listed, context, key), media_type="application/json")


def _listed(context: AppContext, key: Key) -> str:
    registry = context.registry
    records = (r for r in registry.walk() if key.sees(r.name) and r.name not in registry.damaged)
    aliases = (alias for name, alias in sorted(registry.aliases.items()) if key.sees(name))
    adapters = (_adapter(context, record) for record in records)
    models = [_base(context), *adapters, *(_alias(context, alias) for alias in aliases)]
    return ModelList(data=models).model_dump_json()


@router.get("/v1/models/{model:path}", responses=error_responses(400, 401, 403, 404))
async def get_model(model: str, context: Context, key: Caller) -> ModelBody:
    """Return one model: the base model, an adapter, a version of an adapter, or an alias."""
    if model == context.base_model:
        return _base(context)
    alias = context.registry.aliases.get(model)
    if alias is not None and key.sees(model):
        return _alias(context, alias)
    return _adapter(context, resolve_record(context, key, model), model)


def _base(context: AppContext) -> ModelBody:
    name = context.base_model
    return ModelBody(
        id=name, created=int(context.started), root=name, parent=None, max_model_len=_max_model_len(context)
    )


def _max_model_len(context: AppContext) -> int | None:
    """Return the context length in tokens; None until the model is loaded."""
    return None if context.engine.info is None else context.engine.info.max_model_len


def _alias(context: AppContext, alias: Alias) -> ModelBody:
    """Describe an alias. `root` is the alias itself, because its adapter differs from request to request."""
    return ModelBody(
        id=alias.name,
        created=alias.created,
        root=alias.name,
        parent=context.base_model,
        max_model_len=_max_model_len(context),
    )


def _adapter(context: AppContext, record: AdapterRecord, requested_name: str | None = None) -> ModelBody:
    """Describe an adapter. `root` is its immutable version, in a form that the `model` of a request accepts. A chat
    template is left to `/tokenizer_info`."""
    settings = record.settings
    shown = {name: value for name, value in settings.get("defaults", {}).items() if name != "chat_template"}
    root = f"{record.name}@{record.version.digest[:12]}"
    return ModelBody(
        id=requested_name or record.name,
        created=record.created,
        root=root,
        parent=context.base_model,
        max_model_len=_max_model_len(context),
        description=settings.get("description"),
        labels=settings.get("labels"),
        defaults=shown or None,
    )
