"""Measure the time to first token of a cartridge, and of the prompt that it replaces.

    python -m load_tests.cartridge [--tokens 1000] [--question 20] [--rounds 9] [--threads 0]
        [--dtype float32]

One engine over SmolLM2 in this process. A cartridge has the keys and values that the base computes from a text of
`--tokens` tokens, written by PEFT, so that both must give the same first token. Each round has a new text and asks in
turn: with the text in the prompt; with its cartridge on disk; with it on the device, where its blocks are not; and with
its blocks in the cache.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import CartridgeConfig, get_peft_model
from peft.tuners.cartridge.utils import initialize_kv_prefix_from_past_key_values
from transformers import AutoModelForCausalLM

from adapters.peft.files import CONFIG_FILE, WEIGHTS_FILE
from adapters.registry.store import AdapterStore
from adapters.validation.inspect import inspect
from load_tests.peers.setting import commit, machine
from server.config import ServeConfig
from server.engine.build import build_engine
from server.ipc.messages import MoveAdapter, Reply, StepOutputs, Submit
from server.model.loading.default_model import prepare_default_model
from server.request import SamplingParams, ScaledAdapter

PROMPT, DISK, DEVICE, BLOCKS = "text in the prompt", "cartridge on disk", "on the device", "in the KV cache"


@dataclass
class Found:
    """Seconds to the first token by way, and the tokens."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {way: [] for way in (PROMPT, DISK, DEVICE, BLOCKS)})
    tokens: dict[str, list[int]] = field(default_factory=lambda: {way: [] for way in (PROMPT, DISK, DEVICE, BLOCKS)})

    def table(self) -> str:
        head = "| | first token, ms | times below the prompt's | same token |\n| --- | --- | --- | --- |"
        pairs = {
            way: [p / s for p, s in zip(self.seconds[PROMPT], own, strict=True)] for way, own in self.seconds.items()
        }
        same = {way: sum(map(int.__eq__, own, self.tokens[PROMPT])) for way, own in self.tokens.items()}
        return "\n".join(
            [head]
            + [
                f"| {way} | {median(own) * 1e3:.1f} | {median(pairs[way]):.1f} | {same[way]} of {len(own)} |"
                for way, own in self.seconds.items()
            ]
        )


class Cartridges:
    """Writes cartridges of texts with PEFT."""

    def __init__(self, model: Path, dtype: str, folder: Path):
        base = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        self._base, self._folder = base, folder
        self._peft: Any = None

    def write(self, text: list[int]) -> Path:
        """Return the folder of a cartridge with the keys and values of `text`."""
        if self._peft is None:
            config = CartridgeConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(text))
            self._peft = get_peft_model(self._base, config)
        with torch.inference_mode(), self._peft.disable_adapter():
            cache = self._peft(input_ids=torch.tensor([text]), use_cache=True).past_key_values
        initialize_kv_prefix_from_past_key_values(self._peft, past_key_values=cache, num_virtual_tokens=len(text))
        self._peft.save_pretrained(self._folder)
        return self._folder


class Bench:
    """An engine that is asked for one token at a time."""

    def __init__(self, model: Path, data_dir: Path, dtype: str, tokens: int, threads: int):
        settings: dict[str, Any] = {"dtype": dtype, "threads": threads, "adapter_override_bytes": 1 << 30}
        self.engine, self.info = build_engine(ServeConfig(model=str(model), data_dir=data_dir, **settings))
        self._store = AdapterStore(data_dir / "store")
        self._tokens = tokens
        self._number = 0

    def add(self, folder: Path, note: str) -> str:
        """Put a cartridge into the store, under a digest of its own for each `note`. Returns the digest."""
        with self._store.stage() as staged:
            (staged / WEIGHTS_FILE).write_bytes((folder / WEIGHTS_FILE).read_bytes())
            config = json.loads((folder / CONFIG_FILE).read_text())
            (staged / CONFIG_FILE).write_text(json.dumps({**config, "revision": note}))
            digest = inspect(staged, self.info.spec).digest
            self._store.commit(staged, digest)
        return digest

    def bring(self, digest: str) -> None:
        self.engine.handle(MoveAdapter(1, digest, "device"))
        while not any(isinstance(said, Reply) for said in self.engine.step()):
            time.sleep(1e-3)  # the thread that reads has a low priority

    def first_token(self, prompt: list[int], digest: str | None = None) -> tuple[float, int]:
        """Return the seconds to the first token, and the token."""
        self._number += 1
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        adapters = () if digest is None else (ScaledAdapter(digest),)
        virtual = 0 if digest is None else self._tokens
        started = time.perf_counter()
        submit = Submit(str(self._number), prompt, params, adapters, virtual_tokens=virtual, has_prefix=bool(digest))
        self.engine.handle(submit)
        while True:
            said = self.engine.step()[0]
            assert isinstance(said, StepOutputs)
            for output in said.outputs:
                assert output.error is None, output.error
                return time.perf_counter() - started, output.token_ids[0]
            if not said.stats.batch_tokens:
                time.sleep(1e-3)  # the adapter is being read


def measure(
    model: Path, folder: Path, *, tokens: int, question: int, rounds: int, dtype: str, threads: int = 0
) -> Found:
    """Ask in every way, `rounds` times after one that does not count."""
    cartridges = Cartridges(model, dtype, folder / "cartridge")
    bench, found = Bench(model, folder / "data", dtype, tokens, threads), Found()
    generator = torch.Generator().manual_seed(0)
    for number in range(rounds + 1):
        ids = torch.randint(3, bench.info.vocab_size, (tokens + question,), generator=generator).tolist()
        text, asked = ids[:tokens], ids[tokens:]
        written = cartridges.write(text)
        on_disk, on_device = bench.add(written, f"{number} disk"), bench.add(written, f"{number} device")
        bench.bring(on_device)
        ways: list[tuple[str, list[int], str | None]] = [(PROMPT, ids, None), (DISK, asked, on_disk)]
        ways += [(DEVICE, asked, on_device), (BLOCKS, asked, on_device)]
        for way, prompt, digest in ways:
            seconds, token = bench.first_token(prompt, digest)
            print(f"{way}: {seconds:.3f} s", file=sys.stderr, flush=True)
            if number:
                found.seconds[way].append(seconds)
                found.tokens[way].append(token)
    bench.engine.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    for name, default in (("tokens", 1000), ("question", 20), ("rounds", 9), ("threads", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    options = vars(parser.parse_args())
    with tempfile.TemporaryDirectory() as folder:
        found = measure(prepare_default_model(), Path(folder), **options)
    print(f"{machine()}, {commit()}, {options}\n{found.table()}")


if __name__ == "__main__":
    main()
