"""`/v1/models`: the base model and the adapters, as OpenAI clients list them."""

from typing import Annotated

from fastapi import APIRouter, Depends

from adapters.registry import AdapterRecord
from server.api.admission import resolve_record
from server.api.auth import Key, key_of
from server.api.context import AppContext, Context
from server.api.errors import error_answers
from server.api.schemas import ModelBody, ModelList

router = APIRouter(tags=["inference"])
Caller = Annotated[Key, Depends(key_of)]


@router.get("/v1/models", responses=error_answers(401, 403))
async def list_models(context: Context, key: Caller) -> ModelList:
    """What may be named as `model`, as far as this key may see it."""
    records, _ = context.registry.records(limit=len(context.registry))
    visible = [r for r in records if key.sees(r.name) and r.name not in context.registry.damaged]
    return ModelList(data=[_base(context), *(_adapter(context, record) for record in visible)])


@router.get("/v1/models/{model:path}", responses=error_answers(400, 401, 403, 404))
async def get_model(model: str, context: Context, key: Caller) -> ModelBody:
    """One of them."""
    if model == context.base_model:
        return _base(context)
    return _adapter(context, resolve_record(context, key, model), model)


def _base(context: AppContext) -> ModelBody:
    name = context.base_model
    return ModelBody(id=name, created=int(context.started), root=name, parent=None)


def _adapter(context: AppContext, record: AdapterRecord, asked: str | None = None) -> ModelBody:
    """`root` is the immutable version behind the name, in the form that `model` takes too."""
    root = f"{record.name}@{record.version.digest[:12]}"
    return ModelBody(id=asked or record.name, created=record.created, root=root, parent=context.base_model)
