"""`loraplex keys`: commands that change the file of API keys. A running server notices within a second."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from server.cli.http_client import fail
from server.config import ConfigError, env_name
from server.keys_file import (
    ALL_SCOPES,
    LEAST_BITS,
    KeyEntry,
    bits_of,
    digest_of,
    new_secret,
    read_keys_file,
    write_keys_file,
)

app = typer.Typer(no_args_is_help=True, help="Make, list and revoke the API keys of a keys file.")

File = Annotated[Path, typer.Option("--keys-file", envvar=env_name("keys_file"), help="The file of the API keys")]
_SCOPES = ", ".join(sorted(ALL_SCOPES))


@app.callback()
def keys() -> None:
    """Make, list and revoke the API keys of a keys file."""


@app.command()
def new(
    name: str,
    keys_file: File,
    scope: Annotated[list[str] | None, typer.Option(help=f"One of {_SCOPES}; repeatable (default: infer)")] = None,
    tenant: Annotated[str | None, typer.Option(help="Tenant of the key (default: its name)")] = None,
    adapter: Annotated[list[str] | None, typer.Option(help="The only adapters that the key sees; repeatable")] = None,
    days: Annotated[float | None, typer.Option(help="Days until the key expires (default: never)", min=0)] = None,
) -> None:
    """Make a key and print its secret, which is stored nowhere."""
    known = _read(keys_file) if keys_file.exists() else []
    if any(entry.name == name for entry in known):
        fail(f"{keys_file} has a key '{name}'; revoke it first, or choose another name", code=2)
    secret = new_secret()
    fields = {
        "name": name,
        "sha256": digest_of(secret),
        "scopes": scope or ["infer"],
        "tenant": tenant,
        "adapters": adapter or None,
        "expires": _after(days),
    }
    try:
        _write(keys_file, [*known, msgspec.convert(fields, KeyEntry)])
    except msgspec.ValidationError as error:
        fail(f"the key cannot be made: {error}", code=2)
    typer.echo(secret)


@app.command()
def ls(keys_file: File) -> None:
    """List the keys, without their secrets."""
    table = Table("name", "scopes", "tenant", "adapters", "expires", "stored as")
    for entry in _read(keys_file):
        adapters = "all" if entry.adapters is None else ", ".join(sorted(entry.adapters))
        stored = "digest" if entry.key is None else "plain text"
        table.add_row(entry.name, ", ".join(sorted(entry.scopes)), entry.its_tenant, adapters, _when(entry), stored)
    Console(highlight=False, soft_wrap=True).print(table)


@app.command()
def revoke(name: str, keys_file: File) -> None:
    """Remove a key: requests with its secret are refused from now on."""
    known = _read(keys_file)
    kept = [entry for entry in known if entry.name != name]
    if len(kept) == len(known):
        fail(f"{keys_file} has no key '{name}'", code=2)
    _write(keys_file, kept)


@app.command("hash")
def hash_secrets(keys_file: File) -> None:
    """Replace the secrets in the file by their digests; the keys stay valid."""
    known = _read(keys_file)
    weak = [entry.name for entry in known if entry.key is not None and bits_of(entry.key) < LEAST_BITS]
    if weak:
        fail(f"less than {LEAST_BITS} bits have: {', '.join(weak)}; revoke them and make new ones", code=2)
    _write(keys_file, known)


def _read(path: Path) -> list[KeyEntry]:
    try:
        return read_keys_file(path, check_strength=False)
    except ConfigError as error:
        fail(str(error), code=2)


def _write(path: Path, entries: Sequence[KeyEntry]) -> None:
    try:
        write_keys_file(path, entries)
    except (OSError, ValueError) as error:
        fail(f"{path} cannot be written: {error}", code=2)


def _after(days: float | None) -> datetime | None:
    return None if days is None else datetime.now(UTC).replace(microsecond=0) + timedelta(days=days)


def _when(entry: KeyEntry) -> str:
    if entry.expires is None:
        return "never"
    return entry.expires.isoformat() + (" (expired)" if entry.expires <= datetime.now(UTC) else "")
