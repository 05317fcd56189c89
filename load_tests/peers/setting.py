"""What every peer is asked: prompts, adapters, and how many streams on how many adapters."""

import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from load_tests.engine_bench import write_adapter
from server.model.loading.default_model import prepare_default_model

ADAPTERS = 8
RANK = 16
NEW_TOKENS = 64
BASE = "base"

# About 70 tokens. The numbers come early, so that no two prompts share a block that a prefix cache could keep.
PROMPT = (
    "Letter {}: write a short and friendly letter to a neighbour who has moved in next door this week. Mention the "
    "weather, the garden behind the house, the bakery at the corner, the dog that barks in the morning, and invite "
    "everyone of the family to a cup of tea on Sunday afternoon at four."
)


@dataclass(frozen=True)
class Case:
    streams: int
    adapters: int  # 0: all streams ask the base

    @property
    def name(self) -> str:
        return f"{self.streams} on {self.adapters}" if self.adapters else f"{self.streams}, base"

    def models(self) -> list[str]:
        """Whom each stream asks."""
        return [adapter_name(i % self.adapters) if self.adapters else BASE for i in range(self.streams)]

    def prompts(self, round_: int) -> list[str]:
        """One for each stream, other ones in every round and case."""
        return [PROMPT.format(f"{round_}/{self.streams}/{self.adapters}/{i}") for i in range(self.streams)]


CASES = (Case(1, 0), Case(1, 1), Case(8, 0), Case(8, 8), Case(32, 0), Case(32, 8))


class Measured(msgspec.Struct):
    """One peer's run of one case. Times are seconds, one for each stream."""

    tokens_per_second: float
    ttft_s: list[float]
    inter_token_s: list[float]  # mean over the stream's tokens after the first


def adapter_name(index: int) -> str:
    return f"adapter-{index}"


def write_base(folder: Path) -> None:
    """The embedded model, with the name of its class, by which other projects find theirs."""
    base = prepare_default_model()
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


def write_adapters(folder: Path) -> None:
    """Random adapters on all linears, as PEFT saves them."""
    model = AutoModelForCausalLM.from_pretrained(prepare_default_model(), dtype=torch.bfloat16)
    for index in range(ADAPTERS):
        write_adapter(model, folder / adapter_name(index), RANK, seed=index)


def machine() -> str:
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    model = cpu.partition(":")[2].strip() or platform.processor()
    return f"{os.cpu_count()} cores, {model}, torch sees {torch.backends.cpu.get_cpu_capability()}"


def commit() -> str:
    """Of the code that is measured; empty where there is no git to say it."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
