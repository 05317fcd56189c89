"""Request and response bodies with their bounds. Undeclared fields of requests are ignored, except where ignoring them
would change the output (`_NEUTRAL`)."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

MAX_TEXT = 4 << 20
INT64 = 1 << 63

Text = Annotated[str, Field(max_length=MAX_TEXT)]
ModelName = Annotated[str, Field(min_length=1, max_length=256 + len("@sha256:") + 64)]  # a name, or name@version
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=1 << 20, fail_fast=True)]
StopString = Annotated[str, Field(min_length=1, max_length=256)]
MAX_TIMEOUT_SECONDS = 86400.0
TokenCount = Annotated[int, Field(ge=1, lt=1 << 31)]
AdapterScale = Annotated[float, Field(ge=-100, le=100)]
LogitBias = dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Annotated[float, Field(ge=-100, le=100)]]


class Wire(BaseModel):
    """Base of all bodies. Rejects NaN and infinities, which are not valid JSON."""

    model_config = ConfigDict(allow_inf_nan=False)


# Fields of OpenAI's and vLLM's APIs that are not implemented, with the values that have no effect.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "audio": (),
    "modalities": (["text"],),
    "web_search_options": (),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "prompt_logprobs": (),
    "prompt_embeds": (),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "truncate_prompt_tokens": (),
    "logits_processors": (),
}


def _refuse_unsupported(data: Any, fields: dict[str, tuple[Any, ...]]) -> Any:
    for name in data.keys() & fields.keys() if isinstance(data, dict) else ():
        if data[name] is not None and data[name] not in fields[name]:
            raise PydanticCustomError("unsupported", "{name} is not supported with this value", {"name": f"'{name}'"})
    return data


class StreamOptions(Wire):
    include_usage: bool = False


class AdapterPart(Wire):
    name: ModelName
    scale: AdapterScale = 1.0


class GenerationRequest(Wire):
    """Fields common to chat completions and completions."""

    id_prefix: ClassVar[str] = "gen"  # of the response's id
    default_max_tokens: ClassVar[int | None] = None  # None: the rest of the context

    model: ModelName
    adapters: Annotated[list[AdapterPart], Field(max_length=8, fail_fast=True)] | None = (
        None  # `model` must be the base model
    )
    adapter_scale: AdapterScale | None = None
    max_tokens: TokenCount | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=8)
    stop: StopString | Annotated[list[StopString], Field(max_length=4)] | None = None
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: LogitBias | None = Field(None, max_length=300)
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=1024)
    top_k: int | None = Field(None, ge=-1, lt=1 << 31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    min_tokens: int | None = Field(None, ge=0, lt=1 << 31)
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64, fail_fast=True)] | None = None
    priority: int | None = Field(None, ge=-(1 << 31), lt=1 << 31)  # within the tenant; lower is more urgent
    timeout: Annotated[float, Field(gt=0, le=MAX_TIMEOUT_SECONDS)] | None = None  # seconds from the request's arrival

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, data: Any) -> Any:
        return _refuse_unsupported(data, _NEUTRAL)

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> "GenerationRequest":
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("value_error", "stream_options needs stream to be true")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def requested_tokens(self) -> int | None:
        """The maximum number of output tokens that the request names."""
        return self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """The number of most probable tokens to report for each token; None reports no log-probabilities at all."""
        return None


class TextPart(Wire):
    type: Literal["text"]
    text: Text


class ChatMessage(Wire):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=1024, fail_fast=True)]
    name: str | None = Field(None, max_length=256)

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, data: Any) -> Any:
        return _refuse_unsupported(data, {"tool_calls": ([],), "function_call": (), "audio": (), "tool_call_id": ()})

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatCompletionRequest(GenerationRequest):
    id_prefix = "chatcmpl"

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    continue_final_message: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> "ChatCompletionRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("value_error", "top_logprobs needs logprobs to be true")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            raise PydanticCustomError("value_error", "continue_final_message needs an assistant message at the end")
        return self

    @property
    def requested_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(GenerationRequest):
    id_prefix = "cmpl"
    default_max_tokens = 16  # OpenAI's

    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=64, fail_fast=True)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=64, fail_fast=True)]
    )
    logprobs: int | None = Field(None, ge=0, le=5)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class PromptTokensDetails(Wire):
    cached_tokens: int


class UsageBody(Wire):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


FinishReason = Literal["stop", "length"]


class TopLogprob(Wire):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Wire):
    content: list[ChatLogprob]


class AssistantMessage(Wire):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(Wire):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ResponseHead(Wire):
    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(ResponseHead):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: UsageBody


class ChatDelta(Wire):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Wire):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatCompletionChunk(ResponseHead):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: UsageBody | None = None


class CompletionLogprobs(Wire):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChunkChoice(Wire):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class CompletionChoice(CompletionChunkChoice):
    finish_reason: FinishReason


class Completion(ResponseHead):
    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: UsageBody


class CompletionChunk(ResponseHead):
    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChunkChoice]
    usage: UsageBody | None = None


class ModelBody(Wire):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["loraplex"] = "loraplex"
    root: str
    parent: str | None


class ModelList(Wire):
    object: Literal["list"] = "list"
    data: list[ModelBody]


class ProblemBody(Wire):
    where: str
    found: str
    expected: str
    code: str


class ErrorDetail(Wire):
    message: str
    type: str
    param: str | None
    code: str | None
    problems: list[ProblemBody] | None = Field(None, description="Every problem found, if the code is adapter_invalid")


class ErrorBody(Wire):
    error: ErrorDetail
