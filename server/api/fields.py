"""The fields of the request bodies of OpenAI's, vLLM's and SGLang's chat completions and completions, and the adapter
selectors of other servers: applied, refused or harmless. The schemas check requests by these tables.

An applied field is one that a schema declares. A refused field that has another value than null or one without effect
is a 400 that names the field, because without it the response would be another. A harmless field changes no response.
A field in none of the tables is accepted and named in the header `x-loraplex-ignored`, or refused with
`--strict-requests`.
"""

from typing import Any, NamedTuple


class Refusal(NamedTuple):
    """`neutral` are the values that ask for nothing. `instead` ends the message of the 400."""

    what: str
    neutral: tuple[Any, ...] = ()
    instead: str = ""


_IN_A_CHAT = "; use /v1/chat/completions"
_NAME_ADAPTERS = "; name the adapter in 'model', or several in 'adapters'"

# What a schema declares in server/api/requests/.
APPLIED: dict[str, str] = {
    "model": "The base model, an adapter, `name@version` or an alias",
    "adapters": "Several adapters with scales; then `model` is the base model",
    "adapter_scale": "A factor on the adapter's delta",
    "lora_path": "SGLang: an adapter's name; then `model` is the base model or the same name",
    "adapter_id": "LoRAX, TGI: an adapter's name, like `lora_path`",
    "adapter_name": "An adapter's name, like `lora_path`",
    "lora_name": "An adapter's name, like `lora_path`",
    "lora_id": "An adapter's name, like `lora_path`; a number is refused",
    "messages": "The conversation",
    "prompt": "A text, token ids, or a list of either",
    "max_tokens": "Maximum number of output tokens. `-1` takes the rest of the context; `0` computes the prompt alone",
    "max_completion_tokens": "The same for a chat; it has precedence",
    "temperature": "Divides the logits; `0` takes the most probable token",
    "top_p": "Keeps the most probable tokens up to this probability; `0` keeps one",
    "n": "Number of outputs for each prompt",
    "stop": "Texts that end the output; they may have special tokens in them",
    "presence_penalty": "Lowers the logits of tokens that the output has",
    "frequency_penalty": "Lowers them for each time that the output has them",
    "logit_bias": "Numbers to add to logits, by token id",
    "seed": "Makes sampling repeatable",
    "stream": "Sends the output as server-sent events",
    "stream_options": "`include_usage` and vLLM's `continuous_usage_stats`",
    "user": "Keeps one side of a split for an end user",
    "top_k": "Keeps so many tokens; `-1` and `0` keep all",
    "min_p": "Keeps the tokens with at least this part of the highest probability",
    "repetition_penalty": "Lowers the logits of tokens of prompt and output",
    "min_tokens": "Number of output tokens before which nothing ends the output",
    "ignore_eos": "Goes on after end tokens",
    "stop_token_ids": "Tokens that end the output",
    "include_stop_str_in_output": "Keeps the stop text, or the text of the stop token",
    "no_stop_trim": "SGLang's name of `include_stop_str_in_output`",
    "skip_special_tokens": "`false` shows special tokens in the text",
    "add_special_tokens": "Whether the tokenizer adds its special tokens to the prompt",
    "add_generation_prompt": "`false` ends the prompt with the last message",
    "continue_final_message": "Continues the last message, which is the assistant's",
    "tools": "Functions that the model may call, for the chat template",
    "tool_choice": "`auto`, the default; `none` offers no functions; `required` or a function's name forces a call",
    "parallel_tool_calls": "`false` returns the first call alone",
    "separate_reasoning": "SGLang: `false` keeps reasoning in the content",
    "include_reasoning": "vLLM: `false` leaves reasoning out",
    "chat_template_kwargs": "Variables of the chat template",
    "reasoning_effort": "One more variable of the chat template",
    "logprobs": "Log-probabilities of the output: a number of tokens, or for a chat true",
    "top_logprobs": "The number of tokens for a chat",
    "prompt_logprobs": "vLLM: log-probabilities of the prompt, with so many tokens at each position; not in streams",
    "logprobs_mode": "vLLM: log-probabilities of the model's distribution (`raw_logprobs`, the default) or of the "
    "distribution that is sampled from (`processed_logprobs`): after bias, penalties, grammar, temperature, truncation",
    "echo": "Begins the output with the prompt, and its log-probabilities with the prompt's",
    "receipt": "Adds all that determines the output, for `loraplex replay`; not in streams",
    "return_token_ids": "vLLM: adds `prompt_token_ids` and `token_ids`, and `token_versions`: what computed each token",
    "return_tokens_as_token_ids": "vLLM: log-probabilities name tokens as `token_id:N`",
    "cache_salt": "vLLM: shares the prefix cache only with requests of the same salt",
    "priority": "Order within the tenant; lower is more urgent",
    "response_format": "The output is JSON, or JSON of a schema, which is followed as with `strict`",
    "structured_outputs": "vLLM: the output follows a `json` schema, `regex`, `choice` or `grammar`",
    "guided_json": "vLLM's older name of `json` in `structured_outputs`",
    "guided_regex": "The same for `regex`",
    "guided_choice": "The same for `choice`",
    "guided_grammar": "The same for `grammar`",
    "json_schema": "SGLang: the output is JSON of a schema",
    "regex": "SGLang: the output matches a regular expression",
    "ebnf": "SGLang: the output follows a grammar",
    "timeout": "Seconds after which the request is ended with 504",
}

