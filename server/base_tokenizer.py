"""The base model's tokenizer as data: the engine's process loads it with transformers, and the API's process uses it
with the tokenizers library alone."""

import msgspec


class BaseTokenizer(msgspec.Struct, frozen=True):
    """`backend` is the JSON of a fast tokenizer. `special_tokens` (such as `eos_token`) are variables of the chat
    template; `special_ids` are the ids of all special tokens."""

    backend: str
    chat_template: str | None
    special_tokens: dict[str, str]
    special_ids: list[int]
