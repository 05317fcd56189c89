"""`/v1/adapters`: upload, register, list, inspect, load, unload, pin, roll back and delete adapters."""

import asyncio
import heapq
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ValidationError

from adapters.names import MAX_NAME
from adapters.peft.files import FILES, TOKENIZER_FILES
from adapters.tiers import Tier
from server.api.adapters import aliases, fetching, publishing, settings
from server.api.adapters.aliases import AliasBody
from server.api.adapters.bodies import pending_body, pending_state, record_body, state_of, version_body
from server.api.adapters.multipart import receive_upload
from server.api.adapters.paths import NAME
from server.api.adapters.publishing import UPLOAD, Publication, Published, publish_from
from server.api.adapters.quotas import check_count
from server.api.adapters.schemas import (
    AdapterBody,
    AdapterList,
    DeletedBody,
    DryRunBody,
    LoadRequest,
    RegisterRequest,
    RollbackRequest,
    SettingsRequest,
    State,
    UploadForm,
    VersionList,
    VersionText,
)
from server.api.context import AppContext, Context
from server.api.errors import ApiError, error_responses, validation_error
from server.api.middleware.auth import Key, key_of

router = APIRouter(prefix="/v1/adapters", tags=["adapters"])
Caller = Annotated[Key, Depends(key_of)]

_REF = "#/components/schemas/"
_UPLOAD_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["name", "adapter_config.json", "adapter_model.safetensors"],
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": MAX_NAME},
        "adapter_config.json": {"type": "string", "format": "binary"},
        "adapter_model.safetensors": {"type": "string", "format": "binary"},
        **{name: {"type": "string", "format": "binary"} for name in TOKENIZER_FILES},
        "replace": {"type": "boolean", "default": False},
        "pinned": {"type": "boolean", "default": False},
        "in_flight": UploadForm.model_json_schema()["properties"]["in_flight"],
        "description": {"type": "string", "maxLength": 4096},
        "labels": {"type": "string", "description": "JSON object of texts"},
        "defaults": {"type": "string", "description": "JSON object, as in PATCH"},
    },
}


def _without_definitions(body: type[BaseModel]) -> dict[str, Any]:
    """Return the schema of a body whose parts are in the document already, because a route declares them."""
    schema = body.model_json_schema(ref_template=_REF + "{model}")
    schema.pop("$defs", None)
    return schema


_CREATE_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {"schema": _UPLOAD_SCHEMA},
            "application/json": {"schema": _without_definitions(RegisterRequest)},
        },
    }
}
_COMMON = error_responses(400, 401, 403, 404, 500)
_MOVES = _COMMON | error_responses(409, 413, 415, 422, 503)
_BYTES = "application/octet-stream"
_CHUNK_BYTES = 1 << 20
_FILE: dict[int | str, dict[str, Any]] = {
    200: {"content": {_BYTES: {"schema": {"type": "string", "format": "binary"}}}, "description": "The file's bytes"},
    **_COMMON,
}
_CREATED: dict[int | str, dict[str, Any]] = {
    200: {"model": AdapterBody | DryRunBody, "description": "Already published under this name, or a dry run"},
    201: {"model": AdapterBody, "description": "Published"},
    202: {"model": AdapterBody, "description": "Being fetched"},
    **_MOVES,
    **error_responses(408, 411, 507),
}


