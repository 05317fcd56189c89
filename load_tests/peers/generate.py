"""The process in which transformers or PEFT generates: one request a line on standard input, one answer a line back.

python -m load_tests.peers.generate base|mixed|switching BASE ADAPTER ...
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer

from load_tests.peers.setting import Measured


class Request(msgspec.Struct):
    models: list[str]
    prompts: list[str]
    new_tokens: int


class Times(BaseStreamer):  # type: ignore[misc]
    """When the prompt and each token of the batch came by."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.seen.append(time.perf_counter())

    def end(self) -> None:
        pass


class Generator:
    """A batch's rows get their tokens at the same moment, so the batch's times are those of each row."""

    def __init__(self, base: Path, adapters: Sequence[Path]):
        self._tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
        self._tokenizer.pad_token = self._tokenizer.eos_token
        self.model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
        if adapters:
            self.model = PeftModel.from_pretrained(self.model, str(adapters[0]), adapter_name=adapters[0].name)
            for folder in adapters[1:]:
                self.model.load_adapter(str(folder), adapter_name=folder.name)
            self.model.eval()

    @torch.inference_mode()
    def times(self, prompts: list[str], new_tokens: int, **options: Any) -> list[float]:
        """When each token of the batch was there."""
        times = Times()
        inputs = self._tokenizer(prompts, return_tensors="pt", padding=True)
        length = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
        self.model.generate(**inputs, **length, **options, streamer=times)
        assert len(times.seen) == new_tokens + 1
        return times.seen[1:]


def base(generator: Generator, request: Request) -> list[list[float]]:
    times = generator.times(request.prompts, request.new_tokens)
    return [times] * len(request.prompts)


def mixed(generator: Generator, request: Request) -> list[list[float]]:
    times = generator.times(request.prompts, request.new_tokens, adapter_names=request.models)
    return [times] * len(request.prompts)


def switching(generator: Generator, request: Request) -> list[list[float]]:
    found = []
    for name in dict.fromkeys(request.models):
        generator.model.set_adapter(name)
        prompts = [prompt for prompt, model in zip(request.prompts, request.models, strict=True) if model == name]
        found += [generator.times(prompts, request.new_tokens)] * len(prompts)
    return found


WAYS: dict[str, Callable[[Generator, Request], list[list[float]]]] = {
    "base": base,
    "mixed": mixed,
    "switching": switching,
}


def measured(times: list[list[float]], started: float) -> Measured:
    tokens = sum(map(len, times))
    return Measured(
        tokens / (max(row[-1] for row in times) - started),
        [row[0] - started for row in times],
        [(row[-1] - row[0]) / max(len(row) - 1, 1) for row in times],
    )


def main(way: str, base_folder: str, *adapters: str) -> None:
    torch.set_num_threads(os.cpu_count() or 1)
    generator = Generator(Path(base_folder), [] if way == "base" else [Path(folder) for folder in adapters])
    for line in sys.stdin:
        request = msgspec.json.decode(line, type=Request)
        started = time.perf_counter()
        print(msgspec.json.encode(measured(WAYS[way](generator, request), started)).decode(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
