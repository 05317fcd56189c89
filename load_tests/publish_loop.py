"""An adapter that a trainer replaces several times a second, beside streams that go on.

    python -m load_tests.publish_loop [--publishes 300] [--per-second 5] [--rounds 3] [--in-flight finish|switch]
                                      [--other FOLDER]

SmolLM2 in bf16 on a server of its own. Eight streams decode: four of the adapter that is replaced, four of two others.
Every version emits one token of its own and nothing else, so each token that arrives tells which version computed it;
it is compared with the label that the server gave it. A publish counts from the first byte of the upload until the
first token of a request for the new version. Rounds with publishes and rounds without alternate; the ratio of their
throughputs is that of each pair. With `--other`, a server of another checkout takes turns with this one's, so that both
meet the same noise. Exit code 1: a token of another version, or a prefix of another adapter recomputed.
"""

import argparse
import asyncio
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import save
from transformers import AutoModelForCausalLM, AutoTokenizer

from load_tests.own_server import serving
from server.model.loading.default_model import prepare_default_model

POLICY = "policy"
OTHERS = ("steady-0", "steady-1")
STREAMS = 8
BLOCK = 16  # tokens of a block of the prefix cache
ROUND_TOKENS = 48  # of a stream's request; the next one follows at once
WORDS = "The lighthouse keeper wrote down the weather of every morning, and what the ships had said about it. "
HEAD = "base_model.model.lm_head"
RANK = 16
STRENGTH = 1e4
FIRST_TOKEN = 1000  # of the vocabulary: those before are special ones and single bytes


class Versions:
    """Files of the versions of one adapter, of about 2 MB. Version k emits the token `token(k)` at every position."""

    def __init__(self, model: Path) -> None:
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self._config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": RANK,
            "lora_alpha": RANK,
            "rank_pattern": {"lm_head": 1},
            "alpha_pattern": {"lm_head": 1},
            "target_modules": ["q_proj", "v_proj", "lm_head"],
        }
        generator = torch.Generator().manual_seed(0)
        self._tensors: dict[str, torch.Tensor] = {}
        for name, module in base.named_modules():
            if name.endswith(("q_proj", "v_proj")):
                a = torch.randn(RANK, module.in_features, generator=generator) / module.in_features**0.5
                b = 0.01 * torch.randn(module.out_features, RANK, generator=generator)
                self._tensors |= {f"base_model.model.{name}.lora_{k}.weight": t for k, t in (("A", a), ("B", b))}
        self._direction = _common_direction(base, model)
        self._vocab = int(base.config.vocab_size)

    def token(self, version: int) -> int:
        return FIRST_TOKEN + version % (self._vocab - FIRST_TOKEN)

    def files(self, version: int) -> dict[str, tuple[str, bytes]]:
        b = torch.zeros(self._vocab, 1)
        b[self.token(version)] = STRENGTH
        head = {f"{HEAD}.lora_A.weight": self._direction[None], f"{HEAD}.lora_B.weight": b}
        weights = save({name: tensor.bfloat16().contiguous() for name, tensor in (self._tensors | head).items()})
        return _form(self._config, weights)

    def other(self, seed: int) -> dict[str, tuple[str, bytes]]:
        """An adapter that is not replaced."""
        tensors = {name: (tensor * (1 + seed / 100)).bfloat16() for name, tensor in self._tensors.items()}
        return _form({**self._config, "target_modules": ["q_proj", "v_proj"]}, save(tensors))


def _form(config: dict[str, Any], weights: bytes) -> dict[str, tuple[str, bytes]]:
    files = {"adapter_config.json": json.dumps(config).encode(), "adapter_model.safetensors": weights}
    return {name: (name, data) for name, data in files.items()}


