"""Bodies of inference requests with their bounds. `server/api/fields.py` has the fields that they may have besides."""

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from server.api.fields import (
    HARMLESS,
    HARMLESS_IN_EMBEDDINGS,
    HARMLESS_IN_MESSAGES,
    HARMLESS_IN_STREAM_OPTIONS,
    HARMLESS_IN_STRUCTURED_OUTPUTS,
    REFUSED,
    REFUSED_IN_EMBEDDINGS,
    REFUSED_IN_MESSAGES,
    REFUSED_IN_STRUCTURED_OUTPUTS,
    SELECTORS,
    Refusal,
)
from server.api.schemas import Wire

MAX_TEXT = 4 << 20
INT64 = 1 << 63
MAX_CHOICES = 128  # of one request: prompts times n
MAX_INPUTS = 2048  # of one request for embeddings: OpenAI's

Text = Annotated[str, Field(max_length=MAX_TEXT)]
ModelName = Annotated[str, Field(min_length=1, max_length=256 + len("@sha256:") + 64)]  # a name, or name@version
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=1 << 20, fail_fast=True)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
MAX_TIMEOUT_SECONDS = 86400.0
REST_OF_CONTEXT = -1
TokenCount = Annotated[int, Field(ge=REST_OF_CONTEXT, lt=1 << 31)]
NumTop = Annotated[int, Field(ge=0, le=20)]
AdapterScale = Annotated[float, Field(ge=-100, le=100)]
Grammar = Annotated[str, Field(min_length=1, max_length=1 << 16)]
Schema = Grammar | dict[str, Any]  # as text or as JSON
Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=1000, fail_fast=True)]
LogitBias = dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]]


class OpenWire(Wire):
    """Base of the parts of a request that clients of other servers extend. Undeclared fields are kept, refused if they
    would change the response, and otherwise listed by `unknown_fields`."""

    model_config = ConfigDict(extra="allow")

    refused: ClassVar[Mapping[str, Refusal]] = {}
    harmless: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, data: Any) -> Any:
        """Raise one error for each refused field, in the order of the table."""
        given = {name: data[name] for name in cls.refused if name in data} if isinstance(data, dict) else {}
        errors = [
            _unsupported(name, cls.refused[name])
            for name, value in given.items()
            if name not in cls.model_fields and value is not None and value not in cls.refused[name].neutral
        ]
        if errors:
            raise ValidationError.from_exception_data(cls.__name__, errors)
        return data

    def unknown_fields(self) -> Iterator[str]:
        """Yield the paths of the fields that are neither applied, refused nor harmless."""
        extra = self.model_extra or {}
        yield from (name for name in extra if name not in self.refused and name not in self.harmless)
        for name in type(self).model_fields:
            value = getattr(self, name)
            for path, part in _parts(name, value):
                yield from (f"{path}.{unknown}" for unknown in part.unknown_fields())


def _unsupported(name: str, refusal: Refusal) -> InitErrorDetails:
    context = {"instead": refusal.instead}
    error = PydanticCustomError("unsupported", "is not supported with this value{instead}", context)
    return InitErrorDetails(type=error, loc=(name,), input=None)


def _parts(name: str, value: Any) -> Iterator[tuple[str, OpenWire]]:
    if isinstance(value, OpenWire):
        yield name, value
    elif isinstance(value, list):
        yield from ((f"{name}.{i}", part) for i, part in enumerate(value) if isinstance(part, OpenWire))


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


