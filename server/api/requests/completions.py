"""The body of a completion."""

from typing import Annotated

from pydantic import Field

from server.api.requests.inference import GenerationRequest
from server.api.requests.wire import MAX_CHOICES, NumTop, Text, TokenIds


class CompletionRequest(GenerationRequest):
    id_prefix = "cmpl"
    default_max_tokens = 16  # OpenAI's

    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True)]
    )
    logprobs: NumTop | None = None
    echo: bool | None = None

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def echoes_prompt(self) -> bool:
        return bool(self.echo)
