"""`loraplex trace`: writes what a running server's engine does, step by step."""

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Annotated, Any

import typer

from server.cli.http_client import check_response, connect


def trace(
    seconds: Annotated[float, typer.Option(help="How long to watch the engine", min=0.1, max=3600)] = 10.0,
    out: Annotated[Path | None, typer.Option(help="File for the JSON lines; without it they are printed")] = None,
) -> None:
    """Write what a running server does as JSON lines: rows of every step by adapter, loads, evictions and merges."""
    with connect() as client, client.stream("GET", "/v1/trace", params={"seconds": seconds}) as response:
        if response.is_error:
            response.read()
        check_response(response)
        with nullcontext(sys.stdout) if out is None else out.open("w", encoding="utf-8") as target:
            said = summary(map(json.loads, _written(response.iter_lines(), target)))
    typer.echo(said, err=True)


def _written(lines: Iterable[str], target: IO[str]) -> Iterator[str]:
    """Yield the lines, each after it was written to `target`."""
    for line in lines:
        typer.echo(line, file=target)
        yield line


def summary(lines: Iterable[dict[str, Any]]) -> str:
    """Return one sentence about a trace."""
    steps, models, most, tokens, loads = 0, set[str](), 0, 0, 0
    for line in lines:
        if line["kind"] == "step":
            steps += 1
            rows = {name.partition("@")[0]: count for name, count in line["rows"].items()}
            models |= rows.keys()
            most = max(most, len(rows))
            tokens += sum(line["rows"].values())
        elif line["kind"] == "move" and line["to"] == "device" and line["outcome"] == "ok":
            loads += 1
    return f"{steps} steps, {tokens} tokens of {len(models)} models, up to {most} in one step, {loads} loads"
