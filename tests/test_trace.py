"""`loraplex trace`, and the figure that is drawn of a trace."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from docs.trace_figure import draw, read
from server.cli.main import app
from server.cli.trace import summary
from tests.fixtures.api_server import listening

IMAGES = Path(__file__).parents[1] / "docs" / "images"


def step(time: float, rows: dict[str, int], seconds: float = 0.1) -> str:
    return json.dumps({"kind": "step", "time": time, "seconds": seconds, "tokens": sum(rows.values()), "rows": rows})


RUN = json.dumps({"kind": "run", "base_model": "base"})


def test_the_figure_of_the_readme_is_that_of_its_trace() -> None:
    lines = (IMAGES / "one-run.jsonl").read_text().splitlines()
    assert (IMAGES / "one-run.svg").read_text() == draw(read(lines)), (
        "run 'python -m docs.trace_figure docs/images/one-run.jsonl docs/images/one-run.svg'"
    )


def test_the_figure_has_a_cell_for_every_version_of_a_step_and_marks_the_swap() -> None:
    steps = [step(0.1, {"base": 1, "a@1": 2}), step(0.2, {"a@1": 1, "a@2": 1}), step(0.3, {"a@2": 1})]
    trace = read([RUN, *steps])
    assert trace.lanes == ["base", "a"]
    assert [(name, version, pytest.approx(at)) for name, version, at in trace.swaps()] == [("a", "2", 0.1)]
    drawn = draw(trace)
    assert [drawn.count(f'<rect class="{kind}"') for kind in ("base", "adapter", "newer")] == [1, 2, 2]
    assert drawn.count("new version") == 1 and "one pass, 2 models" in drawn
    assert "6 tokens of 2 models in 3 passes" in drawn


def test_the_command_writes_a_trace_and_sums_it_up(tmp_path: Path) -> None:
    with listening(tmp_path / "data") as live:
        command = ["trace", "--seconds", "0.2", "--out", str(tmp_path / "run.jsonl")]
        result = CliRunner().invoke(app, command, env={"LORAPLEX_URL": live.url})
        assert result.exit_code == 0, result.output
        assert json.loads((tmp_path / "run.jsonl").read_text().splitlines()[0])["kind"] == "run"
        refused = CliRunner().invoke(app, ["trace", "--seconds", "0.1"], env={"LORAPLEX_URL": live.url + "/none"})
        assert refused.exit_code == 1 and not list(live.context.engine._listeners[1:])


def test_the_sum_of_a_trace() -> None:
    move = {"kind": "move", "from": "host", "to": "device", "outcome": "ok"}
    lines = [json.loads(RUN), json.loads(step(0, {"base": 1, "a@1": 2, "a@2": 1})), move, {**move, "to": "host"}]
    assert summary(lines) == "1 steps, 4 tokens of 2 models, up to 2 in one step, 1 loads"
