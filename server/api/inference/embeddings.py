"""`POST /v1/embeddings`: the final hidden states of inputs, pooled and of length 1."""

import asyncio
import base64
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec
import numpy as np
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from numpy.typing import NDArray

from server.api.context import AppContext, Context
from server.api.errors import bad_request, error_responses
from server.api.inference.admission import admit_plan, admit_request
from server.api.inference.generation import Generation, collect_output, start_generation
from server.api.inference.plan import plan_embedding
from server.api.middleware.auth import Key, key_of
from server.api.requests.pooled import EmbeddingRequest, PooledRequest
from server.api.schemas import EmbeddingList

Vectors = NDArray[np.float32]  # [inputs, hidden]
Prompt = str | list[int]

ERRORS = error_responses(400, 401, 403, 404, 409, 413, 415, 429, 500, 503, 504)

router = APIRouter(tags=["inference"], responses=ERRORS)


@router.post("/v1/embeddings", responses={200: {"model": EmbeddingList}}, response_model=None)
async def create_embeddings(
    request: Request, body: EmbeddingRequest, context: Context, key: Annotated[Key, Depends(key_of)]
) -> Response:
    """Return embeddings of one or several inputs by the base model or an adapter."""
    generation, vectors = await embed(request, context, key, body, _inputs(body))
    if body.dimensions is not None:
        vectors = _shortened(vectors, body.dimensions)
    items = []
    for index, vector in enumerate(vectors):
        shown = _encoded(vector, body.encoding_format)
        items.append({"object": "embedding", "index": index, "embedding": shown})
        await asyncio.sleep(0)  # long responses hold up nobody
    return json_response({**head(generation, "list"), "data": items, "usage": usage(generation)})


def _inputs(body: EmbeddingRequest) -> list[Any]:
    given = body.input
    return list(given) if isinstance(given, list) and not isinstance(given[0], int) else [given]


async def embed(
    request: Request, context: AppContext, key: Key, body: PooledRequest, inputs: Sequence[Prompt]
) -> tuple[Generation, Vectors]:
    """Return the embeddings of the inputs, each of length 1, and the generation that computed them, which has ended."""
    admitted = await admit_request(request, context, key, body)
    limit, special = context.info.max_model_len, body.add_special_tokens is not False
    prompts = [
        await admitted.tokenizer.encode(given, limit, add_special_tokens=special, param=body.prompt_field)
        if isinstance(given, str)
        else given
        for given in inputs
    ]
    plan = admit_plan(context, plan_embedding(context, admitted, body, prompts))
    generation = start_generation(context, plan)
    deltas = await collect_output(request, generation)
    rows = [np.frombuffer(delta.embedding or b"", np.float32) for delta in deltas]
    return generation, _of_length_one(np.stack(rows))


def _of_length_one(vectors: Vectors) -> Vectors:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float32)


def _shortened(vectors: Vectors, dimensions: int) -> Vectors:
    size = vectors.shape[1]
    if dimensions > size:
        raise bad_request(f"The embeddings of this model have {size} dimensions.", "dimensions")
    return _of_length_one(vectors[:, :dimensions])


def _encoded(vector: Vectors, encoding_format: str | None) -> Any:
    if encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return msgspec.Raw(msgspec.json.encode(vector.tolist()))


def head(generation: Generation, kind: str | None = None) -> dict[str, Any]:
    """Return what a response begins with; `kind` is its `object`."""
    target = generation.plan.target
    return {
        "id": generation.id,
        **({"object": kind} if kind else {}),
        "created": generation.created,
        "model": target.requested_model,
        "system_fingerprint": target.fingerprint,
    }


def usage(generation: Generation) -> dict[str, Any]:
    return generation.usage().model_dump(exclude={"completion_tokens"})


def json_response(body: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")