@router.post("", responses=_CREATED, response_model=None, openapi_extra=_CREATE_BODY)
async def create_adapter(request: Request, context: Context, key: Caller, dry_run: bool = False) -> JSONResponse:
    """Upload an adapter as a form, or register an adapter from an allowed source with JSON."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _create_from_upload(request, context, key, dry_run)
    if kind != "application/json":
        raise ApiError(
            415,
            "The content type is not supported; send multipart/form-data or application/json.",
            code="unsupported_media_type",
        )
    return await _create_from_source(context, key, _parse_json(await request.body()), dry_run)


async def _create_from_upload(request: Request, context: AppContext, key: Key, dry_run: bool) -> JSONResponse:
    async def fill(folder: Path) -> Publication:
        form = _parse_form(await receive_upload(request, folder))
        publishing.check_writable(key, form.name)
        return Publication.of(form, UPLOAD, key, dry_run=dry_run)

    async with publishing.place_for_client(context):
        return _created(context, await publish_from(context, fill))


async def _create_from_source(context: AppContext, key: Key, body: RegisterRequest, dry_run: bool) -> JSONResponse:
    publishing.check_writable(key, body.name)
    check_count(context, key, body.name)
    if body.lazy and not dry_run:
        return _json(pending_body(context, await fetching.register_lazily(context, body)), 202)
    async with publishing.place_for_client(context):
        return _created(context, await fetching.register(context, body, key, dry_run=dry_run))


def _created(context: AppContext, published: Published) -> JSONResponse:
    """Return the response to a registration: the record, or the report of a dry run."""
    if published.record is not None:
        return _json(record_body(context, published.record), 201 if published.created else 200)
    inspected = published.inspected
    version = f"sha256:{inspected.digest}"
    body = DryRunBody(name=published.name, version=version, rank=inspected.rank, report=inspected.report)
    return _json(body, 200)


def _parse_form(fields: dict[str, str]) -> UploadForm:
    try:
        return UploadForm.model_validate(fields)
    except ValidationError as error:
        raise validation_error(error.errors()) from None


def _parse_json(body: bytes) -> RegisterRequest:
    try:
        return RegisterRequest.model_validate_json(body)
    except ValidationError as error:
        raise validation_error(error.errors()) from None


def _json(body: BaseModel, status: int) -> JSONResponse:
    return JSONResponse(body.model_dump(), status)


@router.get("", responses=_COMMON)
async def list_adapters(
    context: Context,
    key: Caller,
    state: State | None = None,
    tier: Tier | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str, Query(max_length=256)] = "",
    search: Annotated[str, Query(max_length=256)] = "",
) -> AdapterList:
    """List adapters in the order of their names, starting after `after`; `search` is a part of their names."""
    part = search.casefold()

    def wanted(name: str, its_state: State, its_tier: Tier) -> bool:
        return key.sees(name) and state in (None, its_state) and tier in (None, its_tier)

    published = (
        record_body(context, record)
        for record in context.registry.walk(after)
        if part in record.name.casefold()
        and wanted(record.name, state_of(context, record)[0], context.tier_of(record.version.digest))
    )
    pending = (
        pending_body(context, adapter)
        for name, adapter in sorted(context.registry.pending.items())
        if name > after
        and part in name.casefold()
        and name not in context.registry
        and wanted(name, pending_state(adapter), "disk")
    )
    page = list(islice(heapq.merge(published, pending, key=lambda body: body.name), limit + 1))
    return AdapterList(data=page[:limit], has_more=len(page) > limit)


@router.get(NAME, responses=_COMMON)
async def get_adapter(name: str, context: Context, key: Caller) -> AdapterBody | AliasBody:
    """Return the record of an adapter, or an alias with its weights."""
    if name in context.registry.aliases:
        return aliases.alias_body(context, aliases.find(context, key, name))
    pending = context.registry.pending.get(name)
    if pending is not None and name not in context.registry and key.sees(name):
        return pending_body(context, pending)
    return record_body(context, publishing.find(context, key, name))


@router.patch(NAME, responses=_COMMON | error_responses(409, 413, 415, 503, 507))
async def change_adapter(name: str, context: Context, key: Caller, body: SettingsRequest) -> AdapterBody:
    """Change an adapter's description, labels and defaults of requests; null removes one."""
    await settings.check(context, body)
    async with context.lock(name):
        if name in context.registry.pending and name not in context.registry and key.sees(name):
            raise ApiError(
                409, "The adapter has not been fetched yet; register it again to change it.", code="conflict"
            )
        record = publishing.find(context, key, name)
        settings.check_tokens(context, body, record.version.traits)
        changed = settings.as_json(settings.changed(record.settings, body.changes()))
        return record_body(context, await asyncio.to_thread(context.registry.set_settings, name, changed))


