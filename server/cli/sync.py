"""`loraplex sync adapters.yaml`: reconciles the server with a YAML file, after showing a plan.

```yaml
adapters:
  - name: acme
    source: ./acme                    # a folder beside this file, or a URL that the server fetches
    pinned: true
  - name: sql
    source: hf://org/sql-lora@main
```
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec
import typer

from adapters.errors import AdapterInvalid, InvalidName
from adapters.names import check_name
from server.cli.http_client import all_adapters, call, fail, path_of, upload

Action = Literal["unpin", "create", "replace", "delete", "pin"]
_ORDER: tuple[Action, ...] = get_args(Action)  # pins come last, when deletions have made room
_COMMIT = re.compile(r"hf://[^@]+@[0-9a-f]{40}(/.*)?")
_FETCH_SECONDS = 3600.0


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One adapter in the file."""

    name: str
    source: str
    pinned: bool = False

    @property
    def is_remote(self) -> bool:
        return "://" in self.source


class _File(msgspec.Struct, forbid_unknown_fields=True):
    adapters: list[Entry]


@dataclass(frozen=True, slots=True)
class Step:
    """One change of the plan; `source` is set for `create` and `replace`."""

    action: Action
    name: str
    source: str = ""


def sync(
    file: Annotated[Path, typer.Argument(help="YAML file with a list 'adapters' of name, source and pinned")],
    prune: Annotated[bool, typer.Option("--prune", help="Delete adapters that the file does not list")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan without applying it")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Apply the plan without asking")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON")] = False,
) -> None:
    """Reconcile the server with a YAML file, after showing a plan."""
    entries = _read(file)
    records = {record["name"]: record for record in all_adapters()}
    unlisted = sorted(records.keys() - {entry.name for entry in entries})
    steps = [step for entry in entries for step in _steps(entry, records.get(entry.name), file.parent)]
    steps += [Step("delete", name) for name in unlisted if prune]
    steps.sort(key=lambda step: _ORDER.index(step.action))
    _show(steps, [] if prune else unlisted, len(entries), as_json)
    if not steps or dry_run:
        return
    if not yes:
        typer.confirm("Apply this plan?", abort=True, err=True)
    for step in steps:
        _do(step, file.parent)
        typer.echo(f"{step.action} {step.name}: done", err=True)


def _read(file: Path) -> Sequence[Entry]:
    try:
        entries = msgspec.yaml.decode(file.read_bytes(), type=_File).adapters
        for name, count in Counter(entry.name for entry in entries).items():
            check_name(name)
            if count > 1:
                fail(f"{file} lists {name} {count} times; list each adapter once", code=2)
    except (OSError, msgspec.MsgspecError, InvalidName) as error:
        fail(f"{file}: {error}", code=2)
    return entries


def _steps(entry: Entry, record: Mapping[str, Any] | None, beside: Path) -> Iterator[Step]:
    """Yield the steps that bring the server's `record` to the state of `entry`."""
    if record is None or record["version"] is None:
        _dry_run(entry, beside)
        yield Step("create", entry.name, entry.source)
    elif _version_of(entry, record, beside) != record["version"] or record["state"] == "failed":
        _dry_run(entry, beside)
        yield Step("replace", entry.name, entry.source)
    if entry.pinned != (record is not None and record["pinned"]):
        yield Step("pin" if entry.pinned else "unpin", entry.name)


def _version_of(entry: Entry, record: Mapping[str, Any], beside: Path) -> str:
    """Return the version at the entry's source; end the command if there is none."""
    if not entry.is_remote:
        return f"sha256:{_digest(beside / entry.source)}"
    if record["source"] == entry.source and _COMMIT.fullmatch(entry.source):
        return str(record["version"])  # a commit is immutable
    return str(_register(entry.name, entry.source, dry_run=True)["version"])


def _dry_run(entry: Entry, beside: Path) -> None:
    """Validate the adapter on the server; end the command before any change if the server would refuse it."""
    if entry.is_remote:
        _register(entry.name, entry.source, dry_run=True)
    else:
        upload(entry.name, beside / entry.source, dry_run=True)


def _digest(folder: Path) -> str:
    from adapters.peft.digest import digest_of

    try:
        return digest_of(folder)
    except (AdapterInvalid, OSError) as error:
        fail(f"{folder}: {error}", code=2)


def _register(name: str, source: str, *, dry_run: bool) -> Any:
    body = {"name": name, "source": source, "replace": True}
    return call("POST", "/v1/adapters", json=body, params={"dry_run": dry_run}, timeout=_FETCH_SECONDS)


def _show(steps: Sequence[Step], unlisted: Sequence[str], listed: int, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"steps": [asdict(step) for step in steps], "unlisted": unlisted}))
        return
    for step in steps:
        typer.echo(f"{step.action:8}{step.name}" + (f" from {step.source}" if step.source else ""))
    unchanged = listed - len({step.name for step in steps if step.action != "delete"})
    typer.echo(f"{unchanged} unchanged" if steps else f"Nothing to do: {unchanged} unchanged")
    if unlisted:
        typer.echo(f"Not in the file and kept (--prune deletes them): {', '.join(unlisted)}")


def _do(step: Step, beside: Path) -> None:
    match step.action:
        case "create" | "replace" if "://" in step.source:
            _register(step.name, step.source, dry_run=False)
        case "create" | "replace":
            upload(step.name, beside / step.source, replace=True)
        case "delete":
            call("DELETE", path_of(step.name))
        case _:
            call("POST", path_of(step.name, step.action))
