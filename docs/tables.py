"""Write the tables of the reference pages from the code: `make docs`. A test fails when a page is out of date."""

import ast
import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from fastapi import FastAPI

from adapters.errors import AdapterError, ProblemCode
from load_tests.clients import page as client_page
from server import config
from server.api.app import ROUTED
from server.api.fields import (
    APPLIED,
    APPLIED_IN_EMBEDDINGS,
    HARMLESS,
    HARMLESS_IN_MESSAGES,
    HARMLESS_IN_RESPONSES,
    HARMLESS_IN_STREAM_OPTIONS,
    HARMLESS_IN_STRUCTURED_OUTPUTS,
    REFUSED,
    REFUSED_IN_EMBEDDINGS,
    REFUSED_IN_MESSAGES,
    REFUSED_IN_RESPONSES,
    REFUSED_IN_STRUCTURED_OUTPUTS,
    Refusal,
)
from server.api.middleware.auth import need_of
from server.api.requests.chat import ChatCompletionRequest
from server.api.requests.completions import CompletionRequest
from server.api.requests.inference import GenerationRequest
from server.api.requests.pooled import EmbeddingRequest, PooledRequest, RerankRequest, ScoreRequest
from server.config import ServeConfig
from server.metric_specs import METRICS

REFERENCE = Path(__file__).parent / "reference"
API = Path(__file__).parent.parent / "server" / "api"
Rows = list[tuple[str, ...]]

# What each code of an API error means. `api_errors` finds the codes in the sources; one that is missing here fails.
CODES = {
    "aborted": "The server stopped while the request ran.",
    "adapter_failed": "The adapter exists and cannot be served: damaged or refused files, or numbers not finite.",
    "adapter_loading": "The adapter is still being fetched from its source, or registered at the start of the server.",
    "adapters_conflict": "Two adapters of the request replace or change the same module, so that they have no sum.",
    "conflict": "The state of the adapter, alias or merge does not allow the operation.",
    "context_length_exceeded": "The prompt and the requested tokens do not fit into the context.",
    "cross_site": "A web page of another site sent a request that changes something or reads weights.",
    "deadline_exceeded": "The request's time was over: its `timeout`, `x-request-timeout`, or `--request-timeout`.",
    "draining": "The server is shutting down.",
    "engine_dead": "The engine is dead or hung, or cannot be restarted; only the liveness probe reports this code.",
    "engine_error": "The engine could not compute the request.",
    "engine_unavailable": "The engine is starting, restarting or dead.",
    "host_not_allowed": "The `Host` header names neither this server's address nor an `--allowed-host`.",
    "insufficient_scope": "The API key lacks the scope, or may not see or change this name.",
    "internal_error": "An unexpected exception; the log has the details under the request's id.",
    "invalid_api_key": "The request has no valid API key, or one that has expired.",
    "invalid_value": "A field of the request is missing, malformed or out of range.",
    "length_required": "An upload needs a `Content-Length` header.",
    "merged": "Another adapter is merged into the base model, and `--merge-others refuse` is set.",
    "model_not_found": "The model does not exist, or the API key may not see it.",
    "no_room": "The adapters of the request do not fit on the device beside pinned ones.",
    "not_found": "The adapter has no such file.",
    "queue_full": "The queue (`--max-queue`, `--max-queue-tokens`) has no room for the sequences of the request.",
    "queue_share": "The key's tenant holds its share of the queue; other tenants may still be served.",
    "rate_limit_exceeded": "A limit of the API key or the adapter is reached; `Retry-After` says when to try again.",
    "scales_overflow": "The numbers of the request's adapters are not finite with the requested scales.",
    "traces_busy": "As many traces are being taken as the server allows at once.",
    "timeout": "No byte of the request's body arrived for too long.",
    "starting": "The server loads the model or registers its adapters; only the readiness probe reports this code.",
    "too_large": "The body or one of its files is too large.",
    "unknown_field": "The request has fields that this server does not know, and `--strict-requests` is set.",
    "unsupported": "The request uses a parameter that this server does not implement.",
    "unsupported_media_type": "The body has a content type that the route does not read.",
    "uploads_busy": "Too many uploads and registrations are staged or self-tested at the moment.",
}
# What each code in the `problems` of a refused adapter means.
PROBLEMS: dict[ProblemCode, str] = {
    "shape_mismatch": "A tensor is missing, or its shape does not fit the layer.",
    "rank_too_large": "The rank exceeds `--max-adapter-rank`.",
    "nonfinite": "A tensor contains NaN or infinity.",
    "unsupported_feature": "The adapter uses a feature that this server does not serve.",
    "unknown_key": "The config has a key that PEFT does not define.",
    "base_mismatch": "The adapter names a module that the base model does not have.",
    "no_target": "A declared target has no tensors, or a tensor belongs to no declared target.",
    "malformed_file": "A file cannot be read, or has a data type that is not expected.",
}


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def flags() -> str:
    rows = []
    for field in dataclasses.fields(ServeConfig):
        default: Any = ", ".join(field.default) if isinstance(field.default, tuple) else field.default
        shown = "" if default == Path() or default == "" or default is False else f"`{default}`"
        rows.append((f"`{config.flag_name(field.name)}`", config.type_label(field.name), shown, field.metadata["help"]))
    return table(("flag", "takes", "default", "what it does"), rows)


