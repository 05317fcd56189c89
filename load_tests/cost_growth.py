"""How the time of a decode step grows with rows, distinct adapters, rank and context: one engine, SmolLM2 in bf16.

    python -m load_tests.cost_growth [--only rows,adapters,rank,context] [--rounds 3] [--out FOLDER]

Every round visits the points of a curve in another order, so that a noisy machine hurts them all alike; a point is the
median over its steps in the round in which that was lowest, since others' work can only add. Through each curve go two
straight lines that meet at one of its points, the one where they fit best: slopes before and after it are printed with
it. JSON and a plot of each curve go to the folder.
"""

import argparse
import itertools
import random
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM

from load_tests.engine_bench import EngineBench, write_adapter
from load_tests.peers.setting import commit, machine
from server.model.loading.default_model import prepare_default_model

RANK = 16
RANKS = (16, 32, 64, 128, 192, 256)
ADAPTERS = 32
CONTEXT = 17  # tokens, where that is not what is varied
ROOM = 16 << 30  # bytes, of which only what is filled is taken: all adapters stay on the device
STEPS = 5  # per point and round; the first does not count
RESULTS = Path(__file__).with_name("results")


class Point(NamedTuple):
    rows: int
    adapters: int = 0  # distinct ones, of which the rows take turns; 0: the base
    rank: int = RANK
    context: int = CONTEXT


@dataclass(frozen=True)
class Curve:
    title: str
    label: str  # of the horizontal axis
    points: dict[int, Point]


ROWS = (1, 2, 4, 8, 16, 24, 32, 48)
CURVES = {
    "rows": [
        Curve("base", "rows", {n: Point(n) for n in ROWS}),
        Curve("one adapter of rank 16", "rows", {n: Point(n, 1) for n in ROWS}),
    ],
    "adapters": [
        Curve("32 rows", "distinct adapters of rank 16", {n: Point(32, n) for n in (1, 2, 4, 8, 16, 24, ADAPTERS)})
    ],
    "rank": [Curve("8 rows of one adapter", "rank", {r: Point(8, 1, rank=r) for r in RANKS})],
    "context": [Curve("4 rows, base", "tokens", {n: Point(4, context=n) for n in (64, 128, 256, 512, 768, 1024)})],
}


class Fit(NamedTuple):
    """`y = at + slope * x` up to `bend`, and `slope_after` from there on. Seconds."""

    at: float
    slope: float
    bend: int
    slope_after: float

    def __call__(self, x: float) -> float:
        return self.at + self.slope * x + (self.slope_after - self.slope) * max(x - self.bend, 0)


def fit(xs: Sequence[int], ys: Sequence[float]) -> Fit:
    """Least squares of relative errors, over all inner points as the bend."""
    found = []
    for bend in xs[1:-1]:
        terms = np.stack([np.ones(len(xs)), np.array(xs), np.maximum(np.array(xs) - bend, 0)], axis=1)
        (at, slope, change), *_ = np.linalg.lstsq(terms / np.array(ys)[:, None], np.ones(len(xs)))
        line = Fit(float(at), float(slope), bend, float(slope + change))
        found.append((sum((line(x) / y - 1) ** 2 for x, y in zip(xs, ys, strict=True)), line))
    return min(found)[1]


class Bench:
    """An engine, and as many adapters as the points need."""

    def __init__(self, folder: Path, ranks: Sequence[int]):
        slots = {"adapter_slots": len(ranks), "adapter_device_bytes": ROOM}
        settings = {**slots, "max_adapter_rank": max(ranks), "max_num_seqs": max(ROWS)}
        self._engine = EngineBench(folder / "data", 1, **settings)
        base = AutoModelForCausalLM.from_pretrained(prepare_default_model(), dtype=torch.bfloat16)
        self._adapters: dict[int, list[str]] = {}
        for seed, rank in enumerate(ranks):
            digest = self._engine.bring(write_adapter(base, folder / f"{seed}", rank, seed))
            self._adapters.setdefault(rank, []).append(digest)
        self.close = self._engine.engine.close

    def decode(self, point: Point) -> list[float]:
        """Seconds of steps in which every row decodes."""
        adapters = itertools.cycle(self._adapters[point.rank][: point.adapters] if point.adapters else [None])
        prompts = [_prompt(row, point.context) for row in range(point.rows)]
        steps = self._engine.decode_steps(prompts, list(itertools.islice(adapters, point.rows)), STEPS)
        return steps[1:]


def _prompt(row: int, tokens: int) -> list[int]:
    """The same in every round, so that only the first one computes it."""
    return [int(token) for token in np.random.default_rng(row).integers(100, 40_000, tokens)]


def measure(bench: Bench, curve: Curve, rounds: int) -> dict[int, float]:
    """Seconds of a step at each of the curve's points, after a round to warm up."""
    medians: dict[int, list[float]] = {x: [] for x in curve.points}
    for round_ in range(rounds + 1):
        for x in random.Random(round_).sample(list(curve.points), len(curve.points)):
            seconds = bench.decode(curve.points[x])
            if round_:  # in the first one, long prompts are computed while earlier rows already end
                medians[x].append(statistics.median(seconds))
    return {x: min(found) for x, found in medians.items()}


def ranks_for(curves: Sequence[Curve]) -> Iterator[int]:
    """Of the adapters that the points need, all at once."""
    points = [point for curve in curves for point in curve.points.values()]
    for rank in sorted({point.rank for point in points}):
        yield from [rank] * max(1, *(point.adapters for point in points if point.rank == rank))


def plot(name: str, found: dict[str, tuple[Curve, dict[int, float], Fit]]) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for title, (curve, seconds, line) in found.items():
        (dots,) = axes.plot(list(seconds), [1000 * s for s in seconds.values()], "o", label=title)
        axes.plot(list(seconds), [1000 * line(x) for x in seconds], color=dots.get_color())
        axes.axvline(line.bend, color=dots.get_color(), linestyle=":", linewidth=1)
        axes.set(xlabel=curve.label, ylabel="decode step, ms", title=f"Step time by {name}")
    axes.set_ylim(bottom=0)
    axes.legend()
    return figure


def report(name: str, rounds: int, out: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), list(ranks_for(CURVES[name])))
        try:
            measured = {curve.title: (curve, measure(bench, curve, rounds)) for curve in CURVES[name]}
        finally:
            bench.close()
    found = {
        title: (curve, seconds, fit(list(seconds), list(seconds.values())))
        for title, (curve, seconds) in measured.items()
    }
    for title, (_, seconds, line) in found.items():
        points = ", ".join(f"{x}: {1000 * s:.1f}" for x, s in seconds.items())
        print(f"{name}, {title}: ms at {points}\n  {1000 * line.at:.1f} ms + {1e6 * line.slope:.1f} us each up to "
              f"{line.bend}, {1e6 * line.slope_after:.1f} us each from there on", flush=True)  # fmt: skip
    content = {title: {"seconds": seconds, "fit": line._asdict()} for title, (_, seconds, line) in found.items()}
    about = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "machine": machine(), "commit": commit(), "rounds": rounds}
    (out / f"cost-{name}.json").write_bytes(
        msgspec.json.format(msgspec.json.encode({**about, "curves": content}), indent=1)
    )
    plot(name, found).savefig(out / f"cost-{name}.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", default=",".join(CURVES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    for name in options.only.split(","):
        report(name, options.rounds, options.out)


if __name__ == "__main__":
    main()
