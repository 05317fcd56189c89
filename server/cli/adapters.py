"""`loraplex adapters …`, `merge`, `unmerge` and `chat`: commands that call a running server over HTTP."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from adapters.convert.folders import FolderError, writing
from adapters.peft.files import TOKENIZER_FILES
from server.cli.http_client import all_adapters, call, check_response, connect, download, fail, path_of, upload

app = typer.Typer(no_args_is_help=True, help="Manage the adapters of a running server.")
Json = Annotated[bool, typer.Option("--json", help="Print JSON")]
Name = Annotated[str, typer.Argument(help="Name of the adapter")]


def _show(records: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    table = Table(*columns, box=None)
    for record in records:
        table.add_row(*(_cell(record[column]) for column in columns))
    Console().print(table)


def _cell(value: Any) -> str:
    text = ",".join(value) if isinstance(value, list) else str(value)
    return text.removeprefix("sha256:")[:12] if text.startswith("sha256:") else text


_COLUMNS = ("name", "version", "state", "tier", "pinned", "rank", "bytes", "in_flight")


def _print(record: dict[str, Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(record))
    else:
        _show([record], _COLUMNS)


@app.command("ls")
def list_adapters(as_json: Json = False) -> None:
    """List all adapters."""
    records = all_adapters()
    if as_json:
        typer.echo(json.dumps(records))
    else:
        _show(records, _COLUMNS)


@app.command()
def push(
    name: Name,
    folder: Annotated[Path, typer.Argument(help="Folder written by PEFT's save_pretrained")],
    replace: Annotated[bool, typer.Option(help="Point an existing name at the new version")] = False,
    pinned: Annotated[bool, typer.Option(help="Protect the adapter from eviction")] = False,
    dry_run: Annotated[bool, typer.Option(help="Validate the adapter without publishing it")] = False,
    as_json: Json = False,
) -> None:
    """Upload an adapter."""
    record = upload(name, folder, replace=replace, pinned=pinned, dry_run=dry_run)
    if dry_run:
        typer.echo(json.dumps(record))
    else:
        _print(record, as_json)


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="Name of the adapter, or name@version")],
    folder: Annotated[Path, typer.Argument(help="Folder to write the files to")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files")] = False,
) -> None:
    """Download an adapter's files."""
    try:
        with writing(folder, replace=force) as fresh:
            download(name, fresh)
            absent = [file for file in TOKENIZER_FILES if not (fresh / file).exists()]
        for file in absent:  # the tokenizer of another adapter must not remain beside this one
            (folder / file).unlink(missing_ok=True)
    except (FolderError, OSError) as error:
        fail(str(error))


@app.command()
def show(name: Name) -> None:
    """Print one adapter's record."""
    typer.echo(json.dumps(call("GET", path_of(name)), indent=2))


@app.command()
def rm(
    name: Name, drain_timeout: Annotated[float, typer.Option(help="Seconds to wait for running requests")] = 30.0
) -> None:
    """Delete an adapter; running requests may finish."""
    typer.echo(json.dumps(call("DELETE", path_of(name), params={"drain_timeout": drain_timeout})))


@app.command()
def load(
    name: Name,
    tier: Annotated[str, typer.Option(help="Tier to load to: device or host")] = "device",
    as_json: Json = False,
) -> None:
    """Load an adapter to the device or to host memory."""
    _print(call("POST", path_of(name, "load"), json={"tier": tier}), as_json)


@app.command()
def unload(name: Name, as_json: Json = False) -> None:
    """Free an adapter's device and host memory; the adapter stays registered."""
    _print(call("POST", path_of(name, "unload")), as_json)


@app.command()
def pin(name: Name, as_json: Json = False) -> None:
    """Load an adapter and protect it from eviction."""
    _print(call("POST", path_of(name, "pin")), as_json)


@app.command()
def unpin(name: Name, as_json: Json = False) -> None:
    """Remove an adapter's protection from eviction."""
    _print(call("POST", path_of(name, "unpin")), as_json)


