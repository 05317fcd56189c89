"""Drives an engine synchronously: what most engine tests need."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.registry.store import AdapterStore
from adapters.validation.inspect import inspect
from server.config import ServeConfig
from server.engine.build import build_engine
from server.engine.engine import Engine
from server.ipc.messages import EngineInfo, Reply, SequenceOutput, StepOutputs, Submit
from server.sequence import SamplingParams, ScaledAdapter

MIB = 1 << 20


def plain(digest: str | None) -> tuple[ScaledAdapter, ...]:
    """One adapter as it is, or the base model."""
    return () if digest is None else (ScaledAdapter(digest),)


@dataclass
class Driver:
    engine: Engine
    info: EngineInfo
    store: AdapterStore
    outputs: dict[str, list[SequenceOutput]] = field(default_factory=dict)
    replies: dict[int, Reply] = field(default_factory=dict)
    steps: list[StepOutputs] = field(default_factory=list)
    check: bool = True  # the books after every step

    def add_adapter(self, folder: Path) -> str:
        """Put a PEFT folder into the engine's store; returns its version digest."""
        with self.store.stage() as staged:
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                (staged / name).write_bytes((folder / name).read_bytes())
            digest = inspect(staged, self.info.spec).digest
            self.store.commit(staged, digest)
        return digest

    def submit(
        self,
        seq_id: str,
        prompt: list[int],
        adapter: str | tuple[ScaledAdapter, ...] | None = None,
        active_from: int = 0,
        **sampling: Any,
    ) -> None:
        params = SamplingParams(**{"max_tokens": 8, "temperature": 0.0, "ignore_eos": True, **sampling})
        adapters = adapter if isinstance(adapter, tuple) else plain(adapter)
        self.engine.handle(Submit(seq_id, list(prompt), params, adapters, active_from=active_from))

    def step(self) -> StepOutputs:
        said = self.engine.step()
        for message in said:
            if isinstance(message, Reply):
                self.replies[message.request_id] = message
            elif isinstance(message, StepOutputs):
                self.steps.append(message)
                for output in message.outputs:
                    self.outputs.setdefault(output.seq_id, []).append(output)
        if self.check:
            self.engine.check_integrity()
        step = said[0]
        assert isinstance(step, StepOutputs)
        if not step.stats.batch_tokens:
            time.sleep(0.001)  # everything waits for adapters: let the reader threads have the interpreter
        return step

    def run(self, max_steps: int = 100_000) -> None:
        """Step until nothing is left to do."""
        for _ in range(max_steps):
            if not self.engine.has_work():
                return
            self.step()
        raise AssertionError("the engine does not come to an end")

    def tokens(self, seq_id: str) -> list[int]:
        return [token for output in self.outputs[seq_id] for token in output.token_ids]

    def finish_reason(self, seq_id: str) -> str | None:
        return self.outputs[seq_id][-1].finish_reason


def make_driver(model: Path, data_dir: Path, **settings: Any) -> Driver:
    """An engine over the model in a folder, fp32 and small unless told otherwise."""
    defaults = {"dtype": "float32", "device": "cpu", "kv_cache_bytes": 8 * MIB, "adapter_slots": 4}
    config = ServeConfig(model=str(model), data_dir=data_dir, **{**defaults, **settings})
    engine, info = build_engine(config)
    return Driver(engine, info, AdapterStore(data_dir / "store"))
