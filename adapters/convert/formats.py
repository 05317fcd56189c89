"""The formats that `loraplex convert` reads, recognised by names and first bytes."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from safetensors.torch import save_file

from adapters.convert.folders import FolderError
from adapters.convert.pickles import read_pickle
from adapters.peft.files import CONFIG_FILE, TOKENIZER_FILES, WEIGHTS_FILE
from adapters.peft.foreign_files import MLX_FILE, PICKLE_FILE, foreign_weights

Format = Literal["peft", "mlx", "gguf", "loralib"]


def format_of(source: Path) -> tuple[Format, Path]:
    """Return the format of a source and the folder or file to read: the folder for a file of an adapter's folder.
    Raises `FolderError`."""
    if source.name in (WEIGHTS_FILE, PICKLE_FILE, MLX_FILE) and (source.parent / CONFIG_FILE).is_file():
        source = source.parent
    if not source.is_dir():
        return ("gguf" if _is_gguf(source) else "loralib"), source
    names = [path.name for path in source.iterdir()]
    other = foreign_weights(names)
    if other is None:
        return "peft", source
    if other[0] in (PICKLE_FILE, MLX_FILE):
        return ("peft" if other[0] == PICKLE_FILE else "mlx"), source
    return "gguf", source / other[0]


def _is_gguf(file: Path) -> bool:
    if not file.is_file():
        raise FolderError(f"{file} is no file")
    with file.open("rb") as opened:
        return opened.read(4) == b"GGUF"


def is_pickle(folder: Path) -> bool:
    """Return whether the weights in a PEFT folder are a pickle alone."""
    return (folder / PICKLE_FILE).is_file() and not (folder / WEIGHTS_FILE).exists()


@contextmanager
def with_safetensors(folder: Path) -> Iterator[Path]:
    """Yield a PEFT folder with weights in safetensors: `folder` itself, or a temporary one where they are a pickle."""
    if not is_pickle(folder):
        yield folder
        return
    tensors = read_pickle(folder / PICKLE_FILE)
    if not (folder / CONFIG_FILE).is_file():
        raise FolderError(f"{folder} has no {CONFIG_FILE}")
    with tempfile.TemporaryDirectory() as temporary:
        shutil.copyfile(folder / CONFIG_FILE, Path(temporary) / CONFIG_FILE)
        save_file(tensors, Path(temporary) / WEIGHTS_FILE, metadata={"format": "pt"})
        yield Path(temporary)


def copy_tokenizer(folder: Path, into: Path) -> None:
    """Copy the tokenizer that an adapter brings, which belongs to what it computes."""
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, into / name)
