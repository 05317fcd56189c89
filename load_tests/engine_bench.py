"""An engine over SmolLM2 in this process, for benchmarks of what happens inside a step."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from adapters.peft.files import CONFIG_FILE, WEIGHTS_FILE
from adapters.registry.store import AdapterStore
from adapters.traits import Traits
from adapters.validation.inspect import inspect
from server.config import ServeConfig
from server.engine.build import build_engine
from server.ipc.messages import MoveAdapter, Reply, Submit, ToEngine
from server.model.loading.default_model import prepare_default_model
from server.request import SamplingParams, ScaledAdapter

PROMPT_TOKENS = 70


def write_adapter(base: nn.Module, folder: Path, rank: int, seed: int) -> Path:
    """A random adapter on all linears, written by PEFT; `base` is left as it was. Returns `folder`."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", init_lora_weights=False)
    tuned = get_peft_model(base, config)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.005)
    tuned.save_pretrained(folder)
    tuned.unload()
    return folder


class EngineBench:
    """Streams of `new_tokens` greedy tokens over random prompts, new ones every time."""

    after_step: Callable[[float], None] = staticmethod(lambda _: None)  # called with the seconds that a step took

    def __init__(self, data_dir: Path, new_tokens: int, **settings: object):
        settings = {"model": str(prepare_default_model()), **settings}
        config = ServeConfig(data_dir=data_dir, **settings)  # type: ignore[arg-type]
        self.engine, self.info = build_engine(config)
        self._new_tokens = new_tokens
        self._store = AdapterStore(data_dir / "store")
        self._runs = 0
        self._traits: dict[str | None, Traits] = {None: Traits()}

    def add(self, folder: Path) -> str:
        """Put a PEFT folder into the engine's store; returns its digest."""
        with self._store.stage() as staged:
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                (staged / name).write_bytes((folder / name).read_bytes())
            inspected = inspect(staged, self.info.spec)
            self._store.commit(staged, inspected.digest)
        self._traits[inspected.digest] = Traits.of(inspected.report)
        return inspected.digest

    def bring(self, folder: Path) -> str:
        """The same, and load it to the device."""
        digest = self.add(folder)
        self.switch(MoveAdapter(0, digest, "device"))
        return digest

    def run(self, adapters: Sequence[str | None], prompts: Sequence[list[int]] | None = None) -> float:
        """Tokens per second of one stream for each of `adapters` (None: the base), all at once."""
        self._runs += 1
        prompts = prompts or self._new_prompts(len(adapters))
        params = SamplingParams(max_tokens=self._new_tokens, temperature=0.0, ignore_eos=True)
        started = time.perf_counter()
        for i, (prompt, digest) in enumerate(zip(prompts, adapters, strict=True)):
            self._submit(i, prompt, params, digest)
        self.settle()
        return len(adapters) * self._new_tokens / (time.perf_counter() - started)

    def _submit(self, number: int, prompt: list[int], params: SamplingParams, digest: str | None) -> None:
        uses, traits = () if digest is None else (ScaledAdapter(digest),), self._traits[digest]
        self.engine.handle(
            Submit(
                f"{self._runs}-{number}",
                prompt,
                params,
                uses,
                virtual_tokens=traits.virtual_tokens,
                has_prefix=traits.has_prefix,
            )
        )

    def _new_prompts(self, count: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self._runs)
        return torch.randint(100, 40_000, (count, PROMPT_TOKENS), generator=generator).tolist()

    def decode_steps(self, prompts: Sequence[list[int]], adapters: Sequence[str | None], steps: int) -> list[float]:
        """Seconds of each of the `steps` or more steps in which one token of every stream is computed."""
        self._runs += 1
        params = SamplingParams(max_tokens=steps + 1, temperature=0.0, ignore_eos=True)
        for i, (prompt, digest) in enumerate(zip(prompts, adapters, strict=True)):
            self._submit(i, prompt, params, digest)
        seconds = []
        while self.engine.has_work():
            stats = self.engine.step()[0].stats  # type: ignore[union-attr]
            if stats.batch_tokens == len(prompts):
                seconds.append(stats.step_seconds)
            elif not stats.batch_tokens:
                time.sleep(0.002)
        return seconds

    def switch(self, request: ToEngine) -> float:
        """Seconds until the engine says that it is done."""
        started = time.perf_counter()
        self.engine.handle(request)
        assert [reply.error for reply in self.settle()] == [None]
        return time.perf_counter() - started

    def settle(self) -> list[Reply]:
        """Step until nothing is left to do."""
        replies = []
        while self.engine.has_work():
            said = self.engine.step()
            replies += [message for message in said if isinstance(message, Reply)]
            self.after_step(said[0].stats.step_seconds)  # type: ignore[union-attr]
            if not said[0].stats.batch_tokens:  # type: ignore[union-attr]
                time.sleep(0.002)  # what it waits for happens in threads, which need the interpreter
        return replies
