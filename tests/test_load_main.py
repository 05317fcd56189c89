"""The command as its user runs it: the scenarios against a whole server over a tiny model."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from load_tests.__main__ import app
from load_tests.scenarios import FOLDER
from tests.fixtures.adapter_factory import write_adapter
from tests.fixtures.timing import HANG_SECONDS
from tests.fixtures.tiny_server import RunningServer, running_server, write_tiny_model

ANY = str(HANG_SECONDS)  # a bound that nothing reaches
FLAGS = ("--served-model-name", "tiny-base", "--dtype", "float32", "--threads", "1", "--kv-cache-bytes", "33554432")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With `model`, and `adapter` for it."""
    made = tmp_path_factory.mktemp("load")
    write_tiny_model(made / "model")
    write_adapter(AutoModelForCausalLM.from_pretrained(made / "model"), made / "adapter")
    return made


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RunningServer]:
    adapter = f"tiny-adapter={folder / 'adapter'}"
    with running_server(folder / "data", "--model", str(folder / "model"), "--adapter", adapter, *FLAGS) as running:
        yield running


def run(folder: Path, server: RunningServer, scenario: str) -> tuple[int, str]:
    """Exit code and output."""
    options = ["--url", server.url, "--template", str(folder / "adapter"), "--out", str(folder / "out")]
    result = CliRunner().invoke(app, ["run", scenario, *options])
    return result.exit_code, result.output


def shortened(folder: Path, name: str, **lines: str) -> str:
    """A copy of a shipped scenario with other values."""
    text = (FOLDER / f"{name}.toml").read_text()
    for key, value in lines.items():
        before, found, after = text.partition(f"\n{key} = ")
        assert found, key
        text = f"{before}{found}{value}\n{after.partition(chr(10))[2]}"
    (folder / f"short-{name}.toml").write_text(text)
    return str(folder / f"short-{name}.toml")


@pytest.mark.slow
def test_the_smoke_scenario(folder: Path, server: RunningServer) -> None:
    scenario = shortened(
        folder, "smoke", rate="20.0", warm_up_s="0.2", duration_s="1.0", request_timeout_s=ANY, ttft_s=ANY, itl_s=ANY
    )
    code, output = run(folder, server, scenario)
    assert code == 0, output
    found = json.loads((folder / "out" / "short-smoke.json").read_bytes())
    assert found["passed"] and found["summary"]["goodput"]["share"] == 1
    records = found["run"]["records"]
    assert {record["model"] for record in records} == {"tiny-base", "tiny-adapter"}
    assert {record["output_tokens"] for record in records} == {8}
    assert (folder / "out" / "short-smoke.html").read_text().startswith("<!DOCTYPE html>")


def test_churn_on_a_real_server_leaves_it_as_it_was(folder: Path, server: RunningServer) -> None:
    thresholds = {"ttft_p99_s": ANY, "send_lag_p99_s": ANY, "goodput": "0.0", "requests": "1", "changes": "2"}
    for rate, duration_s in (("20.0", "2.0"), ("2.0", "20.0"), ("0.2", "200.0")):
        shape = {"rate": rate, "warm_up_s": "0.0", "duration_s": duration_s, "every_s": "0.1", "high": "16"}
        scenario = shortened(folder, "churn", **shape, request_timeout_s=ANY, **thresholds)
        code, output = run(folder, server, scenario)
        if "FAILED changes" not in output:  # two take longer on a busy machine
            break
    assert code == 0, output
    with server.client() as client:
        assert [adapter["name"] for adapter in client.get("/v1/adapters").json()["data"]] == ["tiny-adapter"]


def test_a_missed_threshold_is_exit_code_1_and_can_be_judged_anew(folder: Path, server: RunningServer) -> None:
    scenario = shortened(folder, "smoke", rate="20.0", warm_up_s="0.0", duration_s="0.5", requests="1000")
    code, output = run(folder, server, scenario)
    assert code == 1 and "FAILED requests" in output
    again = CliRunner().invoke(
        app, ["report", str(folder / "out" / "short-smoke.json"), "--out", str(folder / "again")]
    )
    assert again.exit_code == 1 and (folder / "again" / "short-smoke.html").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "nowhere"],
        ["run", "smoke", "--url", "http://127.0.0.1:1"],
        ["report", "nowhere.json"],
    ],
)
def test_what_cannot_run_is_exit_code_2_and_one_line(arguments: list[str]) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.output.startswith("error: ") and result.output.count("\n") == 1
