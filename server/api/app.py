"""The application: routes, middleware and the OpenAPI document."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

import server
from server.api import health as ops
from server.api import models
from server.api.adapters import aliases as splits
from server.api.adapters import merge
from server.api.adapters import routes as adapters
from server.api.adapters import vllm_compat as vllm
from server.api.context import AppContext
from server.api.errors import install_error_handlers
from server.api.inference import chat, completions
from server.api.middleware.auth import AuthMiddleware
from server.api.middleware.body_limits import LimitsMiddleware
from server.api.middleware.request_scope import RequestMiddleware
from server.api.schemas import ChatCompletionChunk, CompletionChunk


def create_app(context: AppContext) -> FastAPI:
    """The HTTP interface over the parts in `context`. Starting and stopping the engine is the caller's business."""
    app = FastAPI(title="Loraplex", version=server.__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.context = context
    for module in (ops, models, chat, completions, adapters, splits, merge, vllm):
        app.include_router(module.router)
    install_error_handlers(app)
    # The last one added is the outermost: an id first, then who it is, then how much may be sent.
    app.add_middleware(LimitsMiddleware, max_upload_bytes=context.config.max_upload_bytes)
    app.add_middleware(AuthMiddleware, keys=context.keys)
    app.add_middleware(RequestMiddleware, metrics=context.metrics)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    context.watch()
    return app


def _document(app: FastAPI) -> dict[str, Any]:
    """FastAPI's document with what it cannot know: chunks of streams, keys, and that invalid input answers 400."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schemas = document["components"]["schemas"]
        chunk_models: Any = [(ChatCompletionChunk, "serialization"), (CompletionChunk, "serialization")]
        _, chunks = models_json_schema(chunk_models, ref_template="#/components/schemas/{model}")
        schemas.update(chunks["$defs"])
        for operation in (op for path in document["paths"].values() for op in path.values()):
            _drop_unused_422(operation)
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
        app.openapi_schema = document
    return app.openapi_schema


def _drop_unused_422(operation: dict[str, Any]) -> None:
    """FastAPI promises its own 422 on every route with parameters; ours is only for unusable adapters."""
    schema = str(operation["responses"].get("422", {}).get("content", ""))
    if "HTTPValidationError" in schema:
        del operation["responses"]["422"]
