"""Publish a LoRA adapter on a Loraplex server whenever a `transformers` trainer saves it.

    trainer = Trainer(model=peft_model, callbacks=[PublishAdapter("http://127.0.0.1:8000", "my-adapter")], ...)

Running responses finish on the version that they began with, and the next request gets the new one. This file needs
transformers and httpx, which transformers brings along, and nothing of Loraplex: copy it into your project.
"""

import logging
import os
from pathlib import Path
from typing import Any, Literal

import httpx
from transformers import TrainerCallback

log = logging.getLogger(__name__)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)


class PublishAdapter(TrainerCallback):
    """Uploads the adapter of each checkpoint under `name`; `versions` are those that the server has published.

    `in_flight` decides what becomes of running responses of the version before: `finish` on it, `switch` to the new one
    or `abort`. The tokenizer's files are sent `with_tokenizer` only: those of the base model are not needed. A failure
    is logged and does not end the training.
    """

    def __init__(
        self,
        url: str,
        name: str,
        *,
        api_key: str | None = None,
        in_flight: Literal["finish", "switch", "abort"] = "finish",
        with_tokenizer: bool = False,
    ):
        key = api_key or os.environ.get("LORAPLEX_API_KEY")
        self._url = f"{url.rstrip('/')}/v1/adapters"
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._form = {"name": name, "replace": "true", "in_flight": in_flight}
        self._wanted = (CONFIG, WEIGHTS, *(TOKENIZER if with_tokenizer else ()))
        self.versions: list[str] = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        try:
            self.publish(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        except (httpx.HTTPError, OSError) as error:
            log.error("step %d was not published: %s", state.global_step, error)

    def publish(self, folder: Path | str) -> str:
        """Publish a folder that PEFT's `save_pretrained` wrote; returns the version. Raises `httpx.HTTPError` with the
        server's reason if it refuses the adapter."""
        paths = [Path(folder) / name for name in self._wanted]
        files = {path.name: (path.name, path.read_bytes()) for path in paths if path.exists()}
        response = httpx.post(self._url, headers=self._headers, data=self._form, files=files, timeout=120)
        if response.is_error:
            reason = f"{response.status_code} {response.text}"
            raise httpx.HTTPStatusError(reason, request=response.request, response=response)
        version: str = response.json()["version"]
        self.versions.append(version)
        return version
