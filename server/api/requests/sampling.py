"""How tokens are chosen and where an output ends: fields of requests that an adapter's defaults may have as well."""

from typing import Annotated

from pydantic import Field

from server.api.requests.wire import INT64, LogitBias, OpenWire, StopString, TokenId


class Sampling(OpenWire):
    """Null is the same as leaving a field out."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    stop: StopString | Annotated[list[StopString], Field(max_length=64)] | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: LogitBias | None = Field(None, max_length=300)
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    top_k: int | None = Field(None, ge=-1, lt=1 << 31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64, fail_fast=True)] | None = None

    def named_tokens(self) -> list[tuple[str, int]]:
        """Return the tokens that `logit_bias` and `stop_token_ids` name, each with its field."""
        biased = [("logit_bias", int(token)) for token in self.logit_bias or {}]
        return biased + [("stop_token_ids", token) for token in self.stop_token_ids or ()]