# In the order in which a request's refused fields are named.
REFUSED: dict[str, Refusal] = {
    # Adapters, as other servers select them
    "adapter_source": Refusal(
        "LoRAX: where an adapter comes from", (), "; register the adapter with POST /v1/adapters"
    ),
    "lora": Refusal("llama.cpp: adapters by number, with scales", ([],), _NAME_ADAPTERS),
    "lora_request": Refusal("vLLM: an adapter as an object", (), _NAME_ADAPTERS),
    "merged_adapters": Refusal("LoRAX: a combination of adapters", (), _NAME_ADAPTERS),
    # What the output must look like
    "tools": Refusal("functions that the model may call, without a chat", ([],), _IN_A_CHAT),
    "tool_choice": Refusal("whether the model calls a function, without a chat", ("none", "auto"), _IN_A_CHAT),
    "functions": Refusal("`tools`, as they were called", ([],), "; use 'tools'"),
    "function_call": Refusal("`tool_choice`, as it was called", ("none", "auto"), "; use 'tool_choice'"),
    "guided_whitespace_pattern": Refusal("vLLM: white space in JSON"),
    "structural_tag": Refusal("vLLM: structures between tags"),
    "modalities": Refusal("kinds of output", (["text"],)),
    "audio": Refusal("spoken output"),
    "verbosity": Refusal("how long the output is", ("medium",)),
    "task": Refusal("SGLang: an instruction of DeepSeek's template"),
    # How tokens are chosen
    "best_of": Refusal("the best of several outputs", (1,)),
    "use_beam_search": Refusal("vLLM: beam search", (False,)),
    "bad_words": Refusal("vLLM: words that may not occur", ([],)),
    "allowed_token_ids": Refusal("vLLM: the only tokens that may occur"),
    "logits_processors": Refusal("vLLM: code that changes logits", ([],)),
    "custom_logit_processor": Refusal("SGLang: code that changes logits"),
    "custom_params": Refusal("SGLang: parameters of that code", ({},)),
    "watermarking": Refusal("vLLM: a watermark", (False,)),
    "repetition_detection": Refusal("vLLM: ends an output that repeats itself"),
    "thinking_token_budget": Refusal("vLLM: maximum number of tokens of reasoning", (-1,)),
    "stop_regex": Refusal("SGLang: a regular expression that ends the output", ([],)),
    "vllm_xargs": Refusal("vLLM: parameters of extensions", ({},)),
    # What the prompt is made of
    "chat_template": Refusal("vLLM: a chat template", (), "; upload a template with the adapter"),
    "documents": Refusal("vLLM: documents for the template", ([],)),
    "suffix": Refusal("text after the output", ("",)),
    "web_search_options": Refusal("OpenAI: a search of the web"),
    "prompt_embeds": Refusal("vLLM: the prompt as embeddings"),
    "input_ids": Refusal("SGLang: the prompt as token ids", (), "; use 'prompt' of /v1/completions"),
    "truncate_prompt_tokens": Refusal("vLLM: cuts the prompt"),
    "truncation_side": Refusal("vLLM: where the prompt is cut"),
    "mm_processor_kwargs": Refusal("vLLM: parameters for images and sound", ({},)),
    "media_io_kwargs": Refusal("vLLM: parameters for images and sound", ({},)),
    "images_config": Refusal("SGLang: parameters for images", ({},)),
    "session_params": Refusal("SGLang: continues an earlier request"),
    "kv_transfer_params": Refusal("vLLM: keys and values of another server"),
    "ec_transfer_params": Refusal("vLLM: encodings of another server"),
    "reasoning": Refusal("SGLang: how much the model reasons", (), "; use 'reasoning_effort'"),
    # What the response has besides text
    "echo": Refusal("vLLM: the chat's last message before the output", (False,)),
    "logprob_token_ids": Refusal("vLLM: tokens whose log-probabilities are returned"),
    "return_hidden_states": Refusal("SGLang: hidden states", (False,)),
    "return_routed_experts": Refusal("SGLang: experts of every token", (False,)),
    "return_prompt_text": Refusal("vLLM: the rendered prompt", (False,), "; /tokenize and /detokenize return it"),
    "return_prompt_token_ids": Refusal("SGLang: the prompt's tokens", (False,), "; use 'return_token_ids'"),
    "return_meta_info": Refusal("SGLang: details of the request", (False,)),
    "return_cached_tokens_details": Refusal("SGLang: where cached tokens were found", (False,)),
}