@app.command("set")
def set_defaults(
    name: Name,
    system_prompt: Annotated[
        str | None, typer.Option(help="First message of chats that have no system message")
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="File of a chat template in place of the adapter's")
    ] = None,
    default: Annotated[
        list[str] | None, typer.Option(help="Default of a field that requests leave out, as in temperature=0.2")
    ] = None,
    description: Annotated[str | None, typer.Option(help="Text that lists of models show")] = None,
    label: Annotated[list[str] | None, typer.Option(help="Label, as in team=search")] = None,
    unset: Annotated[
        list[str] | None, typer.Option(help="What to remove: description, a default's field, or label.NAME")
    ] = None,
    as_json: Json = False,
) -> None:
    """Set what applies to requests of an adapter that leave it out, and its description and labels."""
    defaults: dict[str, Any] = dict(map(_default, default or ()))
    labels: dict[str, Any] = dict(_pair(each, "name=value") for each in label or ())
    body: dict[str, Any] = {"defaults": defaults, "labels": labels}
    if system_prompt is not None:
        defaults["system_prompt"] = system_prompt
    if chat_template is not None:
        defaults["chat_template"] = _text_of(chat_template)
    if description is not None:
        body["description"] = description
    for each in unset or ():
        group, _, field = each.rpartition(".")
        {"": body if each == "description" else defaults, "label": labels}.get(group, defaults)[field] = None
    _print(call("PATCH", path_of(name), json=body), as_json)


def _default(text: str) -> tuple[str, Any]:
    """Return a field and its value, which is JSON, or else text."""
    name, value = _pair(text, "field=value")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _pair(text: str, form: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        fail(f"{text} must have the form {form}")
    return name, value


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        fail(f"{file} cannot be read: {error}")


@app.command()
def versions(name: Name, as_json: Json = False) -> None:
    """List the versions of an adapter, newest first."""
    history = call("GET", path_of(name, "versions"))["data"]
    if as_json:
        typer.echo(json.dumps(history))
    else:
        _show(history, ("version", "created", "current"))


@app.command()
def rollback(
    name: Name,
    version: Annotated[str | None, typer.Option(help="Version to return to (default: the previous one)")] = None,
    as_json: Json = False,
) -> None:
    """Roll an adapter back to an earlier version."""
    _print(call("POST", path_of(name, "rollback"), json={"version": version}), as_json)


@app.command()
def split(
    alias: Annotated[str, typer.Argument(help="The name that clients use")],
    members: Annotated[
        list[str], typer.Argument(help="Adapters or the base model with weights, as in stable=90 canary=10")
    ],
) -> None:
    """Split the requests for one alias among several adapters by weight."""
    weights = dict(map(_weighted, members))
    typer.echo(json.dumps(call("PUT", path_of(alias, "split"), json={"weights": weights}), indent=2))


def _weighted(member: str) -> tuple[str, float]:
    name, _, weight = member.rpartition("=")
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not name or not 0 <= number < math.inf:
        fail(f"{member} must have the form adapter=weight with a number as weight, 0 or more")
    return name, number


@app.command()
def unsplit(alias: Annotated[str, typer.Argument(help="The name that clients use")]) -> None:
    """Delete an alias; its adapters stay."""
    typer.echo(json.dumps(call("DELETE", path_of(alias, "split")), indent=2))


def merge(
    name: Name,
    drain: Annotated[bool, typer.Option(help="Wait for requests of other models to finish")] = False,
    allow_requantize: Annotated[
        bool, typer.Option(help="Keep a 4-bit base model in 4 bits if memory is short")
    ] = False,
) -> None:
    """Merge one adapter into the base model."""
    body = {"name": name, "drain": drain, "allow_requantize": allow_requantize}
    typer.echo(json.dumps(call("POST", "/v1/merge", json=body), indent=2))


def unmerge() -> None:
    """Restore the weights of the base model."""
    typer.echo(json.dumps(call("DELETE", "/v1/merge"), indent=2))


def chat(
    model: Annotated[str, typer.Argument(help="The base model or an adapter (default: the base model)")] = "",
    max_tokens: Annotated[int, typer.Option(help="Maximum number of tokens in a reply")] = 256,
) -> None:
    """Chat with a model; an empty line or Ctrl-D ends the chat."""
    model = model or next(m["id"] for m in call("GET", "/v1/models")["data"] if m["parent"] is None)
    messages: list[dict[str, str]] = []
    while question := _ask():
        messages.append({"role": "user", "content": question})
        reply = ""
        for delta in _stream({"model": model, "messages": messages, "max_tokens": max_tokens, "stream": True}):
            typer.echo(delta, nl=False)
            reply += delta
        typer.echo()
        messages.append({"role": "assistant", "content": reply})


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def _stream(body: dict[str, Any]) -> Iterator[str]:
    with connect() as client, client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.is_error:
            response.read()
        check_response(response)
        for line in response.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    fail(event["error"]["message"])
                yield from (choice["delta"].get("content") or "" for choice in event["choices"])