def endpoints() -> str:
    app = FastAPI()
    for module in ROUTED:
        app.include_router(module.router)
    rows = []
    for path, operations in app.openapi()["paths"].items():
        for method, operation in operations.items():
            summary = operation.get("description", operation["summary"]).split("\n")[0]
            rows.append((f"`{method.upper()} {path}`", need_of(path), summary))
    return table(("route", "scope", "what it does"), rows)


def fields() -> str:
    chat_fields, completion_fields = ChatCompletionRequest.model_fields, CompletionRequest.model_fields
    names = {**chat_fields, **completion_fields}
    rows = [(f"`{name}`", _routes_of(name), APPLIED[name]) for name in names]
    return table(("field", "applied on", "what it does"), rows)


def _routes_of(name: str) -> str:
    schemas: dict[str, type[GenerationRequest]] = {"chat": ChatCompletionRequest, "completions": CompletionRequest}
    return ", ".join(route for route, schema in schemas.items() if name in schema.model_fields)


def refused_fields() -> str:
    parts = {
        "": REFUSED,
        "messages.N.": REFUSED_IN_MESSAGES,
        "structured_outputs.": REFUSED_IN_STRUCTURED_OUTPUTS,
    }
    rows = [
        (f"`{prefix}{name}`", refusal.what, _neutral(refusal))
        for prefix, refused in parts.items()
        for name, refusal in refused.items()
    ]
    in_responses = REFUSED_IN_RESPONSES.items()
    rows += [(f"`{name}` (/v1/responses)", refusal.what, _neutral(refusal)) for name, refusal in in_responses]
    return table(("field", "what it is", "accepted values"), rows)


def embedding_fields() -> str:
    schemas: dict[str, type[PooledRequest]]
    schemas = {"embeddings": EmbeddingRequest, "score": ScoreRequest, "rerank": RerankRequest}
    names = {name: None for schema in schemas.values() for name in schema.model_fields}
    rows = [
        (
            f"`{name}`",
            ", ".join(route for route, schema in schemas.items() if name in schema.model_fields),
            {**APPLIED, **APPLIED_IN_EMBEDDINGS}[name],
        )
        for name in names
    ]
    return table(("field", "applied on", "what it does"), rows)


def refused_in_embeddings() -> str:
    rows = [(f"`{name}`", refusal.what, _neutral(refusal)) for name, refusal in REFUSED_IN_EMBEDDINGS.items()]
    return table(("field", "what it is", "accepted values"), rows)


def _neutral(refusal: Refusal) -> str:
    return ", ".join(["`null`", *(f"`{json.dumps(value)}`" for value in refusal.neutral)])


def harmless_fields() -> str:
    parts = {
        "": HARMLESS,
        "messages.N.": HARMLESS_IN_MESSAGES,
        "structured_outputs.": HARMLESS_IN_STRUCTURED_OUTPUTS,
        "stream_options.": HARMLESS_IN_STREAM_OPTIONS,
    }
    rows = [(f"`{prefix}{name}`", what) for prefix, harmless in parts.items() for name, what in harmless.items()]
    rows += [(f"`{name}` (/v1/responses)", what) for name, what in HARMLESS_IN_RESPONSES.items()]
    return table(("field", "what it is"), rows)


