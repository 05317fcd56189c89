"""A server that can write to its data folder only, as in a container with a read-only root."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import httpx
import pytest
import zmq
from transformers import AutoModelForCausalLM

from adapters.device.forms import NONE, described_choice
from server.config import ConfigError, ServeConfig
from server.ipc.sockets import address
from server.launch import complete
from server.model.loading.default_model import DEFAULT_MODEL
from server.writable import use_writable_folders
from tests.fixtures.adapter_factory import write_adapter
from tests.fixtures.timing import HANG_SECONDS
from tests.fixtures.tiny_server import RunningServer, running_server, write_tiny_model

READ_ONLY_ROOT = """
set -e
mount -o remount,bind,ro /
for folder in /tmp /var/tmp "$HOME"; do
    mount --rbind "$folder" "$folder"
    mount -o remount,bind,ro "$folder"
done
mount --rbind "$0" "$0"
mount -o remount,bind,rw "$0"
mount -t tmpfs -o size=64k tmpfs /dev/shm
exec "$@"
"""


@pytest.fixture
def homeless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home that cannot be written, even by root: a file is in its place."""
    home = tmp_path / "home"
    home.write_text("")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "HF_", "TRITON_"))}
    monkeypatch.setattr(os, "environ", {**kept, "HOME": str(home)})
    monkeypatch.setattr(tempfile, "tempdir", None)
    return home


def without_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [os.environ.get("TMPDIR", "/dev/null")])


def test_on_a_usual_machine_nothing_moves(tmp_path: Path, homeless: Path) -> None:
    homeless.unlink()
    before = dict(os.environ)
    use_writable_folders(tmp_path / "data")
    assert dict(os.environ) == before and not (tmp_path / "data").exists() and not homeless.exists()


def test_caches_move_when_the_home_cannot_be_written(tmp_path: Path, homeless: Path) -> None:
    usual, data = tempfile.gettempdir(), tmp_path / "data"
    use_writable_folders(data)
    assert os.environ["XDG_CACHE_HOME"] == str(data / "cache") and (data / "cache").is_dir()
    assert os.environ["TRITON_CACHE_DIR"] == str(data / "cache" / "triton")
    assert "HF_HOME" not in os.environ  # which huggingface_hub then finds under XDG_CACHE_HOME
    assert tempfile.gettempdir() == usual


def test_a_cache_that_an_operator_has_set_stays(tmp_path: Path, homeless: Path) -> None:
    chosen = {"XDG_CACHE_HOME": str(tmp_path / "own"), "TRITON_HOME": str(tmp_path / "own")}
    os.environ.update(chosen)
    use_writable_folders(tmp_path / "data")
    assert chosen.items() <= os.environ.items() and "TRITON_CACHE_DIR" not in os.environ


@pytest.mark.reliability("T66")
@pytest.mark.usefixtures("homeless")
def test_temporary_files_move_when_there_is_no_place_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_temporary_folder(monkeypatch)
    use_writable_folders(tmp_path / "data")
    assert tempfile.gettempdir() == os.environ["TMPDIR"] == str(tmp_path / "data" / "tmp")
    assert oct((tmp_path / "data" / "tmp").stat().st_mode)[-3:] == "700"


@pytest.mark.usefixtures("homeless")
def test_the_current_folder_is_no_place_for_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [os.environ.get("TMPDIR", os.getcwd())])
    monkeypatch.chdir(tmp_path)
    use_writable_folders(tmp_path / "data")
    assert tempfile.gettempdir() == str(tmp_path / "data" / "tmp")


@pytest.mark.usefixtures("homeless")
def test_a_data_folder_that_cannot_be_written_either_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("")
    with pytest.raises(ConfigError, match="--data-dir"):
        use_writable_folders(tmp_path / "data")


