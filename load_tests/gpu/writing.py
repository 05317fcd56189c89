"""Results as a table, JSON and, where matplotlib is installed, a picture."""

import importlib.util
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from load_tests.gpu.setting import Report


def write(report: Report, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    name = ("smoke-" if report.setting.smoke else "gpu-") + datetime.now(UTC).strftime("%Y-%m-%d-%H%M%S")
    settings = {key: str(value) for key, value in vars(report.setting).items()}
    content = {"setting": settings, "notes": report.notes, "results": report.rows}
    (out / f"{name}.json").write_text(json.dumps(content, indent=1))
    print(table(report.rows))
    print(f"written to {out / name}.json")
    if importlib.util.find_spec("matplotlib") is None:
        print("there is no picture: matplotlib is not installed")
    else:
        draw(report, out / f"{name}.png")


def table(results: list[dict[str, Any]]) -> str:
    """One Markdown table per section."""
    lines: list[str] = []
    for section in dict.fromkeys(row["section"] for row in results):
        rows = [row for row in results if row["section"] == section]
        columns = [key for key in dict.fromkeys(key for row in rows for key in row) if key != "section"]
        lines += [f"\n{section}\n", _line(columns), _line(["---"] * len(columns))]
        lines += [_line([_shown(row.get(column, "")) for column in columns]) for row in rows]
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def draw(report: Report, path: Path) -> None:
    """What a decode step with adapters costs, relative to the base's, by the rows of the batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = [row for row in report.rows if row["section"] == "decode"]
    shapes = list(dict.fromkeys(row["shape"] for row in steps))
    figure, axes = pyplot.subplots(1, len(shapes), figsize=(6 * len(shapes), 4), squeeze=False)
    for axis, shape in zip(axes[0], shapes, strict=True):
        for adapters in sorted({row["adapters"] for row in steps if row["shape"] == shape}):
            points = [(r["rows"], r["to_base"]) for r in steps if (r["shape"], r["adapters"]) == (shape, adapters)]
            axis.plot(*zip(*points, strict=True), marker="o", label=f"{adapters} adapters")
        axis.set(title=shape, xlabel="rows", ylabel="decode step / base", xscale="log")
        axis.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
