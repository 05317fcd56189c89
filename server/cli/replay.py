"""`loraplex replay`: computes the output of a receipt again on a running server, and compares it."""

import json
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import typer

from server.cli.http_client import call, fail
from server.receipt_format import FORMAT, digest_of

_NOT_IN_REQUESTS = {"processed_logprobs", "pooling", "constraint", "prompt_logprobs"}
Outputs = list[dict[str, Any]]


def replay(
    receipt: Annotated[Path, typer.Argument(help="File with a receipt, or with a response that has one", exists=True)],
) -> None:
    """Compute the output of a receipt again on a running server: exit 0 if every token is equal, else 1."""
    given = _read(receipt)
    again = call("POST", "/v1/completions", json=request_of(given, _base_model()))["receipt"]
    for what in ("base", "numerics"):
        if given[what] != again[what]:
            typer.echo(f"the server has another {what}: {again[what]}, and not {given[what]}", err=True)
    found = difference(given["outputs"], again["outputs"])
    if found is not None:
        fail(found)
    tokens = sum(len(output["token_ids"]) for output in given["outputs"])
    numbers = sum(len(output["logprobs"]) for output in given["outputs"])
    typer.echo(f"equal: {tokens} tokens" + (f" and {numbers} log-probabilities, to the bit" if numbers else ""))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        given: dict[str, Any] = content.get("receipt", content)
        stated, own = given["digest"], digest_of(given)
    except (ValueError, KeyError, AttributeError, TypeError):
        fail(f'{path} has no receipt; ask for one with "receipt": true')
    if given["format"] != FORMAT:
        fail(f"the receipt has format {given['format']}; this version of loraplex reads format {FORMAT}")
    if stated != own:
        fail(f"the receipt was changed: its digest is {own} and not {stated}")
    if any(len(output["versions"]) > 1 for output in given["outputs"]):
        fail("the output was computed by two versions, because it was switched when one was published")
    return given


def _base_model() -> str:
    return str(next(model["id"] for model in call("GET", "/v1/models")["data"] if model["parent"] is None))


def request_of(receipt: dict[str, Any], base_model: str) -> dict[str, Any]:
    """Return the completion request that computes the receipt's output, with its versions by name and digest."""
    sampling = {name: value for name, value in receipt["sampling"].items() if name not in _NOT_IN_REQUESTS}
    if receipt["sampling"].get("processed_logprobs"):
        sampling["logprobs_mode"] = "processed_logprobs"
    adapters = [
        {"name": f"{used['name']}@{used['version'].removeprefix('sha256:')[:12]}", "scale": used["scale"]}
        for used in receipt["adapters"]
    ]
    request = {"model": base_model, "prompt": receipt["prompts"], "n": receipt["n"], "stop": receipt["stop"]}
    return {**request, **sampling, "adapters": adapters or None, "receipt": True}


def difference(given: Outputs, again: Outputs) -> str | None:
    """Return where the outputs first differ, or None."""
    nothing: dict[str, Any] = {}
    for choice, (one, other) in enumerate(zip_longest(given, again, fillvalue=nothing)):
        for what, label in (("token_ids", "token"), ("logprobs", "log-probability")):
            pairs = enumerate(zip_longest(one.get(what, []), other.get(what, [])))
            for place, (old, new) in pairs:
                if old != new:
                    return f"choice {choice} differs at {label} {place}: {old} in the receipt, {new} now"
        if one.get("finish_reason") != other.get("finish_reason"):
            return f"choice {choice} ended by {one.get('finish_reason')!r}, and by {other.get('finish_reason')!r} now"
    return None