def test_models_in_a_read_only_image_are_used_where_they_are(
    tmp_path: Path, homeless: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    homeless.unlink()
    prepared = homeless / ".cache" / "loraplex" / "models" / DEFAULT_MODEL
    hub = homeless / ".cache" / "huggingface" / "hub"
    prepared.mkdir(parents=True)
    hub.mkdir(parents=True)
    monkeypatch.setattr("server.writable._is_writable", lambda _: False)
    config = complete(ServeConfig(data_dir=tmp_path / "data"))
    assert config.model == str(prepared)
    assert os.environ["HF_HOME"] == str(hub.parent)
    assert os.environ["XDG_CACHE_HOME"] == str(tmp_path / "data" / "cache")


@pytest.mark.usefixtures("homeless")
def test_a_user_without_a_home_is_served_from_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may run with a user id that its image does not know."""
    monkeypatch.delitem(os.environ, "HOME")
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 2)
    config = complete(ServeConfig(model="some-model", data_dir=tmp_path / "data"))
    assert config.data_dir == tmp_path / "data"
    assert os.environ["XDG_CACHE_HOME"] == str(tmp_path / "data" / "cache")


def test_sockets_work_in_a_folder_of_any_length(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30) / "loraplex-abc"
    folder.mkdir(parents=True)
    with zmq.Context() as context, context.socket(zmq.PULL) as inbox, context.socket(zmq.PUSH) as outbox:
        inbox.bind(address(folder, "from-engine"))
        outbox.connect(address(folder, "from-engine"))
        outbox.send(b"hello")
        assert inbox.poll(HANG_SECONDS * 1000) and inbox.recv() == b"hello"
        assert (folder / "from-engine").is_socket()


def read_only_root(data_dir: Path) -> list[str]:
    """The command in front of one that may write to `data_dir` alone; skips where namespaces are not permitted."""
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    command = [*unshare, "sh", "-c", READ_ONLY_ROOT, str(data_dir)]
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare")
    tried = subprocess.run([*command, "true"], capture_output=True, text=True)
    if tried.returncode != 0:
        pytest.skip(f"a root cannot be made read-only here: {tried.stderr.strip()}")
    return command


def written_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def shared_memory(pid: int) -> list[str]:
    """The files that a process has open or mapped in /dev/shm, besides a semaphore of four kilobytes: tqdm, which draws
    progress bars, makes one where it can."""
    opened = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if os.path.lexists(link)]
    found = [place for place in (*opened, *Path(f"/proc/{pid}/maps").read_text().splitlines()) if "/dev/shm/" in place]
    return [place for place in found if "/dev/shm/sem." not in place]


@pytest.mark.reliability("T66", "T72")
@pytest.mark.slow
def test_a_server_writes_to_its_data_folder_alone_and_needs_no_shared_memory(tmp_path: Path) -> None:
    data = tmp_path / ("data" * 25)  # its sockets' paths are longer than a socket's address may be
    data.mkdir()
    within = read_only_root(data)
    model = write_tiny_model(tmp_path / "model")
    write_adapter(AutoModelForCausalLM.from_pretrained(model), tmp_path / "adapter", scale=0.3)
    flags = ("--model", str(model), "--served-model-name", "tiny-base", "--kv-cache-bytes", str(32 << 20))
    with running_server(data, *flags, environment=usual_environment(), within=within) as server:
        check_isolation(server, tmp_path)
        check_serving(server, tmp_path / "adapter")
    written = written_below(data)
    assert {"cache", "tmp"} <= written
    assert not any(path.startswith("tmp/") for path in written)  # all of it has gone with the server
    if not described_choice().startswith(NONE):
        assert any(path.startswith("cache/") and path.endswith(".so") for path in written)


def usual_environment() -> dict[str, str]:
    """No variable of the tests' own that says where to write."""
    return dict.fromkeys(("XDG_CACHE_HOME", "TMPDIR", "TRITON_CACHE_DIR", "TRITON_HOME"), "")


def check_isolation(server: RunningServer, elsewhere: Path) -> None:
    root = Path(f"/proc/{server.process.pid}/root")
    for folder in (Path("/tmp"), Path.home(), Path.cwd(), elsewhere):
        with pytest.raises(OSError, match="Read-only file system"):
            (root / folder.relative_to("/") / "written").touch()


def check_serving(server: RunningServer, adapter: Path) -> None:
    with server.client() as client:
        base = text_of(server, client, "tiny-base")
        server.upload(client, "acme", adapter).raise_for_status()
        assert text_of(server, client, "acme") != base
    pids = (server.process.pid, server.engine_pid())
    assert [shared_memory(pid) for pid in pids] == [[], []]
    assert os.listdir(f"/proc/{pids[1]}/root/dev/shm") == []


def text_of(server: RunningServer, client: httpx.Client, model: str) -> str:
    return str(server.complete(client, model, "hello")["choices"][0]["text"])