@torch.inference_mode()
def _common_direction(base: Any, model: Path) -> torch.Tensor:
    """A direction in which the last hidden state of every token is positive: that of their mean."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(WORDS * 3, return_tensors="pt").input_ids
    hidden = base.model(ids).last_hidden_state[0]
    mean: torch.Tensor = hidden.mean(0)
    direction: torch.Tensor = mean / mean.norm()
    assert (hidden @ direction).min() > 1, "the states have no direction in common"
    return direction


@dataclass
class Counts:
    """`wrong` are tokens of another version than their label, `recomputed` prompts of other adapters that were not
    found in the prefix cache."""

    tokens: int = 0
    labelled: int = 0
    wrong: int = 0
    mixed: int = 0  # responses of more than one version
    requests: int = 0
    recomputed: int = 0
    errors: list[str] = field(default_factory=list)


@dataclass
class Publish:
    upload: float
    first_token: float

    @property
    def total(self) -> float:
        return self.upload + self.first_token


class Run:
    def __init__(self, http: httpx.AsyncClient, versions: Versions, in_flight: str) -> None:
        self._http, self._versions, self._in_flight = http, versions, in_flight
        self._numbers = itertools.count()
        self._tokens: dict[str, int] = {}  # by label
        self.counts = Counts()
        self.publishes: list[Publish] = []

    async def prepare(self) -> None:
        for seed, name in enumerate(OTHERS):
            form = {"name": name}
            (await self._http.post("/v1/adapters", data=form, files=self._versions.other(seed))).raise_for_status()
        for _ in range(3):
            await self.publish()
        self.publishes.clear()

    async def publish(self) -> None:
        """Replace the adapter and ask the new version for its first token."""
        number = next(self._numbers)
        files = self._versions.files(number)
        form = {"name": POLICY, "replace": "true"} | (
            {} if self._in_flight == "finish" else {"in_flight": self._in_flight}
        )
        started = time.perf_counter()
        answer = await self._http.post("/v1/adapters", data=form, files=files)
        uploaded = time.perf_counter()
        answer.raise_for_status()
        label = answer.json()["version"].removeprefix("sha256:")[:12]
        self._tokens[label] = self._versions.token(number)
        first: float | None = None
        async for event in self._stream(POLICY, WORDS, 4):
            first = first or time.perf_counter()
            self._check(event)
        assert first is not None
        self.publishes.append(Publish(uploaded - started, first - uploaded))

    async def publish_for(self, count: int, per_second: float) -> None:
        started = time.perf_counter()
        for turn in range(count):
            await asyncio.sleep(max(0.0, started + turn / per_second - time.perf_counter()))
            await self.publish()

    async def stream_until(self, stop: asyncio.Event, number: int) -> None:
        """Send one request after the other; each has a few words of its own behind the shared ones."""
        name = POLICY if number < STREAMS // 2 else OTHERS[number % len(OTHERS)]
        prompt = WORDS * 2 + f"Stream {number}:"
        seen = 0
        while not stop.is_set():
            labels: set[str] = set()
            async for event in self._stream(name, prompt, ROUND_TOKENS):
                if event.get("usage") and name != POLICY:
                    cached = event["usage"]["prompt_tokens_details"]["cached_tokens"]
                    self.counts.recomputed += cached < seen
                    seen = max(seen, cached - cached % BLOCK)  # the rest is copied if another stream has it
                labels |= self._check(event)
            self.counts.mixed += len(labels) > 1
            self.counts.requests += 1

    def _check(self, event: dict[str, Any]) -> set[str]:
        labels: set[str] = set()
        for choice in event["choices"]:
            given = choice.get("token_versions") or [event["system_fingerprint"].split("-")[-1]] * len(
                choice["token_ids"]
            )
            self.counts.tokens += len(choice["token_ids"])
            for token, label in zip(choice["token_ids"], given, strict=True):
                labels.add(label)
                if label in self._tokens:
                    self.counts.labelled += 1
                    self.counts.wrong += token != self._tokens[label]
        return labels

    async def _stream(self, model: str, prompt: str, max_tokens: int) -> AsyncIterator[dict[str, Any]]:
        body = {
            "model": model,
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        self.counts.errors.append(str(event["error"]))
                        return
                    yield event

    async def round(self, seconds: float, publishes: int, per_second: float) -> float:
        """Tokens per second of the streams, beside so many publishes or for so long."""
        stop = asyncio.Event()
        before, started = self.counts.tokens, time.perf_counter()
        streams = [asyncio.create_task(self.stream_until(stop, number)) for number in range(STREAMS)]
        if publishes:
            await self.publish_for(publishes, per_second)
        else:
            await asyncio.sleep(seconds)
        rate = (self.counts.tokens - before) / (time.perf_counter() - started)
        stop.set()
        await asyncio.gather(*streams)
        return rate


def quantile(values: list[float], part: float) -> float:
    return sorted(values)[min(int(part * len(values)), len(values) - 1)]


async def measure(urls: dict[str, str], versions: Versions, options: argparse.Namespace) -> list[Run]:
    """Measure the servers in turn."""
    limits = httpx.Limits(max_connections=None, keepalive_expiry=1)
    async with AsyncExitStack() as stack:
        runs: dict[str, Run] = {}
        for name, url in urls.items():
            http = await stack.enter_async_context(httpx.AsyncClient(base_url=url, timeout=120, limits=limits))
            runs[name] = Run(http, versions, options.in_flight)
            await runs[name].prepare()
            await runs[name].round(2, 0, 0)
        each = -(-options.publishes // options.rounds)
        ratios: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.rounds):
            for name, run in runs.items():
                without = await run.round(each / options.per_second, 0, 0)
                beside = await run.round(0, each, options.per_second)
                ratios[name].append(beside / without)
                print(f"{name}: without publishes {without:6.1f} tokens/s, with {beside:6.1f}", flush=True)
        for name, run in runs.items():
            print(f"--- {name}")
            report(run, ratios[name])
        return list(runs.values())


def report(run: Run, ratios: list[float]) -> None:
    for what in ("total", "upload", "first_token"):
        values = [1000 * getattr(each, what) for each in run.publishes]
        parts = " ".join(f"p{round(100 * q)} {quantile(values, q):.0f} ms" for q in (0.5, 0.9, 0.99))
        print(f"{what:12} {parts} max {max(values):.0f} ms, {len(values)} publishes")
    counts = run.counts
    print(f"throughput kept: median {statistics.median(ratios):.2f} of {len(ratios)} pairs")
    print(f"{counts.tokens} tokens, {counts.labelled} of versions that emit their own token, {counts.wrong} wrong")
    print(f"{counts.requests} requests, {counts.mixed} of several versions, {counts.recomputed} recomputed prefixes of")
    print(f"other adapters, {len(counts.errors)} errors {counts.errors[:1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--publishes", type=int, default=300)
    parser.add_argument("--per-second", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--in-flight", choices=("finish", "switch"), default="finish")
    parser.add_argument("--other", type=Path, help="folder of another checkout, to be compared")
    options = parser.parse_args()
    model = prepare_default_model()
    versions = Versions(model)
    flags = ("--model", str(model), "--dtype", "bfloat16", "--adapter-slots", "8", "--log-format", "text")
    checkouts = {"other": options.other.absolute()} if options.other else {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as servers:
        urls = {
            name: servers.enter_context(serving(Path(folder) / name, *flags, checkout=checkout))
            for name, checkout in {**checkouts, "this": Path()}.items()
        }
        runs = asyncio.run(measure(urls, versions, options))
    if any(run.counts.wrong or run.counts.recomputed or run.counts.errors for run in runs):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
