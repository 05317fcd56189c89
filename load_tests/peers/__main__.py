"""Loraplex and its peers, asked the same in interleaved rounds.

    python -m load_tests.peers [--only Loraplex,vLLM] [--streams 1,8,32] [--rounds 3] [--cache DIR] [--out FILE]

The first time sets the peers up in the cache folder, which takes a compiler, some 4 GB and half an hour. A peer that
cannot be set up or fails is left out from there on, with its error. Of all peers only the measured one runs; the others
are stopped by signal. Writes JSON, a plot beside it, and prints a table.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import msgspec

from load_tests.peers.ground import Ground, Peer, prepare
from load_tests.peers.hugging_face import PEFTMixed, PEFTSwitching, TransformersBase
from load_tests.peers.llama_cpp import LlamaCpp
from load_tests.peers.loraplex import Loraplex
from load_tests.peers.process import PeerFailed
from load_tests.peers.report import Report, Run, plot, table
from load_tests.peers.setting import ADAPTERS, CASES, Case, machine
from load_tests.peers.vllm import VLLM, VLLMWithoutLoRA

PEERS: tuple[type[Peer], ...] = (
    Loraplex, VLLM, VLLMWithoutLoRA, PEFTMixed, PEFTSwitching, TransformersBase, LlamaCpp
)  # fmt: skip
CACHE = Path.home() / ".cache" / "loraplex" / "peers"
RESULTS = Path(__file__).parents[1] / "results"
WARM_UP = (Case(8, 0), Case(8, ADAPTERS))
WARM_UP_TOKENS = 4


def start(kind: type[Peer], ground: Ground) -> Peer:
    """Set it up, start it, have it answer with the base and all adapters, and pause it. Raises `PeerFailed`."""
    print(f"{kind.name}: starting", flush=True)
    peer = kind(ground)
    try:
        for case in filter(kind.takes, WARM_UP):
            peer.run(case, -1, WARM_UP_TOKENS)
    except BaseException:
        peer.stop()
        raise
    peer.pause()
    return peer


def started(kinds: Sequence[type[Peer]], ground: Ground, report: Report, stack: ExitStack) -> list[Peer]:
    """Those that work, until `stack` ends them; the others' errors are in the report."""
    peers = []
    for kind in kinds:
        try:
            peers.append(start(kind, ground))
        except PeerFailed as failed:
            report.failed[kind.name] = str(failed)
            print(f"{kind.name}: left out: {failed}", flush=True)
        else:
            stack.callback(peers[-1].stop)
            report.versions[kind.name] = peers[-1].version
    return peers


def measure(peers: Sequence[Peer], cases: Sequence[Case], rounds: int, report: Report) -> Iterator[Run]:
    """One run after the other. A peer that fails is measured no more."""
    for round_ in range(rounds):
        for case in cases:
            for peer in peers:
                if not peer.takes(case) or peer.name in report.failed:
                    continue
                peer.resume()
                try:
                    report.runs.append(Run(peer.name, case.name, round_, peer.run(case, round_)))
                    yield report.runs[-1]
                except PeerFailed as failed:
                    report.failed[peer.name] = f"{case.name}: {failed}"
                finally:
                    peer.pause()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default=",".join(kind.name for kind in PEERS), help="peers, by their names")
    parser.add_argument("--streams", default="1,8,32", help="which of the cases")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the peers are set up")
    parser.add_argument("--out", type=Path, default=RESULTS / f"peers-{datetime.now(UTC):%Y-%m-%d}.json")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    kinds = [kind for kind in PEERS if kind.name in options.only.split(",")]
    cases = [case for case in CASES if str(case.streams) in options.streams.split(",")]
    options.cache.mkdir(parents=True, exist_ok=True)
    report = Report(f"{datetime.now(UTC):%Y-%m-%d}", machine(), {"torch": version("torch")})
    with tempfile.TemporaryDirectory() as work, ExitStack() as stack:
        peers = started(kinds, prepare(options.cache, Path(work)), report, stack)
        for run in measure(peers, cases, options.rounds, report):
            print(
                f"round {run.round + 1}  {run.case:9}  {run.peer:18} {run.measured.tokens_per_second:7.1f} tok/s",
                flush=True,
            )
    options.out.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1))
    plot(report).savefig(options.out.with_suffix(".png"), dpi=120)
    print(table(report))


if __name__ == "__main__":
    main()