class GenerationRequest(InferenceRequest):
    """Fields common to chat completions and completions."""

    refused = REFUSED
    harmless = HARMLESS
    default_max_tokens: ClassVar[int] = REST_OF_CONTEXT  # if the request names no number

    max_tokens: TokenCount | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: StopString | Annotated[list[StopString], Field(max_length=64)] | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: LogitBias | None = Field(None, max_length=300)
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: int | None = Field(None, ge=-1, lt=1 << 31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    min_tokens: int | None = Field(None, ge=0, lt=1 << 31)
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64, fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = None
    no_stop_trim: bool | None = None  # SGLang's name of the field above
    skip_special_tokens: bool | None = None  # default: true
    prompt_logprobs: NumTop | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
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
    def forced_functions(self) -> "list[Function]":
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


class TextPart(OpenWire):
    type: Literal["text"]
    text: Text


class Function(OpenWire):
    """A function that the model may call. `strict` is not declared: arguments are not held to their schema."""

    name: str = Field(min_length=1, max_length=256)
    description: Text | None = None
    parameters: dict[str, Any] | None = None

    def as_schema(self) -> dict[str, Any]:
        """Return the JSON schema of the function as chat templates read it."""
        described = {} if self.description is None else {"description": self.description}
        parameters = {"type": "object", "properties": {}} if self.parameters is None else self.parameters
        return {"type": "function", "function": {"name": self.name, **described, "parameters": parameters}}


class Tool(OpenWire):
    type: Literal["function"]
    function: Function


class CalledFunction(OpenWire):
    name: str = Field(min_length=1, max_length=256)
    arguments: dict[str, Any]  # sent as JSON text

    @field_validator("arguments", mode="before")
    @classmethod
    def _parsed(cls, value: Any) -> Any:
        """Chat templates read arguments as an object."""
        if not isinstance(value, str):
            return value or {}
        try:
            return json.loads(value or "{}")
        except (ValueError, RecursionError):
            raise PydanticCustomError("value_error", "must be the text of a JSON object") from None


class ToolCall(OpenWire):
    id: str = Field(max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction


class NamedFunction(OpenWire):
    name: str = Field(min_length=1, max_length=256)


class NamedChoice(OpenWire):
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedChoice


class ChatMessage(OpenWire):
    refused = REFUSED_IN_MESSAGES
    harmless = HARMLESS_IN_MESSAGES

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=1024, fail_fast=True)] | None = None
    name: str | None = Field(None, max_length=256)  # this and the next one: for the chat template
    reasoning_content: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CHOICES, fail_fast=True)] | None = None
    tool_call_id: str | None = Field(None, max_length=256)  # the call that a tool's message is the result of

    @model_validator(mode="after")
    def _fits_role(self) -> "ChatMessage":
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("value_error", "content is required")
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("value_error", "only an assistant's message has tool_calls")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise PydanticCustomError("value_error", "a tool's message, and no other, needs a tool_call_id")
        return self

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ChatPrompt(OpenWire):
    """A conversation, and how the chat template renders it."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096, fail_fast=True)]
    tools: Annotated[list[Tool], Field(max_length=1024, fail_fast=True)] | None = None
    add_generation_prompt: bool | None = None  # default: true, unless `continue_final_message`
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # variables of the template
    reasoning_effort: str | None = Field(None, max_length=64)  # another one

    @property
    def offered_functions(self) -> list[Function]:
        """The functions that the model may call."""
        return [tool.function for tool in self.tools or ()]

    @model_validator(mode="after")
    def _consistent_end(self) -> "ChatPrompt":
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise PydanticCustomError("value_error", "continue_final_message needs an assistant message at the end")
        if self.continue_final_message and self.add_generation_prompt:
            raise PydanticCustomError("value_error", "continue_final_message needs add_generation_prompt to be false")
        return self


class ChatCompletionRequest(GenerationRequest, ChatPrompt):
    id_prefix = "chatcmpl"
    prompt_field = "messages"

    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: NumTop | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None  # default: true
    separate_reasoning: bool | None = None  # default: true
    include_reasoning: bool | None = None  # default: true

    @model_validator(mode="after")
    def _consistent(self) -> "ChatCompletionRequest":
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("value_error", "top_logprobs needs logprobs to be true")
        if self.tool_choice not in (None, "none", "auto") and not self.forced_functions:
            raise PydanticCustomError("value_error", "tool_choice forces a function that tools does not have")
        return self

    @property
    def requested_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def offered_functions(self) -> list[Function]:
        return [] if self.tool_choice == "none" else super().offered_functions

    @property
    def forced_functions(self) -> list[Function]:
        if self.tool_choice == "required":
            return self.offered_functions
        name = self._named_function
        return [function for function in self.offered_functions if function.name == name]

    @property
    def calls_one_function(self) -> bool:
        return self._named_function is not None or self.parallel_tool_calls is False

    @property
    def _named_function(self) -> str | None:
        return self.tool_choice.function.name if isinstance(self.tool_choice, NamedChoice) else None


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
