"""The application: routes, middleware and the OpenAPI document."""

from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

import server
from server.api import console, health, keys, models, pausing, trace, usage
from server.api.adapters import aliases, merge, routes, vllm_compat
from server.api.context import AppContext
from server.api.errors import install_error_handlers
from server.api.inference import chat, completions, embeddings, scoring, tokenization
from server.api.middleware.audit import AuditMiddleware
from server.api.middleware.auth import AuthMiddleware, need_of
from server.api.middleware.body_limits import BodyLimitsMiddleware
from server.api.middleware.browser_guard import BrowserGuard
from server.api.middleware.refused_requests import RefusedRequestsMiddleware
from server.api.middleware.request_scope import IGNORED_HEADER, RequestMiddleware
from server.api.protocols import anthropic, lorax, openai_responses
from server.api.schemas import ChatCompletionChunk, CompletionChunk

# The modules with routes, in the order in which the reference lists them.
ROUTED = (
    chat,
    completions,
    embeddings,
    scoring,
    tokenization,
    anthropic,
    openai_responses,
    lorax,
    models,
    routes,
    aliases,
    merge,
    vllm_compat,
    keys,
    pausing,
    health,
    trace,
    usage,
    console,
)


def create_app(context: AppContext) -> FastAPI:
    """Create the HTTP application over the parts in `context`. The caller starts and stops the engine."""
    app = FastAPI(title="Loraplex", version=server.__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.context = context
    for module in ROUTED:
        app.include_router(module.router)
    install_error_handlers(app)
    # The middleware added last runs first: request id, audit log, host and origin, CORS, authorization, rate, body.
    app.add_middleware(
        BodyLimitsMiddleware,
        max_upload_bytes=context.config.max_upload_bytes,
        context_length=lambda: context.info.max_model_len if context.ready else 0,
    )
    app.add_middleware(RefusedRequestsMiddleware, rate_limits=lambda: context.rate_limits)
    app.add_middleware(AuthMiddleware, keys=context.keys, routes=app.router.routes)
    if context.config.cors_origin:  # before the authorization: a browser's preflight request has no key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=context.config.cors_origin,
            allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", IGNORED_HEADER],
        )
    app.add_middleware(BrowserGuard, hosts=_hosts(context), origins=context.config.cors_origin)
    app.add_middleware(AuditMiddleware, audit=context.audit)
    app.add_middleware(RequestMiddleware, metrics=context.metrics)
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    context.watch()
    return app


def _hosts(context: AppContext) -> set[str] | None:
    """Return the host names that requests may use, or None for all: who needs no key might be a page of any name."""
    config = context.config
    return None if context.keys and not config.allowed_host else {config.host, *config.allowed_host}


def _document(app: FastAPI) -> dict[str, Any]:
    """Return FastAPI's document, completed with stream chunks, API keys, and 400 for invalid input."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        schemas = document["components"]["schemas"]
        chunks_of_routes = (
            ChatCompletionChunk,
            CompletionChunk,
            anthropic.MessageEvent,
            openai_responses.ResponseEvent,
            lorax.GeneratedEvent,
        )
        chunk_models: Any = [(model, "serialization") for model in chunks_of_routes]
        _, chunks = models_json_schema(chunk_models, ref_template="#/components/schemas/{model}")
        schemas.update(chunks["$defs"])
        for path, operations in document["paths"].items():
            for operation in operations.values():
                _drop_unused_422(operation)
                if need_of(path) == "open":
                    operation["security"] = []
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
        app.openapi_schema = document
    return app.openapi_schema


def _drop_unused_422(operation: dict[str, Any]) -> None:
    """Remove FastAPI's 422, which it declares on every route with parameters; here 422 means an invalid adapter."""
    schema = str(operation["responses"].get("422", {}).get("content", ""))
    if "HTTPValidationError" in schema:
        del operation["responses"]["422"]
