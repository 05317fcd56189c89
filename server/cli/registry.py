"""`loraplex registry`: commands for the registry of a data folder that no server uses."""

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from adapters.errors import AdapterError
from adapters.peft.config_reader import MAX_CONFIG_BYTES, read_json
from adapters.peft.files import CONFIG_FILE
from server.cli.http_client import fail
from server.config import default_data_dir

if TYPE_CHECKING:
    from adapters.registry.registry import Restored

app = typer.Typer(no_args_is_help=True, help="Repair the registry of a data folder that no server uses.")

_OUTCOMES = {
    "restored": "restored",
    "damaged": "restored, but its stored files are damaged: publish it again",
    "kept": "was in the registry",
    "lost": "its files are not in the store: publish it again",
    "alias": "alias restored",
    "unknown": "no name is known: publish it again from its folder",
}


@app.callback()
def registry() -> None:
    """Repair the registry of a data folder that no server uses."""


@app.command()
def rebuild(
    data_dir: Annotated[
        Path | None, typer.Option(help="Data folder of the server; default: the XDG data folder")
    ] = None,
) -> None:
    """Rebuild a registry that was lost or damaged, from the stored adapters and the journal of their names."""
    from adapters.registry.registry import AdapterRegistry, RegistryLocked  # every command imports this module

    folder = (data_dir or default_data_dir()).absolute()
    if not (folder / "store").is_dir():
        fail(f"{folder} has no store of adapters", code=2)
    try:
        with closing(AdapterRegistry(folder)) as opened:
            found = opened.rebuild()
            _show(found, {one.digest: opened.store.path(one.digest) for one in found if one.outcome == "unknown"})
    except RegistryLocked as locked:
        fail(f"{locked} Stop the server first.", code=2)
    except AdapterError as error:
        fail(str(error), code=2)


def _show(found: "list[Restored]", folders: dict[str, Path]) -> None:
    table = Table("name", "version", "versions", "result", title="registry", title_justify="left")
    for one in found:
        count = str(one.versions) if one.versions else ""
        table.add_row(one.name or "", one.digest[:12], count, _OUTCOMES[one.outcome])
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    for digest, folder in folders.items():
        console.print(f"{digest[:12]} was trained on {_base_of(folder)}: loraplex adapters push NAME {folder}")
    if folders:
        console.print("Versions without a name stay in the store, and so do the damaged registries beside it.")


def _base_of(folder: Path) -> str:
    """Return the base model that an adapter's config names."""
    try:
        with (folder / CONFIG_FILE).open("rb") as file:
            config, _ = read_json(file.read(MAX_CONFIG_BYTES + 1))
    except OSError:
        config = None
    return str((config or {}).get("base_model_name_or_path") or "an unknown base model")
