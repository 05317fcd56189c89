"""OpenAI's Python client, Chat Completions and embeddings. LiteLLM's proxy is asked by the same functions."""

from typing import Any

from driver import (
    JSON_TOKENS,
    KEY,
    MAX_TOKENS,
    MODEL,
    NAMED,
    PERSON_QUESTION,
    QUESTION,
    TEXTS,
    TOOL,
    URL,
    WEATHER,
    WEATHER_QUESTION,
    Person,
    call,
    report,
)
from openai import OpenAI


class Features:
    def __init__(self, base_url: str, model: str, key: str):
        self._client = OpenAI(base_url=base_url, api_key=key, max_retries=0)
        self._chat = self._client.chat.completions
        self._common: dict[str, Any] = {"model": model, "temperature": 0}

    def chat(self) -> Any:
        response = self._chat.create(messages=QUESTION, max_completion_tokens=MAX_TOKENS, **self._common)
        return response.choices[0].message.content

    def stream(self) -> Any:
        options = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = self._chat.create(messages=QUESTION, max_completion_tokens=MAX_TOKENS, **options, **self._common)
        return {"deltas": [choice.delta.content or "" for chunk in chunks for choice in chunk.choices]}

    def tools(self) -> Any:
        options = {"tools": [TOOL], "tool_choice": NAMED, "max_completion_tokens": JSON_TOKENS, **self._common}
        message = self._chat.create(messages=WEATHER_QUESTION, **options).choices[0].message
        with self._chat.stream(messages=WEATHER_QUESTION, **options) as stream:
            streamed = stream.get_final_completion().choices[0].message
        return {
            "calls": _calls(message),
            "streamed": _calls(streamed),
            "answer": self._answer(message),
        }

    def _answer(self, message: Any) -> str | None:
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": WEATHER["result"]}
        history = [*WEATHER_QUESTION, message.to_dict(), result]
        options = {"tools": [TOOL], "tool_choice": "none", "max_completion_tokens": MAX_TOKENS, **self._common}
        return self._chat.create(messages=history, **options).choices[0].message.content

    def json_schema(self) -> Any:
        options = {"response_format": Person, "max_completion_tokens": JSON_TOKENS, **self._common}
        return self._chat.parse(messages=PERSON_QUESTION, **options).choices[0].message.parsed.model_dump()

    def embeddings(self) -> Any:
        response = self._client.embeddings.create(model=self._common["model"], input=TEXTS)
        return [item.embedding for item in response.data]

    def logprobs(self) -> Any:
        options = {"logprobs": True, "top_logprobs": 2, "max_completion_tokens": MAX_TOKENS, **self._common}
        choice = self._chat.create(messages=QUESTION, **options).choices[0]
        return [token.logprob for token in choice.logprobs.content]


def _calls(message: Any) -> list[dict[str, Any]]:
    return [call(each.function.name, each.function.arguments) for each in message.tool_calls]


def report_all(base_url: str, model: str, key: str) -> None:
    features = Features(base_url, model, key)
    report(
        chat=features.chat,
        stream=features.stream,
        tools=features.tools,
        json_schema=features.json_schema,
        embeddings=features.embeddings,
        logprobs=features.logprobs,
    )


if __name__ == "__main__":
    report_all(f"{URL}/v1", MODEL, KEY)
