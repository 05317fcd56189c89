"""`/`: the web console, a page that calls this server's own routes. Its files need no key; what it shows does."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.api.errors import ApiError, error_responses
from server.console import PAGE, Asset, assets

router = APIRouter(tags=["console"])

# The page runs its own script and style only, and speaks to this server only.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
_PAGE_CACHING, _ASSET_CACHING = "no-cache", "public, max-age=31536000, immutable"
_TEXT = {"schema": {"type": "string"}}
_UNCHANGED: dict[int | str, dict[str, Any]] = {304: {"description": "The client's copy is current"}}


@router.get(
    "/",
    responses={200: {"content": {"text/html": _TEXT}}, **_UNCHANGED, **error_responses(403)},
    response_class=Response,
)
async def console_page(request: Request) -> Response:
    """Return the page of the web console."""
    return _answer(request, assets()[PAGE], _PAGE_CACHING)


@router.get(
    "/console/{file}",
    responses={
        200: {"content": {"text/javascript": _TEXT, "text/css": _TEXT}},
        **_UNCHANGED,
        **error_responses(403, 404),
    },
    response_class=Response,
)
async def console_file(file: str, request: Request) -> Response:
    """Return a script or a style sheet of the web console."""
    asset = assets().get(file)
    if asset is None or file == PAGE:
        raise ApiError(404, "The console has no such file.", code="not_found")
    return _answer(request, asset, _ASSET_CACHING)


def _answer(request: Request, asset: Asset, caching: str) -> Response:
    headers = {**_HEADERS, "etag": asset.etag, "cache-control": caching}
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if asset.etag in known:
        return Response(status_code=304, headers=headers)
    return Response(asset.body, headers=headers, media_type=asset.media_type)
