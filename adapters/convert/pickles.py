"""Files of `torch.save`, read as weights alone in a process of their own, whose memory and time are bounded."""

import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters.convert.folders import FolderError

SECONDS = 600
_SPARE_BYTES = 2 << 30  # beside four times the file: what it unpacks to, its copy, and what torch needs
_NESTED = ("model_state_dict", "state_dict")  # keys under which training scripts put the weights


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a state dict. Raises `FolderError`."""
    with tempfile.TemporaryDirectory() as temporary:
        target = Path(temporary) / "weights.safetensors"
        # -P: without the working folder, whose files would be imported before torch's own.
        command = [sys.executable, "-P", "-m", "adapters.convert.pickles", str(path.absolute()), str(target)]
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            raise FolderError(f"{path} was not read within {SECONDS} seconds") from None
        if ended.returncode or not target.is_file():
            said = ended.stderr.strip().rpartition("\n")[2]
            raise FolderError(f"{path} {said or f'was not read: the process ended with {ended.returncode}'}")
        tensors: dict[str, Tensor] = load_file(target)
        return tensors


def _main(source: Path, target: Path) -> None:
    """Write the tensors of the file at `source` to `target`. Exits with the reason if it has anything else."""
    limit = 4 * source.stat().st_size + _SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        found = torch.load(source, map_location="cpu", weights_only=True)
        if isinstance(found, dict):
            found = next((found[key] for key in _NESTED if isinstance(found.get(key), dict)), found)
        if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
            sys.exit("is no state dict")
        save_file({str(name): tensor.detach().clone().contiguous() for name, tensor in found.items()}, target)
    except Exception as error:  # the errors of `torch.load` on malformed bytes have no common base class
        sys.exit(f"cannot be read as tensors alone ({type(error).__name__})")


if __name__ == "__main__":
    _main(*map(Path, sys.argv[1:]))
