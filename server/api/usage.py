"""`/v1/usage`: requests and tokens by day, API key and adapter."""

import csv
import io
from datetime import UTC, date, datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from fastapi.responses import Response

from server.api.context import Context
from server.api.errors import bad_request, error_responses
from server.api.schemas import Wire
from server.usage import Counts, Row

router = APIRouter(tags=["operations"])
_DEFAULT_DAYS = 31
_COLUMNS = (*Row._fields, *Counts._fields)
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a cell that begins so is a formula for spreadsheets


class UsageRow(Wire):
    day: str
    key: str  # "" without keys
    adapter: str  # the base model's name for requests without adapters, `_composed` for several adapters
    requests: int
    prompt_tokens: int
    generated_tokens: int


class UsageList(Wire):
    object: Literal["list"] = "list"
    data: list[UsageRow]


_BODIES: dict[str, Any] = {"model": UsageList, "content": {"text/csv": {"schema": {"type": "string"}}}}


@router.get("/v1/usage", responses={200: _BODIES, **error_responses(400, 401, 403)})
async def usage(
    context: Context,
    start: Annotated[date | None, Query(description="First day, UTC; without it, 30 days before `end`")] = None,
    end: Annotated[date | None, Query(description="Last day, UTC; without it, today")] = None,
    format: Literal["json", "csv"] = "json",
) -> Response:
    """Return requests and tokens by day, API key and adapter, as JSON or CSV."""
    last = end or datetime.now(UTC).date()
    first = start or date.fromordinal(max(last.toordinal() - _DEFAULT_DAYS + 1, 1))
    if first > last:
        raise bad_request(f"The first day, {first}, is after the last, {last}.", "start", "invalid_value")
    rows = [
        UsageRow(**row._replace(adapter=row.adapter or context.base_model)._asdict(), **counts._asdict())
        for row, counts in await context.usage.between(first, last)
    ]
    if format == "csv":
        return Response(_csv(rows), media_type="text/csv")
    return Response(UsageList(data=rows).model_dump_json(), media_type="application/json")


def _csv(rows: list[UsageRow]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(_COLUMNS)
    writer.writerows([_cell(getattr(row, name)) for name in _COLUMNS] for row in rows)
    return text.getvalue()


def _cell(value: str | int) -> str | int:
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
