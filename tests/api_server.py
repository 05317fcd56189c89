"""The whole API over a fake engine: in the test's own event loop, or behind a real port."""

import asyncio
import functools
import json
import math
import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adapters.registry.registry import AdapterRegistry
from server.api.app import create_app
from server.api.context import AppContext
from server.api.middleware.auth import KeyRing
from server.api.text.tokenizer import Tokenizer
from server.config import ServeConfig
from server.ipc.client import EngineClient
from server.ipc.messages import EngineInfo, Submit
from server.metrics import Metrics
from tests.adapter_factory import spec_of, tiny_llama, write_adapter
from tests.fake_engine import FakeTransport
from tests.timing import wait_for

BASE = "tiny-base"
MAX_MODEL_LEN = 256
EOS = "<|end|>"
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def byte_tokenizer(template: str | None = TEMPLATE) -> Tokenizer:
    return Tokenizer.of(fast_byte_tokenizer(template))


def fast_byte_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """One token per byte, so that tests can say what every token is."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, additional_special_tokens=["<|start|>"])
    fast.chat_template = template
    return fast


def tokenizer_files(*added: str, template: str | None = TEMPLATE, **special: str) -> dict[str, bytes]:
    """Save the byte tokenizer with more tokens, as transformers does; `special` has names such as `eos_token`."""
    fast = fast_byte_tokenizer(template)
    fast.add_tokens([*added])
    fast.add_special_tokens(special)
    with tempfile.TemporaryDirectory() as folder:
        fast.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    found: list[int] = tokenizer.backend.encode(text, add_special_tokens=False).ids
    return found


@functools.cache
def adapter_files(seed: int = 0) -> dict[str, bytes]:
    """The two files of a valid adapter for the tiny model; another seed is another version."""
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(_tiny_model(), Path(folder), seed=seed)
        names = ("adapter_config.json", "adapter_model.safetensors")
        return {name: (Path(folder) / name).read_bytes() for name in names}


@functools.cache
def _tiny_model() -> Any:
    return tiny_llama(vocab_size=300)  # more than the tokenizer's


def form(seed: int = 0) -> dict[str, tuple[str, bytes]]:
    return {name: (name, data) for name, data in adapter_files(seed).items()}


def engine_info(tokenizer: Tokenizer) -> EngineInfo:
    return EngineInfo(
        base_fingerprint="0123456789ab",
        vocab_size=tokenizer.backend.get_vocab_size(),
        max_model_len=MAX_MODEL_LEN,
        spec=spec_of(_tiny_model(), max_rank=16),
        adapter_slots=4,
        adapter_pages=4,
        num_blocks=100,
        block_size=16,
        eos_token_ids=ids(tokenizer, EOS),
        description={"device": "none"},
    )


@dataclass
class Api:
    app: FastAPI
    context: AppContext
    engine: FakeTransport
    http: httpx.AsyncClient

    def says(self, text: str, *, end: bool = True) -> None:
        """Set the output of the fake model from now on; without `end` it never stops."""
        tokens = ids(self.context.tokenizer, text)
        self.engine.script = lambda _: tokens + self.engine.info.eos_token_ids if end else tokens * 1000

    def waits_after(self, tokens: float) -> None:
        """Have every sequence stop after so many tokens, until it is told otherwise."""
        self.engine.waits_after = lambda _: tokens

    def goes_on(self) -> None:
        self.waits_after(math.inf)

    @property
    def generated(self) -> int:
        """Tokens that the API has taken in, of all requests so far."""
        return sum(use.generated_tokens for use in self.context.in_flight.uses.values())

    async def chat(self, content: str = "hi", **fields: Any) -> httpx.Response:
        body = {"model": BASE, "messages": [{"role": "user", "content": content}], **fields}
        return await self.http.post("/v1/chat/completions", json=body)

    async def complete(self, prompt: Any = "hi", **fields: Any) -> httpx.Response:
        return await self.http.post("/v1/completions", json={"model": BASE, "prompt": prompt, **fields})

    async def upload(
        self, name: str, seed: int = 0, beside: Mapping[str, bytes] | None = None, **fields: Any
    ) -> httpx.Response:
        """`beside` are files of its tokenizer."""
        files = form(seed) | {name: (name, data) for name, data in (beside or {}).items()}
        return await self.http.post("/v1/adapters", data={"name": name, **fields}, files=files)


def make_app(
    folder: Path, *, keys: KeyRing | None = None, tokenizer: Tokenizer | None = None, **settings: Any
) -> tuple[FastAPI, AppContext, FakeTransport]:
    tokenizer = tokenizer or byte_tokenizer()
    info = engine_info(tokenizer)
    answer = ids(tokenizer, "Hello world") + info.eos_token_ids
    transport = FakeTransport(info, lambda _: answer)
    context = AppContext(
        config=ServeConfig(data_dir=folder, **settings),
        engine=EngineClient(transport),
        registry=AdapterRegistry(folder / "data", reserved=(BASE,)),
        tokenizer=tokenizer,
        keys=keys or KeyRing(),
        metrics=Metrics(),
        base_model=BASE,
    )
    return create_app(context), context, transport


@asynccontextmanager
async def serving(folder: Path, **settings: Any) -> AsyncIterator[Api]:
    """The API in this event loop. Answers are whole when they come: no use for streams that a client leaves."""
    app, context, transport = make_app(folder, **settings)
    await context.engine.start()
    wire = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=wire, base_url="http://test") as http:
        yield Api(app, context, transport, http)
    await context.sandbox.close()
    await context.engine.stop()
    context.registry.close()


@dataclass
class LiveServer:
    url: str
    context: AppContext
    engine: FakeTransport

    def wait_idle(self) -> None:
        """Wait until nothing is in flight, in the API as in the engine."""
        wait_for(lambda: not len(self.context.in_flight) and not self.engine._running, "the end of all sequences")


@contextmanager
def listening(folder: Path, **settings: Any) -> Iterator[LiveServer]:
    """The API on a free loopback port, in a thread of its own."""
    app, context, transport = make_app(folder, **settings)
    server = uvicorn.Server(uvicorn.Config(app, http="h11", log_config=None, lifespan="off"))
    with socket.create_server(("127.0.0.1", 0)) as listener:

        async def run() -> None:
            await context.engine.start()
            await server.serve([listener])
            await context.sandbox.close()
            await context.engine.stop()

        thread = threading.Thread(target=asyncio.run, args=(run(),))
        thread.start()
        try:
            yield LiveServer(f"http://127.0.0.1:{listener.getsockname()[1]}", context, transport)
        finally:
            server.should_exit = True
            thread.join()
            context.registry.close()


def events(answer: httpx.Response) -> list[dict[str, Any]]:
    """The frames of a stream, which has to end in [DONE]."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    frames = answer.text.split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-2]]


def assert_error(answer: httpx.Response, status: int, code: str | None = None, *, sent: str = "") -> dict[str, Any]:
    """The one shape of every error; returns it. `sent` may be echoed, nothing else may look like a secret."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert {"message", "type", "param", "code"} <= error.keys() <= {"message", "type", "param", "code", "problems"}
    assert isinstance(error["message"], str) and error["message"]
    assert isinstance(error["type"], str)
    for optional in ("param", "code"):
        assert error[optional] is None or isinstance(error[optional], str)
    assert answer.headers["x-request-id"]
    for secret in ("Traceback", "/home", "/usr", "/tmp", "0x", "/work"):
        assert secret not in (answer.text.replace(sent, "") if sent else answer.text)
    if code is not None:
        assert error["code"] == code, error
    if status == 503:
        assert int(answer.headers["retry-after"]) >= 1
    return error  # type: ignore[no-any-return]


def scripted(tokenizer: Tokenizer, texts: Sequence[str], eos: list[int]) -> Any:
    """A script that answers the i-th choice of a request with `texts[i]`."""

    def script(submit: Submit) -> list[int]:
        return ids(tokenizer, texts[int(submit.seq_id.rpartition("-")[2])]) + eos

    return script
