"""Beacon adapters: each always emits its own token, so a row that was computed with anything else shows.

The model's first hidden component is positive at every position (`beacon_model`). A beacon is a LoRA of the head that
reads that component. Its columns form a chain: each writes a decoy token far up that only the next one cancels, so its
token wins only if every column of every page is its own.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from adapters.peft.files import CONFIG_FILE, WEIGHTS_FILE
from tests.fixtures.adapter_factory import tiny_llama
from tests.fixtures.engine_driver import Driver, make_driver

VOCAB_SIZE = 256
HEAD = "base_model.model.lm_head"
STRENGTH = 1e4  # of a beacon's own token, in units where the base's logits are below 100
RANKS = (1, 2, 8, 16, 17, 33, 48)  # one page, several, and pages that are not full
PROMPTS = ([3, 4, 5], [7] * 20, list(range(10, 60)))
SLOTS = 6
CONCURRENT = 12


@dataclass(frozen=True, slots=True)
class Count:
    tokens: int
    wrong: int
    reassignments: int  # of device slots: loads beyond those that filled them first


def beacon_model() -> LlamaForCausalLM:
    """A tiny Llama whose first hidden component is that of the embeddings, a positive constant, at every layer."""
    model = tiny_llama(vocab_size=VOCAB_SIZE)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 2.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0
            layer.mlp.down_proj.weight[0] = 0
    return model


def write_beacon(folder: Path, token: int, rank: int, hidden_size: int = 64) -> Path:
    """A PEFT adapter of that rank for `beacon_model` that always emits `token`."""
    tokens = [other for other in range(VOCAB_SIZE) if other != token]
    decoys = random.Random(token).sample(tokens, rank - 1)
    a = torch.zeros(rank, hidden_size)
    a[:, 0] = 1
    b = torch.zeros(VOCAB_SIZE, rank)
    b[token, 0] = STRENGTH
    for column, decoy in enumerate(decoys):
        b[decoy, column], b[decoy, column + 1] = 2 * STRENGTH, -2 * STRENGTH
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["lm_head"], "bias": "none"}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    save_file({f"{HEAD}.lora_A.weight": a, f"{HEAD}.lora_B.weight": b}, folder / WEIGHTS_FILE)
    return folder


def run(folder: Path, *, beacons: int, tokens: int, seed: int) -> Count:
    """Emit at least `tokens` tokens of that many beacons in random order over `SLOTS` slots."""
    beacon_model().save_pretrained(folder / "model")
    driver = make_driver(folder / "model", folder / "data", adapter_slots=SLOTS, adapter_host_bytes=1 << 20, threads=1)
    try:
        written = [write_beacon(folder / f"beacon-{i}", i, RANKS[i % len(RANKS)]) for i in range(beacons)]
        digests = [driver.add_adapter(beacon) for beacon in written]
        return _emit(driver, digests, tokens, random.Random(seed))
    finally:
        driver.engine.close()


def _emit(driver: Driver, digests: list[str], tokens: int, rng: random.Random) -> Count:
    """Streams of random beacons and lengths, `CONCURRENT` at a time: slots change hands while others are in use."""
    asked = 0
    while asked < tokens or driver.engine.has_work():
        while (
            asked < tokens and len(driver.engine.scheduler.waiting) + len(driver.engine.scheduler.running) < CONCURRENT
        ):
            beacon, length = rng.randrange(len(digests)), rng.randint(4, 32)
            driver.submit(f"{beacon}-{asked}", rng.choice(PROMPTS), digests[beacon], max_tokens=length)
            asked += length
        driver.step()
    return _count(driver)


def _count(driver: Driver) -> Count:
    emitted = [(int(seq_id.split("-")[0]), driver.tokens(seq_id)) for seq_id in driver.outputs]
    moves = [move for step in driver.steps for move in step.moves]
    return Count(
        tokens=sum(len(tokens) for _, tokens in emitted),
        wrong=sum(token != beacon for beacon, tokens in emitted for token in tokens),
        reassignments=sum(move.target == "device" and move.outcome == "ok" for move in moves) - SLOTS,
    )
