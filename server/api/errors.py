"""One error body for every route and status, and the only place that turns exceptions into responses."""

from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from adapters.errors import AdapterError, AdapterInvalid
from server.api.schemas import ErrorBody, Wire
from server.ipc.client import AdapterMoveRefused
from server.ipc.supervisor import EngineState, EngineUnavailable

RETRY_AFTER_SECONDS = 2
_MAX_VALIDATION_ERRORS = 5

_TYPES = {  # every other status is an invalid_request_error
    401: "authentication_error",
    403: "permission_error",
    409: "conflict",
    422: "adapter_invalid",
    429: "rate_limit_exceeded",
    500: "server_error",
    503: "overloaded_error",
    507: "insufficient_storage",
}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
_CODES = {404: "not_found", 405: "method_not_allowed"}
_REFUSAL_STATUS = {
    "busy": 409,
    "no_room": 409,
    "not_mergeable": 409,
    "invalid": 422,
    "not_found": 404,
    "failed": 500,
    "timeout": 503,
}
_REFUSAL_CODE = {422: "adapter_invalid", 404: "model_not_found", 500: "engine_error"}


class ApiError(HTTPException):
    """An error response with a code of the API contract. Derives from `HTTPException`, because FastAPI wraps other
    exceptions that are raised while it reads a body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, message, dict(headers or {}))
        self.code = code
        self.param = param


def bad_request(message: str, param: str | None = None, code: str | None = "invalid_value") -> ApiError:
    return ApiError(400, message, code=code, param=param)


def model_not_found(model: str) -> ApiError:
    """Return the same response for an unknown model and for a model that the key may not see."""
    return ApiError(404, f"The model '{model}' does not exist.", code="model_not_found", param="model")


def unavailable(message: str, code: str = "unavailable", seconds: int = RETRY_AFTER_SECONDS) -> ApiError:
    """Return a 503 with a Retry-After header."""
    return ApiError(503, message, code=code, headers={"retry-after": str(seconds)})


def engine_unavailable(state: EngineState) -> ApiError:
    return unavailable(f"The engine is {state.value}; try again later.", "engine_unavailable")


def error_body(status: int, message: str, *, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    kind = _TYPES.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def anthropic_error(status: int, error: Mapping[str, Any]) -> dict[str, Any]:
    """Return an error in the format of Anthropic's API."""
    kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {**error, "type": kind}}


def lorax_error(status: int, error: Mapping[str, Any]) -> dict[str, Any]:
    """Return an error in the format of LoRAX, which tells clients what to raise by `error_type`."""
    kind = "overloaded" if status in (429, 503) else "validation" if status < 500 else "generation"
    return {"error": error["message"], "error_type": kind}


# Routes whose errors have another API's format.
_SHAPES: dict[str, Callable[[int, Mapping[str, Any]], dict[str, Any]]] = {
    "/v1/messages": anthropic_error,
    "/generate": lorax_error,
    "/generate_stream": lorax_error,
}


class ErrorResponse(JSONResponse):
    """The body `error_body` returns, in the format of the route's API."""

    def __init__(self, body: Mapping[str, Any], status: int, headers: Mapping[str, str] | None = None):
        super().__init__(body, status, headers=headers)
        self._error: Mapping[str, Any] = body["error"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        shape = _SHAPES.get(scope["path"])
        if shape is not None:
            self.body = self.render(shape(self.status_code, self._error))
            self.headers["content-length"] = str(len(self.body))
        await super().__call__(scope, receive, send)


def error_response(error: HTTPException) -> ErrorResponse:
    code = error.code if isinstance(error, ApiError) else _CODES.get(error.status_code)
    param = error.param if isinstance(error, ApiError) else None
    body = error_body(error.status_code, str(error.detail), code=code, param=param)
    return ErrorResponse(body, error.status_code, headers=error.headers)


def server_error() -> ApiError:
    """Return the response for an unexpected exception. Details are only in the log, under the request's id."""
    return ApiError(
        500,
        "An internal error occurred; the server's log has details under the x-request-id of this response.",
        code="internal_error",
    )


def install_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(AdapterError, _on_adapter_error)
    app.add_exception_handler(AdapterMoveRefused, _on_move_refused)
    app.add_exception_handler(EngineUnavailable, _on_engine_unavailable)


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        error.headers = {"allow": ", ".join(_allowed_methods(request))}
    return error_response(error)


def _allowed_methods(request: Request) -> list[str]:
    """Return the methods of all routes with the request's path; the router names those of the first alone."""
    routes = request.app.router.routes
    return [
        method
        for method in _METHODS
        if any(route.matches({**request.scope, "method": method})[0] is Match.FULL for route in routes)
    ]


async def _on_validation_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return error_response(validation_error(error.errors()))


def validation_error(errors: Any) -> ApiError:
    """Return a 400 that names the invalid fields and the reasons. Never echoes the input: NaN and lone surrogates
    cannot be serialized."""
    if errors[0]["type"] == "json_invalid":
        reason = errors[0].get("ctx", {}).get("error", "it cannot be decoded")
        at = "".join(f" at character {place}" for place in errors[0]["loc"][-1:])  # pydantic's own reason has the place
        return bad_request(f"The body is not valid JSON: {reason}{at}.")
    found = [e for e in errors if e["type"] == "unsupported"] or list(errors[:_MAX_VALIDATION_ERRORS])
    sentences = [f"{_field(e['loc']) or 'body'}: {e['msg']}" for e in found]
    more = len(errors) - len(found)
    message = "; ".join(sentences) + (f" (and {more} more)" if more else "")
    unsupported = any(e["type"] == "unsupported" for e in found)
    return bad_request(message, _field(found[0]["loc"]) or None, "unsupported" if unsupported else "invalid_value")


def _field(location: tuple[int | str, ...]) -> str:
    """Return the path of a field as the client wrote it, without FastAPI's source and pydantic's union member names."""
    parts = [str(part) for part in location[1:]] if location and location[0] in _SOURCES else list(map(str, location))
    return ".".join(part for part in parts if part.isdigit() or (part.isidentifier() and not part[0].isupper()))[:200]


_SOURCES = ("body", "query", "path", "header")


async def _on_adapter_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, AdapterError)
    body = error_body(error.status, str(error), code=error.code)
    if isinstance(error, AdapterInvalid):
        body["error"]["problems"] = [problem.as_dict() for problem in error.problems]
    headers = {"retry-after": str(RETRY_AFTER_SECONDS)} if error.status == 503 else None
    return ErrorResponse(body, error.status, headers=headers)


async def _on_move_refused(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, AdapterMoveRefused)
    status = _REFUSAL_STATUS[error.code]
    if status == 503:
        return error_response(unavailable(str(error), "engine_error"))
    return error_response(ApiError(status, str(error), code=_REFUSAL_CODE.get(status, "conflict")))


async def _on_engine_unavailable(request: Request, _: Exception) -> JSONResponse:
    """Report the state only: the engine's reason is for the operator and may contain file names."""
    return error_response(engine_unavailable(request.app.state.context.engine.state))


def error_responses(*statuses: int, body: type[Wire] = ErrorBody) -> dict[int | str, dict[str, Any]]:
    """Declare for the OpenAPI document that these statuses have the error body, or that of another API."""
    return {status: {"model": body, "description": HTTPStatus(status).phrase} for status in statuses}