HARMLESS: dict[str, str] = {
    "store": "OpenAI: whether the response is stored; this server stores none",
    "metadata": "OpenAI: labels of a stored response",
    "service_tier": "OpenAI: price and speed",
    "safety_identifier": "OpenAI: an end user",
    "prompt_cache_key": "OpenAI: a hint for the prefix cache, which needs none here",
    "prompt_cache_retention": "OpenAI: a hint for the prefix cache",
    "prompt_cache_options": "OpenAI: a hint for the prefix cache",
    "prediction": "OpenAI: text that the output may repeat, for speed",
    "api_token": "LoRAX: for fetching an adapter from the hub",
    "length_penalty": "vLLM: applies to beam search",
    "early_stopping": "vLLM: applies to beam search",
    "spaces_between_special_tokens": "vLLM: applies to tokenizers without a Rust backend",
    "guided_decoding_backend": "vLLM: applies to `guided_json` and others",
    "stream_reasoning": "SGLang: applies to reasoning that is split off",
    "request_id": "vLLM: use the header `x-request-id`",
    "rid": "SGLang: use the header `x-request-id`",
    "session_id": "vLLM, SGLang: a name for related requests",
    "stream_interval": "vLLM: tokens per event of a stream",
    "return_mm_kwargs": "vLLM: applies to images and sound",
    "return_token_offsets": "vLLM: applies to routes that render prompts only",
    "routed_experts_prompt_start": "vLLM: applies to experts that are returned",
    "routed_experts_start_len": "SGLang: applies to `return_routed_experts`",
    "extra_key": "SGLang: a label",
    "custom_labels": "SGLang: labels of metrics",
    "ngram_corpus_id": "SGLang: text that the output may repeat, for speed",
    "max_dynamic_patch": "SGLang: applies to images",
    "min_dynamic_patch": "SGLang: applies to images",
    "use_audio_in_video": "SGLang: applies to videos",
    "bootstrap_host": "SGLang: where another of its servers is",
    "bootstrap_port": "SGLang: where another of its servers is",
    "bootstrap_room": "SGLang: where another of its servers is",
    "routed_dp_rank": "SGLang: which of its workers computes",
    "disagg_prefill_dp_rank": "SGLang: which of its workers computes",
    "data_parallel_rank": "SGLang: which of its workers computes",
}

