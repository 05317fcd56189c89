"""Bodies of embeddings, scores and reranking."""

from typing import Annotated, Literal

from pydantic import Field

from server.api.fields import HARMLESS_IN_EMBEDDINGS, REFUSED_IN_EMBEDDINGS
from server.api.requests.inference import InferenceRequest
from server.api.requests.wire import Text, TokenIds

MAX_INPUTS = 2048  # of one request for embeddings: OpenAI's


class PooledRequest(InferenceRequest):
    """Fields common to the routes that return embeddings, or compare them."""

    refused = REFUSED_IN_EMBEDDINGS
    harmless = HARMLESS_IN_EMBEDDINGS

    pooling: Literal["last", "mean"] | None = None  # default: last


Texts = Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]


class EmbeddingRequest(PooledRequest):
    id_prefix = "embd"
    prompt_field = "input"

    input: (
        Text | TokenIds | Texts | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1, lt=1 << 31)


class ScoreRequest(PooledRequest):
    id_prefix = "score"
    prompt_field = "text_2"

    text_1: Text | Texts
    text_2: Text | Texts


class RerankRequest(PooledRequest):
    id_prefix = "rerank"
    prompt_field = "documents"

    query: Text
    documents: Texts
    top_n: int | None = Field(None, ge=0, lt=1 << 31)  # 0, and the default: all
    return_documents: bool | None = None  # default: true
