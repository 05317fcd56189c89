"""Writes the README's tables from the code: `make docs`. A test fails when they are out of date."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from adapters.errors import AdapterError
from server import config
from server.api import health as ops
from server.api import models
from server.api.adapters import aliases as splits
from server.api.adapters import merge
from server.api.adapters import routes as adapters
from server.api.adapters import vllm_compat as vllm
from server.api.inference import chat, completions
from server.config import ServeConfig
from server.metrics import METRICS

README = Path(__file__).parent.parent / "README.md"
Rows = list[tuple[str, ...]]


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def flags() -> str:
    rows = []
    for field in dataclasses.fields(ServeConfig):
        default: Any = ", ".join(field.default) if isinstance(field.default, tuple) else field.default
        shown = "" if default == Path() or default == "" or default is False else f"`{default}`"
        rows.append((f"`{config.flag_name(field.name)}`", config.type_label(field.name), shown, field.metadata["help"]))
    return table(("flag", "takes", "default", "what it does"), rows)


def endpoints() -> str:
    app = FastAPI()
    for module in (chat, completions, models, adapters, splits, merge, vllm, ops):
        app.include_router(module.router)
    rows = []
    for path, operations in app.openapi()["paths"].items():
        for method, operation in operations.items():
            summary = operation.get("description", operation["summary"]).split("\n")[0]
            rows.append((f"`{method.upper()} {path}`", summary))
    return table(("route", "what it does"), rows)


def metrics() -> str:
    return table(
        ("metric", "type", "labels", "what it counts"),
        [(f"`{m.name}`", m.type, ", ".join(f"`{label}`" for label in m.labels), m.help) for m in METRICS],
    )


def adapter_errors() -> str:
    kinds = sorted(_subclasses(AdapterError), key=lambda kind: (kind.status, kind.code))
    rows = [(str(kind.status), f"`{kind.code}`", (kind.__doc__ or "").split("\n")[0]) for kind in kinds]
    return table(("status", "code", "when"), rows)


def _subclasses(kind: type[AdapterError]) -> list[type[AdapterError]]:
    return [found for child in kind.__subclasses__() for found in (child, *_subclasses(child)) if found.status != 500]


TABLES: dict[str, Callable[[], str]] = {
    "flags": flags,
    "endpoints": endpoints,
    "metrics": metrics,
    "adapter-errors": adapter_errors,
}


def render(text: str, tables: Mapping[str, Callable[[], str]] = TABLES) -> str:
    """`text` with every `<!-- table: name -->` … `<!-- end -->` section made anew."""
    for name, make in tables.items():
        section = re.search(rf"<!-- table: {name} -->\n(.*?)<!-- end -->", text, re.DOTALL)
        assert section is not None, f"no section for the table of {name}"
        text = text[: section.start(1)] + make() + "\n" + text[section.end(1) :]
    return text


if __name__ == "__main__":
    README.write_text(render(README.read_text()))
