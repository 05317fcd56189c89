"""`loraplex convert` and `loraplex merge-adapters`: create PEFT folders from other adapters, on the client."""

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
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except (FolderError, OSError) as error:
        fail(str(error), code=2)


def convert(
    source: Annotated[Path, typer.Argument(help="loralib state dict, or PEFT folder with --initial")],
    folder: Annotated[Path, typer.Argument(help="PEFT folder to write")],
    alpha: Annotated[
        float | None, typer.Option(help="loralib: the lora_alpha of training, which the file does not contain")
    ] = None,
    enable_lora: Annotated[
        list[str] | None, typer.Option(help="loralib: the enable_lora of a MergedLinear, as in c_attn=true,false,true")
    ] = None,
    embedding: Annotated[list[str] | None, typer.Option(help="loralib: name of a module that is an Embedding")] = None,
    rename: Annotated[
        list[str] | None, typer.Option(help="loralib: OLD=NEW replaces a prefix of module names; OLD may be empty")
    ] = None,
    initial: Annotated[
        Path | None, typer.Option(help="PiSSA, OLoRA, CorDA, LoRA-GA: folder of the adapter before training")
    ] = None,
) -> None:
    """Convert a loralib checkpoint, or an adapter trained beside a residual base, to a plain PEFT folder."""
    with _one_line_errors(), writing(folder) as fresh:
        from adapters.convert import loralib, residual_base
        from adapters.convert import peft_folder as plain_lora

        if initial is not None:
            if alpha is not None or enable_lora or embedding or rename:
                raise FolderError("--initial cannot be combined with the loralib options")
            plain_lora.save(fresh, *residual_base.convert(source, initial))
            return
        if alpha is None or not 0 < alpha < math.inf:
            raise FolderError("give a positive --alpha for a loralib checkpoint, or --initial for another adapter")
        enabled = {module: _mask(mask) for module, mask in _pairs(enable_lora, "--enable-lora").items()}
        layers = loralib.Layers(enabled, embedding or (), _pairs(rename, "--rename"))
        plain_lora.save(fresh, *loralib.convert(loralib.read_checkpoint(source), alpha, layers))


def _pairs(options: list[str] | None, flag: str) -> dict[str, str]:
    pairs = {}
    for option in options or ():
        key, equals, value = option.partition("=")
        if not equals or key in pairs:
            raise FolderError(f"{flag} {option} must have the form name=value, with each name once")
        pairs[key] = value
    return pairs


def _mask(text: str) -> tuple[bool, ...]:
    words = text.lower().split(",")
    if "true" not in words or not set(words) <= {"true", "false"}:
        raise FolderError(f"--enable-lora …={text} must be true and false separated by commas, with at least one true")
    return tuple(word == "true" for word in words)


def merge_adapters(
    name: Annotated[str, typer.Argument(help="Name of the new adapter")],
    parts: Annotated[
        list[str], typer.Argument(help="part=weight …; a part is a folder, or an adapter's name or name@version")
    ],
    method: Annotated[str, typer.Option(help="PEFT's method: linear, cat, svd, ties, dare_linear, …")] = "cat",
    density: Annotated[float | None, typer.Option(help="ties, dare, magnitude_prune: share of values to keep")] = None,
    rank: Annotated[
        int | None, typer.Option(help="svd: rank of the result (default: the largest of the parts)")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=(1 << 63) - 1, help="dare: random seed")] = 0,
    replace: Annotated[bool, typer.Option(help="Point an existing name at the new version")] = False,
    output: Annotated[Path | None, typer.Option(help="Write this folder instead of uploading the adapter")] = None,
) -> None:
    """Combine several adapters into one and upload it."""
    with _one_line_errors(), tempfile.TemporaryDirectory() as temporary:
        made = output or Path(temporary) / "merged"
        with writing(made) as fresh:
            _combine(fresh, [_part(text) for text in parts], method, density, rank, seed)
        if output is None:
            typer.echo(upload(name, made, replace=replace)["version"])


def _part(text: str) -> tuple[str, float]:
    part, _, weight = text.rpartition("=")
    try:
        factor = float(weight)
    except ValueError:
        factor = math.nan
    if not part or not math.isfinite(factor):
        raise FolderError(f"{text} must have the form part=weight")
    return part, factor


def _combine(
    folder: Path, parts: list[tuple[str, float]], method: str, density: float | None, rank: int | None, seed: int
) -> None:
    from adapters.convert import add_weighted
    from adapters.convert import peft_folder as plain_lora

    known = next((known for known in add_weighted.METHODS if known == method), None)
    if known is None:
        raise FolderError(f"unknown method {method!r}; choose one of {', '.join(add_weighted.METHODS)}")
    recipe = add_weighted.Recipe(known, density, rank, seed)
    factors = [plain_lora.read(found) for found in _folders([part for part, _ in parts])]
    plain_lora.save(folder, *add_weighted.combine(factors, [weight for _, weight in parts], recipe))


def _folders(parts: list[str]) -> Iterator[Path]:
    """Yield each part's folder, which exists until the next one is requested."""
    for part in parts:
        if Path(part).is_dir() or part.startswith(("/", "./", "../", "~")):  # an adapter's name may have a slash
            yield Path(part)
        else:
            with tempfile.TemporaryDirectory() as temporary:
                download(part, Path(temporary))
                yield Path(temporary)
