"""`loraplex convert` and `loraplex merge-adapters`: create PEFT folders from other adapters, on the client."""

import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from adapters.convert.folders import FolderError, writing
from adapters.peft.files import FILES
from server.cli.http_client import download, fail, upload


@contextmanager
def _one_line_errors() -> Iterator[None]:
    try:
        yield
    except (FolderError, OSError) as error:
        fail(str(error), code=2)


def convert(
    source: Annotated[
        Path, typer.Argument(help="PEFT or MLX folder, GGUF file, or state dict of loralib; recognised by its content")
    ],
    folder: Annotated[Path, typer.Argument(help="PEFT folder to write")],
    base: Annotated[
        str, typer.Option(help="Base model, a folder or hub id: for GGUF, and for PiSSA and OLoRA without --initial")
    ] = "",
    initial: Annotated[
        Path | None, typer.Option(help="PiSSA, OLoRA, CorDA, LoRA-GA: folder of the adapter before training")
    ] = None,
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
) -> None:
    """Convert an adapter to a plain PEFT folder: of MLX, GGUF or loralib, in a pickle (adapter_model.bin), or trained
    beside a residual base."""
    with _one_line_errors(), writing(folder) as fresh:
        from adapters.convert import formats, loralib, mlx
        from adapters.convert import peft_folder as plain_lora

        kind, place = formats.format_of(source)
        of_loralib = {"--alpha": alpha, "--enable-lora": enable_lora, "--embedding": embedding, "--rename": rename}
        _check_options(kind, {"--base": base, "--initial": initial}, of_loralib)
        if kind == "loralib":
            if alpha is None or not 0 < alpha < math.inf:
                raise FolderError("give a positive --alpha for a loralib checkpoint")
            enabled = {module: _mask(mask) for module, mask in _pairs(enable_lora, "--enable-lora").items()}
            layers = loralib.Layers(enabled, embedding or (), _pairs(rename, "--rename"))
            plain_lora.save(fresh, *loralib.convert(loralib.read_checkpoint(place), alpha, layers))
        elif kind == "mlx":
            plain_lora.save(fresh, *mlx.convert(place))
        elif kind == "gguf":
            _convert_gguf(place, fresh, base)
        else:
            _convert_peft(place, fresh, base, initial)


def _check_options(kind: str, peft: Mapping[str, object], loralib: Mapping[str, object]) -> None:
    """Raise `FolderError` for an option of another format."""
    name, foreign = {
        "loralib": ("a state dict of loralib", peft),
        "mlx": ("an MLX folder", {**peft, **loralib}),
        "gguf": ("a GGUF file", {**loralib, "--initial": peft["--initial"]}),
        "peft": ("a PEFT folder", loralib),
    }[kind]
    if given := next((flag for flag, value in foreign.items() if value not in (None, "", [])), None):
        raise FolderError(f"{given} is no option for {name}, which this source is")


def _convert_gguf(file: Path, fresh: Path, base: str) -> None:
    from adapters.convert import gguf_lora
    from adapters.convert import peft_folder as plain_lora

    if not base:
        raise FolderError("a GGUF file has llama.cpp's names of tensors: give the base model with --base")
    from server.model.loading.loader import described_without_weights

    with _model_errors():
        loaded = described_without_weights(base)
    heads = loaded.config.num_attention_heads
    kv_heads = getattr(loaded.config, "num_key_value_heads", None) or heads
    linears = gguf_lora.BaseLinears(loaded.linears, loaded.config.num_hidden_layers, heads, kv_heads)
    plain_lora.save(fresh, *gguf_lora.convert(file, linears))


def _convert_peft(folder: Path, fresh: Path, base: str, initial: Path | None) -> None:
    from adapters.convert import formats, residual_base
    from adapters.convert import peft_folder as plain_lora

    with formats.with_safetensors(folder) as trained:
        if initial is not None:
            with formats.with_safetensors(initial) as start:
                plain_lora.save(fresh, *residual_base.convert(trained, start))
        elif residual_base.begins_beside_residual(trained):
            plain_lora.save(fresh, *residual_base.convert_with_base(trained, _base_model(trained, base)))
        elif not formats.is_pickle(folder):
            raise FolderError(f"{folder} is PEFT's own format and needs no conversion")
        else:
            for name in FILES:
                shutil.copyfile(trained / name, fresh / name)
    formats.copy_tokenizer(folder, fresh)


def _base_model(trained: Path, base: str) -> Any:
    from adapters.convert.residual_base import check_convertible

    check_convertible(trained)
    if not base:
        raise FolderError(
            "the adapter was trained beside a changed base: give the base model with --base, or --initial"
        )
    from server.model.loading.loader import load_model

    with _model_errors():
        return load_model(base, "auto", "none", "cpu", 0).model


@contextmanager
def _model_errors() -> Iterator[None]:
    from server.model.loading.loader import ModelRefused

    try:
        yield
    except ModelRefused as error:
        raise FolderError(f"--base: {error}") from None


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
