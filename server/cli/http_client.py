"""HTTP client of the command line. The address and the API key come from `LORAPLEX_URL` and `LORAPLEX_API_KEY`.
Every error ends the command with a message instead of a traceback."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

import httpx
import typer

from adapters.peft.files import FILES, TOKENIZER_FILES


@contextmanager
def connect() -> Iterator[httpx.Client]:
    key = os.environ.get("LORAPLEX_API_KEY", "")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url = os.environ.get("LORAPLEX_URL", "http://127.0.0.1:8000")
    try:
        tls = url.startswith("https")  # httpx takes 60 ms to build a TLS context, which plain HTTP does not need
        with httpx.Client(base_url=url, headers=headers, timeout=120, verify=tls) as client:
            yield client
    except httpx.HTTPError as error:
        fail(f"cannot reach the server at {url}: {error}; set LORAPLEX_URL if it is elsewhere")


def path_of(name: str, *rest: str) -> str:
    """Return the path of the routes of an adapter or alias."""
    return "/".join(("/v1/adapters", quote(name, safe="/:@"), *rest))


def call(method: str, path: str, **options: Any) -> Any:
    """Send a request and return the JSON of the response."""
    with connect() as client:
        response = client.request(method, path, **options)
    check_response(response)
    return response.json()


def check_response(response: httpx.Response) -> None:
    """End the command with the server's error message if the response is an error."""
    if response.is_error:
        body = response.json()
        problems = body["error"].get("problems") or []
        lines = [f"  {p['where']}: found {p['found']}, expected {p['expected']}" for p in problems]
        fail("\n".join([body["error"]["message"], *lines]))


def fail(message: str, code: int = 1) -> NoReturn:
    typer.secho(f"error: {message}", fg=typer.colors.RED, err=True)
    raise typer.Exit(code)


def all_adapters() -> list[dict[str, Any]]:
    """Return the records of all adapters, ordered by name."""
    records: list[dict[str, Any]] = []
    more = True
    while more:
        page = call("GET", "/v1/adapters", params={"after": records[-1]["name"] if records else "", "limit": 1000})
        records += page["data"]
        more = page["has_more"]
    return records


def upload(
    name: str, folder: Path, *, replace: bool = False, pinned: bool = False, dry_run: bool = False
) -> dict[str, Any]:
    """Publish the adapter in `folder` and return its record."""
    missing = [file for file in FILES if not (folder / file).is_file()]
    if missing:
        fail(f"{folder} has no {' and no '.join(missing)}")
    fields = {"name": name, "replace": str(replace).lower(), "pinned": str(pinned).lower()}
    present = [*FILES, *(file for file in TOKENIZER_FILES if (folder / file).is_file())]
    files = {file: (file, (folder / file).read_bytes()) for file in present}
    record: dict[str, Any] = call("POST", "/v1/adapters", data=fields, files=files, params={"dry_run": dry_run})
    return record


def download(adapter: str, folder: Path) -> None:
    """Write the files of `name` or `name@version` into `folder`, all of one version."""
    name, _, version = adapter.partition("@")
    version = version or call("GET", path_of(name))["version"]
    params = {"version": version} if version else None  # an adapter that is still being fetched has no version
    for file in (*FILES, *TOKENIZER_FILES):
        with (
            connect() as client,
            client.stream("GET", path_of(name, "files", file), params=params) as response,
        ):
            if file in TOKENIZER_FILES and response.status_code == 404:
                continue  # optional file that this adapter does not have
            if response.is_error:
                response.read()
            check_response(response)
            with (folder / file).open("wb") as target:
                target.writelines(response.iter_bytes())
