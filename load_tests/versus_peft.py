"""Tokens per second of 8 streams on 8 adapters: our server beside PEFT's own mixed batch, in the same run.

    python -m load_tests.versus_peft [--streams 8] [--adapters 8] [--rank 16] [--new-tokens 64] [--rounds 3]

Both sides run the same SmolLM2 weights in bf16, the same random adapters (rank 16 on all linears), the same prompts of
about 70 tokens, greedy decoding and exactly as many new tokens; rounds alternate, so that a noisy machine hurts both.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from server.model.default_model import prepare_default_model

PROMPT = (
    "Write a short and friendly letter to a neighbour, number {}, who has moved in next door this week. Mention the "
    "weather, the garden behind the house, the bakery at the corner, the dog that barks in the morning, and invite "
    "everyone of the family to a cup of tea on Sunday afternoon at four."
)


@dataclass(frozen=True)
class Setting:
    streams: int
    adapters: int
    rank: int
    new_tokens: int


def write_adapters(model: Any, folder: Path, setting: Setting) -> list[Path]:
    """Random adapters, written by PEFT itself."""
    folders = []
    for index in range(setting.adapters):
        torch.manual_seed(index)
        config = LoraConfig(
            r=setting.rank, lora_alpha=setting.rank, target_modules="all-linear", init_lora_weights=False
        )
        peft_model = get_peft_model(model, config)
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.005)
        folders.append(folder / f"adapter-{index}")
        peft_model.save_pretrained(folders[-1])
        model = peft_model.unload()
    return folders


class Peft:
    """PEFT's mixed batch: `generate(adapter_names=…)`."""

    name = "PEFT generate(adapter_names)"

    def __init__(self, model: Any, tokenizer: Any, folders: list[Path], setting: Setting):
        self._setting = setting
        self._model = PeftModel.from_pretrained(model, str(folders[0]), adapter_name="adapter-0")
        for folder in folders[1:]:
            self._model.load_adapter(str(folder), adapter_name=folder.name)
        self._model.eval()
        tokenizer.padding_side = "left"
        prompts = [PROMPT.format(i) for i in range(setting.streams)]
        self._inputs = tokenizer(prompts, return_tensors="pt", padding=True)
        self._names = [folders[i % len(folders)].name for i in range(setting.streams)]

    @torch.inference_mode()
    def run(self) -> float:
        started = time.perf_counter()
        out = self._model.generate(
            **self._inputs,
            adapter_names=self._names,
            max_new_tokens=self._setting.new_tokens,
            min_new_tokens=self._setting.new_tokens,
            do_sample=False,
        )
        assert out.shape[1] == self._inputs["input_ids"].shape[1] + self._setting.new_tokens
        return self._setting.streams * self._setting.new_tokens / (time.perf_counter() - started)


class Server:
    """`loraplex serve` in a process of its own, asked over HTTP."""

    def __init__(self, folders: list[Path], setting: Setting, data_dir: Path):
        self.name = "loraplex serve"
        self._setting = setting
        self._models = [folder.name for folder in folders]
        command = [sys.executable, "-m", "server", "serve", "--port", "0", "--data-dir", str(data_dir)]
        for folder in folders:
            command += ["--adapter", f"{folder.name}={folder}"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._url = self._wait_until_ready()

    def _wait_until_ready(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if "ready at" in line:
                return line.split("ready at ")[1].split()[0]
        raise RuntimeError("the server did not start")

    def run(self, models: list[str] | None = None) -> float:
        return asyncio.run(self._run(models or self._models))

    async def _run(self, models: list[str]) -> float:
        setting = self._setting
        async with httpx.AsyncClient(base_url=self._url, timeout=600) as client:
            started = time.perf_counter()
            await asyncio.gather(
                *(
                    _complete(client, models[i % len(models)], PROMPT.format(i), setting.new_tokens)
                    for i in range(setting.streams)
                )
            )
            return setting.streams * setting.new_tokens / (time.perf_counter() - started)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(30)


async def _complete(client: httpx.AsyncClient, model: str, prompt: str, new_tokens: int) -> None:
    body = {"model": model, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
    answer = await client.post("/v1/completions", json=body)
    answer.raise_for_status()
    assert answer.json()["usage"]["completion_tokens"] == new_tokens


def measure(setting: Setting, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(os.cpu_count() or 1)
    base = prepare_default_model()
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token = tokenizer.eos_token
    speeds: dict[str, list[float]] = {"peft": [], "ours": [], "ours_base": []}
    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        folders = write_adapters(model, Path(folder), setting)
        peft = Peft(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), tokenizer, folders, setting)
        server = Server(folders, setting, Path(folder) / "data")
        try:
            for round_ in range(-1, rounds):  # the first one warms up
                measured = {
                    "peft": peft.run(),
                    "ours": server.run(),
                    "ours_base": server.run(["smollm2-135m-instruct"]),
                }
                print(("warm-up" if round_ < 0 else f"round {round_ + 1}"), _line(measured), flush=True)
                for name, speed in measured.items() if round_ >= 0 else ():
                    speeds[name].append(speed)
        finally:
            server.close()
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    return {
        "setting": vars(setting),
        "tokens_per_second": medians,
        "ratio_to_peft": medians["ours"] / medians["peft"],
        "ratio_to_own_base": medians["ours"] / medians["ours_base"],
        "rounds": speeds,
    }


def _line(measured: dict[str, float]) -> str:
    return "  ".join(f"{name} {speed:.1f} tok/s" for name, speed in measured.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    for name, default in (("streams", 8), ("adapters", 8), ("rank", 16), ("new-tokens", 64), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = vars(parser.parse_args())
    rounds = options.pop("rounds")
    result = measure(Setting(**options), rounds)
    print(json.dumps({k: v for k, v in result.items() if k != "rounds"}, indent=2))
    print(
        f"ours / PEFT's mixed batch: {result['ratio_to_peft']:.2f}   ours / own base: {result['ratio_to_own_base']:.2f}"
    )


if __name__ == "__main__":
    main()
