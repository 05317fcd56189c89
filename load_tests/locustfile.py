"""Traffic for people who use Locust: streaming chats with the server's adapters and its base, chosen by Zipf's law.

    locust -f load_tests/locustfile.py --host http://127.0.0.1:8000 --users 4 --spawn-rate 2 --run-time 1m --headless

The key comes from LORAPLEX_API_KEY. Locust's users are a closed loop: one that waits sends nothing, so a slow server
gets less traffic. `python -m load_tests` does not have that blind spot.
"""

import json
import os
import random
import time
from typing import Any

from locust import HttpUser, between, task

QUESTIONS = ("How do I boil an egg?", "Where does the rain come from?", "What is a good name for a ship?")
MAX_TOKENS = 32


class ChatUser(HttpUser):  # type: ignore[misc]  # Locust is no dependency, so its types are unknown here
    wait_time = between(0.5, 2.0)

    def on_start(self) -> None:
        key = os.environ.get("LORAPLEX_API_KEY")
        if key:
            self.client.headers["Authorization"] = f"Bearer {key}"
        self.models = [model["id"] for model in self.client.get("/v1/models").json()["data"]]

    @task  # type: ignore[untyped-decorator]
    def chat(self) -> None:
        """A chat's own entry is its time to the end of the stream; "first token" is one of its own."""
        model = random.choices(self.models, [1 / rank for rank in range(1, len(self.models) + 1)])[0]
        body = {
            "model": model,
            "messages": [{"role": "user", "content": random.choice(QUESTIONS)}],
            "max_tokens": MAX_TOKENS,
            "stream": True,
        }
        started = time.perf_counter()
        with self.client.post(
            "/v1/chat/completions", json=body, stream=True, name=f"chat {model}", catch_response=True
        ) as answer:
            failure = self._read(answer, model, started) if answer.ok else f"status {answer.status_code}"
            answer.request_meta["response_time"] = 1000 * (time.perf_counter() - started)
            if failure:
                answer.failure(failure)

    def _read(self, answer: Any, model: str, started: float) -> str | None:
        """Read the stream to its end; what was wrong with it."""
        first = True
        for line in answer.iter_lines():
            if line == b"data: [DONE]":
                return None
            event = json.loads(line[6:]) if line.startswith(b"data: ") else {}
            if "error" in event:
                return str(event["error"]["message"])
            if first and any(choice["delta"].get("content") for choice in event.get("choices", ())):
                first = False
                self._report_first_token(model, started)
        return "the stream ended without [DONE]"

    def _report_first_token(self, model: str, started: float) -> None:
        self.environment.events.request.fire(
            request_type="SSE",
            name=f"first token {model}",
            response_time=1000 * (time.perf_counter() - started),
            response_length=0,
            exception=None,
            context={},
        )