# The same for OpenAI's Responses API, besides those above.
_SEND_ALL = "; this server stores no responses, so send the whole conversation in 'input'"
REFUSED_IN_RESPONSES: dict[str, Refusal] = {
    "previous_response_id": Refusal("an earlier response that is continued", (), _SEND_ALL),
    "conversation": Refusal("a stored conversation", (), _SEND_ALL),
    "prompt": Refusal("a stored prompt", (), "; use 'instructions' and 'input'"),
    "background": Refusal("whether the response is fetched later", (False,)),
    "truncation": Refusal("whether the conversation is cut to the context", ("disabled",)),
    "context_management": Refusal("how the conversation is shortened", ([],)),
    "moderation": Refusal("whether texts are checked"),
}
HARMLESS_IN_RESPONSES: dict[str, str] = {
    "max_tool_calls": "OpenAI: applies to tools that its server runs",
    "stream_options": "OpenAI: padding of events",
}

# The same for embeddings, scores and reranking; fields that are in `APPLIED` as well mean the same.
APPLIED_IN_EMBEDDINGS: dict[str, str] = {
    "input": "A text, token ids, or a list of either",
    "pooling": "`last` (default) takes the hidden state of the last token, `mean` that of all tokens",
    "encoding_format": "`float` (default), or `base64` of float32 numbers",
    "dimensions": "Keeps so many numbers, at length 1 again",
    "text_1": "vLLM: a text, or as many as `text_2` has",
    "text_2": "vLLM: a text or several",
    "query": "The text that documents are compared with",
    "documents": "The texts to order",
    "top_n": "Number of results; `0` (default) returns all",
    "return_documents": "`false` leaves the texts out of the results",
}
REFUSED_IN_EMBEDDINGS: dict[str, Refusal] = {
    **{name: REFUSED[name] for name in ("adapter_source", "lora", "lora_request", "merged_adapters")},
    "messages": Refusal("vLLM: a conversation", (), "; render it with /tokenize and send the token ids"),
    "truncate_prompt_tokens": Refusal("vLLM: cuts the prompt"),
    "truncation_side": Refusal("vLLM: where the prompt is cut"),
    "max_tokens_per_doc": Refusal("Cohere: cuts the documents"),
    "normalize": Refusal("vLLM: embeddings of length 1", (True,)),
    "use_activation": Refusal("vLLM: embeddings of length 1", (True,)),
    "activation": Refusal("vLLM: embeddings of length 1", (True,)),
    "softmax": Refusal("vLLM: a softmax over embeddings", (False,)),
    "embed_dtype": Refusal("vLLM: the number format of base64", ("float32",)),
    "endianness": Refusal("vLLM: the byte order of base64", ("native", "little")),
    "input_type": Refusal("Cohere: what the text is used for"),
    "instruction": Refusal("vLLM: an instruction for the template"),
    "mm_processor_kwargs": REFUSED["mm_processor_kwargs"],
}
HARMLESS_IN_EMBEDDINGS: dict[str, str] = {
    name: HARMLESS[name] for name in ("metadata", "safety_identifier", "api_token", "request_id", "rid")
}

# The same for a message of a chat, for `structured_outputs` and for `stream_options`.
REFUSED_IN_MESSAGES: dict[str, Refusal] = {
    "function_call": Refusal("`tool_calls`, as it was called", (), "; use 'tool_calls'"),
    "tools": Refusal("SGLang: functions that the model may call", ([],)),
    "audio": Refusal("OpenAI: spoken output of an earlier response"),
}
HARMLESS_IN_MESSAGES: dict[str, str] = {
    "refusal": "OpenAI: the model's refusal in an earlier response",
    "annotations": "OpenAI: web addresses in an earlier response",
}
REFUSED_IN_STRUCTURED_OUTPUTS: dict[str, Refusal] = {
    "structural_tag": Refusal("vLLM: structures between tags"),
    "whitespace_pattern": Refusal("vLLM: white space in JSON"),
    "disable_additional_properties": Refusal("vLLM: changes the schema", (False,), "; write it in the schema"),
}
HARMLESS_IN_STRUCTURED_OUTPUTS: dict[str, str] = {
    "disable_any_whitespace": "vLLM: optional white space in JSON, which is never written here",
    "disable_fallback": "vLLM: another implementation, of which there is none here",
}
HARMLESS_IN_STREAM_OPTIONS: dict[str, str] = {
    "include_obfuscation": "OpenAI: padding of events",
}

# Fields that select an adapter by its name: of SGLang, LoRAX, TGI and others.
SELECTORS = ("lora_path", "adapter_id", "adapter_name", "lora_name", "lora_id")
