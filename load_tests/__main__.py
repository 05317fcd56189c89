"""`python -m load_tests`: send a scenario's traffic to a server and judge what comes back."""

import asyncio
import tempfile
from pathlib import Path
from typing import Annotated, NoReturn

import msgspec
import typer

from load_tests import report as reports
from load_tests import runner, scenarios
from load_tests.client import FAILURES, new_client
from load_tests.own_server import serving

DEMO_ADAPTER = Path(__file__).parent.parent / "examples" / "adapters" / "sql"
SHORT_SET = ("smoke", "steady", "bursty", "zipf", "churn")

Out = Annotated[Path, typer.Option(help="Folder for SCENARIO.json and SCENARIO.html")]
Seed = Annotated[int, typer.Option(help="The same seed draws the same schedule")]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.command()
def run(
    scenario: Annotated[str, typer.Argument(help="A name from load_tests/scenarios, or a .toml file")],
    url: Annotated[str, typer.Option(envvar="LORAPLEX_URL")] = "http://127.0.0.1:8000",
    api_key: Annotated[str, typer.Option(envvar="LORAPLEX_API_KEY")] = "",
    template: Annotated[Path, typer.Option(help="PEFT folder that published adapters are made from")] = DEMO_ADAPTER,
    out: Out = Path("load-test-results"),
    seed: Seed = 0,
) -> None:
    """Run one scenario against a server that is there. Exit code 1: a threshold was missed; 2: it could not run."""
    if not _passed(scenario, url, api_key, template, out, seed):
        raise typer.Exit(1)


@app.command()
def suite(out: Out = Path("load-test-results"), seed: Seed = 0) -> None:
    """Run the short set against a server with the demo adapters, started for it and ended after it."""
    with tempfile.TemporaryDirectory() as data_dir, serving(Path(data_dir), "--demo", "--adapter-slots", "16") as url:
        passed = [_passed(scenario, url, "", DEMO_ADAPTER, out, seed) for scenario in SHORT_SET]
    if not all(passed):
        raise typer.Exit(1)


@app.command()
def report(
    file: Annotated[Path, typer.Argument(help="A SCENARIO.json of an earlier run")],
    out: Out = Path("load-test-results"),
) -> None:
    """Summarize, judge and draw an earlier run anew."""
    try:
        earlier = msgspec.json.decode(file.read_bytes(), type=reports.Report)
    except (OSError, msgspec.DecodeError) as error:
        _cannot_run(f"{file}: {error}")
    if not _written(reports.report_of(earlier.run), out):
        raise typer.Exit(1)


def _passed(scenario: str, url: str, api_key: str, template: Path, out: Path, seed: int) -> bool:
    try:
        seen = asyncio.run(_run(scenario, url, api_key, template, seed))
    except (scenarios.ScenarioError, *FAILURES, OSError) as error:
        _cannot_run(str(error) or type(error).__name__)
    return _written(reports.report_of(seen), out)


async def _run(scenario: str, url: str, api_key: str, template: Path, seed: int) -> runner.Run:
    async with new_client(url, api_key) as client:
        return await runner.run(scenarios.load(scenario), client, template=template, seed=seed)


def _written(report: reports.Report, out: Path) -> bool:
    _, page = reports.write(report, out)
    typer.echo(f"{reports.text(report)}\n  {page}")
    return report.passed


def _cannot_run(why: str) -> NoReturn:
    typer.secho(f"error: {why}", fg=typer.colors.RED, err=True)
    raise typer.Exit(2)


if __name__ == "__main__":
    app()
