"""The data folder is private, usable and this server's alone, or the start is refused in one sentence."""

import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from server import data_folder
from server.config import ConfigError, StartFailed
from server.ipc.socket_folder import SocketFolder


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_folder_and_what_is_written_later_are_private(tmp_path: Path) -> None:
    open_folder = tmp_path / "open"
    open_folder.mkdir(mode=0o755)
    for folder in (tmp_path / "a" / "new", open_folder):
        data_folder.prepare(folder)
        (folder / "file").write_text("x")
        (folder / "below").mkdir()
        assert [mode(path) for path in (folder, folder / "file", folder / "below")] == [0o700, 0o600, 0o700]


@pytest.mark.reliability("T11")
def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ConfigError, match=str(file)):
        data_folder.prepare(file / "below")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    if os.geteuid() == 0:
        os.chown(theirs, 4711, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 4711)
    with pytest.raises(ConfigError, match="belongs to the user"):
        data_folder.prepare(theirs)


@pytest.mark.reliability("T14")
def test_a_second_server_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    """By a process that has the folder open, and that the message names."""
    hold = "from adapters.registry.folder_lock import lock; import sys; lock(sys.argv[1]); print('held', flush=True)"
    holder = subprocess.Popen(
        [sys.executable, "-c", f"{hold}; input()", str(tmp_path / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None and holder.stdin is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(StartFailed, match=str(holder.pid)):
        data_folder.prepare(tmp_path)
    script = "import sys; import server.launch; assert 'torch' not in sys.modules and 'zmq' in sys.modules"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
    holder.communicate("")
    data_folder.prepare(tmp_path)


def test_folders_of_killed_servers_are_swept_and_those_of_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    script = "from server.ipc.socket_folder import SocketFolder; import os; SocketFolder(); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", script], env={**os.environ, "TMPDIR": str(tmp_path)})
    (left,) = tmp_path.iterdir()
    (tmp_path / "loraplex-models").mkdir()
    (tmp_path / "loraplex-models" / "mine.txt").write_text("kept")
    (tmp_path / "other").mkdir()
    old = tmp_path / "loraplex-old"
    old.mkdir()
    os.utime(old, (time.time() - 3600,) * 2)
    os.utime(tmp_path / "loraplex-models", (time.time() - 3600,) * 2)
    first, second = SocketFolder(), SocketFolder()
    assert not left.exists() and not old.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"loraplex-models", "other", first.path.name, second.path.name}
    first.remove()
    second.remove()
    assert {path.name for path in tmp_path.iterdir()} == {"loraplex-models", "other"}
