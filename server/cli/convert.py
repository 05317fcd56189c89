"""`loraplex convert` and `loraplex merge-adapters`: new PEFT folders out of others, made on the client's side."""

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from adapters.convert.folders import FolderError, writing
from server.cli.http_client import download, fail, upload


@contextmanager
def _told_in_one_line() -> Iterator[None]:
    try:
        yield
    except (FolderError, OSError) as error:
        fail(str(error), code=2)


def convert(
    source: Annotated[Path, typer.Argument(help="loralib's state dict, or with --initial a PEFT folder")],
    folder: Annotated[Path, typer.Argument(help="The PEFT folder to write")],
    alpha: Annotated[
        float | None, typer.Option(help="loralib: the lora_alpha of training, which the file does not have")
    ] = None,
    enable_lora: Annotated[
        list[str] | None, typer.Option(help="loralib: a MergedLinear's parts, as in c_attn=true,false,true")
    ] = None,
    embedding: Annotated[list[str] | None, typer.Option(help="loralib: a module that is an Embedding")] = None,
    rename: Annotated[
        list[str] | None, typer.Option(help="loralib: OLD=NEW for the beginning of module names; OLD may be empty")
    ] = None,
    initial: Annotated[
        Path | None, typer.Option(help="PiSSA, OLoRA, CorDA, LoRA-GA: the adapter's folder from before training")
    ] = None,
) -> None:
    """Make a plain PEFT folder of a loralib checkpoint, or of an adapter that was trained beside a changed base."""
    with _told_in_one_line(), writing(folder) as fresh:
        from adapters.convert import loralib
        from adapters.convert import peft_folder as plain_lora
        from adapters.convert import residual_base as mutated_base

        if initial is not None:
            if alpha is not None or enable_lora or embedding or rename:
                raise FolderError("--initial goes with none of the options of loralib")
            plain_lora.save(fresh, *mutated_base.convert(source, initial))
            return
        if alpha is None or not 0 < alpha < math.inf:
            raise FolderError("give --alpha for a loralib checkpoint, or --initial for an adapter to be made plain")
        enabled = {module: _mask(mask) for module, mask in _pairs(enable_lora, "--enable-lora").items()}
        layers = loralib.Layers(enabled, embedding or (), _pairs(rename, "--rename"))
        plain_lora.save(fresh, *loralib.convert(loralib.read_checkpoint(source), alpha, layers))


def _pairs(options: list[str] | None, flag: str) -> dict[str, str]:
    pairs = {}
    for option in options or ():
        key, equals, value = option.partition("=")
        if not equals or key in pairs:
            raise FolderError(f"{flag} {option}: expected name=value, each name once")
        pairs[key] = value
    return pairs


def _mask(text: str) -> tuple[bool, ...]:
    words = text.lower().split(",")
    if "true" not in words or not set(words) <= {"true", "false"}:
        raise FolderError(f"--enable-lora …={text}: expected true and false between commas, and a true")
    return tuple(word == "true" for word in words)


def merge_adapters(
    name: Annotated[str, typer.Argument(help="The new adapter's name")],
    parts: Annotated[
        list[str], typer.Argument(help="part=weight …; a part is a folder, or the name or name@version of an adapter")
    ],
    method: Annotated[str, typer.Option(help="linear, cat, svd, ties, dare_linear, … as PEFT names them")] = "cat",
    density: Annotated[float | None, typer.Option(help="ties, dare, magnitude_prune: the share of values kept")] = None,
    rank: Annotated[int | None, typer.Option(help="svd: the result's rank (default: the largest of the parts)")] = None,
    seed: Annotated[int, typer.Option(min=0, max=(1 << 63) - 1, help="dare: of its random choice")] = 0,
    replace: Annotated[bool, typer.Option(help="Point an existing name at the new version")] = False,
    output: Annotated[Path | None, typer.Option(help="Only write a folder here, and upload nothing")] = None,
) -> None:
    """Make one adapter of several and upload it."""
    with _told_in_one_line(), tempfile.TemporaryDirectory() as temporary:
        made = output or Path(temporary) / "merged"
        with writing(made) as fresh:
            _merge(fresh, [_part(text) for text in parts], method, density, rank, seed)
        if output is None:
            typer.echo(upload(name, made, replace=replace)["version"])


def _part(text: str) -> tuple[str, float]:
    part, _, weight = text.rpartition("=")
    try:
        factor = float(weight)
    except ValueError:
        factor = math.nan
    if not part or not math.isfinite(factor):
        raise FolderError(f"{text}: expected part=weight")
    return part, factor


def _merge(
    folder: Path, parts: list[tuple[str, float]], method: str, density: float | None, rank: int | None, seed: int
) -> None:
    from adapters.convert import add_weighted as combination
    from adapters.convert import peft_folder as plain_lora

    known = next((known for known in combination.METHODS if known == method), None)
    if known is None:
        raise FolderError(f"no method {method!r}; there are {', '.join(combination.METHODS)}")
    recipe = combination.Recipe(known, density, rank, seed)
    factors = [plain_lora.read(found) for found in _folders([part for part, _ in parts])]
    plain_lora.save(folder, *combination.combine(factors, [weight for _, weight in parts], recipe))


def _folders(parts: list[str]) -> Iterator[Path]:
    """Each part's folder, for as long as the next one is not asked for."""
    for part in parts:
        if "/" in part or Path(part).is_dir():
            yield Path(part)
        else:
            with tempfile.TemporaryDirectory() as temporary:
                download(part, Path(temporary))
                yield Path(temporary)
