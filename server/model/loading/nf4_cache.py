"""Quantized weights on disk, so that a start with NF4 reads them instead of quantizing again.

`<cache>/loraplex/nf4/<key>` is a checkpoint that transformers wrote, and a checksum of its configs and of the tensors
in memory. The key is a digest of all that decides them: the model's files, the dtype, the kind of device and the
versions of the libraries. A checkpoint that is damaged, or that loads in another way than it was saved, is removed, and
the weights are quantized again.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import server
from adapters.runtime.dora import quant_state
from server.model.loading.default_model import cache_folder

log = logging.getLogger(__name__)

KEPT = 4  # checkpoints; those that were unused for the longest time are removed
MIN_FREE = 1 << 30  # bytes that stay free on the file system
_SUM = "checksum"
_CONFIGS = ("config.json", "generation_config.json", "model.safetensors.index.json")
_ABANDONED_SECONDS = 3600  # age of a draft whose process has ended


def source_key(folder: Path, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return the key of the model in `folder`; None if it has no weights."""
    weights = sorted(folder.glob("*.safetensors"))
    files = [folder / name for name in _CONFIGS if (folder / name).is_file()] + weights
    libraries = [(name, version(name)) for name in ("bitsandbytes", "torch", "transformers")]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        digests = dict(zip((file.name for file in files), threads.map(_file_digest, files), strict=True))
    described = [digests, str(dtype), device.type, libraries, server.__version__]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest() if weights else None


class NF4Cache:
    """The checkpoints under `root`."""

    def __init__(self, root: Path | None = None) -> None:
        self._root = root or cache_folder().parent / "nf4"

    def load(self, key: str, read: Callable[[Path], nn.Module]) -> nn.Module | None:
        """Return the model of the checkpoint, in memory of its own, or None if there is no good one."""
        folder = self._root / key
        if not folder.is_dir():
            return None
        try:
            expected = (folder / _SUM).read_text()
            model = read(folder)
            _own(model)
            if _checksum(folder, model) == expected:
                os.utime(folder)
                return model
            problem = "they differ from those that were saved"
        except Exception as error:  # whatever a damaged file makes of the libraries
            problem = f"{type(error).__name__}: {error}"
        log.warning("the kept NF4 weights are damaged and made again: %s", problem)
        shutil.rmtree(folder, ignore_errors=True)
        return None

    def store(self, key: str, model: Any) -> None:
        """Write the checkpoint of a model that has just been quantized, if there is room."""
        try:
            self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
            nbytes = sum(tensor.nbytes for _, tensor in _tensors(model))
            if shutil.disk_usage(self._root).free < nbytes + MIN_FREE:
                log.warning("the NF4 weights are not kept for the next start: the disk is nearly full")
                return
            self._write(self._root / key, model)
            self._remove_old()
        except Exception as error:  # the server can do without
            log.warning("the NF4 weights cannot be kept for the next start: %s", error)

    def _write(self, folder: Path, model: Any) -> None:
        draft = Path(tempfile.mkdtemp(prefix=".", dir=self._root))
        try:
            model.save_pretrained(draft)
            (draft / _SUM).write_text(_checksum(draft, model))
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # another process wrote it meanwhile
                draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _remove_old(self) -> None:
        found = sorted(self._root.iterdir(), key=lambda folder: folder.stat().st_mtime, reverse=True)
        drafts = [folder for folder in found if folder.name.startswith(".")]
        old = [folder for folder in found if folder not in drafts][KEPT:]
        abandoned = [draft for draft in drafts if time.time() - draft.stat().st_mtime > _ABANDONED_SECONDS]
        for folder in (*old, *abandoned):
            shutil.rmtree(folder, ignore_errors=True)


def _checksum(folder: Path, model: nn.Module) -> str:
    configs = [(file.name, _file_digest(file)) for file in sorted(folder.glob("*.json"))]
    return hashlib.sha256(json.dumps([configs, tensors_digest(model)]).encode()).hexdigest()


def tensors_digest(model: nn.Module) -> str:
    """Return a digest of all tensors of a model, and of what its 4-bit weights are dequantized by."""
    digest = hashlib.sha256()
    for name, state in _states(model):
        facts = state.shape, state.dtype, state.blocksize, state.quant_type, state.state2.blocksize, state.state2.dtype
        digest.update(f"{name} {facts}".encode())
    for name, tensor in sorted(_tensors(model)):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
    for name, state in _states(model):
        yield from ((f"{name}.{part}", getattr(state, part)) for part in ("absmax", "code", "offset"))
        yield from ((f"{name}.state2.{part}", getattr(state.state2, part)) for part in ("absmax", "code"))


def _states(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        state = quant_state(module) if "weight" in module._parameters else None
        if state is not None:
            yield name, state


def _own(model: nn.Module) -> None:
    """Copy 4-bit weights out of the file, which a single view would keep mapped."""
    for name, state in _states(model):
        weight: Any = model.get_submodule(name).weight
        weight.data = weight.data.clone()
        for holder, parts in ((state, ("absmax", "code", "offset")), (state.state2, ("absmax", "code"))):
            for part in parts:
                setattr(holder, part, getattr(holder, part).clone())


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
