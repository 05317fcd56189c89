"""`loraplex doctor`: shows the machine's resources and the native code that the server would use."""

import importlib.metadata
import json
import math
import platform
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from adapters.device import forms
from server.engine.memory.machine import available_cpus, available_memory, cpu_quota, memory_limit, schedulable_cores

PACKAGES = ("loraplex", "torch", "transformers", "peft", "bitsandbytes", "triton")
GIB = 1 << 30


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables")] = False,
    data_dir: Annotated[Path | None, typer.Option(help="Also show the condition of this data folder")] = None,
) -> None:
    """Show the native code, processors, memory and packages that the server would use on this machine."""
    found = {"native code": _native_code(), "machine": _machine(), "packages": _packages()}
    if data_dir is not None:
        from adapters.registry.condition import condition  # imported here because every command imports this module

        found["data folder"] = condition(data_dir)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    for title, rows in found.items():
        table = Table("", "", title=title, title_justify="left", show_header=False)
        for name, value in rows.items():
            table.add_row(name, value)
        Console(highlight=False).print(table)


def _native_code() -> dict[str, str]:
    """Return the form in use, and for every form whether this machine can use it."""
    try:
        used = forms.described_choice()
    except forms.FormRefused as refused:
        used = f"refused: {refused}"
    usable = {
        form.name: forms.why_not(form) or ("prebuilt" if forms.is_prebuilt(form) else "usable") for form in forms.FORMS
    }
    return {"used": used, **usable, "compiler": forms.compiler() or "none found"}


def _machine() -> dict[str, str]:
    quota, limit = cpu_quota(), memory_limit()
    return {
        "processor": f"{platform.machine()}, {schedulable_cores()} cores",
        "CPU quota of the container": "none" if math.isinf(quota) else f"{quota:.2f} cores",
        "threads of the model": str(available_cpus()),
        "memory available": f"{available_memory() / GIB:.1f} GiB",
        "memory limit of the container": "none" if math.isinf(limit) else f"{limit / GIB:.1f} GiB",
    }


def _packages() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