@router.delete(NAME, responses=_COMMON)
async def delete_adapter(
    name: str, context: Context, key: Caller, drain_timeout: Annotated[float, Query(ge=0, le=3600)] = 30.0
) -> DeletedBody:
    """Delete an adapter: new requests get 404 at once, running requests may finish until `drain_timeout`."""
    if name in context.registry.pending and key.sees(name):
        await fetching.forget(context, name)
        if name not in context.registry:
            return DeletedBody(name=name, drained=0, aborted=0)
    publishing.find(context, key, name)
    return await publishing.remove(context, name, drain_timeout)


@router.post(f"{NAME}/load", responses=_MOVES)
async def load_adapter(name: str, context: Context, key: Caller, body: LoadRequest | None = None) -> AdapterBody:
    """Load an adapter to the device or to host memory, also one that was put aside."""
    record = publishing.find(context, key, name)
    await context.engine.move_adapter(record.version.digest, body.tier if body else "device")
    context.quarantine.forget(record.version.digest)
    return record_body(context, record)


@router.post(f"{NAME}/unload", responses=_MOVES)
async def unload_adapter(name: str, context: Context, key: Caller) -> AdapterBody:
    """Free an adapter's device and host memory; the adapter stays registered."""
    record = publishing.find(context, key, name)
    if record.pinned:
        raise ApiError(409, "The adapter is pinned; unpin it first.", code="conflict")
    if record.version.digest in context.in_flight.digests():
        raise ApiError(409, "The adapter is in use; wait until its requests have finished.", code="conflict")
    await context.engine.move_adapter(record.version.digest, "disk")
    return record_body(context, record)


@router.post(f"{NAME}/pin", responses=_MOVES)
async def pin_adapter(name: str, context: Context, key: Caller) -> AdapterBody:
    """Load an adapter to the device and protect it from eviction."""
    async with context.lock(name):
        return record_body(context, await publishing.pin(context, publishing.find(context, key, name)))


@router.post(f"{NAME}/unpin", responses=_MOVES)
async def unpin_adapter(name: str, context: Context, key: Caller) -> AdapterBody:
    """Remove an adapter's protection from eviction."""
    async with context.lock(name):
        return record_body(context, await publishing.unpin(context, publishing.find(context, key, name)))


@router.get(f"{NAME}/versions", responses=_COMMON)
async def list_versions(name: str, context: Context, key: Caller) -> VersionList:
    """List the versions of an adapter, newest first."""
    publishing.find(context, key, name)
    history = context.registry.history(name)
    return VersionList(data=[version_body(context, name, entry) for entry in history])


@router.post(f"{NAME}/rollback", responses=_MOVES)
async def roll_back_adapter(
    name: str, context: Context, key: Caller, body: RollbackRequest | None = None
) -> AdapterBody:
    """Roll an adapter back to the previous version or to the given one."""
    async with context.lock(name):
        old = publishing.find(context, key, name)
        version = body.version if body else None
        record = await asyncio.to_thread(context.registry.rollback, name, version)
        try:
            await publishing.follow(context, old, record)
        finally:
            publishing.collect_later(context)
        return record_body(context, record)


@router.get(NAME + "/files/{file}", responses=_FILE, response_class=StreamingResponse)
async def download_file(
    name: str, file: str, context: Context, key: Caller, version: VersionText | None = None
) -> StreamingResponse:
    """Download a stored file of the current version or of the given one."""
    record = publishing.find(context, key, name)
    if version is not None:
        record = context.registry.resolve(f"{name}@{version}")
    if file not in (*FILES, *TOKENIZER_FILES):
        raise ApiError(
            404, f"An adapter can only have the files {', '.join((*FILES, *TOKENIZER_FILES))}.", code="not_found"
        )
    try:
        stored = await asyncio.to_thread((context.registry.store.path(record.version.digest) / file).open, "rb")
    except FileNotFoundError:
        raise ApiError(404, "This version of the adapter does not have this file.", code="not_found") from None
    size = os.fstat(stored.fileno()).st_size
    return StreamingResponse(_chunks(stored), media_type=_BYTES, headers={"content-length": str(size)})


def _chunks(stored: BinaryIO) -> Iterator[bytes]:
    with stored:
        while chunk := stored.read(_CHUNK_BYTES):
            yield chunk
