"""How large the benchmark is: at real shapes on a GPU, or tiny on a CPU so that it can be seen to run to its end."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Shape:
    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


H200_COPY = 4.3e12  # bytes read and written per second, before it is measured
LLAMA_8B = Shape("Llama-3.1-8B", 4096, 14336, 32, 32, 8, 128, 128256)
SMOLLM2 = Shape("SmolLM2-135M", 576, 1536, 30, 9, 3, 64, 49152)
TINY = Shape("tiny", 64, 64, 1, 4, 2, 16, 128)


@dataclass(frozen=True)
class Setting:
    smoke: bool
    device: torch.device
    dtype: torch.dtype
    shapes: tuple[Shape, ...]
    rank: int
    rows: tuple[int, ...]  # of decode batches
    adapters: tuple[int, ...]  # distinct ones in a batch; as many as there are rows is measured as well
    context: int
    prefill_tokens: tuple[int, ...]
    nf4_rows: tuple[int, ...]
    streams: int
    new_tokens: int
    repeats: int


def full() -> Setting:
    return Setting(
        smoke=False, device=torch.device("cuda"), dtype=torch.bfloat16, shapes=(LLAMA_8B, SMOLLM2), rank=16,
        rows=(32, 1, 64, 128), adapters=(1, 8, 32, 64), context=1024, prefill_tokens=(512, 2048, 8192),
        nf4_rows=(1, 4, 8, 16, 32, 64), streams=64, new_tokens=64, repeats=30,
    )  # fmt: skip


def smoke() -> Setting:
    return Setting(
        smoke=True, device=torch.device("cpu"), dtype=torch.bfloat16, shapes=(TINY,), rank=16, rows=(1, 2),
        adapters=(1,), context=20, prefill_tokens=(8,), nf4_rows=(2,), streams=2, new_tokens=2, repeats=1,
    )  # fmt: skip


@dataclass
class Report:
    """Rows of results, printed as they come. `left` is the time there is, in seconds."""

    setting: Setting
    deadline: float
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lines: Path | None = None  # where each row goes as well, as a line of JSON, as soon as it is there
    copy_bytes_per_second: float = H200_COPY  # the ceiling that byte floors refer to, once `ceilings` has measured it

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def resume(self) -> None:
        """Take the measured ceiling from the lines of an earlier process."""
        for line in self.lines.read_text().splitlines() if self.lines and self.lines.exists() else ():
            if '"what": "copy"' in line:
                self.copy_bytes_per_second = json.loads(line)["gb_per_s"] * 1e9

    def add(self, section: str, **values: Any) -> None:
        self.rows.append({"section": section, **values})
        if self.lines is not None:
            with self.lines.open("a") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")
        shown = (
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
        )
        print(f"{section:9} " + "  ".join(shown), flush=True)

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(f"note: {text}", flush=True)
