"""What all peers stand on: the base model, the adapters, and where a peer may keep things."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from load_tests.peers.setting import (
    ADAPTERS,
    NEW_TOKENS,
    RANK,
    Case,
    Measured,
    adapter_name,
    write_adapters,
    write_base,
)


@dataclass(frozen=True)
class Ground:
    base: Path  # folder of safetensors
    adapters: list[Path]
    cache: Path  # what a peer made there is kept for the next time
    work: Path  # what it makes here is not

    def log(self, peer: str) -> Path:
        return self.work / f"{peer}.log"


class Peer(Protocol):
    """One way to serve. Making it starts it, or raises `PeerFailed`; paused, it takes no time from the others."""

    name: ClassVar[str]
    version: str

    def __init__(self, ground: Ground) -> None: ...

    @staticmethod
    def takes(case: Case) -> bool: ...

    def run(self, case: Case, round_: int, new_tokens: int = NEW_TOKENS) -> Measured:
        """All streams at once. Raises `PeerFailed`."""

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def stop(self) -> None: ...


def prepare(cache: Path, work: Path) -> Ground:
    """Write the base and the adapters, where that was not done before."""
    base, adapters = cache / "base", cache / f"adapters-rank-{RANK}"
    for folder, write in ((base, write_base), (adapters, write_adapters)):
        if not folder.exists():
            staging = folder.with_name(f".{folder.name}")
            write(staging)
            staging.rename(folder)
    return Ground(base, [adapters / adapter_name(i) for i in range(ADAPTERS)], cache, work)
