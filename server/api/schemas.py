"""Bodies of responses, and the base of all bodies."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Wire(BaseModel):
    """Base of all bodies. Rejects NaN and infinities, which are not valid JSON."""

    model_config = ConfigDict(allow_inf_nan=False)


class PromptTokensDetails(Wire):
    cached_tokens: int


class UsageBody(Wire):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


FinishReason = Literal["stop", "length", "tool_calls", "abort"]


class PromptLogprob(Wire):
    """One of a prompt position's tokens, in vLLM's format."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]  # by token id


def requested() -> Any:
    """A field that a response has only if the request asked for it, or if it is set."""
    return Field(None, exclude_if=lambda value: value is None)


class TopLogprob(Wire):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Wire):
    content: list[ChatLogprob]


class CalledFunction(Wire):
    name: str
    arguments: str  # a JSON object, as the model wrote it


class ToolCallBody(Wire):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(Wire):
    role: Literal["assistant"] = "assistant"
    content: str | None  # null beside calls alone
    refusal: None = None
    reasoning_content: str | None = requested()
    tool_calls: list[ToolCallBody] | None = requested()


class ChatChoice(Wire):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    token_ids: list[int] | None = requested()
    token_versions: list[str] | None = requested()  # which version computed each token, as in `system_fingerprint`


class ResponseHead(Wire):
    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(ResponseHead):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    usage: UsageBody
    prompt_token_ids: list[int] | None = requested()
    prompt_logprobs: PromptLogprobs | None = requested()
    receipt: dict[str, Any] | None = requested()  # for `loraplex replay`


class CalledFunctionDelta(Wire):
    name: str | None = requested()
    arguments: str


class ToolCallDelta(Wire):
    """The beginning of a call, which has its id and name, or more of its arguments."""

    index: int
    id: str | None = requested()
    type: Literal["function"] | None = requested()
    function: CalledFunctionDelta


class ChatDelta(Wire):
    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = requested()
    tool_calls: list[ToolCallDelta] | None = requested()


class ChatChunkChoice(Wire):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    token_ids: list[int] | None = requested()
    token_versions: list[str] | None = requested()  # which version computed each token, as in `system_fingerprint`


class ChatCompletionChunk(ResponseHead):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    usage: UsageBody | None = None
    prompt_token_ids: list[int] | None = requested()


class CompletionLogprobs(Wire):
    tokens: list[str]
    token_logprobs: list[float | None]  # null for the first token of an echoed prompt
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChunkChoice(Wire):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    token_ids: list[int] | None = requested()
    token_versions: list[str] | None = requested()  # which version computed each token, as in `system_fingerprint`
    prompt_token_ids: list[int] | None = requested()


class CompletionChoice(CompletionChunkChoice):
    finish_reason: FinishReason
    prompt_logprobs: PromptLogprobs | None = requested()


class Completion(ResponseHead):
    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]
    usage: UsageBody
    receipt: dict[str, Any] | None = requested()  # for `loraplex replay`


class CompletionChunk(ResponseHead):
    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChunkChoice]
    usage: UsageBody | None = None


class EmbeddingUsage(Wire):
    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class EmbeddingItem(Wire):
    index: int
    object: Literal["embedding"] = "embedding"
    embedding: list[float] | str  # in base64: float32, little-endian


class EmbeddingList(ResponseHead):
    object: Literal["list"] = "list"
    data: list[EmbeddingItem]
    usage: EmbeddingUsage


class ScoreItem(Wire):
    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreList(ResponseHead):
    object: Literal["list"] = "list"
    data: list[ScoreItem]
    usage: EmbeddingUsage


class RankedText(Wire):
    text: str


class RankedDocument(Wire):
    index: int
    document: RankedText | None = requested()
    relevance_score: float


class Ranking(ResponseHead):
    results: list[RankedDocument]
    usage: EmbeddingUsage


class ModelPermission(Wire):
    """The permissions that vLLM lists with every model."""

    id: str = "modelperm-loraplex"
    object: Literal["model_permission"] = "model_permission"
    created: int = 0
    allow_create_engine: bool = False
    allow_sampling: bool = True
    allow_logprobs: bool = True
    allow_search_indices: bool = False
    allow_view: bool = True
    allow_fine_tuning: bool = False
    organization: str = "*"
    group: str | None = None
    is_blocking: bool = False


class ModelBody(Wire):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["loraplex"] = "loraplex"
    root: str
    parent: str | None
    max_model_len: int | None
    permission: list[ModelPermission] = Field(default_factory=lambda: [ModelPermission()])
    description: str | None = requested()  # this and the next two: an adapter's, if they are set
    labels: dict[str, str] | None = requested()
    defaults: dict[str, Any] | None = requested()


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


class AnthropicErrorBody(Wire):
    """An error in the format of Anthropic's API. Its `type` is that API's."""

    type: Literal["error"]
    error: ErrorDetail


class LoraxErrorBody(Wire):
    error: str
    error_type: Literal["overloaded", "validation", "generation"]
