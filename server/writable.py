"""Folders for temporary files and caches. Where the usual folders are read-only, as in a container with a read-only
root, folders in the data folder replace them."""

import logging
import os
import tempfile
from pathlib import Path

from server.config import ConfigError

log = logging.getLogger(__name__)


def use_writable_folders(data_dir: Path) -> None:
    """Move temporary files and caches to `data_dir` where their usual folders are read-only, for this process and its
    children. Call it before importing libraries, which read the variables on import. Raises `ConfigError` if `data_dir`
    is read-only as well."""
    moved = {**_moved_temporary_files(data_dir / "tmp"), **_moved_caches(data_dir / "cache")}
    if not moved:
        return
    for folder in moved.values():
        _make(folder, data_dir)
    _keep_hub_models(moved)
    os.environ.update({name: str(folder) for name, folder in moved.items()})
    tempfile.tempdir = None  # makes Python choose again
    log.info("the usual folders are read-only: %s", ", ".join(f"{name} is now {moved[name]}" for name in moved))


def _moved_temporary_files(folder: Path) -> dict[str, Path]:
    try:
        found = tempfile.gettempdir()
        has_one = (
            found == os.environ.get("TMPDIR") or found != os.getcwd()
        )  # the working directory is Python's last resort
    except FileNotFoundError:
        has_one = False
    return {} if has_one else {"TMPDIR": folder}


def _moved_caches(folder: Path) -> dict[str, Path]:
    moved = {}
    if not _is_writable(_usual_cache() / "loraplex"):
        moved["XDG_CACHE_HOME"] = folder
    if "TRITON_HOME" not in os.environ and not _is_writable(_usual("TRITON_CACHE_DIR", "~/.triton/cache")):
        moved["TRITON_CACHE_DIR"] = folder / "triton"
    return moved


def _keep_hub_models(moved: dict[str, Path]) -> None:
    """Keep reading hub models from the usual cache, because a container image may contain them."""
    hub = _usual_cache() / "huggingface"
    if "XDG_CACHE_HOME" in moved and os.path.isdir(hub / "hub"):
        os.environ.setdefault("HF_HOME", str(hub))


def _usual_cache() -> Path:
    return _usual("XDG_CACHE_HOME", "~/.cache")


def _usual(variable: str, place: str) -> Path:
    return Path(os.environ.get(variable) or os.path.expanduser(place))


def _is_writable(folder: Path) -> bool:
    """Return whether `folder` can be written or created. For a user without a home, "~" is not expanded."""
    nearest = next((path for path in (folder, *folder.parents) if os.path.exists(path)), folder)
    return folder.is_absolute() and os.access(nearest, os.W_OK | os.X_OK)


def _make(folder: Path, data_dir: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"--data-dir {data_dir} is not writable ({error}), and neither are the usual temporary folders; "
            "give a writable --data-dir"
        ) from error
