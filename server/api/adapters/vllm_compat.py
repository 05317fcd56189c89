"""vLLM's adapter routes, so that its clients and controllers work unchanged."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi.responses import PlainTextResponse
from pydantic import ValidationError

from adapters.errors import AdapterConflict, AdapterInvalid, SourceNotAllowed, SourceNotFound
from adapters.sources.paths import source_of
from server.api.adapters import fetching, publishing
from server.api.adapters.schemas import RegisterRequest, VllmLoadRequest, VllmUnloadRequest
from server.api.context import Context
from server.api.errors import bad_request, error_responses, validation_error
from server.api.middleware.auth import Key, key_of

router = APIRouter(prefix="/v1", tags=["adapters"], default_response_class=PlainTextResponse)
Caller = Annotated[Key, Depends(key_of)]
# Successes are plain text and errors are JSON. By reference, because FastAPI would document errors as plain text too.
_ERROR_JSON = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"description": response["description"], "content": _ERROR_JSON}
    for status, response in error_responses(400, 401, 403, 404, 413, 415, 500, 503, 507).items()
}


@router.post("/load_lora_adapter", responses=_RESPONSES)
async def load_lora_adapter(body: VllmLoadRequest, context: Context, key: Caller) -> str:
    """Register the folder `lora_path`, which must be under an allowed `file://` source, or the hub's `org/name`."""
    publishing.check_writable(key, body.lora_name)
    source = await asyncio.to_thread(source_of, body.lora_path, context.config.allow_source)
    try:
        request = RegisterRequest(
            name=body.lora_name, source=source, replace=body.load_inplace, lazy=False, in_flight=body.in_flight
        )
        async with publishing.place_for_client(context):
            published = await fetching.register(context, request, key)
    except (AdapterConflict, AdapterInvalid) as error:
        raise bad_request(str(error), code=error.code) from None
    except (SourceNotAllowed, SourceNotFound) as error:  # which name the server's folder where the client did not
        raise type(error)(str(error).replace(source[:200], body.lora_path[:200])) from None
    except ValidationError as error:  # the path as a URL may exceed the maximum length of a source
        raise validation_error(error.errors()) from None
    if not published.created and not body.load_inplace:
        raise bad_request(
            f"The adapter '{body.lora_name}' is already loaded; set load_inplace to replace it.", "lora_name"
        )
    return f"Success: LoRA adapter '{body.lora_name}' added successfully."


@router.post("/unload_lora_adapter", responses=_RESPONSES)
async def unload_lora_adapter(body: VllmUnloadRequest, context: Context, key: Caller) -> str:
    """Delete an adapter after its running requests have finished."""
    publishing.find(context, key, body.lora_name)
    try:
        await publishing.remove(context, body.lora_name, context.config.drain_timeout)
    except AdapterConflict as error:
        raise bad_request(str(error), "lora_name", error.code) from None
    return f"Success: LoRA adapter '{body.lora_name}' removed successfully."
