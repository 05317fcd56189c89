"""Fields that the bodies of all inference requests share, with their bounds."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from server.api.fields import (
    HARMLESS,
    HARMLESS_IN_STREAM_OPTIONS,
    HARMLESS_IN_STRUCTURED_OUTPUTS,
    REFUSED,
    REFUSED_IN_STRUCTURED_OUTPUTS,
    SELECTORS,
)
from server.api.requests.functions import Function
from server.api.requests.sampling import Sampling
from server.api.requests.wire import (
    MAX_CHOICES,
    MAX_TIMEOUT_SECONDS,
    REST_OF_CONTEXT,
    AdapterScale,
    Choices,
    Grammar,
    ModelName,
    NumTop,
    OpenWire,
    Schema,
    TokenCount,
)


class StreamOptions(OpenWire):
    harmless = HARMLESS_IN_STREAM_OPTIONS

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None  # in every event; needs `include_usage`


class JsonSchemaFormat(OpenWire):
    """A schema with OpenAI's names around it, which the model does not see."""

    harmless: ClassVar[Mapping[str, str]] = {"strict": "the schema is followed either way"}

    name: str | None = Field(None, max_length=256)
    description: str | None = Field(None, max_length=65536)
    schema_: Schema = Field(alias="schema")


class ResponseFormat(OpenWire):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError("value_error", "json_schema belongs to the type json_schema, which needs it")
        return self


class StructuredOutputs(OpenWire):
    """A constraint in vLLM's format, of which one is given."""

    refused = REFUSED_IN_STRUCTURED_OUTPUTS
    harmless = HARMLESS_IN_STRUCTURED_OUTPUTS

    json_: Schema | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: Grammar | None = None
    choice: Choices | None = None
    grammar: Grammar | None = None

    @model_validator(mode="after")
    def _has_one(self) -> "StructuredOutputs":
        given = (self.json_, self.json_object or None, self.regex, self.choice, self.grammar)
        if all(value is None for value in given):
            raise PydanticCustomError("value_error", "one of json, json_object, regex, choice and grammar is required")
        return self


class AdapterPart(OpenWire):
    name: ModelName
    scale: AdapterScale | None = None

    @property
    def factor(self) -> float:
        return 1.0 if self.scale is None else self.scale


class InferenceRequest(OpenWire):
    """Fields common to all requests that the model computes: its adapters, and its place among other requests. Null is
    the same as leaving a field out."""

    id_prefix: ClassVar[str] = "gen"  # of the response's id
    prompt_field: ClassVar[str] = "prompt"  # that errors of the prompt name

    model: ModelName
    adapters: Annotated[list[AdapterPart], Field(max_length=8, fail_fast=True)] | None = (
        None  # `model` must be the base model
    )
    adapter_scale: AdapterScale | None = None
    lora_path: ModelName | None = None  # this and the next four: an adapter's name; `model` is the base model
    adapter_id: ModelName | None = None
    adapter_name: ModelName | None = None
    lora_name: ModelName | None = None
    lora_id: ModelName | None = None
    user: str | None = Field(None, max_length=1024)
    add_special_tokens: bool | None = None  # default: true for a prompt, false for a chat
    cache_salt: str | None = Field(None, min_length=1, max_length=1024)
    priority: int | None = Field(None, ge=-(1 << 31), lt=1 << 31)  # within the tenant; lower is more urgent
    timeout: Annotated[float, Field(gt=0, le=MAX_TIMEOUT_SECONDS)] | None = None  # seconds from the request's arrival

    @property
    def selectors(self) -> dict[str, str]:
        """The adapter names in fields of other servers, by field."""
        return {field: name for field in SELECTORS if (name := getattr(self, field)) is not None}


class GenerationRequest(Sampling, InferenceRequest):
    """Fields common to chat completions and completions."""

    refused = REFUSED
    harmless = HARMLESS
    default_max_tokens: ClassVar[int] = REST_OF_CONTEXT  # if neither the request nor the adapter names a number
    default_temperature: ClassVar[float] = 1.0

    max_tokens: TokenCount | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    min_tokens: int | None = Field(None, ge=0, lt=1 << 31)
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    no_stop_trim: bool | None = None  # SGLang's name of the field above
    skip_special_tokens: bool | None = None  # default: true
    prompt_logprobs: NumTop | None = None
    logprobs_mode: Literal["raw_logprobs", "processed_logprobs"] | None = None  # default: raw
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    receipt: bool | None = None  # what determines the output, for `loraplex replay`
    response_format: ResponseFormat | None = None  # this and the next ones: at most one constraint
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: Grammar | None = None
    guided_choice: Choices | None = None
    guided_grammar: Grammar | None = None
    json_schema: Schema | None = None
    regex: Grammar | None = None
    ebnf: Grammar | None = None

    @model_validator(mode="after")
    def _fits_streaming(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("value_error", "stream_options needs stream to be true")
        if self.prompt_logprobs is not None and self.stream:
            raise PydanticCustomError("value_error", "prompt_logprobs needs stream to be false")
        if self.receipt and self.stream:
            raise PydanticCustomError("value_error", "receipt needs stream to be false")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        return (
            self.include_usage and self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)
        )

    @property
    def forced_functions(self) -> list[Function]:
        """The functions of which the output must call one; none if it need not."""
        return []

    @property
    def calls_one_function(self) -> bool:
        """True if a forced output has exactly one call."""
        return True

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def requested_tokens(self) -> int | None:
        """The maximum number of output tokens that the request names, which may be `REST_OF_CONTEXT`."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """The number of most probable tokens to report for each token; None reports no log-probabilities at all."""
        return None

    @property
    def echoes_prompt(self) -> bool:
        """True if the output begins with the prompt."""
        return False