def metrics() -> str:
    return table(
        ("metric", "type", "labels", "what it counts"),
        [(f"`{m.name}`", m.type, ", ".join(f"`{label}`" for label in m.labels), m.help) for m in METRICS],
    )


def adapter_errors() -> str:
    kinds = sorted(_subclasses(AdapterError), key=lambda kind: (kind.status, kind.code))
    rows = [(str(kind.status), f"`{kind.code}`", (kind.__doc__ or "").split("\n")[0]) for kind in kinds]
    return table(("status", "code", "when"), rows)


def _subclasses(kind: type[AdapterError]) -> list[type[AdapterError]]:
    return [found for child in kind.__subclasses__() for found in (child, *_subclasses(child)) if found.status != 500]


def problems() -> str:
    return table(("code", "meaning"), [(f"`{code}`", PROBLEMS[code]) for code in get_args(ProblemCode)])


def api_errors() -> str:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(API.rglob("*.py"))]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found = sorted({(status, code) for call in calls for status, code in _errors_of(call)})
    return table(("status", "code", "meaning"), [(str(status), f"`{code}`", CODES[code]) for status, code in found])


def _errors_of(call: ast.Call) -> Iterator[tuple[int, str]]:
    """Yield the statuses and codes that a call of one of the makers in `server/api/errors.py` has as literals."""
    maker = call.func.id if isinstance(call.func, ast.Name) else ""
    keywords = {word.arg: word.value for word in call.keywords}
    if maker == "ApiError":
        status, code = call.args[0], keywords.get("code")
    elif maker == "bad_request":
        status, code = ast.Constant(400), keywords.get("code", _argument(call, 2, "invalid_value"))
    elif maker == "unavailable":
        status, code = ast.Constant(503), keywords.get("code", _argument(call, 1, "unavailable"))
    else:
        return
    if isinstance(status, ast.Constant) and code is not None:
        literals = (node.value for node in ast.walk(code) if isinstance(node, ast.Constant))
        yield from ((int(str(status.value)), literal) for literal in literals if isinstance(literal, str))


def _argument(call: ast.Call, place: int, default: str) -> ast.expr:
    return call.args[place] if len(call.args) > place else ast.Constant(default)


def clients() -> str:
    return table(client_page.table_head(), client_page.table_rows(client_page.load()))


def client_reasons() -> str:
    return table(("client", "feature", "", "why"), client_page.reasons(client_page.load()))


def client_run() -> str:
    return table(("what", "value"), client_page.setting(client_page.load()))


PAGES: dict[Path, Mapping[str, Callable[[], str]]] = {
    REFERENCE / "flags.md": {"flags": flags},
    REFERENCE / "routes.md": {"endpoints": endpoints},
    REFERENCE / "fields.md": {
        "applied": fields,
        "refused": refused_fields,
        "harmless": harmless_fields,
        "embeddings": embedding_fields,
        "refused-in-embeddings": refused_in_embeddings,
    },
    REFERENCE / "metrics.md": {"metrics": metrics},
    REFERENCE / "clients.md": {"clients": clients, "client-reasons": client_reasons, "client-run": client_run},
    REFERENCE / "errors.md": {"api-errors": api_errors, "adapter-errors": adapter_errors, "problems": problems},
}


def render(text: str, tables: Mapping[str, Callable[[], str]]) -> str:
    """Return `text` with every `<!-- table: name -->` … `<!-- end -->` section written anew."""
    for name, make in tables.items():
        section = re.search(rf"<!-- table: {name} -->\n(.*?)<!-- end -->", text, re.DOTALL)
        assert section is not None, f"no section for the table of {name}"
        text = text[: section.start(1)] + make() + "\n" + text[section.end(1) :]
    return text


if __name__ == "__main__":
    for path, its_tables in PAGES.items():
        path.write_text(render(path.read_text(encoding="utf-8"), its_tables), encoding="utf-8")
