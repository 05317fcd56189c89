"""Structured output of the embedded model: are all outputs valid, and what does the constraint cost?

    python -m load_tests.structured [--generations 500] [--rounds 5]

Every generation follows one of the schemas of `tests/fixtures/schemas.py`, eight at a time, and is validated.
Then rounds of eight free streams and rounds of eight constrained ones alternate, of the same lengths. Exit code 1: an
output is not valid, or constrained streams are slower than 0.85 of free ones.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import httpx
import jsonschema

from load_tests.own_server import serving
from tests.fixtures.schemas import SCHEMAS, Schema

STREAMS = 8
MAX_TOKENS = 600
ROUND_TOKENS = 64
LEAST_RATIO = 0.85
# JSON that goes on for longer than a round.
LONG: Schema = {"type": "array", "minItems": 99, "items": {"enum": ["red", "green", "blue", 10, 250, None, True]}}


@dataclass
class Outcomes:
    """`wrong` has the outputs that ended by themselves and are not valid."""

    valid: int = 0
    cut: int = 0  # by `max_tokens`
    wrong: list[str] = field(default_factory=list)

    def add(self, name: str, choice: dict[str, Any]) -> None:
        text = choice["message"]["content"]
        if choice["finish_reason"] == "length":
            self.cut += 1
        elif (problem := _problem(SCHEMAS[name], text)) is not None:
            self.wrong.append(f"{name}: {problem}: {text!r}")
        else:
            self.valid += 1


def _problem(schema: Schema, text: str) -> str | None:
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    try:
        jsonschema.Draft202012Validator(schema, format_checker=checker).validate(json.loads(text))
    except (ValueError, jsonschema.ValidationError) as error:
        return str(error).splitlines()[0]
    return None


async def generate(client: httpx.AsyncClient, model: str, generations: int) -> Outcomes:
    outcomes, free = Outcomes(), asyncio.Semaphore(STREAMS)

    async def one(number: int, name: str) -> None:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": f"Invent an example of {name} and write it as JSON."}],
            "temperature": 1.0 if number % 2 else 0.0,
            "seed": number,
            "max_tokens": MAX_TOKENS,
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMAS[name]}},
        }
        async with free:
            answer = await client.post("/v1/chat/completions", json=body)
        answer.raise_for_status()
        outcomes.add(name, answer.json()["choices"][0])

    await asyncio.gather(*(one(number, name) for number, name in enumerate(islice(cycle(SCHEMAS), generations))))
    return outcomes


async def tokens_per_second(client: httpx.AsyncClient, model: str, constraint: dict[str, Any]) -> float:
    async def one(number: int) -> int:
        body = {
            "model": model,
            "prompt": f"A list of {number} colours:",
            "max_tokens": ROUND_TOKENS,
            "ignore_eos": True,
        }
        answer = await client.post("/v1/completions", json={**body, "seed": number, "temperature": 0.8, **constraint})
        answer.raise_for_status()
        return int(answer.json()["usage"]["completion_tokens"])

    started = time.perf_counter()
    tokens = await asyncio.gather(*map(one, range(STREAMS)))
    return sum(tokens) / (time.perf_counter() - started)


async def ratios(client: httpx.AsyncClient, model: str, rounds: int) -> list[float]:
    """Return the throughput of constrained streams as a part of that of the free ones beside them in time."""
    found = []
    for number in range(rounds + 1):
        free = await tokens_per_second(client, model, {})
        constrained = await tokens_per_second(client, model, {"structured_outputs": {"json": LONG}})
        if number:  # the first round reads the tokenizer and compiles the grammar
            found.append(constrained / free)
            print(f"round {number}: free {free:.1f} tokens/s, constrained {constrained:.1f}, ratio {found[-1]:.3f}")
    return found


async def measure(url: str, generations: int, rounds: int) -> bool:
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        outcomes = await generate(client, model, generations)
        print(f"{generations} generations of {min(generations, len(SCHEMAS))} schemas: ", end="")
        print(f"{outcomes.valid} valid, {outcomes.cut} cut by max_tokens, {len(outcomes.wrong)} wrong")
        print(*outcomes.wrong, sep="\n")
        ratio = statistics.median(await ratios(client, model, rounds)) if rounds else 1.0
        print(f"constrained streams have {ratio:.3f} of the throughput of free ones (median of {rounds} rounds)")
        return not outcomes.wrong and ratio >= LEAST_RATIO


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generations", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as url:
        sys.exit(0 if asyncio.run(measure(url, options.generations, options.rounds)) else 1)


if __name__ == "__main__":
    main()
