"""Responses of the inference endpoints: one body or a stream, in the endpoint's format."""

from collections.abc import Callable
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from server.api.context import AppContext
from server.api.errors import error_responses
from server.api.inference.formatting import Formatter
from server.api.inference.generation import Generation, collect_output, start_generation
from server.api.inference.plan import GenerationPlan
from server.api.inference.streaming import EventStream
from server.api.schemas import ErrorBody, Wire


async def respond(
    context: AppContext, request: Request, plan: GenerationPlan, formatter: Callable[[Generation], Formatter]
) -> Response:
    """Start a planned generation and return its output. The generation ends with the response, or when the client
    disconnects."""
    generation = start_generation(context, plan)
    output = formatter(generation)
    if plan.stream:
        return EventStream(generation, output)
    deltas = await collect_output(request, generation)
    return JSONResponse(output.body(deltas).model_dump())


def documented_responses(
    body: type[Wire], chunk: type[Wire], error: type[Wire] = ErrorBody
) -> dict[int | str, dict[str, Any]]:
    """Declare the responses of an inference endpoint for the OpenAPI document."""
    stream = {"text/event-stream": {"x-chunk": chunk.__name__}}
    errors = error_responses(400, 401, 403, 404, 409, 413, 415, 429, 500, 503, 504, body=error)
    return {200: {"model": body, "content": stream}, **errors}
