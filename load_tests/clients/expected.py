"""The responses to the task's requests, sent as plain HTTP: what clients have to return."""

from typing import Any

import httpx

from load_tests.clients.checks import Expected
from load_tests.clients.task import TASK


def expected_of(url: str, model: str) -> Expected:
    with httpx.Client(base_url=f"{url}/v1", timeout=None) as http:
        message = {"role": "user", "content": TASK["question"]}
        options = {"temperature": 0, "max_tokens": TASK["max_tokens"], "logprobs": True}
        choice = _post(http, "/chat/completions", model=model, messages=[message], **options)["choices"][0]
        items = _post(http, "/embeddings", model=model, input=TASK["texts"])["data"]
    logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
    return Expected(choice["message"]["content"], logprobs, [item["embedding"] for item in items])


def _post(http: httpx.Client, path: str, **body: Any) -> Any:
    response = http.post(path, json=body)
    response.raise_for_status()
    return response.json()
