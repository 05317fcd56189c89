"""`/tokenize`, `/detokenize` and `/tokenizer_info` in vLLM's format, for the base model and adapters."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from pydantic import Field

from adapters.errors import AdapterInvalid
from server.api.context import AppContext, Context
from server.api.errors import bad_request, error_responses, model_not_found
from server.api.inference.admission import note_unknown_fields
from server.api.inference.chat import render_chat
from server.api.inference.targets import adapter_failed, defaults_of, serving_record
from server.api.middleware.auth import Key, key_of
from server.api.requests.chat import ChatPrompt
from server.api.requests.defaults import NO_DEFAULTS, Defaults
from server.api.requests.wire import ModelName, OpenWire, Text, TokenId
from server.api.schemas import Wire
from server.api.text.tokenizer import Tokenizer

router = APIRouter(tags=["inference"], responses=error_responses(400, 401, 403, 404, 413, 415, 503))
Caller = Annotated[Key, Depends(key_of)]


class TokenizePromptRequest(OpenWire):
    model: ModelName | None = None  # default: the base model
    prompt: Text
    add_special_tokens: bool | None = None  # default: true
    return_token_strs: bool | None = None


class TokenizeChatRequest(ChatPrompt):
    model: ModelName | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(OpenWire):
    model: ModelName | None = None
    tokens: Annotated[list[TokenId], Field(max_length=1 << 20, fail_fast=True)]


class TokenizeBody(Wire):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeBody(Wire):
    prompt: str


@router.post("/tokenize")
async def tokenize(
    request: Request, body: TokenizePromptRequest | TokenizeChatRequest, context: Context, key: Caller
) -> TokenizeBody:
    """Return the tokens of a text or of a conversation."""
    note_unknown_fields(request, context, body)
    tokenizer, defaults = await _tokenizer(context, key, body.model)
    if isinstance(body, TokenizeChatRequest):
        tokens = await render_chat(context, tokenizer, defaults.applied_to(body))
    else:
        special = body.add_special_tokens is not False
        tokens = await tokenizer.encode(body.prompt, context.info.max_model_len, add_special_tokens=special)
    strings = [tokenizer.backend.id_to_token(token) or "" for token in tokens] if body.return_token_strs else None
    limit = context.info.max_model_len
    return TokenizeBody(count=len(tokens), max_model_len=limit, tokens=tokens, token_strs=strings)


@router.post("/detokenize")
async def detokenize(request: Request, body: DetokenizeRequest, context: Context, key: Caller) -> DetokenizeBody:
    """Return the text of tokens, special tokens included."""
    note_unknown_fields(request, context, body)
    tokenizer, _ = await _tokenizer(context, key, body.model)
    unknown = next((token for token in body.tokens if tokenizer.backend.id_to_token(token) is None), None)
    if unknown is not None:
        raise bad_request(f"Token {unknown} is not in the tokenizer's vocabulary.", "tokens")
    return DetokenizeBody(prompt=tokenizer.decode(body.tokens, skip_special_tokens=False))


@router.get("/tokenizer_info")
async def tokenizer_info(
    context: Context, key: Caller, model: Annotated[str | None, Query(max_length=330)] = None
) -> dict[str, Any]:
    """Return the special tokens and the chat template of a tokenizer."""
    tokenizer, _ = await _tokenizer(context, key, model)
    template = None if tokenizer.template is None else tokenizer.template.source
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context.info.max_model_len,
        "chat_template": template,
        **tokenizer.special_tokens,
    }


async def _tokenizer(context: AppContext, key: Key, model: str | None) -> tuple[Tokenizer, Defaults]:
    """Return the tokenizer of a model and the defaults of its requests."""
    record = None
    if model is not None and model != context.base_model:
        record = serving_record(context, key, model, None)
    if record is None:  # the base model, or an alias that assigns it
        return context.tokenizer, NO_DEFAULTS
    defaults, version = defaults_of(record), record.version
    try:
        return await context.tokenizers.of(version.digest, version.traits, defaults.chat_template), defaults
    except FileNotFoundError:  # the adapter was deleted just now
        raise model_not_found(str(model)) from None
    except AdapterInvalid as error:  # it was stored by an earlier version, which admitted it
        raise adapter_failed(str(model), str(error)) from None
