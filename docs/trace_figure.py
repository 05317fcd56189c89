"""Draw a trace of `loraplex trace` as one SVG: `python -m docs.trace_figure run.jsonl figure.svg`.

A lane is a model, a column is a forward pass, and a cell is a model that had rows in that pass.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

WIDTH, LEFT, TOP, LANE, CELL = 960, 176, 64, 42, 24
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #5e615a }
.small { font-size: 11px } .title { font-size: 19px; font-weight: 650; fill: #1c1e1b }
.lane { font-size: 14px; fill: #1c1e1b }
.base { fill: #8d9088 } .adapter { fill: #0a6f62 } .newer { fill: #c46a1c }
.line { stroke: #dfdcd3 } .pass { fill: none; stroke: #1c1e1b; stroke-width: 1.5 }
.strong { fill: #1c1e1b; font-weight: 600 }
@media (prefers-color-scheme: dark) {
  text { fill: #9aa09a } .title, .lane, .strong { fill: #e8e8e2 } .base { fill: #747c78 } .adapter { fill: #5cd0b6 }
  .newer { fill: #f0a050 } .line { stroke: #2a302e } .pass { stroke: #e8e8e2 }
}
"""


@dataclass
class Step:
    time: float
    seconds: float
    rows: dict[str, dict[str, int]]  # rows by model and version


@dataclass
class Trace:
    base: str
    steps: list[Step] = field(default_factory=list)

    @property
    def lanes(self) -> list[str]:
        """The base model, and adapters by the time of their first row."""
        seen = dict.fromkeys(name for step in self.steps for name in step.rows)
        return [self.base, *(name for name in seen if name != self.base)]

    def swaps(self) -> Iterator[tuple[str, str, float]]:
        """Yield the names that moved to another version, the version, and the beginning of its first step."""
        seen: dict[str, set[str]] = {}
        for step in self.steps:
            for name, versions in step.rows.items():
                known = seen.setdefault(name, set())
                yield from ((name, new, step.time - step.seconds) for new in versions.keys() - known if known)
                known.update(versions)


def read(lines: Iterable[str]) -> Trace:
    """Return the steps of a trace; the time begins with the first of them."""
    trace, parsed = Trace(""), [json.loads(line) for line in lines]
    steps = [line for line in parsed if line["kind"] == "step"]
    begin = steps[0]["time"] - steps[0]["seconds"]
    trace.base = next(line["base_model"] for line in parsed if line["kind"] == "run")
    trace.steps = [Step(line["time"] - begin, line["seconds"], _rows(line["rows"])) for line in steps]
    return trace


def _rows(rows: dict[str, int]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for model, count in rows.items():
        name, _, version = model.partition("@")
        found.setdefault(name, {})[version] = count
    return found


def draw(trace: Trace) -> str:
    """Return the figure as SVG."""
    lanes, swaps = trace.lanes, list(trace.swaps())
    height = TOP + LANE * len(lanes) + 62
    span = trace.steps[-1].time
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(_sentence(trace))}">',
        f"<style>{STYLE}</style>",
        f'<text class="title" x="0" y="22">{escape(_sentence(trace))}</text>',
        *(_lane(number, name) for number, name in enumerate(lanes)),
        *_cells(trace, lanes, swaps, span),
        *(_swap(lanes.index(name), at, span) for name, _, at in swaps),
        _fullest(trace, lanes, span),
        f'<text x="{LEFT}" y="{height - 30}">0 s</text>',
        f'<text x="{WIDTH}" y="{height - 30}" text-anchor="end">{span:.1f} s</text>',
        f'<text x="0" y="{height - 6}">A column is one forward pass over the base model; a filled cell is a model with '
        "rows in it. Requests keep the version they began with.</text>",
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _sentence(trace: Trace) -> str:
    tokens = sum(sum(versions.values()) for step in trace.steps for versions in step.rows.values())
    most = max(len(step.rows) for step in trace.steps)
    return f"{tokens} tokens of {len(trace.lanes)} models in {len(trace.steps)} passes, up to {most} models in one"


def _x(time: float, span: float) -> float:
    return LEFT + (WIDTH - LEFT) * time / span


def _lane(number: int, name: str) -> str:
    y = TOP + LANE * number
    return (
        f'<text class="lane" x="0" y="{y + 29}">{escape(name[:24])}</text>'
        f'<line class="line" x1="0" x2="{WIDTH}" y1="{y + LANE}" y2="{y + LANE}"/>'
    )


def _cells(trace: Trace, lanes: list[str], swaps: list[tuple[str, str, float]], span: float) -> Iterator[str]:
    """Yield the cells. Where two versions of a name run in one step, they share its cell, the older one above."""
    newer = {version for _, version, _ in swaps}
    most = max(rows for step in trace.steps for versions in step.rows.values() for rows in versions.values())
    for step in trace.steps:
        wide = max((WIDTH - LEFT) * step.seconds / span - 1, 1.2)
        for name, versions in step.rows.items():
            tall = CELL / len(versions)
            for place, version in enumerate(sorted(versions, key=lambda version: version in newer)):
                kind = "base" if name == trace.base else "newer" if version in newer else "adapter"
                y, x = TOP + LANE * lanes.index(name) + 12 + place * tall, _x(step.time, span) - wide
                yield (
                    f'<rect class="{kind}" x="{x:.1f}" y="{y:g}" width="{wide:.1f}" height="{tall:g}" '
                    f'opacity="{0.6 + 0.4 * versions[version] / most:.2f}"/>'
                )


def _swap(lane: int, at: float, span: float) -> str:
    x, y = _x(at, span), TOP + LANE * lane
    return (
        f'<path class="strong" d="M{x - 5:.1f} {y + 3}h10l-5 7z"/>'
        f'<text class="strong small" x="{x + 9:.1f}" y="{y + 10}">new version</text>'
    )


def _fullest(trace: Trace, lanes: list[str], span: float) -> str:
    """Frame the pass with the most models, the longest of them."""
    step = max(trace.steps, key=lambda step: (len(step.rows), step.seconds))
    wide = max((WIDTH - LEFT) * step.seconds / span, 4)
    x, tall = _x(step.time, span) - wide, LANE * len(lanes) - 4
    middle = min(max(x + wide / 2, LEFT + 80), WIDTH - 90)
    return (
        f'<rect class="pass" x="{x - 1.5:.1f}" y="{TOP + 6}" width="{wide + 2:.1f}" height="{tall}" rx="3"/>'
        f'<text class="strong" x="{middle:.1f}" y="{TOP - 4}" text-anchor="middle">'
        f"one pass, {len(step.rows)} models</text>"
    )


def main(source: str, target: str) -> None:
    lines = Path(source).read_text(encoding="utf-8").splitlines()
    Path(target).write_text(draw(read(lines)), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
