"""`/score` and `/rerank` in vLLM's format: the similarity of texts is the cosine of their embeddings."""

from typing import Annotated

import numpy as np
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from server.api.context import Context
from server.api.errors import bad_request
from server.api.inference.embeddings import ERRORS, Vectors, embed, head, json_response, usage
from server.api.middleware.auth import Key, key_of
from server.api.requests.pooled import RerankRequest, ScoreRequest
from server.api.schemas import Ranking, ScoreList

router = APIRouter(tags=["inference"], responses=ERRORS)
Caller = Annotated[Key, Depends(key_of)]


@router.post("/score", responses={200: {"model": ScoreList}}, response_model=None)
@router.post("/v1/score", responses={200: {"model": ScoreList}}, response_model=None)
async def score(request: Request, body: ScoreRequest, context: Context, key: Caller) -> Response:
    """Return the similarity of pairs of texts, or of one text with several."""
    first, second = ([given] if isinstance(given, str) else given for given in (body.text_1, body.text_2))
    if len(first) not in (1, len(second)):
        raise bad_request(f"'text_1' must be one text, or as many as 'text_2' has ({len(second)}).", "text_1")
    generation, vectors = await embed(request, context, key, body, [*first, *second])
    scores = _cosines(vectors[: len(first)], vectors[len(first) :])
    data = [{"index": index, "object": "score", "score": value} for index, value in enumerate(scores)]
    return json_response({**head(generation, "list"), "data": data, "usage": usage(generation)})


@router.post("/rerank", responses={200: {"model": Ranking}}, response_model=None)
@router.post("/v1/rerank", responses={200: {"model": Ranking}}, response_model=None)
async def rerank(request: Request, body: RerankRequest, context: Context, key: Caller) -> Response:
    """Return documents in the order of their similarity to a query, the most similar first."""
    generation, vectors = await embed(request, context, key, body, [body.query, *body.documents])
    scores = _cosines(vectors[:1], vectors[1:])
    order = sorted(range(len(scores)), key=lambda index: -scores[index])[: body.top_n or None]
    with_text = body.return_documents is not False
    results = [
        {
            "index": index,
            **({"document": {"text": body.documents[index]}} if with_text else {}),
            "relevance_score": scores[index],
        }
        for index in order
    ]
    return json_response({**head(generation), "results": results, "usage": usage(generation)})


def _cosines(first: Vectors, second: Vectors) -> list[float]:
    """Return the cosines of vectors of length 1; `first` may be one for all."""
    found: list[float] = np.clip((first * second).sum(1, dtype=np.float64), -1, 1).tolist()
    return found
